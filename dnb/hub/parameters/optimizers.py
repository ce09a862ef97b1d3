"""Optimizers by name, and the scheduler that belongs to one."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from dnb.errors import ArgumentError, nearest
from dnb.hub.guarded_calls import user_code
from dnb.hub.parameters.scheduler_pacing import check_pace
from dnb.hub.parameters.thread_team import ThreadTeam

_REASONS = {
    "lbfgs": "LBFGS evaluates the loss several times in one step, dnb once: use optimizer='adamw' or 'sgd'",
    "sparseadam": "SparseAdam takes sparse gradients only, and slabs are dense: use optimizer='adamw' or 'adagrad'",
    "muon": "Muon takes matrices only, and a model has other parameters too: give an instance on those it is for, "
    "optimizer=torch.optim.Muon([...])",
}


def optimizer_classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the optimizers of `torch.optim` that take dense gradients, by lower-case name."""
    found = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    return {name: value for name, value in found.items() if name != "optimizer" and name not in _REASONS}


def check_optimizer(optimizer: Any) -> None:
    """Refuse what cannot be an optimizer.

    Raises:
        ArgumentError: an unknown name, or an object of the wrong kind.
    """
    kind = optimizer if inspect.isclass(optimizer) else type(optimizer)
    named = optimizer.lower() if isinstance(optimizer, str) else kind.__name__.lower()
    if named in _REASONS and (
        isinstance(optimizer, str) or (named != "muon" and issubclass(kind, torch.optim.Optimizer))
    ):
        raise ArgumentError(_REASONS[named])
    if issubclass(kind, torch.optim.Optimizer) and _needs_closure(kind):
        raise ArgumentError(
            f"{kind.__name__}.step needs a closure that evaluates the loss again, dnb evaluates it once a step: "
            "use optimizer='adamw' or 'sgd'"
        )
    if isinstance(optimizer, str):
        if optimizer.lower() not in optimizer_classes():
            raise ArgumentError(f"no optimizer {optimizer!r}: {nearest(optimizer.lower(), optimizer_classes())}")
    elif not isinstance(optimizer, torch.optim.Optimizer) and not callable(optimizer):
        raise ArgumentError(
            f"optimizer is a {type(optimizer).__name__}: give a name such as 'adamw', a torch Optimizer on "
            "model.parameters(), or a callable that takes the parameters"
        )


def check_setting(name: str, value: float | None, *, known: Sequence[str]) -> None:
    """Refuse a number that a run cannot go on with.

    Raises:
        ArgumentError: the name is not in `known`, or the value is no fitting number.
    """
    if name not in known:
        raise ArgumentError(f"{name} cannot be set while a run goes on: {nearest(name, known)}")
    if name == "clip_norm" and value is None:
        return
    is_positive = name in ("lr", "clip_norm")
    if value is None or not math.isfinite(value) or value < 0 or (is_positive and value == 0):
        what = "a positive number" if is_positive else "a number of at least 0"
        raise ArgumentError(f"{name} must be {what}, not {value!r}: run.set({name}=1e-3)")


def warm_up() -> None:
    """Make torch import what it leaves until an optimizer first steps, which takes seconds."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter], fused=True).step()


def build_optimizer(
    optimizer: Any, parameters: Iterable[torch.nn.Parameter], *, lr: float | None
) -> torch.optim.Optimizer:
    """Make the one optimizer of a run; by name, the fused implementation where torch has one."""
    parameters = list(parameters)
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        built = optimizer(parameters)
        if not isinstance(built, torch.optim.Optimizer):
            raise ArgumentError(f"optimizer(params) returned a {type(built).__name__}, not a torch Optimizer")
        check_optimizer(built)
        return built
    kind: Any = optimizer_classes()[optimizer.lower()]
    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    if "fused" in inspect.signature(kind).parameters and all(p.is_floating_point() for p in parameters):
        options["fused"] = True
    return kind(parameters, **options)  # type: ignore[no-any-return]


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether torch updates each tensor in one pass."""
    return all(group.get("fused") for group in optimizer.param_groups)


class Stepper:
    """Steps an optimizer; a fused Adam or AdamW by its one kernel alone, without the walk around it.

    That walk (looking every parameter's state up, grouping by device) takes longer than the update of a small model.
    Whatever an optimizer of another kind, a hook or a change of groups asks for is left to its own `step`.

    Args:
        optimizer: stepped; its state stays where it is.
        thread_team: shares the update of a large model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, thread_team: ThreadTeam) -> None:
        self._optimizer = optimizer
        self._thread_team = thread_team
        self._has_kernel = has_kernel(optimizer)
        self._groups: list[AdamGroup] = []

    def forget(self) -> None:
        """Drop the groups of tensors, as other parameters have gradients now, or these lie elsewhere."""
        self._groups = []

    def step(self) -> None:
        """Take one optimizer step."""
        if not self._has_kernel or not self._groups or has_hooks(self._optimizer):
            with user_code("in the optimizer"):
                self._optimizer.step()
            if self._has_kernel:
                self._groups = adam_groups(self._optimizer, self._thread_team)
            return
        for group in self._groups:
            torch._foreach_add_(group.steps, 1)
            self._thread_team.share([partial(self._update, group.options, part) for part in group.parts])

    def _update(self, options: dict[str, Any], part: AdamPart) -> None:
        update_adam(self._optimizer, options, part)


def has_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is an Adam or AdamW that its fused kernel alone can step."""
    is_plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and is_fused(optimizer)
    return is_plain and hasattr(torch, "_fused_adam_") and hasattr(torch, "_fused_adamw_")


