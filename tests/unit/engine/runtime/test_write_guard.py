"""Parameters that user code writes on an engine: noticed by step, and without effect on the hub."""

import pytest
import torch
from torch import nn

from dnb.engine.runtime.run_memory import EngineMemory
from dnb.engine.runtime.write_guard import ParameterWrittenError, WriteGuard
from dnb.protocol.engine_messages import Load, WireOffer
from dnb.protocol.memory import Layout
from dnb.transport.layout import plan_layout, slot_views
from dnb.transport.segments import create_segment

NOTHING = Layout(slots=(), regions=(), num_bytes=0)


@pytest.fixture(params=[3, 200_000], ids=["small", "large"])
def bound(request, tmp_path):
    """A model bound to the hub's memory as on an engine, and the hub's own views."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(request.param, 2), nn.Linear(2, 1))
    named = dict(model.named_parameters())
    layout = plan_layout(named.items())
    segment = create_segment("run-parameters", layout.num_bytes, folders=[tmp_path])
    hub = slot_views(layout, segment.memory)
    for name, parameter in named.items():
        hub[name].copy_(parameter.detach())
    load = Load(
        run="r",
        transport="memory",
        wire=WireOffer(url="", token=""),
        parameters=segment.ref,
        parameter_layout=layout,
        gradient_layout=NOTHING,
        buffer_layout=NOTHING,
    )
    memory = EngineMemory(load)
    for name, view in slot_views(layout, memory.parameters).items():
        named[name].data = view
    yield model, WriteGuard(named, memory), hub
    segment.unlink()


def in_place(model):
    with torch.no_grad():
        model[1].weight.clamp_(-0.1, 0.1)


def past_the_counter(model):
    model[1].weight.data += 1


@pytest.mark.parametrize("write", [in_place, past_the_counter])
def test_a_write_is_named_does_not_reach_the_hub_and_is_undone(bound, write):
    model, guard, hub = bound
    before = hub["1.weight"].clone()
    guard.check(1)
    write(model)
    with pytest.raises(ParameterWrittenError, match=r"parameter '1\.weight' was written .* step 2: .*after_step="):
        guard.check(2)
    assert torch.equal(hub["1.weight"], before)
    assert torch.equal(model[1].weight, before)
    guard.check(3)


def test_what_the_hub_writes_is_seen_and_is_no_fault(bound):
    model, guard, hub = bound
    for step in range(4):
        for view in hub.values():
            view.add_(1)
        guard.check(step)
        assert all(torch.equal(hub[name], parameter) for name, parameter in model.named_parameters())
