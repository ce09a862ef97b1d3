"""How steps of a run and of one process are held against each other, and shown."""

import numpy as np
import pytest
import torch

from dnb.api.proof.comparison import Proof, compare
from dnb.user_code.gradient_samples import MOST_OF_A_TENSOR, positions, take

SIZES = (3, 2)
NAMES = ("first.weight", "last.bias")


def step(number, run, here, *, bound=2e-6, losses=(1.0, 1.0)):
    run, here = np.array(run, dtype=np.float64), np.array(here, dtype=np.float64)
    row = np.array([losses[0], np.linalg.norm(run), *run])
    return compare(number, row, (losses[1], float(np.linalg.norm(here)), here), NAMES, SIZES, bound)


def test_what_differs_by_rounding_is_the_same():
    found = step(1, [1.0, 2.0, 3.0, 0.5, 0.5], [1.0, 2.0, 3.0 + 1e-6, 0.5, 0.5])
    assert found.is_same
    assert found.largest == pytest.approx(1e-6 / 3)


def test_the_first_tensor_that_differs_is_named_with_its_share():
    found = step(1, [1.0, 2.0, 3.0, 0.5, 0.5], [1.0, 2.0, 3.0, 0.5, 0.4])
    assert [(each.name, round(each.share, 9)) for each in found.differing] == [("last.bias", 0.2)]
    proof = Proof("digits", (step(1, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]), found))
    assert proof.first_difference is found
    assert "'last.bias' by 0.2" in proof.verdict


def test_a_gradient_that_is_nothing_but_rounding_beside_the_others_does_not_differ():
    found = step(1, [1.0, 2.0, 3.0, 1e-9, -1e-9], [1.0, 2.0, 3.0, -1e-9, 1e-9])
    assert found.is_same


def test_a_norm_that_differs_is_a_difference_though_no_element_that_was_looked_at_does():
    row = np.array([1.0, 5.0, *[1.0] * 5])
    assert not compare(1, row, (1.0, 4.0, np.ones(5)), NAMES, SIZES, 2e-6).is_same


def test_a_number_that_is_none_is_a_difference():
    assert not step(1, [1.0, 1.0, np.nan, 1.0, 1.0], [1.0] * 5).is_same
    assert not step(1, [1.0] * 5, [1.0] * 5, losses=(np.nan, 1.0)).is_same


def test_losses_stand_side_by_side_to_the_digit():
    text = Proof("digits", (step(1, [1.0] * 5, [1.0] * 5, losses=(2.30258512, 2.30258509)),)).text
    assert "2.30258512" in text
    assert "2.30258509" in text
    assert text.startswith("the same: 1 steps of run 'digits'")


def test_names_are_escaped_where_a_browser_reads_them():
    proof = Proof("<b>run</b>", (), suspects=("<script>",))
    assert "<script>" not in proof._repr_html_()
    assert "&lt;script&gt;" in proof._repr_html_()


def test_a_small_tensor_is_seen_whole_and_a_large_one_by_elements_anywhere():
    small, large = positions([5, 100_000])
    assert small.tolist() == [0, 1, 2, 3, 4]
    assert len(large) == MOST_OF_A_TENSOR
    assert large.unique().numel() > MOST_OF_A_TENSOR - 5
    assert large.max() > 90_000 > 10_000 > large.min()
    assert torch.equal(large, positions([5, 100_000])[1])


def test_a_gradient_that_is_not_there_is_zero():
    chosen = positions([2, 2])
    assert take([torch.ones(2), None], chosen).tolist() == [1.0, 1.0, 0.0, 0.0]