# Parameters, gradients, first and second moments, largest second moments, step counts, as the kernel takes them.
AdamPart = list[list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class AdamGroup:
    """Tensors of one parameter group and dtype, cut into parts for the thread team."""

    options: dict[str, Any]
    steps: list[torch.Tensor]
    parts: list[AdamPart]


def adam_groups(optimizer: torch.optim.Optimizer, thread_team: ThreadTeam) -> list[AdamGroup]:
    """Sort tensors by group and dtype; none if a group is out of the ordinary."""
    found: list[AdamGroup] = []
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("differentiable") or isinstance(group["lr"], torch.Tensor):
            return []
        by_dtype: dict[torch.dtype, AdamPart] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if torch.is_complex(parameter):
                return []
            lists = by_dtype.setdefault(parameter.dtype, [[] for _ in range(6)])
            state = optimizer.state[parameter]
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
            tensors = [parameter.detach(), parameter.grad, *(state[name] for name in names)]
            for place, tensor in zip(lists, tensors, strict=False):
                place.append(tensor)
            lists[5].append(state["step"])
        found += [AdamGroup(group, lists[5], _adam_parts(lists, thread_team)) for lists in by_dtype.values()]
    return found


def update_adam(optimizer: torch.optim.Optimizer, options: dict[str, Any], part: AdamPart) -> None:
    """Run the kernel on tensors of one group; their step counts were raised before."""
    beta1, beta2 = options["betas"]
    is_decoupled = options.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    kernel = torch._fused_adamw_ if is_decoupled else torch._fused_adam_
    kernel(
        *part,
        amsgrad=options["amsgrad"],
        lr=options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=options["maximize"],
        grad_scale=None,
        found_inf=None,
    )


def _adam_parts(lists: AdamPart, thread_team: ThreadTeam) -> list[AdamPart]:
    """Cut the elements into as many parts as the thread team takes; a tensor may be cut."""
    sizes = [parameter.numel() for parameter in lists[0]]
    bounds = thread_team.cut(sum(sizes))
    if len(bounds) == 1:
        return [lists]
    parts: list[AdamPart] = [[[] for _ in range(6)] for _ in bounds]
    share = sum(sizes) / len(bounds)
    filled = 0.0
    for index, size in enumerate(sizes):
        step, tensors = lists[5][index], [place[index] if place else None for place in lists[:5]]
        pieces = thread_team.cut(size) if all(t is None or t.is_contiguous() for t in tensors) else [(0, size)]
        for begin, end in pieces:
            part = parts[min(int(filled / share), len(parts) - 1)]
            for place, tensor in zip(part, tensors, strict=False):
                if tensor is not None:
                    place.append(tensor if len(pieces) == 1 else tensor.view(-1)[begin:end])
            part[5].append(step)
            filled += end - begin
    return [part for part in parts if part[0]]


def _needs_closure(kind: type[torch.optim.Optimizer]) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def has_hooks(optimizer: Any) -> bool:
    """Return whether an optimizer has hooks before or after its step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def build_scheduler(
    scheduler: Any, optimizer: torch.optim.Optimizer, *, every: str = "step", has_val: bool = False
) -> LRScheduler | None:
    """Make the scheduler.

    Args:
        scheduler: instance, or callable that makes one.
        optimizer: of the run.
        every: when it is stepped, as of `Pace`.
        has_val: whether there are evaluations.

    Raises:
        ArgumentError: it is none, belongs to another optimizer, or cannot be stepped so.
    """
    if scheduler is None:
        return None
    built = scheduler if isinstance(scheduler, LRScheduler) else scheduler(optimizer)
    if not isinstance(built, LRScheduler):
        raise ArgumentError(f"scheduler(optimizer) returned a {type(built).__name__}, not an LRScheduler")
    check_pace(built, every=every, has_val=has_val)
    if built.optimizer is not optimizer:
        raise ArgumentError("the scheduler belongs to another optimizer: give scheduler=callable(optimizer)")
    _track_steps(optimizer)
    return built


def _track_steps(optimizer: Any) -> None:
    """Mark steps as LRScheduler does when it is built; pickling an optimizer loses the mark, and it would warn."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    step = optimizer.step

    @functools.wraps(step)
    def tracked(*arguments: Any, **options: Any) -> Any:
        optimizer._opt_called = True
        return step(*arguments, **options)

    tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = tracked
