"""Numbers, words and models that a user hands to `fit`: checked, and refused with the way out, before a start."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from packaging.version import Version

from dnb.errors import ArgumentError, PlanError, is_text, nearest
from dnb.planning.checkpoint_policy import read_goal
from dnb.protocol.run import CheckpointPolicy, Partition, TransportKind

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
STRATEGIES = ("auto", "data", "hybrid", "pipeline", "tensor")
SYNCS = ("allreduce", "hub", "local")
PRECISIONS = ("bfloat16", "float32")


class UsualInt(int):
    """A default that can be told from the same number given."""


# Samples of a global batch, where nobody says how many.
USUAL_BATCH_SIZE = UsualInt(64)


def check_model(model: Any) -> torch.nn.Module:
    """Refuse what cannot be trained.

    Raises:
        ArgumentError: not a module, nothing to train in it, or not on the CPU.
    """
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise ArgumentError(f"model is the class {model.__name__}: give one object of it, as {model.__name__}(...) is")
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model is of type {type(model).__name__}, not a torch.nn.Module such as nn.Linear(4, 3)")
    parameters = list(model.parameters())
    if any(isinstance(p, torch.nn.parameter.UninitializedParameter) for p in parameters):
        raise ArgumentError("model has lazy parameters without a shape yet: run one batch through it first")
    if not any(p.requires_grad and p.numel() for p in parameters):
        frozen = f", all {len(parameters)} are frozen" if parameters else ""
        raise ArgumentError(f"model has no trainable parameters{frozen}: set requires_grad_(True) on some")
    unnamed = [name for name, _ in [*model.named_parameters(), *model.named_buffers()] if not is_text(name)]
    if unnamed:
        raise ArgumentError(f"model has a tensor named {unnamed[0]!a}, which is no text: give its module another name")
    elsewhere = {str(p.device) for p in parameters if p.device.type != "cpu"}
    if elsewhere:
        raise ArgumentError(f"model is on {', '.join(sorted(elsewhere))}: give it on the CPU, model.cpu()")
    return model


def check_positive(value: Any, *, name: str) -> int:
    """Refuse all but integers of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ArgumentError(f"{name} must be a positive integer, not {value!r}")
    return int(value)


def check_number(value: Any, *, name: str) -> float:
    """Refuse all but finite numbers above 0, of Python, NumPy or torch."""
    is_array = isinstance(value, torch.Tensor | np.ndarray | np.generic)
    number = value.item() if is_array and value.ndim == 0 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not (0 < number < math.inf):
        raise ArgumentError(f"{name} must be a positive number, not {value!r}")
    return float(number)


def check_seed(seed: Any) -> int:
    """Refuse all but integers that torch takes for a seed."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not -(1 << 63) <= seed < 1 << 64:
        raise ArgumentError(f"seed must be an integer of 64 bits, such as 0, not {seed!r}")
    return int(seed)


def check_flags(**flags: Any) -> None:
    """Refuse what is neither true nor false: a word such as 'no' would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_) and not (isinstance(value, int) and value in (0, 1)):
            raise ArgumentError(f"{name} must be True or False, not {value!r}")


def check_choice(value: Any, *, name: str, known: Sequence[str], available: Sequence[str]) -> str:
    """Refuse a word that is not known, or not in this release."""
    if value not in known:
        raise ArgumentError(f"no {name} {value!r}: {nearest(str(value), known)}")
    if value not in available:
        raise PlanError(f"{name}={value!r} is not in this release yet: use {name}={available[0]!r}")
    return str(value)


def read_transport(transport: Any) -> dict[str, TransportKind]:
    """Return how engines are reached, by engine id as text; "" is for those that are not named.

    Raises:
        ArgumentError: a word that is no transport.
    """
    if transport is None:
        return {}
    kinds = transport if isinstance(transport, Mapping) else {"": transport}
    known = get_args(TransportKind)
    for kind in kinds.values():
        if kind not in known:
            raise ArgumentError(f"no transport {kind!r}: {nearest(str(kind), known)}")
    return {str(engine): kind for engine, kind in kinds.items()}


def read_checkpoint_policy(
    every: Any, *, keep: Any, best: Any, metrics: Sequence[str] | None, has_val: bool
) -> CheckpointPolicy | None:
    """Read the policy by which a run writes checkpoints by itself.

    Args:
        every: steps between two; None writes none.
        keep: how many stay.
        best: the best by this stays too.
        metrics: names that will be measured; None if only the step function knows.
        has_val: whether there are evaluations.

    Raises:
        ArgumentError: a number that is not positive, or a column that there will not be.
    """
    keep = check_positive(keep, name="checkpoint_keep")
    if every is None:
        if best is not None:
            raise ArgumentError("checkpoint_best chooses among checkpoints, and none is written: give checkpoint_every")
        return None
    every = check_positive(every, name="checkpoint_every")
    if best is not None:
        name = read_goal(str(best)).name
        if name.startswith("val_") and not has_val:
            raise ArgumentError(f"checkpoint_best={best!r} is measured in evaluations: give val")
        known = {"loss", *(metrics or ())}
        if metrics is not None and name.removeprefix("val_") not in known:
            columns = [*known, *(f"val_{column}" for column in known if has_val)]
            raise ArgumentError(f"checkpoint_best={best!r} will not be measured: {nearest(name, columns)}")
    return CheckpointPolicy(every=every, keep=keep, best=None if best is None else str(best))


def read_bytes(amount: Any) -> int | None:
    """Return bytes from a number or a word such as "2GB" or "512 MiB".

    Raises:
        ArgumentError: it is neither.
    """
    if amount is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", str(amount).lower())
    if isinstance(amount, bool) or found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ArgumentError(f"memory_limit={amount!r} is no number of bytes: such as 2GB, 512MB or 2000000000")
    return round(float(found[1]) * _UNITS[found[2]])


def can_divide() -> bool:
    """Say whether this torch has what pipelines and tensor parallelism call: 2.6 has not."""
    return Version(torch.__version__).release >= (2, 7)


def check_can_divide(partitions: Sequence[Partition]) -> None:
    """Refuse to divide a model where torch lacks what that takes, whoever chose it: the user, a plan, a checkpoint.

    Raises:
        PlanError: it does.
    """
    kinds = sorted({each.kind for each in partitions} & {"pipeline", "tensor"})
    if kinds and not can_divide():
        raise PlanError(
            f"strategy={kinds[0]!r} needs torch 2.7 or later, and this is {torch.__version__}: pip install -U torch, "
            "or strategy='data'"
        )
