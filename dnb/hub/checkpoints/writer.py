"""Checkpoints of a run that goes on: copied between two steps, written by a thread, kept by policy."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from dnb.errors import ArgumentError
from dnb.hub.checkpoints.format import MANIFEST_FILE, TENSOR_FILES, Disk, Manifest, remove_checkpoint, step_folder
from dnb.hub.checkpoints.news import CheckpointNews, Tell
from dnb.hub.checkpoints.signing import Signer
from dnb.hub.checkpoints.state_copy import RunProgress, StateCopier
from dnb.hub.checkpoints.tensor_files import TensorBuffer
from dnb.hub.checkpoints.tickets import CheckpointTickets
from dnb.hub.checkpoints.user_objects import Sources
from dnb.hub.checkpoints.writer_thread import CheckpointThread, PendingCheckpoint, WriteResult
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.hub.parameters.master import Master
from dnb.planning.checkpoint_policy import Retention, read_goal
from dnb.protocol.client_messages import CheckpointState
from dnb.protocol.run import CheckpointPolicy, RunSpec
from dnb.transport.segments import megabytes
from dnb.transport.system.failures import describe_error

log = logging.getLogger(__name__)

# How long the end of a run is held back for its last checkpoint.
FINISH_SECONDS = 600.0
# How long a hub that ends waits for the one being written.
CLOSE_SECONDS = 10.0
# Beside the tensors: checkpoint.json, folders.
MARGIN_BYTES = 1 << 18

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Checkpointer:
    """Writes the checkpoints of one run; only `take` costs the run time, a copy in memory.

    Args:
        spec: of the run.
        frames: as the client signed them.
        master: whose state is kept.
        columns: the history.
        place: how far the run has come; asked between two steps.
        tell: adds an event to the run.
        disk: where checkpoints are written.
        generation: how many hubs the run had before: no ticket has the number of one of theirs.
        signer: signs them for this user.
    """

    def __init__(
        self,
        spec: RunSpec,
        frames: Sequence[bytes],
        master: Master,
        columns: HistoryColumns,
        *,
        place: Callable[[], RunProgress],
        tell: Tell,
        disk: Disk | None = None,
        generation: int = 0,
        signer: Signer | None = None,
    ) -> None:
        self._spec = spec
        self._place = place
        self._copier = StateCopier(master, columns)
        sources = Sources(frames, spec)
        self._thread = CheckpointThread(sources, disk=disk or Disk(), signer=signer or Signer())
        self._news = CheckpointNews(tell)
        self._tickets = CheckpointTickets(spec.name, first=generation << 32)
        self._retention = _retention(spec.checkpoints)
        self._buffers: dict[str, TensorBuffer] = {}
        self._is_due = False
        self._is_record = False  # what is due is the best so far: it waits in memory rather than being left out
        # The step whose turn came too early; reported once another step has taken its place.
        self._left_out: int | None = None
        self._waiting: PendingCheckpoint | None = None
        self._last_taken = (-1, -1)
        self._ended: float | None = None
        self.is_torn = False  # the optimizer failed in the middle of an update

    # when

    def is_due(self, kind: str, step: int, values: Mapping[str, float], *, owes_evaluation: bool) -> bool:
        """Return True if `take` is to be called now that a step or an evaluation was committed.

        Args:
            kind: "step" or "evaluation".
            step: that was committed, or evaluated.
            values: what was measured.
            owes_evaluation: an evaluation of this very step follows, and the checkpoint waits for it.
        """
        self.is_torn = False
        if self._left_out is not None and step > self._left_out:
            self._news.tell_left_out(self._left_out)
            self._left_out = None
        if self._retention is not None and not owes_evaluation:
            self._is_record = kind == "evaluation" and self._retention.is_record(dict(values))
            self._is_due = self._is_due or self._is_record or self._retention.is_due(step)
        return self._is_due or bool(self._tickets)

    def go_on_with(self, spec: RunSpec) -> None:
        """Write the run's changed numbers into later checkpoints."""
        self._spec = spec

    def ask(self, path: Path | None) -> CheckpointState:
        """Ask for a checkpoint besides those of the policy.

        Raises:
            ArgumentError: it cannot be put there, or the state cannot be kept.
        """
        if self.is_torn:
            raise ArgumentError("the run failed in the middle of an update, so that its state cannot be kept")
        if path is not None:
            check_target(path)
        return self._tickets.ask(path)

    def state_of(self, ticket: int) -> CheckpointState:
        """Return the state of a request.

        Raises:
            ArgumentError: there was no such request.
        """
        self.collect()
        return self._tickets.state_of(ticket)

    def replace_functions(self, pickled: bytes) -> None:
        """Keep another step or loss function in every later checkpoint."""
        self._thread.sources.replace_functions(pickled)

    def tick(self, *, is_still: bool) -> None:
        """Look after the thread; serve requests, if no commit will come that does it."""
        self.collect()
        if not is_still or self._thread.is_busy:
            return
        if self._left_out is not None:  # the state of its step is still there, and there is time now
            self._is_due, self._left_out = True, None
        if self._is_due or self._tickets:
            self.take()

    @property
    def is_finishing(self) -> bool:
        """True if the run has ended, and its last checkpoint is not durable yet."""
        return self._is_unwritten and time.monotonic() - (self._ended or 0.0) < FINISH_SECONDS

    @property
    def _is_unwritten(self) -> bool:
        return self._ended is not None and (self._thread.is_busy or self._is_due)

    @property
    def shortfall(self) -> str:
        """In words, if the run has ended and its last checkpoint is not durable; else empty."""
        if not self._is_unwritten or self._ended is None:
            return ""
        seconds = time.monotonic() - self._ended
        return f"the last checkpoint, of step {self._place().step}, is not whole after {seconds:.3g} s"

    def end(self) -> None:
        """Keep the last state of a run that has ended, if it keeps any."""
        self._ended = time.monotonic()
        self._is_due = False
        place = self._place()
        first_step = 0 if self._spec.resumed is None else self._spec.resumed.step
        is_new = (place.step, place.evaluated) != self._last_taken and place.step > first_step
        left_out, self._left_out = self._left_out, None
        if self._retention is not None and is_new and not self.is_torn:
            self._is_due = True
        elif left_out is not None:
            self._news.tell_left_out(left_out)
        self.tick(is_still=True)
        if not self._thread.is_busy and not self._is_due:
            self._thread.sources.forget_data()

    def close(self) -> None:
        """Wait for what is yet to be written, but not for ever: what is not whole by then is left aside."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_busy and time.monotonic() < deadline:
            self._thread.join(max(deadline - time.monotonic(), 0.0))
            self.tick(is_still=True)  # the last one may have waited for the one before
        if not self._thread.is_busy:
            self._thread.sources.close()

    # copying

    def take(self) -> None:
        """Copy the state as it is between two steps, and let it be written.

        While another one is written it is left out; only the best so far waits for its turn.
        """
        self.collect()
        if self._thread.is_busy and not (self._is_due and self._is_record):
            self._skip()
            return
        if not self._is_due and not self._tickets:
            return  # served already
        place = self._place()
        own = step_folder(Path(self._spec.folder), place.step)
        path, tickets = self._tickets.take(is_own=self._is_due)
        target = path or own
        is_of_policy, self._is_due = self._is_due, False
        if tickets and self._is_there(target, place):
            self._settle_as_there(target, tickets, place.step)
            return
        buffers = (
            self._buffers
            if self._buffers and not self._thread.is_busy
            else {name: TensorBuffer() for name in TENSOR_FILES}
        )
        try:
            manifest, extra = self._copier.copy(self._spec, place, buffers)
        except BaseException as error:  # noqa: BLE001 - state_dict of a user's optimizer may raise anything
            failure = describe_error(error)
            self._fail(tickets, place.step, "checkpoint", f"{failure.kind}: {failure.message}", error)
            return
        if target == own:
            self._last_taken = (place.step, place.evaluated)
            self._left_out = None
        if self._waiting is not None:  # a better one takes its place, and serves its requests
            tickets += self._waiting.tickets
        needed = sum(buffer.num_bytes for buffer in buffers.values()) + self._thread.sources.pending_bytes
        checkpoint = PendingCheckpoint(target, manifest, buffers, tickets, is_of_policy, needed + MARGIN_BYTES, extra)
        if self._thread.is_busy:
            self._waiting = checkpoint
        else:
            self._write(checkpoint)

    def _skip(self) -> None:
        if self._is_due and self._ended is None:
            self._is_due = False
            self._left_out = self._place().step

    def _is_there(self, target: Path, place: RunProgress) -> bool:
        is_own = target == step_folder(Path(self._spec.folder), place.step)
        is_same = self._last_taken == (place.step, place.evaluated)
        try:
            return is_own and is_same and (target / MANIFEST_FILE).exists()
        except OSError:  # it is written again, and what is wrong with the folder is reported then
            return False

    def _settle_as_there(self, target: Path, tickets: Sequence[int], step: int) -> None:
        if self._retention is not None:
            self._retention.release(step)
        self._tickets.settle(tickets, CheckpointState(ticket=0, state="durable", path=str(target), step=step))

    # writing

    def _write(self, checkpoint: PendingCheckpoint) -> None:
        self._buffers = checkpoint.buffers
        self._thread.start(checkpoint)

    def collect(self) -> None:
        """Take over what the thread has done."""
        result = self._thread.collect()
        if result is None:
            return
        if result.error is None:
            self._succeed(result)
        else:
            self._explain(result.checkpoint, result.error)
        if self._waiting is not None:
            checkpoint, self._waiting = self._waiting, None
            self._write(checkpoint)
        elif self._retention is None:
            self._buffers = {}  # as large as model and optimizer: not kept for a request that may not come
        if self._ended is not None and not self._thread.is_busy and not self._is_due and not self._tickets:
            self._thread.sources.forget_data()

    def _succeed(self, result: WriteResult) -> None:
        checkpoint = result.checkpoint
        step = checkpoint.manifest.step
        if checkpoint.is_of_policy and self._retention is not None:
            gone = self._retention.add(step, _measured_at(checkpoint.manifest))
            if checkpoint.tickets:
                self._retention.release(step)
            self._remove(gone)
        self._news.tell_written(result, signer_fault=self._thread.signer_fault)
        self._tickets.settle(
            checkpoint.tickets,
            CheckpointState(ticket=0, state="durable", path=str(checkpoint.target), step=step),
        )

    def _remove(self, steps: Sequence[int]) -> None:
        for step in steps:
            folder = step_folder(Path(self._spec.folder), step)
            try:
                remove_checkpoint(folder)
            except OSError as error:
                log.warning("the old checkpoint %s is not removed: %s", folder, error)

    def _explain(self, checkpoint: PendingCheckpoint, error: BaseException) -> None:
        step = checkpoint.manifest.step
        if not isinstance(error, OSError):
            failure = describe_error(error)
            self._fail(checkpoint.tickets, step, "checkpoint", f"{failure.kind}: {failure.message}", error)
            return
        free = self._thread.free_space(checkpoint.target)
        needed = megabytes(checkpoint.needed_bytes)
        text = f"{checkpoint.target} cannot be written ({error.strerror}): {needed} needed, {free} free"
        self._fail(checkpoint.tickets, step, "disk", text, error)

    def _fail(
        self,
        tickets: Sequence[int],
        step: int,
        kind: Literal["checkpoint", "disk"],
        reason: str,
        error: BaseException,
    ) -> None:
        self._last_taken = (-1, -1)
        text = self._news.tell_failure(step, kind, reason, error, is_last=self._ended is not None)
        named = "SpaceError" if isinstance(error, OSError) and error.errno in _FULL else "ArgumentError"
        failed = CheckpointState(ticket=0, state="failed", error=named, message=text, step=step)
        self._tickets.settle(tickets, failed)


def _measured_at(manifest: Manifest) -> dict[str, float]:
    return {name: float(value) for name, value in manifest.metrics.items()}


def check_target(path: Path) -> None:
    """Refuse to put a checkpoint where something else is.

    Raises:
        ArgumentError: a file, or a folder that holds something other than a checkpoint.
    """
    try:
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
        is_taken = not is_free and not (path / MANIFEST_FILE).exists()
    except OSError as error:
        raise ArgumentError(f"no checkpoint can be put at {path}: {error.strerror}") from error
    except ValueError as error:  # such as a NUL in it
        raise ArgumentError(f"no checkpoint can be put at {str(path)!r}: {error}") from error
    if is_taken:
        raise ArgumentError(
            f"{path} exists and is not a checkpoint, so it is not overwritten: name a new folder, or an empty one"
        )


def _retention(policy: CheckpointPolicy | None) -> Retention | None:
    if policy is None:
        return None
    goal = None if policy.best is None else read_goal(policy.best)
    return Retention(every=policy.every, keep=policy.keep, goal=goal)
