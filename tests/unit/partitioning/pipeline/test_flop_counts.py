"""What pieces of a model weigh, and where a chain is cut."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dnb.partitioning.pipeline.cut_points import cut_points
from dnb.partitioning.pipeline.flop_counts import ALIKE, balanced_cuts, weigh
from dnb.partitioning.pipeline.tracing import Inputs


def heaviest(weights: list[float], cuts: tuple[int, ...]) -> float:
    edges = [0, *cuts, len(weights)]
    return max(sum(weights[begin:end]) for begin, end in pairwise(edges))


@given(st.lists(st.integers(1, 50).map(float), min_size=2, max_size=9), st.integers(2, 5))
def test_no_other_cuts_have_a_lighter_heaviest_stage(weights: list[float], num_stages: int):
    num_stages = min(num_stages, len(weights))
    points = [str(number) for number in range(1, len(weights))]
    chosen = tuple(int(point) for point in balanced_cuts(weights, points, num_stages))
    best = min(heaviest(weights, cuts) for cuts in combinations(range(1, len(weights)), num_stages - 1))
    assert len(chosen) == num_stages - 1
    assert heaviest(weights, chosen) <= best + ALIKE * sum(weights) / num_stages


def test_a_cut_between_outer_modules_is_taken_if_it_is_as_good():
    assert balanced_cuts([1.0, 0.01, 1.0], ["block.1", "block2"], 2) == ("block2",)


def test_a_matrix_product_weighs_what_it_computes_and_an_activation_little():
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 400))
    inputs = Inputs.of((torch.empty(8, 100), torch.empty(8, dtype=torch.long)))
    first, between, last = weigh(model, inputs, cut_points(model, inputs))
    assert 3.5 < last / first < 4.0  # four times the products, and twice the outputs
    assert between < 0.15 * first


def test_a_model_that_looks_at_values_is_cut_evenly():
    class Looking(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = Looking(nn.Linear(4, 4), nn.Linear(4, 4))
    assert weigh(model, Inputs.of((torch.ones(2, 4), torch.ones(2))), ["1"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "num_stages", "cuts"),
    [
        ([1, 1, 1, 1], 2, (2,)),
        ([8, 1, 1, 1], 2, (1,)),
        ([1, 1, 1, 8], 2, (3,)),
        ([5, 1, 1, 1], 4, (1, 2, 3)),
        ([9, 1, 1], 3, (1, 2)),
    ],
)
def test_cuts_make_the_heaviest_stage_as_light_as_can_be(weights, num_stages, cuts):
    points = [str(number) for number in range(1, len(weights))]
    assert balanced_cuts(weights, points, num_stages, alike=1e-9) == tuple(map(str, cuts))
