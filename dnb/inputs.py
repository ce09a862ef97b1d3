"""What a user hands to `fit`: read, checked, and refused with the way out, before anything starts."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch

from dnb.data_sources import Source, read_source
from dnb.errors import ArgumentError, PlanError, is_text, nearest
from dnb.planning.calling import named_parts, no_target, takes_positional
from dnb.planning.retention import read_goal
from dnb.planning.sample_order import BatchOrder, count_batches, iterate_batches
from dnb.records import CheckpointPolicy, TransportKind
from dnb.transport.job import Job
from dnb.transport.returned import ReturnError, fault_of_name
from dnb.transport.stateful_metrics import StatefulMetric

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
STRATEGIES = ("auto", "data", "hybrid", "pipeline", "tensor")
SYNCS = ("allreduce", "hub", "local")
PRECISIONS = ("bfloat16", "float32")


def batches(
    train: Any, *, batch_size: int = 64, shuffle: bool = True, seed: int = 0, epochs: int = 1
) -> Iterator[torch.Tensor]:
    """Yield the sample indices of every global batch that `fit` trains on with the same arguments, in order.

    They are those of a `DataLoader` with a generator seeded by `seed`, whatever the number of engines. Nothing of the
    caller's is advanced: a sampler or generator of a `DataLoader` is copied first.

    Args:
        train: as for `fit`.
        batch_size: samples of the global batch; a `DataLoader`'s own counts.
        shuffle: likewise.
        seed: of the order.
        epochs: passes over the data.

    Yields:
        int64 tensors of shape (batch,).

    Raises:
        ArgumentError: `fit` would refuse it too.
    """
    source = read_source(train, name="train", seed=seed)
    order = copy.deepcopy(order_of(source, batch_size=batch_size, shuffle=shuffle, seed=seed))
    num_batches = count_batches(order) * check_positive(epochs, name="epochs")
    return islice(iterate_batches(order), num_batches)


def count_val_samples(source: Source | None) -> int:
    """Samples of an evaluation, as the order of a validation loader says; 0 without validation data.

    Raises:
        ArgumentError: an evaluation would have none.
    """
    if source is None:
        return 0
    order = source.order
    if order is None:
        return source.num_samples
    num_batches = count_batches(order)
    if order.sampler is not None:
        sampler: Any = order.sampler
        num_drawn = len(sampler)  # or else batches could not have been counted
    else:
        num_drawn = source.num_samples if order.batch_sampler is None else num_batches * order.batch_size
    return min(num_drawn, num_batches * order.batch_size)


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


def order_of(source: Source, *, batch_size: Any, shuffle: bool, seed: int) -> BatchOrder:
    """How global batches are drawn from a data set; a `DataLoader` brings its own order.

    Raises:
        ArgumentError: a batch that is none, or larger than the data set.
    """
    if source.order is not None:
        return source.order
    return BatchOrder(
        num_samples=source.num_samples,
        batch_size=check_batch_size(batch_size, num_samples=source.num_samples),
        shuffle=shuffle,
        seed=seed,
    )


def check_model(model: Any) -> torch.nn.Module:
    """Refuse what cannot be trained.

    Raises:
        ArgumentError: not a module, nothing to train in it, or not on the CPU.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}, not a torch.nn.Module")
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


def check_batch_size(batch_size: Any, *, num_samples: int) -> int:
    """Refuse a global batch that is not a positive integer, or larger than the data set."""
    size = check_positive(batch_size, name="batch_size")
    if size > num_samples:
        raise ArgumentError(
            f"batch_size={size} is larger than the data set of {num_samples} samples: use at most {num_samples}"
        )
    return size


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
    """How engines are reached, by engine id as text; "" is for those that are not named.

    Raises:
        ArgumentError: a word that is no transport.
    """
    if transport is None:
        return {}
    wishes = transport if isinstance(transport, Mapping) else {"": transport}
    known = get_args(TransportKind)
    for wish in wishes.values():
        if wish not in known:
            raise ArgumentError(f"no transport {wish!r}: {nearest(str(wish), known)}")
    return {str(engine): wish for engine, wish in wishes.items()}


