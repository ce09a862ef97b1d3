"""Padding to the longest sample of a batch, which is another one in each part: found where it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from dnb.api.rehearsal.fitting import AsFloat32
from dnb.api.rehearsal.trial import Trial
from dnb.api.rehearsal.undisturbed import undisturbed
from dnb.errors import USER_ERRORS, ArgumentError
from dnb.job import DataSource, Sum
from dnb.protocol.run import Finding
from dnb.transport.pickling.copies import close_files
from dnb.user_code.judged_batches import tolerance_of
from dnb.user_code.loader import fetch_batch
from dnb.user_code.loss_weights import OVER_TARGETS, weighed_loss
from dnb.user_code.model_call import arguments_of


def check_padding(trial: Trial) -> list[Finding]:
    """Refuse a loss that counts what collate_fn pads, and tell of a model that sees it: parts are padded by themselves.

    Raises:
        ArgumentError: padding counts in the loss.
    """
    if trial.computed.loss is None or not trial.options.cuts_batches or trial.options.loss_over is not None:
        return []
    if trial.loss_over == "batch":
        return []
    found = _found_in(trial, trial.data.train, trial.indices)
    if found is None:
        return _tell_of_val(trial)
    whole, parts, counts_in_loss = found
    figures = f"of {len(trial.indices)} samples it is {whole:.6g}, and of their parts {parts:.6g}"
    if counts_in_loss:
        raise ArgumentError(
            "collate_fn pads samples to the longest of a batch, each part has another longest, and padding counts in "
            f"the loss: {figures}: leave padding out of it by ignore_index or dnb.Sum(total, weight), or pad all "
            "samples to one length; loss_over='samples' trains on the mean of the parts"
        )
    text = (
        "collate_fn pads samples to the longest of a batch, each part has another longest, and the model sees padding: "
        f"the loss is not that of one process ({figures}); a mask, or one length for all samples, would change that"
    )
    return [Finding(kind="data", text=text)]


def _tell_of_val(trial: Trial) -> list[Finding]:
    """Tell of validation data in which padding counts; nothing is trained on it, so that it is not refused."""
    source = trial.data.val
    if source is None or trial.job.val_step is not None:
        return []
    found = _found_in(trial, source, torch.arange(min(len(trial.indices), len(source.samples))))
    assert trial.given_data.val is not None
    close_files(source.samples, trial.given_data.val.samples)
    if found is None:
        return []
    text = (
        "val's collate_fn pads samples to the longest of a batch, and each part has another longest: val_loss is not "
        f"that of one process (of some samples it is {found[0]:.6g}, and of their parts {found[1]:.6g}); padding that "
        "neither model nor loss counts, or one length for all samples, would change that"
    )
    return [Finding(kind="data", text=text)]


def _found_in(trial: Trial, source: DataSource, indices: torch.Tensor) -> tuple[float, float, bool] | None:
    """Compare the loss of some samples with that of their parts, in evaluation mode, and leave all as it was."""
    if not _may_pad(source) or len(indices) < 2:
        return None
    with undisturbed():
        trial.modes.set_training(mode=False)
        trial.seed()
        try:
            return _compare(trial, source, indices)
        except KeyboardInterrupt:
            raise
        except USER_ERRORS:  # one more batch than it stands: its own step will tell
            return None


def _may_pad(source: DataSource) -> bool:
    collate = source.collate
    while isinstance(collate, AsFloat32):
        collate = collate.collate
    return collate is not None and collate is not default_collate


def _compare(trial: Trial, source: DataSource, indices: torch.Tensor) -> tuple[float, float, bool] | None:
    """Compute the loss of all samples, that of two parts put together, and whether the loss itself counts padding.

    Returns:
        None if the samples are of one length, are others every time, or if padding makes no difference.
    """
    order = _by_length(source, indices)
    if order is None:
        return None
    half = len(order) // 2
    batches = [fetch_batch(source, indices[places]) for places in (order, order, order[:half], order[half:])]
    if _are_others(*batches[:2]):
        return None
    whole, again = (_loss_of(trial, batch, len(order)) for batch in batches[:2])
    if whole != again:
        return None
    parts = [_loss_of(trial, batches[2], half), _loss_of(trial, batches[3], len(order) - half)]
    total, weight = sum(each[0] for each in parts), sum(each[1] for each in parts)
    if not weight or not whole[1]:
        return None
    alone, together = whole[0] / whole[1], total / weight
    if not abs(alone - together) > tolerance_of(batches[0]) * max(abs(alone), abs(together)):
        return None
    counts_in_loss = abs(whole[1] - weight) > 1e-6 * weight if whole[2] else not _is_pooled(trial, batches)
    return alone, together, counts_in_loss


def _is_pooled(trial: Trial, batches: Sequence[Any]) -> bool:
    """Tell whether the loss is surely given no padding, as outputs are of one shape however long samples are."""
    if trial.job.loss is None:
        return False
    shapes = [tuple(leaf.shape[1:] for leaf in _output_of(trial, batch)) for batch in batches]
    return len(set(shapes)) == 1


def _output_of(trial: Trial, batch: Any) -> list[torch.Tensor]:
    """Compute the tensors that the model gives for some samples."""
    model = trial.job.model
    given = arguments_of(model, batch, has_target=trial.job.loss is not None)
    with torch.no_grad(), trial.autocast():
        leaves = torch.utils._pytree.tree_leaves(model(*given.positional, **given.keywords))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _by_length(source: DataSource, indices: torch.Tensor) -> list[int] | None:
    """Return the places of the samples, the shortest first; None if they are of one length."""
    sizes = []
    for place in range(len(indices)):
        leaves = torch.utils._pytree.tree_leaves(fetch_batch(source, indices[place : place + 1]))
        sizes.append(tuple(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)))
    if len(set(sizes)) == 1:
        return None
    return sorted(range(len(sizes)), key=lambda place: sizes[place])


def _are_others(first: Any, second: Any) -> bool:
    """Tell whether the same samples came out otherwise the second time."""
    pairs = zip(*(torch.utils._pytree.tree_leaves(batch) for batch in (first, second)), strict=True)
    return any(isinstance(a, torch.Tensor) and not (a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)


def _loss_of(trial: Trial, batch: Any, num_samples: int) -> tuple[float, float, bool]:
    """Return total and weight of a loss as engines report them, and whether it weighs something else than samples."""
    loss, _ = trial.loss_and_metrics_of(batch)
    if trial.reduction in OVER_TARGETS:
        loss, _ = weighed_loss(loss)
    if isinstance(loss, Sum):
        return loss.total.item(), float(loss.weight), True
    if trial.reduction == "sum":
        return loss.item(), float(num_samples), False
    return loss.item() * num_samples, float(num_samples), False
