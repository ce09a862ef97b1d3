"""Extra states, and buffers of another shape: on an engine, and as the hub keeps them for the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from dnb.engine.runtime.loose_states import EngineStates, StateError
from dnb.hub.parameters.loose_states import HubStates
from dnb.transport.pickling.module_states import LooseStates, extra_owners


class Layer(nn.Module):
    """Has a buffer with a place, one that is empty at first, and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("mask", None)
        self.seen: Any = []

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


def engine_of(layer: nn.Module, **rules: str) -> EngineStates:
    return EngineStates(layer, placed=["table"], rules=rules)


def taken(packed: bytes) -> LooseStates:
    return LooseStates.unpack(packed)


def test_what_has_not_changed_is_not_collected():
    states = engine_of(Layer())
    states.begin()
    assert states.collect({}) == b""


def test_extra_states_and_buffers_that_were_added_are_collected():
    layer = Layer()
    states = engine_of(layer)
    layer.seen.append(1)
    layer.mask = torch.ones(2)
    layer.register_buffer("late", torch.ones(1), persistent=False)
    found = taken(states.collect({"table": torch.ones(5)}))
    assert found.extra == {"_extra_state": {"seen": [1]}}
    assert {name: len(value) for name, value in found.buffers.items() if value is not None} == {
        "table": 5,
        "mask": 2,
        "late": 1,
    }
    assert found.transient == {"late"}


def test_a_part_begins_as_the_last_step_ended_whatever_came_in_between():
    layer = Layer()
    states = engine_of(layer)
    layer.seen.append(1)
    layer.mask = torch.ones(2)
    layer.register_buffer("late", torch.ones(1))
    states.begin()
    assert (layer.seen, layer.mask, hasattr(layer, "late")) == ([], None, False)


def test_what_the_hub_has_is_put_into_the_model_and_not_told_again():
    layer = Layer()
    states = engine_of(layer)
    states.adopt(LooseStates({"_extra_state": {"seen": [7]}}, {"table": torch.arange(4.0)}).pack())
    states.begin()
    assert (layer.seen, layer.table.tolist()) == ([7], [0.0, 1.0, 2.0, 3.0])
    assert states.is_loose("table")
    assert states.collect({"table": layer.table}) == b""
    layer.table += 1
    assert taken(states.collect({"table": layer.table})).buffers["table"].tolist() == [1.0, 2.0, 3.0, 4.0]  # type: ignore[union-attr]


def test_a_buffer_of_another_shape_has_no_sum():
    with pytest.raises(StateError, match="buffer 'table' has got another shape or dtype in forward, so that its rule"):
        engine_of(Layer(), table="sum").collect({"table": torch.ones(5)})


def test_what_is_too_large_to_travel_beside_gradients_is_refused_by_name():
    with pytest.raises(StateError, match="at most 24 MB travel beside the gradients: give table its last shape"):
        engine_of(Layer()).collect({"table": torch.zeros(7_000_000)})


@pytest.mark.parametrize(
    "value", [{1, 2}, b"bytes", 1 << 70, float("inf"), (1, [torch.ones(2)]), {3: "x"}, None], ids=repr
)
def test_whatever_plain_thing_an_extra_state_holds_comes_back(value: Any):
    found = taken(LooseStates(extra={"_extra_state": value}).pack()).extra["_extra_state"]
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    "packed",
    [b"", b"\x00", b"\xff" * 40, msgspec.msgpack.encode((b"", [], [])), LooseStates().pack()[:-3]],
    ids=["empty", "number", "noise", "nothing", "torn"],
)
def test_what_is_no_state_is_refused(packed: bytes):
    with pytest.raises(ValueError, match="loose states"):
        LooseStates.unpack(packed)


# the hub -----------------------------------------------------------------------------------------------


def hub_of(folder: Path, layer: nn.Module | None = None) -> HubStates:
    return HubStates(layer or Layer(), folders=[folder], prefix="run")


def with_count(count: int) -> LooseStates:
    return LooseStates({"_extra_state": {"seen": [count]}}, {"table": torch.full((count + 4,), 1.0)})


def test_the_hubs_model_is_as_engines_have_made_it(tmp_path: Path):
    layer = Layer()
    hub_of(tmp_path, layer).update(with_count(2), step=1)
    assert (layer.seen, layer.table.shape) == ([2], (6,))


@pytest.mark.parametrize("stranger", [{"extra": {"other._extra_state": 1}}, {"buffers": {"no.table": torch.ones(1)}}])
def test_states_of_modules_that_are_not_there_are_refused(tmp_path: Path, stranger: dict[str, Any]):
    with pytest.raises(ValueError, match="the model has no state"):
        hub_of(tmp_path).check(LooseStates(**stranger))


def test_a_buffer_cannot_take_the_place_of_a_method(tmp_path: Path):
    with pytest.raises(ValueError, match="the model has no state 'forward'"):
        hub_of(tmp_path).check(LooseStates(buffers={"forward": torch.ones(1)}))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_next_hub_has_the_states_of_the_step_that_counts(tmp_path: Path, step: int):
    hub = hub_of(tmp_path)
    hub.keep(step=0)
    for each in range(1, step + 1):
        hub.update(with_count(each), step=each)
    hub.update(with_count(9), step=step + 1)  # which is undone
    layer = Layer()
    recovered = hub_of(tmp_path, layer)
    recovered.recover(step=step)
    assert (layer.seen, layer.table.shape) == ([step], (step + 4,))
    recovered.update(with_count(step + 1), step=step + 1)
    again = hub_of(tmp_path)
    again.recover(step=step + 1)
    assert again.now.extra == {"_extra_state": {"seen": [step + 1]}}
    again.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_was_half_written_does_not_count(tmp_path: Path):
    hub = hub_of(tmp_path)
    hub.keep(step=0)
    hub.update(with_count(1), step=1)
    hub.update(with_count(2), step=2)
    hub.segments[-1].memory[:8] = (-1).to_bytes(8, "little", signed=True)
    recovered = hub_of(tmp_path)
    recovered.recover(step=1)
    assert recovered.now.extra == {"_extra_state": {"seen": [1]}}


def test_only_modules_that_can_get_and_set_a_state_have_one():
    class OnlyGets(nn.Module):
        def get_extra_state(self) -> int:
            return 1

    assert list(extra_owners(nn.ModuleDict({"both": Layer(), "one": OnlyGets()}))) == ["both._extra_state"]
