"""How a run begins in a hub: new, continued from a checkpoint, or taken over from a hub that died."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dnb.errors import ArgumentError
from dnb.hub.accounts import Columns
from dnb.hub.checkpoints import find_checkpoint, remove_torn
from dnb.hub.history import HistoryRow, RunFolder, read_events, read_history, read_summary
from dnb.hub.memo import RunMemo
from dnb.hub.reducer import Master
from dnb.hub.restoring import restore, rows_of
from dnb.planning.sample_order import BatchOrder
from dnb.records import ENDED, RunEvent, RunSpec, RunStatus
from dnb.transport.job import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A run's state when a hub takes it up."""

    master: Master
    order: BatchOrder
    columns: Columns
    first_step: int = 0  # committed by the run that this one continues
    step: int = 0  # committed
    evaluated: int = 0
    started: float  # seconds since the epoch
    elapsed_seconds: float = 0.0
    status: RunStatus = "starting"  # or "paused", or ended
    error: str = ""
    traceback: str = ""
    events: list[RunEvent] = field(default_factory=list)
    note: str = ""  # for people: that it was taken over, and from where it goes on
    mended: tuple[bytes, bytes] | None = None  # pickle and signature

    @property
    def is_taken_over(self) -> bool:
        """Whether a hub before this one held the run."""
        return bool(self.note)


def begin(spec: RunSpec, job: Job, *, folders: Sequence[Path]) -> Beginning:
    """A new run, which may continue an earlier one.

    Args:
        spec: of the run.
        job: as unpacked.
        folders: where segments may lie.

    Raises:
        ArgumentError: the checkpoint is of another model.
        SpaceError: no room for the parameters.
    """
    master = Master(job, folders=folders, prefix=spec.name, clip_norm=spec.clip_norm)
    columns = Columns()
    step = evaluated = 0
    elapsed_seconds = 0.0
    try:
        if spec.resumed is not None:
            manifest = restore(Path(spec.resumed.folder), master, columns)
            step, evaluated, elapsed_seconds = manifest.step, manifest.evaluated, manifest.elapsed_seconds
    except BaseException:
        master.close()
        raise
    return Beginning(
        master=master,
        order=job.order,
        columns=columns,
        first_step=step,
        step=step,
        evaluated=evaluated,
        started=time.time() - elapsed_seconds,
    )


def take_over(spec: RunSpec, memo: RunMemo, job: Job, *, folders: Sequence[Path]) -> Beginning:
    """A run that a hub held which died: from its newest checkpoint, else from its beginning.

    Args:
        spec: of the run.
        memo: of the hub before.
        job: as unpacked.
        folders: where segments may lie.
    """
    folder = Path(spec.folder)
    summary = read_summary(folder)
    last = max((row.step for row in read_history(folder)), default=0)
    master = Master(job, folders=folders, prefix=spec.name, clip_norm=memo.clip_norm)
    columns = Columns()
    step = evaluated = 0
    source = _newest_checkpoint(spec)
    if source is not None:
        manifest = restore(source, master, columns)
        step, evaluated = manifest.step, manifest.evaluated
    _rewrite_history(folder, columns, started=summary.started)
    note = f"the hub died and was started again: the run goes on after step {step}"
    if step < last:
        note += f", from {source or 'the beginning'}; steps {step + 1} to {last} are done again"
    return Beginning(
        master=master,
        order=job.order,
        columns=columns,
        first_step=0 if spec.resumed is None else spec.resumed.step,
        step=step,
        evaluated=evaluated,
        started=summary.started,
        elapsed_seconds=summary.elapsed_seconds,
        status="starting" if summary.status == "running" else summary.status,
        error=summary.error,
        traceback=summary.remote_traceback,
        events=read_events(folder),
        note=note,
        mended=memo.mended,
    )


def give_up(memo: RunMemo, reason: str) -> None:
    """A run that hubs die of has failed; its folder says so."""
    spec = msgspec.msgpack.decode(memo.frames[0], type=RunSpec)
    folder = Path(spec.folder)
    try:
        summary = read_summary(folder)
        if summary.status not in ENDED:
            with RunFolder(folder) as files:
                files.write_summary(msgspec.structs.replace(summary, status="failed", error=reason))
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s cannot be told that its run has failed: %s", folder, error)


def columns_of(rows: Sequence[HistoryRow]) -> Columns:
    """The history in memory, from its lines."""
    columns = Columns()
    for row in rows:
        if row.kind == "step":
            columns.add_step(row.values)
        else:
            columns.add_evaluation(row.step, row.values)
    return columns


def _newest_checkpoint(spec: RunSpec) -> Path | None:
    folder = Path(spec.folder)
    try:
        found = find_checkpoint(folder, wants=lambda _: ())[0].folder
    except ArgumentError as error:
        log.info("no checkpoint of this run to go on from: %s", error)
        return None if spec.resumed is None else Path(spec.resumed.folder)
    remove_torn(found.parent)
    return found


def _rewrite_history(folder: Path, columns: Columns, *, started: float) -> None:
    """Leave out the steps that are done again."""
    with RunFolder(folder) as files:
        files.replace_history(rows_of(columns, time=started))
