"""The arguments of `fit` in words, also those that are objects: for the run's folder, and the report made of it."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from dataclasses import fields
from typing import Any

import torch

from dnb.api.fit_arguments import FitArguments
from dnb.errors import USER_ERRORS, clean_text
from dnb.hub.parameters.optimizers import optimizer_classes
from dnb.job import Job

_MOST_LETTERS = 300
_MOST_LETTERS_OF_MODEL = 4_000
_MOST_LETTERS_OF_CODE = 10_000
# Arguments that are told only where they were given.
_OPTIONAL = ("scheduler", "scheduler_every", "step", "val_step", "after_step", "buffers", "stages", "mesh",
             "tensor_plan", "checkpoint_every", "checkpoint_best", "loss_over", "transport")  # fmt: skip


def describe_arguments(given: FitArguments, job: Job) -> dict[str, str]:
    """Return the arguments of `fit` by name, each in a few words, with the model's layers and the cell's code.

    Args:
        given: as it was handed to `fit`.
        job: as it was read.
    """
    usual = {field.name: field.default for field in fields(FitArguments)}
    words = {
        "model": f"{type(given.model).__name__}, {sum(each.numel() for each in given.model.parameters()):,} parameters",
        "loss": _loss_in_words(given),
        "optimizer": _named(given.optimizer),
        "lr": _lr_in_words(given, job),
        "metrics": ", ".join(job.metrics),
        "epochs": str(given.epochs) if given.steps is None else f"as many as {given.steps:,} steps take",
        "strategy": _named(given.strategy),
        "shuffle": "yes" if given.shuffle else "no",
    }
    words |= {name: _named(value) for name in _OPTIONAL if _differs(value := getattr(given, name), usual[name])}
    words |= {"layers": _shown(given.model, length=_MOST_LETTERS_OF_MODEL), "code": code_of_cell()}
    return {name: text for name, text in words.items() if text}


def code_of_cell() -> str:
    """Return the code of the notebook's cell that runs now; "" in a script, or in a thread that no cell waits for."""
    notebook = sys.modules.get("__main__")
    cells = getattr(notebook, "In", None)  # IPython's list of all cells, with magics as the calls that they are
    if threading.current_thread() is not threading.main_thread() or not isinstance(cells, list) or not cells:
        return ""
    typed = getattr(notebook, f"_i{len(cells) - 1}", cells[-1])  # as it was typed
    return clean_text(typed.strip(), length=_MOST_LETTERS_OF_CODE) if isinstance(typed, str) else ""


def _differs(value: Any, usual: Any) -> bool:
    """Tell whether a value is no default; objects of the user's are not asked."""
    return value != usual if isinstance(value, str | int | float) else value is not usual


def _loss_in_words(given: FitArguments) -> str:
    if given.loss is None:
        return "returned by the step function" if given.step is not None else "returned by the model"
    return _named(given.loss)


def _lr_in_words(given: FitArguments, job: Job) -> str:
    if job.lr is not None:
        return f"{job.lr:g}"
    if isinstance(given.optimizer, torch.optim.Optimizer):
        return ", ".join(dict.fromkeys(f"{float(group['lr']):g}" for group in given.optimizer.param_groups))
    if not isinstance(given.optimizer, str):
        return ""
    kind = optimizer_classes().get(given.optimizer.lower())
    usual = inspect.signature(kind).parameters["lr"].default if kind is not None else None
    return f"{usual:g}, torch's default" if isinstance(usual, float) else ""


def _named(value: Any) -> str:
    """Return a word or a number itself, the name of a function, and of an object what it says of itself."""
    if isinstance(value, str):
        return clean_text(value, length=_MOST_LETTERS)
    if isinstance(value, functools.partial):
        return f"partial of {_named(value.func)}"
    if inspect.isroutine(value) or isinstance(value, type):
        return clean_text(str(getattr(value, "__qualname__", type(value).__name__)), length=_MOST_LETTERS)
    if isinstance(value, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler):
        return type(value).__name__
    return " ".join(_shown(value, length=_MOST_LETTERS).split())


def _shown(value: Any, *, length: int) -> str:
    """Return an object's own text; the name of its class if it has none."""
    try:
        return clean_text(repr(value), length=length)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # the user's own __repr__
        return type(value).__name__
