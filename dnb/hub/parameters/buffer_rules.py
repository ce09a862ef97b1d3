"""Rules by which the buffers that engines bring become one: whose counts, or what is computed of all."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch

from dnb.errors import ArgumentError, nearest

BufferRule = Literal["first", "sum", "mean"]
BUFFER_RULES: tuple[BufferRule, ...] = get_args(BufferRule)
# Of BatchNorm and InstanceNorm, and of layers that are written like them.
RUNNING_STATISTICS = ("running_mean", "running_var")
_SHOWN_NAMES = 3


def read_buffer_rules(given: object, model: torch.nn.Module) -> dict[str, str]:
    """Return the rule of every buffer for which one is given, by the buffer's whole name.

    Args:
        given: rules by whole names, by patterns such as "layers.*.seen", or by a buffer's own name in its module.
        model: whose buffers they are.

    Raises:
        ArgumentError: there is no such rule or buffer, or the rule is not for its dtype.
    """
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"buffers must be a dictionary of names and rules, not {given!r:.60}: buffers={{'queue': 'first'}}"
        )
    buffers = dict(model.named_buffers())
    found: dict[str, str] = {}
    for pattern, rule in given.items():
        if rule not in BUFFER_RULES:
            raise ArgumentError(f"buffers={{{pattern!r}: {rule!r}}}: {nearest(str(rule), BUFFER_RULES)}")
        names = [name for name in buffers if _matches(str(pattern), name)]
        if not names:
            known = nearest(str(pattern), buffers) if buffers else "the model has no buffers"
            raise ArgumentError(f"buffers={{{pattern!r}: {rule!r}}} names no buffer of the model: {known}")
        for name in names:
            _check_dtype(name, buffers[name].dtype, rule)
            found[name] = rule
    return found


def default_rule(name: str, buffer: torch.Tensor) -> BufferRule:
    """Return the mean for running statistics, and "first", the batch's first shard, for all others."""
    is_statistic = name.rpartition(".")[2] in RUNNING_STATISTICS and buffer.is_floating_point()
    return "mean" if is_statistic else "first"


def differing_text(names: list[str]) -> str:
    """Word the event about buffers without a rule that came out differently on several engines."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN_NAMES])
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return (
        f"engines have made different things of buffer{'s' * (len(names) > 1)} {shown}{more}: what the engine with the "
        f"batch's first shard has is kept; buffers={{{names[0]!r}: 'sum'}} adds up what each part has added, 'mean' "
        "averages, and 'first' is what is done now"
    )


def _matches(pattern: str, name: str) -> bool:
    return pattern in (name, name.rpartition(".")[2]) or fnmatchcase(name, pattern)


def _check_dtype(name: str, dtype: torch.dtype, rule: str) -> None:
    if rule == "mean" and not (dtype.is_floating_point or dtype.is_complex):
        others = "'first' or 'sum'" if dtype != torch.bool else "'first'"
        raise ArgumentError(f"buffer {name!r} is of {dtype}, which has no mean: use {others} for it")
    if rule == "sum" and dtype == torch.bool:
        raise ArgumentError(f"buffer {name!r} is of {dtype}, which has no sum: use 'first' for it")
