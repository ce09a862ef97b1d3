"""A forward that is followed once: where it can be cut, and which stages use which parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dnb.errors import PlanError
from dnb.partitioning.pipeline.partitions import pipelines
from dnb.partitioning.pipeline.stage_builder import divide
from dnb.partitioning.pipeline.traced_forward import follow_once
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.protocol.run import Partition
from tests.unit.stage_teams import SmallGPT, sentences

ROWS = torch.randn(8, 6)


class Counting(nn.Module):
    """Eight layers, and the number of its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)])
        self.num_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        return self.layers(x)


class Adapted(nn.Module):
    """A frozen layer, and beside it a low-rank update behind a dropout that does nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(requires_grad=False)
        self.dropout = nn.ModuleDict({"default": nn.Identity()})
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.up(self.down(self.dropout["default"](x)))
        return self.base(x) + (inner * 2.0 if isinstance(inner, torch.Tensor) else inner)


class Residual(nn.Module):
    """Adds its input to a value that it has made, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.beside = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y += self.beside(x)
        return self.last(y)


def all_pipelines(model: nn.Module, *inputs: Any, most_engines: int = 16) -> tuple[tuple[Partition, ...], Any]:
    return pipelines(model, Inputs(inputs), most_engines=most_engines, num_samples=8, micro_batch=None, schedule="1f1b")


def test_a_model_is_followed_as_often_for_sixteen_engines_as_for_two():
    few, many = Counting(), Counting()
    assert len(all_pipelines(few, ROWS, most_engines=2)[0]) == 2
    assert len(all_pipelines(many, ROWS)[0]) == 8
    assert many.num_forwards == few.num_forwards <= 2


def test_a_parameter_that_two_stages_use_is_tied_if_they_are_on_two_engines():
    model = SmallGPT(num_blocks=2)
    users = follow_once(model, Inputs((sentences(8)[0],))).users(["blocks.1"])
    parts = divide(model, Partition(kind="pipeline", num_engines=2, num_stages=2, cuts=("blocks.1",)),
                   Inputs((sentences(8)[0],)))  # fmt: skip
    assert {name: stages for name, stages in users.items() if 0 in stages} == {
        name: {stage for stage, part in enumerate(parts) if name in part.parameters} for name in parts[0].parameters
    }


def test_no_stage_begins_between_a_value_and_its_change_in_place():
    assert list(follow_once(Residual(), Inputs((ROWS,))).points) == ["last"]


def test_stages_of_a_sum_in_place_give_the_models_own_output():
    model = Residual()
    first, second = divide(
        model, Partition(kind="pipeline", num_engines=2, num_stages=2, cuts=("last",)), Inputs((ROWS,))
    )
    assert torch.equal(second.module(*first.module(ROWS)), model(ROWS))


def test_a_cut_that_parts_a_value_from_its_change_in_place_is_refused():
    followed = follow_once(Residual(), Inputs((ROWS,)))
    with pytest.raises(PlanError, match=r"stage 1 changes in place \(iadd\) what stage 0 has made \('first'\)"):
        followed.users(["beside"])


def test_where_no_place_can_be_cut_the_reason_is_told():
    class Listing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            self.second(x)
            y += 1
            return y

    with pytest.raises(PlanError, match="changes in place"):
        all_pipelines(Listing(), ROWS, most_engines=2)


def test_a_module_that_does_nothing_is_no_place_to_cut_where_only_operations_are_seen():
    model = nn.Sequential(Adapted(6), nn.ReLU(), Adapted(6), nn.ReLU(), Adapted(6))
    partitions, _ = all_pipelines(model, ROWS)
    assert len(partitions) > 4
    for partition in partitions[1:]:
        assert not [cut for cut in partition.cuts if "dropout" in cut]
        divide(model, partition, Inputs((ROWS,)))


def test_named_inputs_are_weighed_too():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(6, 8), nn.Linear(8, 800)

        def forward(self, *, x: torch.Tensor, labels: torch.Tensor) -> Any:
            output = self.large(self.small(x))
            return type("Output", (), {"loss": nn.functional.cross_entropy(output, labels)})

    small, large = follow_once(Named(), Inputs.of({"x": ROWS, "labels": torch.zeros(8, dtype=torch.long)})).weights
    assert large > 10 * small
