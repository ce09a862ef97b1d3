"""Hooks that pickle drops: they travel in payloads, and those of one process alone are refused."""

import sys
import threading

import pytest
import torch
from torch import nn

from dnb.errors import ArgumentError
from dnb.transport.pickling.hooks import drop_gradient_hooks, gradient_hooks, refuse_global_hooks, step_hooks
from dnb.transport.pickling.payloads import explain_unpicklable, pickle_payload, unpack


def travelled(obj, folder):
    pickled, ref, segment = pickle_payload(obj, name="x", folders=[folder])
    try:
        return unpack(pickled, ref)
    finally:
        if segment is not None:
            segment.unlink()


def test_hooks_of_parameters_travel_also_of_frozen_ones_and_of_those_that_they_refer_to(tmp_path):
    model = nn.Linear(2, 1)
    model.weight.register_hook(lambda gradient: gradient * 0 + model.bias.numel())
    model.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    model.bias.requires_grad_(False)
    again = travelled(model, tmp_path)
    assert [len(each) for each in gradient_hooks(again.weight)] == [1, 0]
    assert [len(each) for each in gradient_hooks(again.bias)] == [0, 1]
    assert not again.bias.requires_grad
    again(torch.ones(1, 2)).sum().backward()
    assert again.weight.grad.tolist() == [[1.0, 1.0]]
    drop_gradient_hooks(again)
    assert not any(gradient_hooks(again.weight))


def test_hooks_of_modules_travel_and_are_called(tmp_path):
    model = nn.Linear(2, 1)
    model.register_forward_hook(lambda _module, _inputs, output: output * 2)
    model.register_full_backward_hook(lambda _module, inputs, _outputs: (inputs[0] * 10,))
    again, inputs = travelled(model, tmp_path), torch.ones(1, 2, requires_grad=True)
    again(inputs).sum().backward()
    assert torch.allclose(inputs.grad, again.weight * 20)


class Named(torch.optim.SGD):
    """An optimizer that keeps something besides torch's own."""

    half = 0.0


def test_hooks_of_an_optimizer_and_its_own_attributes_travel(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = Named(model.parameters(), lr=1.0)
    optimizer.half = 0.5
    optimizer.register_step_pre_hook(lambda opt, _args, _kwargs: opt.param_groups[0].update(lr=opt.half))
    optimizer.register_step_post_hook(lambda opt, _args, _kwargs: opt.param_groups[0]["params"][1].data.zero_())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps its step
    model, optimizer = travelled((model, optimizer), tmp_path)
    assert len(step_hooks(optimizer)) == 2
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, before - 0.5)
    assert model.bias.item() == 0.0


def test_a_hook_that_cannot_travel_is_named():
    model, lock = nn.Sequential(nn.Linear(2, 1)), threading.Lock()
    model[0].weight.register_hook(lambda gradient: lock and gradient)
    assert "model.0.weight's hook" in str(explain_unpicklable(model, name="model"))


def test_hooks_on_all_modules_or_optimizers_of_the_process_are_refused():
    refuse_global_hooks()
    for register, word in (
        (nn.modules.module.register_module_forward_hook, "module"),
        (sys.modules[torch.optim.Optimizer.__module__].register_optimizer_step_post_hook, "optimizer"),
    ):
        handle = register(lambda *_: None)
        try:
            with pytest.raises(ArgumentError, match=f"a hook on every {word} of this process"):
                refuse_global_hooks()
        finally:
            handle.remove()
