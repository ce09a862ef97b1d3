from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from dnb.errors import ArgumentError
from dnb.hub.parameters.optimizers import build_optimizer, build_scheduler, check_optimizer, optimizer_classes


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("name", ["adamw", "AdamW", "sgd", "rmsprop", "adagrad"])
def test_an_optimizer_is_known_by_its_name(name: str):
    assert type(build_optimizer(name, [weight()], lr=0.1)).__name__.lower() == name.lower()


@pytest.mark.parametrize("name", sorted(optimizer_classes()))
def test_every_named_optimizer_takes_a_step(name: str):
    parameter = weight()
    optimizer = build_optimizer(name, [parameter], lr=0.1)
    for _ in range(2):
        parameter.grad = torch.full((2, 2), 0.5)
        optimizer.step()
    assert not torch.equal(parameter, torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_the_default_optimizer_steps_parameters_of_other_dtypes(dtype: torch.dtype):
    parameter = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = build_optimizer("adamw", [parameter], lr=0.5)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(2, dtype=dtype))


def test_a_named_optimizer_is_fused_where_torch_can():
    assert build_optimizer("adamw", [weight()], lr=None).param_groups[0]["fused"] is True


def test_a_named_optimizer_takes_the_learning_rate():
    assert build_optimizer("sgd", [weight()], lr=0.25).param_groups[0]["lr"] == 0.25


def test_a_named_optimizer_without_a_learning_rate_has_torchs_default():
    assert build_optimizer("adamw", [weight()], lr=None).param_groups[0]["lr"] == 0.001


def test_an_optimizer_instance_is_taken_as_it_is():
    optimizer = torch.optim.SGD([weight()], lr=0.1)
    assert build_optimizer(optimizer, [], lr=None) is optimizer


def test_a_callable_is_given_the_parameters():
    parameter = weight()
    optimizer = build_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), [parameter], lr=None)
    assert optimizer.param_groups[0]["params"][0] is parameter


def test_a_class_is_a_callable():
    assert type(build_optimizer(torch.optim.Adam, iter([weight()]), lr=None)) is torch.optim.Adam


def test_a_callable_that_returns_no_optimizer_is_refused():
    with pytest.raises(ArgumentError, match=r"optimizer\(params\) returned a list, not a torch Optimizer"):
        build_optimizer(list, [weight()], lr=None)


# what is refused at once --------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match=r"no optimizer 'adamww': did you mean 'adamw'\? known: adadelta, "):
        check_optimizer("adamww")


@pytest.mark.parametrize("optimizer", ["lbfgs", "LBFGS", torch.optim.LBFGS([weight()])], ids=["name", "NAME", "object"])
def test_an_optimizer_that_needs_the_loss_several_times_is_refused(optimizer: Any):
    with pytest.raises(ArgumentError, match="LBFGS evaluates the loss several times in one step"):
        check_optimizer(optimizer)


def test_sparse_adam_is_refused_with_the_reason():
    with pytest.raises(ArgumentError, match="SparseAdam takes sparse gradients only"):
        check_optimizer("sparseadam")


@pytest.mark.parametrize("name", ["optimizer"])
def test_what_is_no_optimizer_of_its_own_is_not_among_the_names(name: str):
    with pytest.raises(ArgumentError, match=f"no optimizer '{name}'"):
        check_optimizer(name)


def test_an_object_that_is_no_optimizer_is_refused():
    with pytest.raises(ArgumentError, match="optimizer is a float: give a name such as 'adamw'"):
        check_optimizer(0.1)


@pytest.mark.parametrize("optimizer", ["Adam", torch.optim.SGD([weight()], lr=0.1), torch.optim.Adam], ids=repr)
def test_names_objects_and_callables_are_taken(optimizer: Any):
    check_optimizer(optimizer)


# schedulers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([weight()], lr=1.0)


def test_no_scheduler_is_none(optimizer: torch.optim.Optimizer):
    assert build_scheduler(None, optimizer) is None


def test_a_scheduler_is_taken_as_it_is(optimizer: torch.optim.Optimizer):
    scheduler = StepLR(optimizer, 1)
    assert build_scheduler(scheduler, optimizer) is scheduler


def test_a_callable_is_given_the_optimizer(optimizer: torch.optim.Optimizer):
    make: Callable[..., Any] = lambda each: StepLR(each, 1)  # noqa: E731
    assert build_scheduler(make, optimizer).optimizer is optimizer


def test_a_callable_that_returns_no_scheduler_is_refused(optimizer: torch.optim.Optimizer):
    with pytest.raises(ArgumentError, match=r"scheduler\(optimizer\) returned a SGD, not an LRScheduler"):
        build_scheduler(lambda each: each, optimizer)


def test_a_scheduler_of_another_optimizer_is_refused(optimizer: torch.optim.Optimizer):
    other = StepLR(torch.optim.SGD([weight()], lr=1.0), 1)
    with pytest.raises(ArgumentError, match="scheduler"):
        build_scheduler(other, optimizer)


def test_a_scheduler_that_needs_a_metric_is_refused(optimizer: torch.optim.Optimizer):
    with pytest.raises(ArgumentError, match="ReduceLROnPlateau"):
        build_scheduler(ReduceLROnPlateau(optimizer), optimizer)
