"""A run held against one process: the same first steps, computed here by a plain loop."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnb.api.proof.comparison import LATER_FACTOR, ROUNDING, Proof, ProvedStep, compare
from dnb.api.proof.plain_steps import plain_steps
from dnb.api.proof.suspects import suspects_of
from dnb.errors import ArgumentError
from dnb.job import Data, DataSource, Job
from dnb.progress import long_work
from dnb.protocol.run import RunSpec
from dnb.transport.pickling.payloads import copy_of, unpack
from dnb.user_code.gradient_samples import positions, take


def known_submission(submission: Submission | None, *, run: str) -> Submission:
    """Return what a run began with.

    Raises:
        ArgumentError: this kernel did not start it.
    """
    if submission is None:
        raise ArgumentError(
            f"run {run!r} cannot be proved from here, as only the kernel that called fit has what it began with: prove "
            "it there, or train it anew with fit(prove=20)"
        )
    return submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A run as it was submitted: what is needed to compute it again.

    Args:
        spec: its numbers, and where its job lies.
        job: pickled, as the hub and the engines got it.
        data: the notebook's own.
    """

    spec: RunSpec
    job: bytes
    data: Data

    def open(self) -> Job:
        """Return a copy of the job as it was at `fit`.

        Raises:
            ArgumentError: the pool has given it up for another run.
        """
        try:
            job: Job = unpack(self.job, self.spec.job)
        except FileNotFoundError as error:
            raise self.given_up from error
        return job

    @property
    def given_up(self) -> ArgumentError:
        """The refusal where the pool has not kept it."""
        return ArgumentError(
            f"the pool has given up how run {self.spec.name!r} began, as another run was started or the pool ended: "
            "prove a run before the next fit, or train it with fit(prove=20)"
        )


@dataclass(frozen=True, slots=True)
class ObservedGradients:
    """The observed part of a run's gradients, by step: its loss, the gradient's norm, some elements of it."""

    names: Sequence[str]
    rows: Mapping[int, np.ndarray[Any, np.dtype[np.float64]]]


def prove(submission: Submission, gradients: ObservedGradients, *, notes: Sequence[str] = ()) -> Proof:
    """Compute the steps of a run again in this process, one batch at a time, and hold them against what was seen.

    Random numbers, the notebook's model and its data stay as they are.

    Args:
        submission: as the run was submitted.
        gradients: of the run.
        notes: for people.

    Raises:
        ArgumentError: the pool has given up how the run began, or nothing of it could be computed again.
    """
    job = submission.open()
    names = list(gradients.names)
    wanted = dict(job.model.named_parameters())
    chosen = positions([wanted[name].numel() for name in names])
    found: list[ProvedStep] = []
    suspects: list[str] = []
    with _as_it_was(), long_work(f"computing {len(gradients.rows)} steps in this process") as report:
        torch.manual_seed(submission.spec.seed)
        source = _copied(submission.data.train)
        loop = plain_steps(job, source, submission.spec)
        bound = ROUNDING.get(min((p.element_size() for p in wanted.values()), default=4), 2e-6)
        bound = max(bound, ROUNDING[2]) if submission.spec.precision != "float32" else bound
        last = max(gradients.rows, default=0)
        for step, loss in enumerate(loop, 1):
            row = gradients.rows.get(step)
            if row is not None:
                here = take([wanted[name].grad for name in names], chosen).numpy()
                norm = _norm([parameter.grad for parameter in wanted.values() if parameter.requires_grad])
                sizes = [len(places) for places in chosen]
                tolerance = bound * (1.0 if step == 1 else LATER_FACTOR)
                found.append(compare(step, row, (loss, norm, here), names, sizes, tolerance))
                report(f"{step} of {last}")
            if step >= last:
                break
        if not found:
            raise ArgumentError(
                f"no step of run {submission.spec.name!r} can be proved: none of those that were looked at can be "
                "computed here, as its scheduler waits for an evaluation before them"
            )
        if found[-1].step < last:
            notes = (*notes, f"only up to step {found[-1].step}, after which the scheduler waits for an evaluation")
        if not all(step.is_same for step in found):
            suspects = suspects_of(job, source, submission.spec, first=next(s for s in found if not s.is_same))
    return Proof(submission.spec.name, tuple(found), tuple(suspects), tuple(notes))


def _norm(gradients: Sequence[torch.Tensor | None]) -> float:
    return math.sqrt(sum(g.detach().double().abs().square().sum().item() for g in gradients if g is not None))


def _copied(source: DataSource) -> DataSource:
    """Return the data as an engine gets it; tensors are shared, as they are only indexed."""
    return source if source.collate is None else copy_of(source)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Leave random numbers as they were, whatever is drawn within."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
