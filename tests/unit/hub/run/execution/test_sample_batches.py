"""What a user's sampler yields, raises and promises, as the hub takes it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Sampler

from dnb.errors import ArgumentError
from dnb.hub.guarded_calls import UserCodeError
from dnb.hub.run.execution.sample_batches import Batches
from dnb.planning.sample_order import BatchOrder, count_batches, iterate_batches

NUM_SAMPLES = 256


class Yields(Sampler):
    """Yields what it is given; an exception among it is raised."""

    def __init__(self, items: list[Any], *, length: int | None = None) -> None:
        self.items = items
        self.length = len(items) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            yield item


def order_of(items: list[Any], *, batch_size: int = 2, length: int | None = None) -> BatchOrder:
    return BatchOrder(num_samples=NUM_SAMPLES, batch_size=batch_size, sampler=Yields(items, length=length))


def order_of_batches(items: list[Any], *, length: int | None = None) -> BatchOrder:
    return BatchOrder(num_samples=NUM_SAMPLES, batch_size=1, batch_sampler=Yields(items, length=length))


def batches_of(order: BatchOrder, *, num_steps: int = 100, num_done: int = 0) -> Batches:
    return Batches(
        order,
        num_steps=num_steps,
        num_shards=1,
        num_val_samples=0,
        num_done=num_done,
        steps_per_epoch=count_batches(order),
    )


def samples_of(batches: Batches, step: int) -> list[int]:
    _, raw = batches.samples_of("step", step, (0,))
    return np.frombuffer(raw, dtype=np.int64).tolist()  # type: ignore[no-any-return]


def fault_of(batches: Batches, step: int) -> UserCodeError:
    with pytest.raises(UserCodeError) as caught:
        batches.samples_of("step", step, (0,))
    return caught.value


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("no more of this class"),
        SystemExit(3),
        KeyboardInterrupt(),
        MemoryError(),
        GeneratorExit(),
        BaseException("\ud800"),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_what_a_sampler_raises_is_raised_at_the_step_that_needs_the_batch(raised: BaseException):
    batches = batches_of(order_of([0, 1, 2, 3, 4, raised, 6, 7]))
    for step in (1, 2):
        batches.prepare()
        assert samples_of(batches, step) == [2 * step - 2, 2 * step - 1]
        batches.prepare()  # a batch ahead, as in the hub
    failure = fault_of(batches, 3).failure
    assert (failure.kind, failure.place) == (type(raised).__name__, "in the sampler")
    assert "in __iter__" in failure.traceback
    assert fault_of(batches, 3).error is raised  # asked for again, by another engine


def test_a_step_that_has_its_batch_keeps_it_although_the_sampler_has_raised_since():
    batches = batches_of(order_of([0, 1, RuntimeError("too late")], length=4))
    assert samples_of(batches, 1) == [0, 1]
    batches.prepare()
    assert samples_of(batches, 1) == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ("cat", r"'cat' \(of type str\)"),
        (1.0, r"1\.0 \(of type float\)"),
        (float("nan"), r"nan \(of type float\)"),
        (True, r"True \(of type bool\)"),
        (np.bool_(True), r"(np\.)?True_? \(of type bool"),
        (torch.tensor(True), r"tensor\(True\) \(of type Tensor\)"),
        (None, r"None \(of type NoneType\)"),
        ((3, 64), r"\(3, 64\) \(of type tuple\)"),
        ([3], r"\[3\] \(of type list\)"),
        (torch.tensor([3]), r"tensor\(\[3\]\) \(of type Tensor\)"),
        (np.array([3]), r"array\(\[3\]\) \(of type ndarray\)"),
        (torch.tensor(3.0), r"tensor\(3\.\) \(of type Tensor\)"),
        (256, r"256 \(of type int\)"),
        (-257, r"-257 \(of type int\)"),
        (2**63, r"9223372036854775808 \(of type int\)"),
        (-(2**80), r"-1208925819614629174706176 \(of type int\)"),
        (np.int64(300), r"300 \(of type int\)"),
        ("x" * 1000, r"'x{79}\.\.\. \(of type str\)"),
    ],
    ids=str,
)
def test_what_is_no_index_is_named_with_its_sampler_and_what_it_must_be(wrong: Any, shown: str):
    error = fault_of(batches_of(order_of([0, wrong])), 1).error
    assert isinstance(error, ArgumentError)
    with pytest.raises(ArgumentError, match=rf"the sampler Yields yielded {shown}.*: .*an integer from 0 to 255"):
        raise error


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([], "yielded a batch without any index"),
        ("word", r"yielded 'word' \(of type str\) for a batch: it must be a list of indices"),
        (7, r"yielded 7 \(of type int\) for a batch: it must be a list of indices"),
        (None, r"yielded None \(of type NoneType\) for a batch"),
        (torch.tensor(3), "iteration over a 0-d tensor"),
        ([[1, 2], [3]], r"yielded \[1, 2\] \(of type list\) for an index"),
        ([0, "1"], r"yielded '1' \(of type str\) for an index"),
    ],
    ids=str,
)
def test_what_is_no_batch_is_named_with_its_batch_sampler(wrong: Any, told: str):
    batches = batches_of(order_of_batches([[1], wrong]))
    assert samples_of(batches, 1) == [1]
    failure = fault_of(batches, 2).failure
    assert "batch sampler Yields" in failure.message or failure.kind != "ArgumentError"
    with pytest.raises(Exception, match=told):
        raise fault_of(batches, 2).error


class Silent:
    """Says nothing of itself."""

    def __repr__(self) -> str:
        raise ValueError("no")


def test_a_value_whose_repr_raises_is_named_by_its_type():
    with pytest.raises(ArgumentError, match=r"yielded a value \(of type Silent\)"):
        raise fault_of(batches_of(order_of([Silent()])), 1).error


@pytest.mark.parametrize("kind", [int, np.int32, np.uint8, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_integers_of_every_kind_are_indices(kind: Any):
    assert samples_of(batches_of(order_of([kind(5), kind(7)])), 1) == [5, 7]


@pytest.mark.parametrize(
    "batch",
    [[3, 1], (3, 1), torch.tensor([3, 1]), np.array([3, 1]), iter([3, 1])],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_may_be_anything_that_has_indices(batch: Any):
    assert samples_of(batches_of(order_of_batches([batch])), 1) == [3, 1]


def test_an_index_below_0_reaches_the_data_set_as_it_is():
    assert samples_of(batches_of(order_of([-1, -256])), 1) == [-1, -256]


def test_a_sampler_that_is_used_up_after_an_epoch_is_told_at_the_step_that_has_no_batch():
    order = BatchOrder(num_samples=NUM_SAMPLES, batch_size=2, sampler=iter([0, 1, 2, 3]))  # type: ignore[arg-type]
    batches = Batches(order, num_steps=4, num_shards=1, num_val_samples=0, steps_per_epoch=2)
    assert [samples_of(batches, step) for step in (1, 2)] == [[0, 1], [2, 3]]
    with pytest.raises(ArgumentError, match=r"the sampler .* yielded no batch in epoch 2"):
        raise fault_of(batches, 3).error


def test_a_walk_outside_of_the_hub_says_the_same():
    with pytest.raises(ArgumentError, match=r"the sampler Yields yielded 'cat' \(of type str\) for an index"):
        next(iterate_batches(order_of(["cat", 1])))


# its length


def test_an_epoch_that_is_shorter_than_its_length_is_told_once():
    batches = batches_of(order_of([0, 1, 2, 3], length=8), num_steps=8)
    found = []
    for step in range(1, 9):
        found.append(samples_of(batches, step)[0])
        batches.prepare()
    assert found == [0, 2] * 4
    assert "the sampler Yields gave 2 batches in epoch 1, and by its __len__ it has 4" in batches.take_note()
    assert batches.take_note() == ""


@pytest.mark.parametrize("num_steps", [1, 3])
def test_an_epoch_that_is_longer_than_its_length_is_told_also_by_a_run_that_ends_with_it(num_steps: int):
    batches = batches_of(order_of([0, 1, 2, 3], length=2), num_steps=num_steps)
    for step in range(1, num_steps + 1):
        samples_of(batches, step)
        batches.prepare()
    assert "the sampler Yields gave more batches in epoch 1, and by its __len__ it has 1" in batches.take_note()


def test_of_a_sampler_that_keeps_its_promise_nothing_is_told():
    batches = batches_of(order_of([0, 1, 2, 3]), num_steps=4)
    for step in range(1, 5):
        samples_of(batches, step)
        batches.prepare()
    assert batches.take_note() == ""


def test_what_a_sampler_raises_at_its_very_end_hurts_nobody():
    batches = batches_of(order_of([0, 1, RuntimeError("the end")], length=2), num_steps=1)
    assert samples_of(batches, 1) == [0, 1]
    batches.prepare()
    assert samples_of(batches, 1) == [0, 1]


def test_a_run_that_goes_on_has_the_batches_after_those_that_are_done():
    batches = batches_of(order_of([0, 1, 2, 3, 4, 5]), num_done=4)
    assert samples_of(batches, 5) == [2, 3]


class Endless(Sampler):
    """Has no length."""

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        yield 0


def test_a_sampler_without_a_length_is_refused_by_its_name():
    order = BatchOrder(num_samples=NUM_SAMPLES, batch_size=2, sampler=Endless())
    with pytest.raises(ArgumentError, match=r"the sampler Endless does not say how long an epoch is .*__len__"):
        count_batches(order)


def test_a_sampler_that_has_no_batch_is_refused_by_its_name():
    with pytest.raises(ArgumentError, match="the sampler Yields has no batch in an epoch of 256 samples"):
        count_batches(order_of([]))


def test_the_traceback_of_a_fault_is_that_of_the_sampler():
    error = fault_of(batches_of(order_of([RuntimeError("here")], length=2)), 1).error
    assert traceback.extract_tb(error.__traceback__)[-1].name == "__iter__"


# evaluations


def evaluations_of(order: BatchOrder, **options: Any) -> Batches:
    train = BatchOrder(num_samples=10, batch_size=5)
    return Batches(train, num_steps=10, num_shards=2, num_val_samples=4, steps_per_epoch=2, val_order=order, **options)


def drawn(batches: Batches, step: int) -> list[int]:
    sizes, raw = batches.samples_of("evaluation", step, [0, 1])
    assert sum(sizes) == batches.num_samples("evaluation", step)
    return np.frombuffer(raw, dtype=np.int64).tolist()


def test_an_evaluation_has_what_the_sampler_of_val_draws():
    assert drawn(evaluations_of(order_of([7, 3, 9])), 2) == [7, 3, 9]


def test_a_hub_that_takes_over_draws_the_same_evaluations():
    order = BatchOrder(num_samples=20, batch_size=4, shuffle=True, seed=5, drop_last=True)
    first = evaluations_of(order)
    every = [drawn(first, step) for step in (2, 4, 6)]
    assert drawn(evaluations_of(order), 6) == every[2]
    assert every[1] != every[2]


def test_an_evaluation_that_is_done_again_has_the_same_samples():
    batches = evaluations_of(BatchOrder(num_samples=20, batch_size=4, shuffle=True, seed=5))
    assert drawn(batches, 2) == drawn(batches, 2)


def test_batches_of_an_evaluation_may_be_kept_whole():
    batches = evaluations_of(order_of(list(range(9)), batch_size=4), val_batch=4)
    assert batches.samples_of("evaluation", 2, [0, 1])[0] in ((4, 5), (8, 1))


@pytest.mark.parametrize("items", [[ValueError("no more")], []], ids=["raises", "yields nothing"])
def test_a_fault_of_val_s_sampler_is_the_user_s(items: list[Any]):
    with pytest.raises(UserCodeError) as caught:
        drawn(evaluations_of(order_of(items, length=3)), 2)
    assert caught.value.place == "in the sampler of val"
