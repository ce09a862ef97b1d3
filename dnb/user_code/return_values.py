"""Return values of step functions, losses and metrics: read, and refused in words where they cannot be used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import fx

from dnb.errors import DnbError, clean_text
from dnb.job import Sum

# Columns that the history has of every step.
STEP_COLUMNS = ("loss", "lr", "samples_per_second", "seconds", "grad_norm")
# No metric may bear these names: columns, and what the history is drawn or exported over.
RESERVED_NAMES = frozenset({*STEP_COLUMNS, "digest", "epoch", "step"})
EVALUATION_PREFIX = "val_"  # of columns that are measured in evaluations

MOST_NAME_LENGTH = 100
# Different names in a run; more come from names that change with every step.
MOST_NAMES = 1_000

Metrics = dict[str, tuple[float, float]]  # total and weight
Returner = Literal["step", "loss", "model"]

CPU = torch.device("cpu")
NO_METRICS: Mapping[Any, Any] = {}
_WANTED: dict[Returner, str] = {
    "step": "step must return the loss as a tensor of one number, dnb.Sum(total, weight), or (loss, {'name': number})",
    "loss": "loss must return a tensor of one number, the mean over samples, or dnb.Sum(total, weight)",
    "model": "a model without loss= and step= must return its own loss, a tensor of one number: bare, in .loss, in "
    "['loss'], or alone beside its output",
}
# Said of a step function that does what a training loop does around it.
OWN_LOOP = (
    "calls backward() itself: it returns the loss, and dnb runs backward and the optimizer's step; leave out "
    "backward(), zero_grad() and optimizer.step()"
)
# Of classes and keys of the user's, in characters.
_SHOWN = 60


class ReturnError(DnbError, TypeError):
    """A step function, loss or metric returned what cannot be used."""


def read_step(
    result: Any, *, needs_gradient: bool, by: Returner = "step", device: torch.device = CPU
) -> tuple[torch.Tensor | Sum, Mapping[Any, Any]]:
    """Find the loss in what a step function or a model returned, and metrics, which are still to be read.

    Args:
        result: the loss; (loss, metrics); a mapping or an object that has it as "loss"; or a tuple in which one
            element alone can be it.
        needs_gradient: whether backward follows.
        by: who returned it, for messages; metrics are a step function's.
        device: of the model.

    Raises:
        ReturnError: no loss can be told, or it cannot be used.
    """
    if isinstance(result, torch.Tensor | Sum):
        return read_loss(result, needs_gradient=needs_gradient, by=by, device=device), NO_METRICS
    metrics = NO_METRICS
    if by == "step" and isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result, metrics = result
    return read_loss(_loss_in(result, by), needs_gradient=needs_gradient, by=by, device=device), metrics


def own_loss(output: Any) -> Any:
    """Find the loss in the output of a model that computes it; symbols of a traced forward will do, too.

    Raises:
        ReturnError: none can be told.
    """
    return output if _is_tensor(output) else _loss_in(output, "model")


def read_loss(
    value: Any, *, needs_gradient: bool, by: Returner = "loss", device: torch.device = CPU
) -> torch.Tensor | Sum:
    """Check a loss: a floating-point tensor of one element, or a `Sum` of one.

    Args:
        value: as it was returned; a plain number will do where no backward follows.
        needs_gradient: whether backward follows.
        by: who returned it, for messages.
        device: of the model.

    Raises:
        ReturnError: it cannot be used.
    """
    if isinstance(value, Sum):
        total = read_loss(value.total, needs_gradient=needs_gradient, by=by, device=device)
        if isinstance(total, Sum):
            raise ReturnError(f"{_WANTED[by]}, not a Sum of a Sum")
        return Sum(total, _weight_of(value, what=by))
    if not isinstance(value, torch.Tensor):
        if isinstance(value, int | float | np.floating) and not isinstance(value, bool) and not needs_gradient:
            return torch.tensor(float(value), dtype=torch.float64)
        raise ReturnError(f"{_WANTED[by]}, not {_described(value)}{_way_out(value)}")
    if (
        value.numel() == 1
        and value.is_floating_point()
        and (value.requires_grad or not needs_gradient)
        and (value.is_cpu or value.device.type == device.type)
    ):
        return value
    raise ReturnError(f"{_WANTED[by]}, not {_described(value)}{_fault_of(value, device)}")


class MetricReader:
    """Reads what a step function returns beside its loss; knows the names that it has seen."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def read(self, metrics: Mapping[Any, Any], num_samples: int) -> Metrics:
        """Return total and weight of each metric.

        Args:
            metrics: means over samples, or `Sum`s, by name; integers, such as those of classes, become words.
            num_samples: that they are means over.

        Raises:
            ReturnError: a name that is none, is taken or comes twice, or a value that is no number.
        """
        found: Metrics = {}
        for key, value in metrics.items():
            name = key if type(key) is str and key in self._names else self._learn(key)
            if name in found:
                raise ReturnError(f"step must return each metric once, and {name!r} is there as a word and as a number")
            found[name] = weighed(value, num_samples, name=name)
        return found

    def _learn(self, key: Any) -> str:
        if isinstance(key, str):
            name = str.__str__(key)
        elif isinstance(key, int | np.integer) and not isinstance(key, bool):
            name = str(int(key))
        else:
            raise ReturnError(f"step must return its metrics by name, such as {{'accuracy': 0.9}}, not {_key(key)}")
        fault = fault_of_name(name)
        if fault:
            raise ReturnError(f"step must return its metrics by other names: {fault}")
        if name not in self._names and len(self._names) >= MOST_NAMES:
            raise ReturnError(
                f"step must return its metrics by the same names every time, at most {MOST_NAMES:,}: {name!r} is one "
                "more; do they bear a number that grows?"
            )
        self._names.add(name)
        return name


