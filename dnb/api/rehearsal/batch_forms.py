"""Batches as collate_fn makes them: they must go with the loss, or with what the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dnb.api.arguments.data_sources import WHAT_TO_GIVE
from dnb.api.arguments.losses import check_loss_fits
from dnb.api.rehearsal.trial import Trial
from dnb.api.rehearsal.undisturbed import undisturbed
from dnb.errors import USER_ERRORS, ArgumentError, summary_of
from dnb.job import DataSource
from dnb.protocol.run import Finding
from dnb.transport.pickling.copies import close_files
from dnb.user_code.accuracy import accuracy
from dnb.user_code.loader import fetch_batch
from dnb.user_code.return_values import ReturnError


def check_batches(trial: Trial) -> Sequence[Finding]:
    """Refuse data that give no batch, or batches for which nothing says what the loss is.

    Raises:
        ArgumentError: names the data, and what to give instead.
    """
    job = trial.given
    if trial.computed.phase == "data" and trial.computed.error is not None:
        raise _no_batch(trial.data.train, trial.computed.error, name="train") from trial.computed.error
    check_loss_fits(job.loss, step=job.step, model=job.model, batch=trial.batch, name="train")
    if trial.data.val is not None:
        batch = _first_batch(trial, trial.data.val)
        assert trial.given_data.val is not None
        with undisturbed():
            close_files(trial.data.val.samples, trial.given_data.val.samples)
        check_loss_fits(job.loss, step=job.val_step or job.step, model=job.model, batch=batch, name="val")
    _check_accuracy(trial)
    return ()


def _check_accuracy(trial: Trial) -> None:
    """Refuse the word "accuracy" where a model has its own loss, and it is not known what is compared."""
    job, computed = trial.job, trial.computed
    if job.loss is not None or job.step is not None or computed.error is not None:
        return
    for metric in job.metrics.values():
        if getattr(metric, "__name__", "") == accuracy.__name__ and metric.__module__ == accuracy.__module__:
            try:
                accuracy(computed.output, trial.batch)
            except ReturnError as error:
                raise ArgumentError(str(error)) from None


def _first_batch(trial: Trial, source: DataSource) -> Any:
    with undisturbed():
        trial.seed()
        try:
            return fetch_batch(source, torch.arange(1))
        except KeyboardInterrupt:
            raise
        except USER_ERRORS as error:
            raise _no_batch(source, error, name="val") from error


def _no_batch(source: DataSource, error: BaseException, *, name: str) -> ArgumentError:
    kind = type(source.samples).__name__
    return ArgumentError(f"{name}, a {kind}, gives no batch of its first samples ({summary_of(error)}): {WHAT_TO_GIVE}")