def read_checkpoint_policy(
    every: Any, *, keep: Any, best: Any, metrics: Sequence[str] | None, has_val: bool
) -> CheckpointPolicy | None:
    """Which checkpoints a run writes by itself.

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


def read_loss(loss: Any, *, step: Any) -> Callable[..., Any] | None:
    """The loss function that a name or callable stands for.

    Raises:
        ArgumentError: an unknown name, not a callable, or a step function beside it.
    """
    if loss is not None and step is not None:
        raise ArgumentError("give loss or step, not both: a step function returns its own loss")
    if step is not None and not callable(step):
        raise ArgumentError(f"step is a {type(step).__name__}: give a callable(model, batch) that returns the loss")
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
    """The losses of `torch.nn.functional` that compare an output with a target."""
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
            "say what to minimise: loss='cross_entropy' (or another), or step=callable(model, batch); or let "
            f"{type(model).__name__}.forward take all {len(batch)} parts of a batch of {name}, and return the loss"
        )


def read_metrics(metrics: Any) -> dict[str, Callable[..., Any]]:
    """The metrics by name; the word "accuracy" stands for that of classes.

    Raises:
        ArgumentError: a name that is taken, or something that cannot be called.
    """
    if metrics is None:
        return {}
    if isinstance(metrics, str):
        metrics = [metrics]
    if callable(metrics) or not isinstance(metrics, Iterable):
        raise ArgumentError(
            f"metrics is a {type(metrics).__name__}: give 'accuracy', or {{'name': callable(output, target)}}"
        )
    if not isinstance(metrics, Mapping):
        unknown = [name for name in metrics if name != "accuracy"]
        if unknown:
            raise ArgumentError(f"no metric {unknown[0]!r}: give 'accuracy', or {{'name': callable(output, target)}}")
        metrics = dict.fromkeys(metrics, accuracy)
    for name, metric in metrics.items():
        _check_metric(name, metric)
    return {name: StatefulMetric(metric) if _has_state(metric) else metric for name, metric in metrics.items()}


def _has_state(metric: Any) -> bool:
    """Tell whether a metric is one of torchmetrics' kind."""
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute"))


def _check_metric(name: Any, metric: Any) -> None:
    if not isinstance(name, str):
        raise ArgumentError(f"{name!r} cannot be the name of a metric: give a word")
    if fault := fault_of_name(name):
        raise ArgumentError(fault)
    if not callable(metric) and not _has_state(metric):
        raise ArgumentError(f"metric {name!r} is a {type(metric).__name__}: give a callable(output, target)")


def accuracy(output: Any, target: Any) -> torch.Tensor:
    """Share of samples whose largest output is the target class.

    Args:
        output: shape (batch, classes, ...); of a model that returns its own loss, what has one row of classes per
            sample, as .logits, ["logits"] or alone beside the loss.
        target: class indices, shape (batch, ...); of a model that returns its own loss, the batch, which has them as
            "labels", "label", "targets", "target" or "y", or as its last element.

    Raises:
        ReturnError: it cannot be told which these are.
    """
    if isinstance(output, torch.Tensor) and output.dim() > 1 and isinstance(target, torch.Tensor):
        return (output.argmax(dim=1) == target).float().mean()
    logits, labels = _logits_of(output), _labels_of(target)
    if logits is None or labels is None or logits.shape[:1] != labels.shape:
        raise ReturnError(
            "accuracy cannot be told, as it is not clear which of what the model returns has a row of classes for each "
            "sample, and what of the batch are their classes: give metrics={'accuracy': callable(output, batch)} that "
            "returns a mean over samples"
        )
    return (logits.argmax(dim=1) == labels).float().mean()


def _logits_of(output: Any) -> torch.Tensor | None:
    """The one row of classes per sample in a model's output."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list):
        found = [each for each in output if isinstance(each, torch.Tensor) and each.dim() > 0 and each.numel() > 1]
        output = found[0] if len(found) == 1 else None
    is_one = isinstance(output, torch.Tensor) and output.dim() == 2 and output.is_floating_point()
    return output if is_one else None


def _labels_of(batch: Any) -> torch.Tensor | None:
    """The classes in a batch."""
    named = named_parts(batch)
    if named is not None:
        batch = next((named[name] for name in ("labels", "label", "targets", "target", "y") if name in named), None)
    elif isinstance(batch, tuple | list):
        batch = batch[-1] if len(batch) > 1 else None
    is_one = isinstance(batch, torch.Tensor) and batch.dim() == 1 and not batch.is_floating_point()
    return batch if is_one else None


def read_bytes(amount: Any) -> int | None:
    """Bytes from a number or a word such as "2GB" or "512 MiB".

    Raises:
        ArgumentError: it is neither.
    """
    if amount is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", str(amount).lower())
    if isinstance(amount, bool) or found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ArgumentError(f"memory_limit={amount!r} is no number of bytes: such as 2GB, 512MB or 2000000000")
    return round(float(found[1]) * _UNITS[found[2]])


LOSS_OVERS = ("samples", "batch")


def read_loss_over(wish: Any) -> Literal["samples", "batch"] | None:
    """The wish of the user, if there is one.

    Raises:
        ArgumentError: it is neither.
    """
    if wish is None:
        return None
    check_choice(wish, name="loss_over", known=LOSS_OVERS, available=LOSS_OVERS)
    return "batch" if wish == "batch" else "samples"


def check_loss_over(loss_over: Literal["samples", "batch"], job: Job) -> Literal["samples", "batch"]:
    """Refuse a loss over the whole batch where outputs cannot be told from the loss; else give back what it is over.

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