def fault_of_name(name: str) -> str:
    """Explain why a metric cannot have this name; empty if it can."""
    if name in RESERVED_NAMES or name.startswith(EVALUATION_PREFIX):
        return f"{name!r} cannot be the name of a metric: the history uses it; choose another"
    if not name.strip():
        return f"{name!r} cannot be the name of a metric: it has no letters"
    if not name.isprintable():
        shown = ascii(name[:MOST_NAME_LENGTH])
        return f"{shown} cannot be the name of a metric: it has characters that cannot be shown"
    if len(name) > MOST_NAME_LENGTH:
        return f"{name[:20]!r}... cannot be the name of a metric: it has {len(name):,} letters, more than 100"
    return ""


def weighed(value: Any, num_samples: int, *, name: str) -> tuple[float, float]:
    """Return a metric's total and weight.

    Raises:
        ReturnError: it is no number.
    """
    if isinstance(value, Sum):
        weight = _weight_of(value, what=f"metric {name!r}")
        return number_of(value.total, what="metric", name=name), weight
    return number_of(value, what="metric", name=name) * num_samples, float(num_samples)


def number_of(value: Any, *, what: str, name: str | None = None) -> float:
    """Return a number of Python, NumPy or torch, or of an object that converts itself to one.

    Args:
        value: a tensor or array must have one element.
        what: it is, for messages.
        name: of it.

    Raises:
        ReturnError: it is no real number.
    """
    if type(value) is float:
        return value
    called = what if name is None else f"{what} {name!r}"
    try:
        if isinstance(value, torch.Tensor):
            if value.numel() == 1 and not value.is_complex():
                return float(value.item())  # float() of what needs a gradient warns
        elif not isinstance(value, str | bytes | bytearray | complex | np.complexfloating):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ReturnError(f"{called} must be a number, not {_described(value)}") from error
    raise ReturnError(f"{called} must be a number, not {_described(value)}")


def _weight_of(value: Sum, *, what: str) -> float:
    called = f"the weight in the dnb.Sum of {what}"
    weight = number_of(value.weight, what=called)
    if not 0 <= weight < math.inf:
        raise ReturnError(f"{called} must be a number of at least 0, not {weight:g}")
    return weight


def _loss_in(result: Any, by: Returner) -> Any:
    """Find the loss in a returned value that holds more; any other value is given back as it is."""
    if isinstance(result, Mapping):
        if "loss" in result:
            return result["loss"]
        keys = ", ".join(_key(key) for key in [*result][:5])
        raise ReturnError(f"{_WANTED[by]}, not a dictionary of {keys or 'nothing'} without 'loss'")
    if isinstance(result, torch.Tensor | Sum):
        return result
    if hasattr(result, "loss"):
        if result.loss is None:
            raise ReturnError(f"{_WANTED[by]}, not {_described(result)} whose .loss is None: has it no target?")
        return result.loss
    if isinstance(result, tuple | list):
        for most_dims in (0, None):
            found = [each for each in result if _may_be_loss(each, most_dims=most_dims)]
            if len(found) == 1:
                return found[0]
            if found:
                break
        parts = ", ".join(_described(each) for each in result[:5])
        raise ReturnError(
            f"{_WANTED[by]}, not a {_kind(result)} of {len(result)} ({parts}), in which it cannot be told "
            "what the loss is"
        )
    return result


def _may_be_loss(value: Any, *, most_dims: int | None) -> bool:
    """Return whether an element of a tuple may be the loss: of 0 dimensions, or else of one element."""
    if isinstance(value, Sum):
        return True
    if not _is_tensor(value) or not value.is_floating_point():
        return False
    return bool(value.dim() == 0 if most_dims == 0 else value.numel() == 1)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor | fx.Proxy)


def _way_out(value: Any) -> str:
    if value is None:
        return ": is a return missing at its end?"
    if isinstance(value, int | float | np.generic):
        return ", from which no gradient comes: leave out .item() and float()"
    if isinstance(value, np.ndarray):
        return ", from which no gradient comes: leave out .numpy()"
    return ""


def _fault_of(value: torch.Tensor, device: torch.device) -> str:
    if value.numel() != 1:
        return ": take its mean, such as .mean() or reduction='mean'"
    if not value.is_floating_point():
        return ", which has no gradient"
    if not (value.is_cpu or value.device.type == device.type):
        return f" on {value.device}, and the model on {device}"
    return " without a gradient: leave out .detach(), .data and torch.no_grad(), or is every parameter of it frozen?"


def _described(value: Any) -> str:
    """Describe a returned value for a sentence, without calling any method that user code could override."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        shape = f" and shape {tuple(value.shape)}" if value.dim() else ""
        return f"a tensor of {dtype}{shape}{' on the meta device' if value.is_meta else ''}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    if type(value) in (str, bytes):
        return f"the {_kind(value)} {_shortened(value)}"
    if type(value) in (bool, int, float, complex):
        is_huge = type(value) is int and value.bit_length() > 64
        return f"the {_kind(value)} {f'of {value.bit_length()} bits' if is_huge else value}"
    kind = _kind(value)
    return f"a{'n' * (kind[:1].lower() in 'aeiou')} {kind}"


def _key(key: Any) -> str:
    """Describe a key of a dictionary for a sentence."""
    return _shortened(key) if type(key) is str else _described(key)


def _shortened(text: str | bytes) -> str:
    shown = ascii(text[:_SHOWN])
    return shown if len(text) <= _SHOWN and len(shown) <= 2 * _SHOWN else f"{shown[:_SHOWN]}..."


def _kind(value: Any) -> str:
    name: str = type.__dict__["__name__"].__get__(type(value))
    return clean_text(name, length=_SHOWN)
