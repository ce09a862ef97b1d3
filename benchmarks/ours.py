"""Our side: a pool that stays, and turns of training on it through the public interface."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import dnb
from benchmarks.models import LEARNING_RATE, Case
from dnb.errors import ArgumentError, PlanError

START_SECONDS = 120.0
TURN_SECONDS = 300.0
LOOK_SECONDS = 0.05


class NotAvailableError(Exception):
    """This release of dnb lacks an option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a turn of training gave."""

    step_seconds: list[float]  # between commits, the first from the start of the run
    first_commit: float  # seconds since the epoch
    run: dnb.Run


class Side:
    """A pool that trains cases.

    Args:
        pool: with one thread per engine.
        num_engines: of it.
    """

    def __init__(self, pool: dnb.Pool, *, num_engines: int) -> None:
        self.pool = pool
        self.num_engines = num_engines

    def submit(
        self,
        case: Case,
        *,
        steps: int,
        batch_size: int | None = None,
        made: tuple[torch.nn.Module, Any] | None = None,
        **options: Any,
    ) -> dnb.Run:
        """Start a turn.

        Args:
            case: from its initial weights.
            steps: to commit.
            batch_size: the global one; the case's for every engine if left out.
            made: the case's model and data, if they are there already.
            options: others of `dnb.fit`.

        Raises:
            NotAvailableError: dnb has no such option yet.
        """
        unknown = set(options) - set(inspect.signature(dnb.fit).parameters)
        if unknown:
            raise NotAvailableError(f"fit has no {', '.join(sorted(unknown))}")
        options.setdefault("strategy", "data")  # else large models would be profiled first
        model, data = made or (case.make_model(), case.data())
        try:
            return self.pool.fit(
                model,
                data,
                loss=case.loss,
                optimizer=case.optimizer,
                lr=LEARNING_RATE,
                batch_size=batch_size or case.batch_per_engine * self.num_engines,
                steps=steps,
                **options,
            )
        except (ArgumentError, PlanError) as error:
            if "not in this release" in str(error):
                raise NotAvailableError(str(error)) from error
            raise

    def train(
        self, case: Case, *, steps: int, watch: Callable[[dnb.Run], None] | None = None, **options: Any
    ) -> Training:
        """Take a whole turn.

        Args:
            case: from its initial weights.
            steps: to commit.
            watch: called with the run once it is submitted.
            options: of `dnb.fit`.

        Raises:
            NotAvailableError: dnb has no such option yet.
        """
        run = self.submit(case, steps=steps, **options)
        if watch is not None:
            watch(run)
        deadline = time.monotonic() + TURN_SECONDS
        run.wait(TURN_SECONDS)
        if run.is_active and time.monotonic() < deadline:
            raise KeyboardInterrupt  # `wait` takes one for itself
        if run.status != "finished":
            raise TimeoutError(f"run {run.name!r} was {run.status} after {TURN_SECONDS:g} s")
        batch_size = options.get("batch_size") or case.batch_per_engine * self.num_engines
        step_seconds = [batch_size / speed for speed in run.history["samples_per_second"]]
        return Training(step_seconds=step_seconds, first_commit=first_commit(run), run=run)


@contextmanager
def open_side(num_engines: int) -> Iterator[Side]:
    """A pool of our own, ended at the end."""
    pool = dnb.start(num_engines, threads_per_engine=1, timeout_seconds=START_SECONDS)
    try:
        yield Side(pool, num_engines=num_engines)
    finally:
        pool.shutdown()


def first_commit(run: dnb.Run) -> float:
    """When the first step was committed, in seconds since the epoch, as the run's folder has it."""
    with open(run.folder / "history.jsonl") as file:
        return float(json.loads(file.readline())["time"])


def wait_for_step(run: dnb.Run, step: int) -> None:
    """Block until so many steps are committed, as far as the kernel knows.

    Raises:
        TimeoutError: they were not in time.
    """
    deadline = time.monotonic() + TURN_SECONDS
    while run.step < step:
        if not run.is_active or time.monotonic() > deadline:
            raise TimeoutError(f"run {run.name!r} did not come to step {step}: {run.status} at step {run.step}")
        time.sleep(LOOK_SECONDS)  # not `wait`, which takes an interrupt for itself
