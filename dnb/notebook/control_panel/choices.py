"""The notebook's variables that fit where a run wants a model, data, a loss or an optimizer."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dnb.api.arguments.checks import STRATEGIES, check_model
from dnb.api.arguments.losses import are_objects, loss_names, read_loss, read_metrics
from dnb.api.run_request import check_optimizer_fits
from dnb.errors import USER_ERRORS, summary_of
from dnb.hub.parameters.optimizers import check_optimizer, optimizer_classes
from dnb.notebook.control_panel.lines import literal
from dnb.notebook.text.summary import one_line
from dnb.planning.search.plans import Plan
from dnb.user_code.model_call import takes_positional

log = logging.getLogger(__name__)

# First in their lists; the others follow in alphabetical order.
_USUAL_LOSSES = ("cross_entropy", "mse_loss", "l1_loss", "binary_cross_entropy_with_logits", "nll_loss")
_USUAL_OPTIMIZERS = ("adamw", "sgd", "adam")
# What IPython itself puts into a notebook's variables.
_OF_IPYTHON = frozenset({"In", "Out", "exit", "quit", "get_ipython", "open", "display"})
_MODEL_NAMES = frozenset({"model", "net", "network", "module"})
_LOSS_NAMES = frozenset(
    {"input", "output", "outputs", "logits", "pred", "preds", "prediction", "predictions", "y_pred"}
)


@dataclass(frozen=True, slots=True)
class Choice:
    """Something to choose: what is shown, and the words that it adds to the line."""

    label: str
    words: str


def own_names(names: Mapping[str, Any], *, hidden: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables that the user has made: nothing private, no modules, no classes, nothing of IPython's.

    Args:
        names: all variables of the notebook.
        hidden: what was there before the first cell.
    """
    return {
        name: value
        for name, value in names.items()
        if name.isidentifier()
        and not name.startswith("_")
        and name not in _OF_IPYTHON
        and not isinstance(value, types.ModuleType | type)
        and (name not in hidden or hidden[name] is not value)
    }


def models(own: Mapping[str, Any]) -> list[Choice]:
    """Modules that can be trained as they are."""
    return [
        Choice(f"{name} ({_type(value)}, {_parameters(value)})", name)
        for name, value in own.items()
        if isinstance(value, torch.nn.Module) and _passes(check_model, value)
    ]


def data_sets(own: Mapping[str, Any]) -> list[Choice]:
    """List map-style data sets, loaders, tuples (X, y) of tensors or arrays, and X and y in two variables."""
    found = [Choice(f"{name} ({told})", name) for name, value in own.items() if (told := _told_of_data(value))]
    return found + [
        Choice(f"({x}, {y}) ({len(own[x]):,} samples)", f"{{({x}, {y})}}")
        for x in own
        for y in (_target_name(x),)
        if y in own and shape_of((own[x], own[y])) is not None
    ]


def shape_of(value: Any) -> tuple[int, int] | None:
    """Count the tensors or arrays of a tuple, and their samples; None if it is something else."""
    if not isinstance(value, tuple | list) or len(value) < 2 or not all(holds_numbers(part) for part in value):
        return None
    lengths = {len(part) for part in value}
    return (len(value), lengths.pop()) if len(lengths) == 1 and 0 not in lengths else None


def losses(own: Mapping[str, Any], *, names: Mapping[str, Any]) -> list[Choice]:
    """Losses and step functions: what the notebook has defined, then torch's by name."""
    by_name = loss_words()
    found = [Choice(f"{name} (step)", f"--step {name}") for name, value in own.items() if _may_be_step(value)]
    found = [Choice(f"{name} (loss)", f"--loss {name}") for name, value in own.items() if _may_be_loss(value)] + found
    # a name that was imported is offered once: as the loss that it is
    taken = {name for name in by_name if name in own and _may_be_loss(own[name])}
    return found + [Choice(name, f"--loss {literal(name, names=names)}") for name in by_name if name not in taken]


def guess_loss(data: Any, *, model: Any = None) -> str:
    """Return the name of the loss that is usual for the targets of data; "" where they do not tell.

    Args:
        data: as `fit` takes them; only tensors and arrays are looked at, as reading a sample may take long.
        model: one that wants the targets, too, has a loss of its own.
    """
    if isinstance(data, DataLoader):
        data = data.dataset
    parts = data.tensors if isinstance(data, TensorDataset) else data
    if shape_of(parts) is None or (model is not None and not takes_positional(model, len(parts) - 1)):
        return ""
    kind = torch.as_tensor(parts[-1][:1]).dtype
    if kind.is_floating_point:
        return "mse_loss"
    return "" if kind == torch.bool or kind.is_complex or parts[-1].ndim > 1 else "cross_entropy"


def loss_words() -> list[str]:
    """Return the names of torch's losses, the usual ones first."""
    known = loss_names()
    usual = [name for name in _USUAL_LOSSES if name in known]
    return usual + [name for name in known if name not in usual]


