"""The state in which a run begins in a hub: new, continued from a checkpoint, or recovered from a hub that died."""

from __future__ import annotations

import contextlib
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path

import msgspec

from dnb.errors import ArgumentError
from dnb.hub.checkpoints.format import remove_torn
from dnb.hub.checkpoints.reader import find_checkpoint
from dnb.hub.checkpoints.restore import restore, rows_between, rows_of
from dnb.hub.handover import RunHandover
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.hub.history.run_files import HistoryRow, RunSummary, read_events, read_history, summarize
from dnb.hub.history.run_folder import RunFolder, make_run_folder
from dnb.hub.parameters.durability import remove_segments
from dnb.hub.parameters.journal import LastCommit, Unrecoverable
from dnb.hub.parameters.master import Master
from dnb.hub.parameters.recovery import recover_master
from dnb.job import Job
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.measurements import RunEvent
from dnb.protocol.run import ENDED, Failure, RunSpec, RunStatus

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialState:
    """A run's state when a hub takes it up."""

    master: Master
    order: BatchOrder
    val_order: BatchOrder | None = None
    columns: HistoryColumns
    files: RunFolder
    first_step: int = 0  # committed by the run that this one continues
    step: int = 0  # committed
    evaluated: int = 0
    started: float  # seconds since the epoch
    elapsed_seconds: float = 0.0
    status: RunStatus = "starting"  # or "paused", or ended
    error: str = ""
    traceback: str = ""
    events: list[RunEvent] = field(default_factory=list)
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)  # samples and steps of each engine
    note: str = ""  # for people: that it was taken over, and from where it goes on
    mended: tuple[bytes, bytes] | None = None  # pickle and signature
    is_given_up: bool = False  # it was going on, and has failed now, as hubs have died of it
    is_ending: bool = False  # only its last checkpoint was missing

    @property
    def is_taken_over(self) -> bool:
        """True if a hub before this one held the run."""
        return bool(self.note)


def new_run(spec: RunSpec, job: Job, *, folders: Sequence[Path]) -> InitialState:
    """Make the state of a new run, which may continue an earlier one.

    Args:
        spec: of the run.
        job: as unpacked.
        folders: where segments may lie.

    Raises:
        ArgumentError: the checkpoint is of another model.
        SpaceError: no room for the parameters.
    """
    folder = Path(spec.folder)
    make_run_folder(folder)
    columns = HistoryColumns()
    step = evaluated = 0
    elapsed_seconds = 0.0
    master: Master | None = None
    try:
        master = Master(job, folders=folders, prefix=spec.name, clip_norm=spec.clip_norm, spec=spec)
        if spec.resumed is not None:
            manifest = restore(Path(spec.resumed.folder), master, columns, digest=spec.resumed.digest)
            step, evaluated, elapsed_seconds = manifest.step, manifest.evaluated, manifest.elapsed_seconds
        master.keep_journal(step=step, evaluated=evaluated)
    except BaseException:
        if master is not None:
            master.close()
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing is in it yet
        raise
    started = time.time() - elapsed_seconds
    files = RunFolder(folder, folders=folders)
    files.rebuild_with(partial(rows_between, columns, started=started))
    return InitialState(
        master=master,
        order=job.order,
        val_order=job.val_order,
        columns=columns,
        files=files,
        first_step=step,
        step=step,
        evaluated=evaluated,
        started=started,
    )


def recovered_run(
    spec: RunSpec,
    handover: RunHandover,
    unpack: Callable[[], Job],
    *,
    folders: Sequence[Path],
    reason: str = "",
    failure: Failure | None = None,
) -> InitialState:
    """Recover the state of a run whose hub has died.

    Args:
        spec: of the run.
        handover: of the hub before.
        unpack: makes the job anew.
        folders: where segments may lie.
        reason: why that hub has died, for people.
        failure: why the run does not go on, if it does not: what was trained can still be had.
    """
    files = RunFolder(Path(spec.folder), folders=folders)
    try:
        return _recovered(spec, handover, unpack, files, folders=folders, reason=reason, failure=failure)
    except BaseException:
        files.close()
        raise


