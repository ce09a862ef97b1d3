"""A run that hubs have died of: it has failed, and is only what its folder says."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dnb.hub.history.engine_stats import HistoryColumns
from dnb.hub.history.run_files import RunSummary, read_usage
from dnb.hub.history.run_folder import RunFolder
from dnb.hub.run.initial_state import columns_of, events_in, rows_in
from dnb.protocol.base import Record
from dnb.protocol.client_messages import GetRun, RunState
from dnb.protocol.measurements import RunEvent, UsageRow
from dnb.protocol.run import ENDED, RunSpec, RunStatus

log = logging.getLogger(__name__)


class LostRun(Record, frozen=True):
    """The remains of a run: enough for viewers to learn how it ended."""

    spec: RunSpec
    status: RunStatus
    step: int
    started: float
    elapsed_seconds: float
    error: str
    remote_traceback: str

    def state(self, request: GetRun) -> tuple[RunState, list[bytes]]:
        """Return the part of the state that a viewer does not have yet."""
        folder = Path(self.spec.folder)
        columns, frames = _columns_in(folder).after(request.seen)
        state = RunState(
            status=self.status,
            step=self.step,
            first_step=0 if self.spec.resumed is None else self.spec.resumed.step,
            num_steps=self.spec.num_steps,
            steps_per_epoch=self.spec.steps_per_epoch,
            started=self.started,
            elapsed_seconds=self.elapsed_seconds,
            error=self.error,
            remote_traceback=self.remote_traceback,
            columns=columns,
            workers=(),
            events=tuple(events_in(folder)[request.seen_events :]),
            prediction=self.spec.prediction,
            usage=tuple(_usage_in(folder)[request.seen_usage :]),
            batch_size=self.spec.batch_size,
            num_samples=self.spec.num_samples,
            num_shards=self.spec.num_shards,
        )
        return state, frames


def lose(spec: RunSpec, *, error: str, remote_traceback: str, folders: Sequence[Path] = ()) -> LostRun:
    """Write into a run's folder that it has failed, unless it had ended before.

    Args:
        spec: of the run.
        error: why.
        remote_traceback: of what is in `error`.
        folders: of the pool's memory, where hubs have kept what the disk had not taken.
    """
    folder = Path(spec.folder)
    with RunFolder(folder, folders=folders) as files:
        step = max((row.step for row in files.rows()), default=0)
        try:
            summary = files.summary()
        except (OSError, ValueError, msgspec.MsgspecError) as fault:
            log.warning("%s cannot be told that its run has failed: %s", folder, fault)
            lost = LostRun(
                spec=spec,
                status="failed",
                step=step,
                started=time.time(),
                elapsed_seconds=0.0,
                error=error,
                remote_traceback=remote_traceback,
            )
        else:
            if summary.status not in ENDED:
                summary = msgspec.structs.replace(
                    summary, status="failed", ending=None, error=error, remote_traceback=remote_traceback, step=step
                )
                files.write_summary(summary)
                files.append_event(RunEvent(kind="failed", text=error, step=step, time=time.time()))
            lost = _lost(spec, summary)
        files.finish()
        files.forget()
    return lost


def _lost(spec: RunSpec, summary: RunSummary) -> LostRun:
    return LostRun(
        spec=spec,
        status=summary.status,
        step=summary.step,
        started=summary.started,
        elapsed_seconds=summary.elapsed_seconds,
        error=summary.error,
        remote_traceback=summary.remote_traceback,
    )


def _columns_in(folder: Path) -> HistoryColumns:
    return columns_of(rows_in(folder))


def _usage_in(folder: Path) -> list[UsageRow]:
    try:
        return read_usage(folder, skip_broken=True)
    except OSError as error:
        log.warning("the usage in %s cannot be read: %s", folder, error)
        return []