def optimizer_words() -> list[str]:
    """Return the names of torch's optimizers, the usual ones first, and of them the default."""
    known = optimizer_classes()
    usual = [name for name in _USUAL_OPTIMIZERS if name in known]
    return usual + sorted(set(known) - set(usual))


def optimizers(own: Mapping[str, Any], *, model: Any, names: Mapping[str, Any]) -> list[Choice]:
    """Optimizers by name, the default first, and instances on this model's parameters."""
    others = optimizer_words()[1:]
    found = [
        Choice(f"{name} ({_type(value)}, on the model)", f"--optimizer {name}")
        for name, value in own.items()
        if isinstance(value, torch.optim.Optimizer) and _passes(_check_on, value, model)
    ]
    default = "" if "adamw" not in names else f"--optimizer {literal('adamw', names=names)}"
    by_name = [Choice(name, f"--optimizer {literal(name, names=names)}") for name in others]
    return [Choice("adamw (default)", default), *found, *by_name]


def strategies(own: Mapping[str, Any], *, names: Mapping[str, Any]) -> list[Choice]:
    """List the strategies: the words that `fit` knows, the default first, and plans."""
    plans = [
        Choice(f"{name} (plan)", f"--strategy {{{name}}}") for name, value in own.items() if isinstance(value, Plan)
    ]
    words = [word for word in STRATEGIES if word != "auto"]
    by_name = [Choice(word, f"--strategy {literal(word, names=names)}") for word in words]
    return [Choice("auto (default)", ""), *by_name, *plans]


def metrics(own: Mapping[str, Any], *, names: Mapping[str, Any]) -> list[Choice]:
    """List no metrics, the accuracy of classes, and dictionaries of functions."""
    found = [
        Choice(f"{name} ({len(value)} metrics)", f"--metrics {name}")
        for name, value in own.items()
        if are_objects(value) and value and _passes(read_metrics, value)
    ]
    return [Choice("none", ""), Choice("accuracy", f"--metrics {literal('accuracy', names=names)}"), *found]


def _passes(check: Callable[..., Any], *values: Any) -> bool:
    try:
        check(*values)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:  # an object of the user's may raise anything when it is looked at
        log.debug("not offered: %s", summary_of(error))
        return False
    return True


def _check_on(optimizer: Any, model: Any) -> None:
    check_optimizer(optimizer)
    check_optimizer_fits(optimizer, check_model(model), lr=None)


def _type(value: Any) -> str:
    return one_line(type(value).__name__, limit=40)


def _parameters(model: torch.nn.Module) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count:,} parameters"


def _told_of_data(value: Any) -> str:
    """Describe a data set in words; "" if it is none that `fit` takes."""
    shape = shape_of(value)
    if shape is not None:
        return f"{shape[1]:,} samples"
    if isinstance(value, DataLoader):
        told = _told_of_data_set(value.dataset)
        return "" if not told or (value.batch_size is None and value.batch_sampler is None) else f"DataLoader, {told}"
    return _told_of_data_set(value)


def _told_of_data_set(value: Any) -> str:
    # Hugging Face's data sets are none of torch's, and are taken like them
    is_data_set = isinstance(value, Dataset) or type(value).__module__.partition(".")[0] == "datasets"
    if not is_data_set or isinstance(value, IterableDataset) or not hasattr(value, "__getitem__"):
        return ""
    try:
        size = len(value)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:  # the user's own __len__
        log.debug("not offered: %s", summary_of(error))
        return ""
    return f"{_type(value)}, {size:,} samples" if size else ""


def holds_numbers(part: Any) -> bool:
    """Tell whether a value is a tensor or an array of numbers, one for each sample."""
    if isinstance(part, torch.Tensor):
        return part.dim() > 0
    return isinstance(part, np.ndarray) and part.ndim > 0 and part.dtype.kind in "biufc"


def _target_name(name: str) -> str:
    """Return y_train for X_train, y for X; "" for other names."""
    is_input = name in ("x", "X") or name.startswith(("x_", "X_"))
    return f"y{name[1:]}" if is_input else ""


def _may_be_loss(value: Any) -> bool:
    if isinstance(value, torch.nn.Module):
        fits = not any(parameter.requires_grad for parameter in value.parameters()) and _takes_two(value.forward)
    else:
        fits = is_function(value) and _takes_two(value) and _first_parameter(value) not in _MODEL_NAMES
    return fits and _passes(partial(read_loss, step=None), value)


def _may_be_step(value: Any) -> bool:
    return is_function(value) and _takes_two(value) and _first_parameter(value) not in _LOSS_NAMES


def is_function(value: Any) -> bool:
    """Tell whether a value is a function or a method, and no other object that can be called."""
    return isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType | partial)


def _first_parameter(function: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(function).parameters), "")


def _takes_two(function: Callable[..., Any]) -> bool:
    """Return True if it can be called with two values and nothing else."""
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True