def _recovered(
    spec: RunSpec,
    handover: RunHandover,
    unpack: Callable[[], Job],
    files: RunFolder,
    *,
    folders: Sequence[Path],
    reason: str,
    failure: Failure | None,
) -> InitialState:
    summary = _summary_of(files, spec)
    events = files.events()
    is_given_up = failure is not None and summary.status not in ENDED
    if failure is not None and is_given_up:
        summary = msgspec.structs.replace(
            summary, status="failed", ending=None, error=failure.message, remote_traceback=failure.traceback
        )
    found = _from_journal(spec, handover, unpack(), files, folders)
    found = found or _from_checkpoint(spec, handover, unpack(), files, folders)
    files.rebuild_with(partial(rows_between, found.columns, started=summary.started))
    status, is_ending = _status_after(summary, step=found.step)
    return InitialState(
        master=found.master,
        order=found.order,
        val_order=found.val_order,
        columns=found.columns,
        files=files,
        first_step=0 if spec.resumed is None else spec.resumed.step,
        step=found.step,
        evaluated=found.evaluated,
        started=summary.started,
        elapsed_seconds=summary.elapsed_seconds,
        status=status,
        is_ending=is_ending,
        error=summary.error,
        traceback=summary.remote_traceback,
        events=events,
        counts=_counts(found.rows),
        note=f"{found.note} ({reason})" if reason else found.note,
        mended=handover.mended,
        is_given_up=is_given_up,
    )


def _status_after(summary: RunSummary, *, step: int) -> tuple[RunStatus, bool]:
    """Return the status with which a run goes on that another hub held, and True if only its last checkpoint lacks.

    Args:
        summary: as that hub left it.
        step: from which it goes on.
    """
    if summary.ending is None or (summary.ending == "finished" and step < summary.num_steps):
        return "starting" if summary.status == "running" else summary.status, False
    return summary.ending, True


@dataclass(frozen=True, slots=True)
class _RecoveredRun:
    """The part of a run that could be recovered."""

    master: Master
    order: BatchOrder
    val_order: BatchOrder | None
    rows: list[HistoryRow]
    columns: HistoryColumns
    step: int
    evaluated: int
    note: str


def _from_journal(
    spec: RunSpec, handover: RunHandover, job: Job, files: RunFolder, folders: Sequence[Path]
) -> _RecoveredRun | None:
    """Recover a run from shared memory, if it is whole."""
    if handover.journal is None:
        remove_segments(folders, spec.name, but=())
        return None
    try:
        master, last = recover_master(job, journal=handover.journal, folders=folders, prefix=spec.name, spec=spec)
    except Unrecoverable as torn:
        log.warning("run %r goes on from a checkpoint: %s", spec.name, torn)
        return None
    rows = files.rows()
    columns = columns_of(rows)
    missing = _missing_row(columns, last)
    if missing is not None:
        rows.append(missing)
        _add_row(columns, missing)
        files.append_row(missing)
    note = f"the hub died and was started again: the run goes on after step {last.step}"
    note = f"{note}; {last.note}" if last.note else note
    num_lost = last.step - sum(row.kind == "step" for row in rows)
    if num_lost > 0:
        note += f"; {num_lost} steps are missing in its history, as the disk had not taken them"
    return _RecoveredRun(master, job.order, job.val_order, rows, columns, last.step, last.evaluated, note)


