"""Hooks that pickle drops without a word: of tensors on their gradients, of optimizers on their step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from dnb.errors import ArgumentError

Hook = Callable[..., Any]


class GradientHooks(NamedTuple):
    """Hooks of a leaf tensor, in the order in which autograd calls them."""

    gradient: tuple[Hook, ...]  # of `register_hook`
    accumulated: tuple[Hook, ...]  # of `register_post_accumulate_grad_hook`


def gradient_hooks(tensor: Any) -> GradientHooks:
    """Return the hooks that autograd would call for a leaf tensor."""
    return GradientHooks(_values(tensor._backward_hooks), _values(tensor._post_accumulate_grad_hooks))


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Return whether autograd would call hooks for a leaf tensor's gradient."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def set_gradient_hooks(tensor: torch.Tensor, hooks: GradientHooks) -> None:
    """Register hooks anew, also on a tensor that is frozen for now."""
    is_trained = tensor.requires_grad
    tensor.requires_grad_(True)
    for hook in hooks.gradient:
        tensor.register_hook(hook)
    for hook in hooks.accumulated:
        tensor.register_post_accumulate_grad_hook(hook)
    tensor.requires_grad_(is_trained)


def drop_gradient_hooks(model: torch.nn.Module) -> None:
    """Call no hook for the gradient of a part: the hub calls them for that of the whole batch."""
    for parameter in model.parameters():
        for hooks in (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)):
            if hooks:
                hooks.clear()


def step_hooks(optimizer: Any) -> tuple[Hook, ...]:
    """Return the hooks before and after an optimizer's step."""
    return _values(optimizer._optimizer_step_pre_hooks) + _values(optimizer._optimizer_step_post_hooks)


def reduce_optimizer(optimizer: Any, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reduce an optimizer for pickle, with its hooks and with what its class keeps besides torch's own.

    Args:
        optimizer: to be pickled.
        reduced: as its own `__reduce_ex__` says.
    """
    kind: Any = type(optimizer)
    usual: Any = torch.optim.Optimizer
    has_usual_state = kind.__getstate__ is usual.__getstate__ and len(reduced) > 2
    if not has_usual_state or kind.__reduce_ex__ is not usual.__reduce_ex__:
        return reduced
    own = {name: value for name, value in vars(optimizer).items() if name not in _own_attributes()}
    state = (
        {**reduced[2], **own},
        _values(optimizer._optimizer_step_pre_hooks),
        _values(optimizer._optimizer_step_post_hooks),
    )
    return (*reduced[:2], state, None, None, set_optimizer)


def set_optimizer(optimizer: Any, state: tuple[dict[str, Any], Sequence[Hook], Sequence[Hook]]) -> None:
    """Fill an unpickled optimizer with the state and hooks that `reduce_optimizer` took."""
    own, before, after = state
    optimizer.__setstate__(own)
    for hook in before:
        optimizer.register_step_pre_hook(hook)
    for hook in after:
        optimizer.register_step_post_hook(hook)


def refuse_global_hooks() -> None:
    """Refuse hooks that are called for all modules or all optimizers of one process.

    Raises:
        ArgumentError: there is one; says which, and where it can be registered instead.
    """
    modules: Any = torch.nn.modules.module
    optimizers: Any = sys.modules[torch.optim.Optimizer.__module__]
    of_modules = [
        name
        for name in vars(modules)
        if name.startswith(("_global_forward", "_global_backward")) and name.endswith("_hooks")
    ]
    of_optimizers = ["_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"]
    for owner, word, names in ((modules, "module", of_modules), (optimizers, "optimizer", of_optimizers)):
        for name in names:
            for hook in _values(getattr(owner, name, None)):
                called = getattr(hook, "__qualname__", type(hook).__name__)
                raise ArgumentError(
                    f"{called} is a hook on every {word} of this process, and engines and hub are other processes: "
                    f"register it on the {word} itself, and remove this one, before fit"
                )


def _values(hooks: Any) -> tuple[Hook, ...]:
    return tuple(hooks.values()) if hooks else ()


@cache
def _own_attributes() -> frozenset[str]:
    """Return the attributes that every optimizer of torch has, and makes anew when it is unpickled.

    Not while this module is imported: torch imports its compiler to make an optimizer, which engines do without.
    """
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return frozenset(vars(sgd)) | {
        "step",
        "_opt_called",
    }  # "step" is wrapped by a scheduler, and refers to the optimizer
