"""Losses, metrics and step functions that a user hands to `fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch

from dnb.api.arguments.checks import check_choice
from dnb.errors import ArgumentError, nearest
from dnb.job import Job
from dnb.user_code.accuracy import accuracy
from dnb.user_code.model_call import no_target, takes_positional
from dnb.user_code.return_values import fault_of_name
from dnb.user_code.stateful_metrics import StatefulMetric, has_state, is_collection, spread

LOSS_OVERS = ("samples", "batch")


def read_loss(loss: Any, *, step: Any) -> Callable[..., Any] | None:
    """Return the loss function that a name or callable stands for.

    Raises:
        ArgumentError: an unknown name, not a callable, or a step function beside it.
    """
    if loss is not None and step is not None:
        raise ArgumentError("give loss or step, not both: a step function returns its own loss")
    if step is not None and not callable(step):
        raise ArgumentError(f"step is a {type(step).__name__}: give a callable(model, batch) that returns the loss")
    if isinstance(loss, type) and issubclass(loss, torch.nn.Module):
        raise ArgumentError(f"loss is the class {loss.__name__}: give one object of it, {loss.__name__}()")
    if getattr(loss, "reduction", "mean") == "none":
        raise ArgumentError(
            "loss has reduction='none', which leaves a number for each sample: use reduction='mean', or 'sum'"
        )
    if loss is None or callable(loss):
        return loss  # type: ignore[no-any-return]
    known = loss_names()
    if loss not in known:
        raise ArgumentError(f"no loss {loss!r}: {nearest(str(loss), known)}; or give a callable(output, target)")
    return getattr(torch.nn.functional, loss)  # type: ignore[no-any-return]


def loss_names() -> list[str]:
    """Return the losses of `torch.nn.functional` that compare an output with a target."""
    others = {"cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"}
    three_inputs = {
        "triplet_margin_loss",
        "margin_ranking_loss",
        "cosine_embedding_loss",
        "ctc_loss",
        "gaussian_nll_loss",
        "triplet_margin_with_distance_loss",
    }
    losses = {name for name in dir(torch.nn.functional) if name.endswith("_loss")}
    return sorted((losses - three_inputs) | others)


def check_loss_fits(loss: Any, *, step: Any, model: torch.nn.Module, batch: Any, name: str) -> None:
    """Refuse batches for which nothing says what the loss is.

    Args:
        loss: as read.
        step: likewise.
        model: without both it returns its own loss.
        batch: as collate_fn made it, of whatever number of samples.
        name: of the data, for messages.

    Raises:
        ArgumentError: the batch has no target for the loss, or a target that nothing compares.
    """
    if step is not None:
        return
    if loss is not None:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ArgumentError(no_target(batch, name=f"a batch of {name}"))
    elif isinstance(batch, tuple | list) and not takes_positional(model, len(batch)):
        raise ArgumentError(
            "no loss was given: give loss='cross_entropy' (or another), or step=callable(model, batch); or let "
            f"{type(model).__name__}.forward take all {len(batch)} parts of a batch of {name}, and return the loss"
        )


def check_val_step(val_step: Any, *, has_val: bool) -> None:
    """Refuse an evaluation by what cannot be called, or of nothing.

    Raises:
        ArgumentError: it is so.
    """
    if val_step is None:
        return
    if not callable(val_step):
        raise ArgumentError(f"val_step is a {type(val_step).__name__}: give a callable(model, batch), as step is")
    if not has_val:
        raise ArgumentError("val_step is called with the batches of val, and there is none: give val")


def read_loss_over(loss_over: Any) -> Literal["samples", "batch"] | None:
    """Return the user's choice for `loss_over`, if there is one.

    Raises:
        ArgumentError: it is neither.
    """
    if loss_over is None:
        return None
    check_choice(loss_over, name="loss_over", known=LOSS_OVERS, available=LOSS_OVERS)
    return "batch" if loss_over == "batch" else "samples"


def check_loss_over(loss_over: Literal["samples", "batch"], job: Job) -> Literal["samples", "batch"]:
    """Refuse a loss over the whole batch where outputs cannot be separated from it; else return `loss_over`.

    Raises:
        ArgumentError: a step function or the model itself computes the loss.
    """
    if loss_over == "samples" or job.loss is not None:
        return loss_over
    whose = "a step function" if job.step is not None else "a model that returns its own loss"
    raise ArgumentError(
        f"loss_over='batch' gathers outputs before the loss is computed, and {whose} does both at once: give "
        "loss=callable(output, target), or return dnb.Sum(total, weight) if it is a mean over other things than samples"
    )


def read_metrics(metrics: Any) -> dict[str, Callable[..., Any]]:
    """Return the metrics by name; the word "accuracy" stands for that of classes.

    Raises:
        ArgumentError: a name that is taken, or something that cannot be called.
    """
    if metrics is None:
        return {}
    if isinstance(metrics, str):
        metrics = [metrics]
    if is_collection(metrics):
        metrics = dict(metrics.items())
    if callable(metrics) or not isinstance(metrics, Iterable):
        raise ArgumentError(
            f"metrics is a {type(metrics).__name__}: give 'accuracy', or {{'name': callable(output, target)}}"
        )
    if not isinstance(metrics, Mapping):
        unknown = [name for name in metrics if name != "accuracy"]
        if unknown:
            raise ArgumentError(f"no metric {unknown[0]!r}: give 'accuracy', or {{'name': callable(output, target)}}")
        metrics = dict.fromkeys(metrics, accuracy)
    named = list(spread(metrics))
    for name, metric in named:
        _check_metric(name, metric)
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError(
                f"{name!r} would be the name of two metrics, one of them in a collection: choose another"
            )
    return {name: StatefulMetric(metric) if has_state(metric) else metric for name, metric in named}


def are_objects(metrics: Any) -> bool:
    """Tell whether metrics are functions and objects, not the words that stand for some."""
    return isinstance(metrics, Mapping) or is_collection(metrics)


def check_metrics_are_computed(metrics: Any, *, step: Any) -> None:
    """Refuse metrics beside a step function, which alone knows the output.

    Raises:
        ArgumentError: there are both.
    """
    if metrics and step is not None:
        raise ArgumentError(
            "metrics are computed from output and target, which only the step function has: let step return them "
            "beside the loss, as (loss, {'accuracy': value}), and leave metrics out"
        )


def _check_metric(name: Any, metric: Any) -> None:
    if not isinstance(name, str):
        raise ArgumentError(f"{name!r} cannot be the name of a metric: give a word")
    if fault := fault_of_name(name):
        raise ArgumentError(fault)
    if not callable(metric) and not has_state(metric):
        raise ArgumentError(f"metric {name!r} is a {type(metric).__name__}: give a callable(output, target)")
