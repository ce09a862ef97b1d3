"""A master copy from the journal of a hub that died."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dnb.hub.parameters.durability import UpdateLog, remove_segments
from dnb.hub.parameters.journal import Journal, LastCommit, State, Unrecoverable
from dnb.hub.parameters.master import Master
from dnb.job import Job
from dnb.protocol.memory import SegmentRef
from dnb.protocol.run import RunSpec
from dnb.transport.segments import open_segment


def recover_master(
    job: Job, *, journal: SegmentRef, folders: Sequence[Path], prefix: str, spec: RunSpec | None = None
) -> tuple[Master, LastCommit]:
    """Restore the state after the last committed step, and keep the same journal from there on.

    The slabs of the hub that died are removed: those who write into them must have been told to stop.

    Args:
        job: unpacked anew, as the run began with it.
        journal: `Master.journal_ref` of the hub that died.
        folders: where segments may lie.
        prefix: of the segments' file names, as it was.
        spec: of the run, as of `Master`.

    Raises:
        Unrecoverable: that state cannot be had; nothing of it is left. After any other exception all of it is.
    """
    master: Master | None = None
    try:
        found = Journal(open_segment(journal))
        state = found.read()
        master = Master(
            job,
            folders=folders,
            prefix=prefix,
            clip_norm=state.clip_norm,
            parameters=state.parameters,
            num_threads=state.num_threads,
            spec=spec,
        )
        master.restore_freezing(state.toggled, state.frozen_on_engines)
        last = _recover(master, found, state)
        remove_segments(folders, prefix, but=master.segments)
    except (OSError, ValueError, KeyError, msgspec.MsgspecError) as error:
        _remove(master, folders, prefix)
        raise Unrecoverable(f"the journal is of no use: {type(error).__name__}: {error}") from error
    except Unrecoverable:
        _remove(master, folders, prefix)
        raise
    return master, last


def _recover(master: Master, journal: Journal, state: State) -> LastCommit:
    update_log = UpdateLog(master.held, journal, clip_norm=state.clip_norm, state=state)
    last = update_log.recover()
    master.go_on_with(update_log)
    return last


def _remove(master: Master | None, folders: Sequence[Path], prefix: str) -> None:
    if master is not None:
        master.close()
    remove_segments(folders, prefix, but=())
