"""A pool that can train, and the launch of a run on it."""

from __future__ import annotations

import contextlib
import logging
import uuid
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import torch

from dnb.api.arguments.checks import check_can_divide
from dnb.api.fit_arguments import FitArguments, takes_pairs
from dnb.api.proof.proving import Submission
from dnb.api.run_request import RunRequest, read_request
from dnb.api.runs.run import Run
from dnb.api.runs.run_snapshot import KnownRun, RunSnapshot
from dnb.api.submission import submit
from dnb.errors import USER_ERRORS, ArgumentError, PoolError, RunError, summary_of
from dnb.pool.engine_pool import EnginePool
from dnb.protocol.run import ENDED, Finding, RunSpec

log = logging.getLogger(__name__)

LINGER_SECONDS = 1800.0
END_SECONDS = 30.0
_FIT_NAMES = frozenset(field.name for field in fields(FitArguments))


class Pool(EnginePool):
    """A pool that can train; made by `start`."""

    linger_seconds = LINGER_SECONDS
    run: Run | None = None  # the last one that this kernel submitted or attached to

    def follow(self, run: Run) -> Run:
        """Make a run the one that this kernel watches, and give the pool what it needs to go on."""
        run.add_listener(lambda run: self.fill_up() if run.num_owed else None)
        self.run = run.watch()
        return run

    @takes_pairs(num_positional=3)
    def fit(self, model: torch.nn.Module, train: Any, **options: Any) -> Run:
        """Run `dnb.fit` on this pool."""
        unknown = next((name for name in options if name not in _FIT_NAMES), None)
        if unknown is not None:
            raise TypeError(f"fit() got an unexpected keyword argument {unknown!r}")
        return launch(read_request(FitArguments(model=model, train=train, **options)), self)


def launch(request: RunRequest, pool: Pool) -> Run:
    """Hand a run to a pool, and follow it.

    Raises:
        ArgumentError: a run is active.
        PlanError: the pool cannot train as is asked.
        PoolError: no engine is there.
    """
    ended = end_what_never_began(pool)
    refuse_busy_or_empty(pool)
    spec = request.settle(request.spec, pool)
    check_can_divide(spec.partitions)
    spec = msgspec.structs.replace(
        spec, id=uuid.uuid4().hex, linger_seconds=pool.linger_seconds, findings=(*spec.findings, *ended)
    )
    spec, job = submit(pool, spec, request.ship_job, request.ship_data)
    run = Run(
        spec.name,
        pool.hub,
        folder=Path(spec.folder),
        own=request.own,
        key=pool.key,
        known=KnownRun(name=spec.name, snapshot=_initial_state(spec, step=request.first_step)),
        submission=None if request.data is None else Submission(spec=spec, job=job, data=request.data),
    )
    return _proved(pool.follow(run), request.num_proved)


def _initial_state(spec: RunSpec, *, step: int) -> RunSnapshot:
    """Return what is known of a run before its hub was asked."""
    return RunSnapshot(num_steps=spec.num_steps, steps_per_epoch=spec.steps_per_epoch, step=step, first_step=step)


def end_what_never_began(pool: EnginePool) -> tuple[Finding, ...]:
    """End the run that this kernel began and that paused before its first step; return an event of the next one."""
    facts, run = pool.facts, getattr(pool, "run", None)
    if run is None or facts.run != run.name or facts.run_status != "paused" or run.step > run.first_step:
        return ()
    run.stop()
    with contextlib.suppress(RunError):  # the one that it paused with
        run.wait(END_SECONDS)
    text = f"run {run.name!r}, which paused before its first step, was ended for this one"
    return (Finding(kind="stopped", text=text),)


def refuse_busy_or_empty(pool: EnginePool) -> None:
    """Refuse a pool that cannot take a run now.

    Raises:
        ArgumentError: a run is active.
        PoolError: no engine is there.
    """
    facts = pool.await_engines()
    if not facts.engines and facts.returning:
        raise PoolError(
            f"the hub was started again, and none of its {len(facts.returning)} engines has come back yet: "
            "%dtrain status says when they are there, %dtrain add 2 starts others"
        )
    if not facts.engines:
        raise PoolError("no engine of the pool is alive: %dtrain add 2 starts some")
    if facts.run is not None and facts.run_status not in ENDED:
        raise ArgumentError(
            f"run {facts.run!r} is active: wait for it with %dtrain wait, or end it with %dtrain stop, "
            "before the next fit"
        )


def _proved(run: Run, steps: int | None) -> Run:
    """Return the run, whose first steps were computed here, too, if that was asked for; it goes on whatever comes."""
    if steps is not None:
        try:
            proof = run.prove(steps)
            log.log(logging.INFO if proof.is_same else logging.WARNING, proof.verdict)
        except KeyboardInterrupt:
            log.warning("run %r goes on; %%dtrain prove computes its first steps here", run.name)
        except USER_ERRORS as error:
            log.warning("run %r goes on, and could not be proved: %s", run.name, summary_of(error))
    return run
