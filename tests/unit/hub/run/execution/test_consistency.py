"""One loss for the same samples, one hash for the same parameters."""

import math

import numpy as np
import pytest
import torch

from dnb.hub.run.execution.consistency import ConsistencyChecks
from dnb.transport.layout import plan_layout


def agreement(*, dtype=torch.float32, precision="float32", num_steps=25):
    layout = plan_layout([("first", torch.zeros(3, dtype=dtype)), ("second", torch.zeros(2, dtype=dtype))])
    return ConsistencyChecks(layout, num_steps=num_steps, precision=precision)


def packed(*digests):
    return np.array(digests, dtype=np.uint32).tobytes()


def test_a_small_model_is_hashed_after_each_10th_step_and_the_last():
    judge = agreement()
    assert [step for step in range(26) if judge.is_digest_due(step)] == [10, 20, 25]


def test_a_large_model_is_hashed_after_each_100th_step():
    layout = plan_layout([("only", torch.empty(1 << 20, device="meta"))])
    judge = ConsistencyChecks(layout, num_steps=250, precision="float32")
    assert [step for step in range(251) if judge.is_digest_due(step)] == [100, 200, 250]


def test_a_copy_with_the_hub_s_hashes_is_fine():
    judge = agreement()
    judge.keep(10, packed(7, 8))
    assert judge.fault_of_copy(1, 10, packed(7, 8)) == ""


def test_what_is_read_from_the_hub_s_memory_is_not_compared():
    judge = agreement()
    judge.keep(10, packed(7, 8))
    assert judge.fault_of_copy(1, 10, packed(0, 0)) == ""


def test_a_copy_that_differs_is_named_by_engine_tensor_and_step():
    judge = agreement()
    judge.keep(10, packed(7, 8))
    told = judge.fault_of_copy(1, 10, packed(7, 9))
    assert told.startswith("engine 1's copy of 'second' is not the hub's after step 10: if forward or step writes it")


def test_copies_that_differ_are_counted():
    judge = agreement()
    judge.keep(10, packed(7, 8))
    assert "copy of 'first' and 1 more is not" in judge.fault_of_copy(1, 10, packed(1, 2))


def test_hashes_of_another_step_say_nothing():
    judge = agreement()
    judge.keep(10, packed(7, 8))
    assert judge.fault_of_copy(1, 20, packed(1, 2)) == ""


def test_engines_that_round_otherwise_agree():
    judge = agreement()
    assert [judge.fault_of_probe(0, 2.3), judge.fault_of_probe(1, 2.3001)] == ["", ""]


def test_engines_with_other_losses_are_both_named():
    judge = agreement()
    judge.fault_of_probe(0, 2.3)
    assert "the loss is 2.3 on engine 0 and 2.301 on engine 3" in judge.fault_of_probe(3, 2.301)


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"dtype": torch.bfloat16}])
def test_half_precision_may_differ_more(options):
    judge = agreement(**options)
    assert [judge.fault_of_probe(0, 2.3), judge.fault_of_probe(1, 2.301)] == ["", ""]


def test_two_losses_that_are_no_number_agree():
    judge = agreement()
    assert [judge.fault_of_probe(0, math.nan), judge.fault_of_probe(1, math.nan)] == ["", ""]


def test_one_loss_that_is_no_number_does_not():
    judge = agreement()
    judge.fault_of_probe(0, 2.3)
    assert "nan on engine 1" in judge.fault_of_probe(1, math.nan)


def test_an_engine_that_differs_from_the_notebook_is_told_with_both_losses():
    layout = plan_layout([("only", torch.zeros(3))])
    judge = ConsistencyChecks(layout, num_steps=10, precision="float32", probe=1.5)
    assert judge.fault_of_probe(0, 1.50001) == ""
    assert "for the same samples the loss is 2.5 on engine 1 and 1.5 in the notebook" in judge.fault_of_probe(1, 2.5)