def _from_checkpoint(
    spec: RunSpec, handover: RunHandover, job: Job, files: RunFolder, folders: Sequence[Path]
) -> _RecoveredRun:
    """Recover a run from the newest checkpoint, else from the beginning; the history forgets repeated steps."""
    before = files.rows()
    last = max((row.step for row in before), default=0)
    master = Master(job, folders=folders, prefix=spec.name, clip_norm=handover.clip_norm, spec=spec)
    columns = HistoryColumns()
    step = evaluated = 0
    source, digest = _newest_checkpoint(spec)
    if source is not None:
        manifest = restore(source, master, columns, digest=digest)
        step, evaluated = manifest.step, manifest.evaluated
    master.keep_journal(step=step, evaluated=evaluated)
    brought = {(row.kind, row.step): row.samples for row in before}
    rows = [
        msgspec.structs.replace(row, samples=brought.get((row.kind, row.step), {}))
        for row in rows_of(columns, time=_summary_of(files, spec).started)
    ]
    files.replace_history(rows)
    note = f"the hub died and was started again: the run goes on after step {step}"
    if step < last:
        note += f", from {source or 'the beginning'}; steps {step + 1} to {last} are done again"
    return _RecoveredRun(master, job.order, job.val_order, rows, columns, step, evaluated, note)


def _summary_of(files: RunFolder, spec: RunSpec) -> RunSummary:
    """Read run.json; if somebody has spoilt or removed it, assume that the run was going on."""
    try:
        return files.summary()
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        log.warning("run.json in %s is of no use: %s", files.path, error)
        return summarize(
            spec, status="running", error="", remote_traceback="", started=time.time(), elapsed_seconds=0.0, step=0
        )


def rows_in(folder: Path) -> list[HistoryRow]:
    """Read as much of the history in a run's folder as can be read."""
    try:
        return read_history(folder, skip_broken=True)
    except OSError as error:
        log.warning("the history in %s cannot be read: %s", folder, error)
        return []


def events_in(folder: Path) -> list[RunEvent]:
    """Read as many of the events in a run's folder as can be read."""
    try:
        return read_events(folder, skip_broken=True)
    except OSError as error:
        log.warning("the events in %s cannot be read: %s", folder, error)
        return []


def _counts(rows: Iterable[HistoryRow]) -> dict[int, tuple[int, int]]:
    """Samples and steps of each engine."""
    counts: dict[int, tuple[int, int]] = {}
    for row in rows:
        for engine, num_samples in row.samples.items():
            samples, steps = counts.get(engine, (0, 0))
            counts[engine] = samples + num_samples, steps + 1
    return counts


def columns_of(rows: Iterable[HistoryRow]) -> HistoryColumns:
    """Build the history in memory from its lines; a step whose line is missing, as on a full disk, is not a number."""
    columns = HistoryColumns()
    for row in rows:
        _add_row(columns, row)
    return columns


def _add_row(columns: HistoryColumns, row: HistoryRow) -> None:
    if row.kind != "step":
        columns.add_evaluation(row.step, row.values)
        return
    columns.add_step(row.values)
    for name in row.values:
        values = columns.by_step[name]
        if len(values) < row.step:
            values[-1:] = array("d", [nan] * (row.step - len(values)) + [row.values[name]])


def _missing_row(columns: HistoryColumns, last: LastCommit) -> HistoryRow | None:
    """Return the line of the last commit, which is written a little later, if it is missing."""
    if last.step == 0 or not last.values:
        return None
    if last.kind == "step":
        is_there = any(len(values) >= last.step for values in columns.by_step.values())
    else:
        name = next(iter(last.values))
        is_there = last.step in columns.by_evaluation.get(name, array("d"))[-2::2]
    return (
        None
        if is_there
        else HistoryRow(kind=last.kind, step=last.step, time=last.time, values=last.values, samples=last.samples)
    )


def _newest_checkpoint(spec: RunSpec) -> tuple[Path | None, str]:
    """Return the newest checkpoint's folder and manifest digest; that which the run continues if it has none."""
    folder = Path(spec.folder)
    try:
        found = find_checkpoint(folder, wants=lambda _: ())[0]
    except ArgumentError as error:
        log.info("no checkpoint of this run to go on from: %s", error)
        return (None, "") if spec.resumed is None else (Path(spec.resumed.folder), spec.resumed.digest)
    remove_torn(found.folder.parent)
    return found.folder, found.manifest.digest
