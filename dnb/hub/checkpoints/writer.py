"""Checkpoints of a run that goes on: copied between two steps, written by a thread, kept by policy."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

import msgspec

from dnb.errors import ArgumentError
from dnb.hub.checkpoints.contents import extra_file_of, extra_of, history_of, in_json, named_tensors, state_of, versions
from dnb.hub.checkpoints.format import (
    FORMAT,
    HISTORY_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Disk,
    Manifest,
    facts_of,
    remove_checkpoint,
    step_folder,
    write_checkpoint,
)
from dnb.hub.checkpoints.signing import Signer
from dnb.hub.checkpoints.tensor_files import TensorBuffer
from dnb.hub.checkpoints.user_objects import Sources
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.hub.parameters.master import Master
from dnb.planning.checkpoint_policy import Retention, read_goal
from dnb.protocol.client_messages import CheckpointState
from dnb.protocol.run import CheckpointPolicy, RunSpec
from dnb.transport.segments import megabytes
from dnb.transport.state_trees import take_apart
from dnb.transport.system.failures import describe_error
from dnb.transport.system.process_settings import without_variables

log = logging.getLogger(__name__)

# How long the end of a run is held back for its last checkpoint.
FINISH_SECONDS = 600.0
# How long a hub that ends waits for the one being written.
CLOSE_SECONDS = 10.0
# Beside the tensors: checkpoint.json, folders.
MARGIN_BYTES = 1 << 18

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Tell = Callable[[Literal["checkpoint", "disk"], str, int], None]  # kind, text, step


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run has come."""

    step: int
    evaluated: int
    elapsed_seconds: float


@dataclass(frozen=True, slots=True)
class _WriteJob:
    """One checkpoint that is being written."""

    target: Path
    manifest: Manifest
    buffers: dict[str, TensorBuffer]
    tickets: tuple[int, ...]
    is_of_policy: bool
    needed_bytes: int
    extra: bytes = b""


@dataclass(frozen=True, slots=True)
class _WriteResult:
    """What became of it."""

    job: _WriteJob
    error: BaseException | None
    num_bytes: int = 0
    seconds: float = 0.0


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
        self._master = master
        self._columns = columns
        self._place = place
        self._tell = tell
        self._disk = disk or Disk()
        self._signer = signer or Signer()
        self._is_unsigned_told = False
        self._sources = Sources(frames, spec)
        self._retention = _retention(spec.checkpoints)
        self._first_step = 0 if spec.resumed is None else spec.resumed.step
        self._tensors = named_tensors(master)
        self._buffers: dict[str, TensorBuffer] = {}
        self._is_due = False
        self._is_record = False  # what is due is the best so far: it waits in memory rather than being left out
        self._left_out: int | None = (
            None  # the step whose turn came too early; told once another step has taken its place
        )
        self._waiting: _WriteJob | None = None
        self._asked: dict[int, Path | None] = {}  # by ticket; None: in the run's own folder
        self._tickets: dict[int, CheckpointState] = {}
        self._first_ticket = generation << 32
        self._thread: threading.Thread | None = None
        self._outcomes: SimpleQueue[_WriteResult] = SimpleQueue()
        self._last_taken = (-1, -1)
        self._faults: set[str] = set()  # that were told
        self._ended: float | None = None
        self.is_torn = False  # the optimizer failed in the middle of an update

    # when

    def is_due(self, kind: str, step: int, values: Mapping[str, float], *, owes_evaluation: bool) -> bool:
        """Whether `take` is to be called now that a step or an evaluation was committed.

        Args:
            kind: "step" or "evaluation".
            step: that was committed, or evaluated.
            values: what was measured.
            owes_evaluation: an evaluation of this very step follows, and the checkpoint waits for it.
        """
        self.is_torn = False
        if self._left_out is not None and step > self._left_out:
            self._tell_left_out(self._left_out)
        if self._retention is not None and not owes_evaluation:
            self._is_record = kind == "evaluation" and self._retention.is_record(dict(values))
            self._is_due = self._is_due or self._is_record or self._retention.is_due(step)
        return self._is_due or bool(self._asked)

    def go_on_with(self, spec: RunSpec) -> None:
        """The run's numbers have changed: later checkpoints hold these."""
        self._spec = spec

    def ask(self, path: Path | None) -> CheckpointState:
        """A checkpoint is wished for, besides those of the policy.

        Raises:
            ArgumentError: it cannot be put there, or the state cannot be kept.
        """
        if self.is_torn:
            raise ArgumentError("the run failed in the middle of an update, so that its state cannot be kept")
        if path is not None:
            check_target(path)
        ticket = self._first_ticket + len(self._tickets) + 1
        self._asked[ticket] = path
        self._tickets[ticket] = CheckpointState(ticket=ticket, state="waiting")
        return self._tickets[ticket]

    def state_of(self, ticket: int) -> CheckpointState:
        """What became of a wish.

        Raises:
            ArgumentError: there was no such wish.
        """
        self.collect()
        if ticket not in self._tickets:
            raise ArgumentError(f"no checkpoint of run {self._spec.name!r} was asked for with the number {ticket}")
        return self._tickets[ticket]

    def replace_functions(self, pickled: bytes) -> None:
        """Another step or loss function belongs to every later checkpoint."""
        self._sources.replace_functions(pickled)

    def tick(self, *, is_still: bool) -> None:
        """Look after the thread; serve wishes, if no commit will come that does it."""
        self.collect()
        if not is_still or self._thread is not None:
            return
        if self._left_out is not None:  # the state of its step is still there, and there is time now
            self._is_due, self._left_out = True, None
        if self._is_due or self._asked:
            self.take()

    @property
    def is_finishing(self) -> bool:
        """Whether the run has ended, and its last checkpoint is not durable yet."""
        return self._is_unwritten and time.monotonic() - (self._ended or 0.0) < FINISH_SECONDS

    @property
    def _is_unwritten(self) -> bool:
        return self._ended is not None and (self._thread is not None or self._is_due)

    @property
    def shortfall(self) -> str:
        """In words, if the run has ended and its last checkpoint is not durable; else empty."""
        if not self._is_unwritten or self._ended is None:
            return ""
        seconds = time.monotonic() - self._ended
        return f"the last checkpoint, of step {self._place().step}, is not whole after {seconds:.3g} s"

    def end(self) -> None:
        """The run has ended: keep its last state, if it keeps any."""
        self._ended = time.monotonic()
        self._is_due = False
        place = self._place()
        is_new = (place.step, place.evaluated) != self._last_taken and place.step > self._first_step
        left_out, self._left_out = self._left_out, None
        if self._retention is not None and is_new and not self.is_torn:
            self._is_due = True
        elif left_out is not None:
            self._tell_left_out(left_out)
        self.tick(is_still=True)
        if self._thread is None and not self._is_due:
            self._sources.forget_data()

    def close(self) -> None:
        """Wait for what is yet to be written, but not for ever: what is not whole by then is left aside."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread is not None and time.monotonic() < deadline:
            self._thread.join(max(deadline - time.monotonic(), 0.0))
            self.tick(is_still=True)  # the last one may have waited for the one before
        if self._thread is None:
            self._sources.close()

    # copying

    def take(self) -> None:
        """Copy the state as it is between two steps, and let it be written.

        While another one is written it is left out; only the best so far waits for its turn.
        """
        self.collect()
        if self._thread is not None and not (self._is_due and self._is_record):
            self._skip()
            return
        if not self._is_due and not self._asked:
            return  # served already
        place = self._place()
        target, tickets = self._next_target(place.step)
        is_of_policy, self._is_due = self._is_due, False
        if tickets and self._is_there(target, place):
            self._settle_as_there(target, tickets, place.step)
            return
        buffers = self._buffers if self._buffers and self._thread is None else {name: TensorBuffer() for name in _FILES}
        try:
            manifest = self._copy(place, buffers)
            extra = extra_file_of(self._master)
        except BaseException as error:  # noqa: BLE001 - state_dict of a user's optimizer may raise anything
            failure = describe_error(error)
            self._fail(tickets, place.step, "checkpoint", f"{failure.kind}: {failure.message}", error)
            return
        if target == step_folder(Path(self._spec.folder), place.step):
            self._last_taken = (place.step, place.evaluated)
            self._left_out = None
        if self._waiting is not None:  # a better one takes its place, and fulfils its wishes
            tickets += self._waiting.tickets
        needed = sum(buffer.num_bytes for buffer in buffers.values()) + self._sources.pending_bytes
        job = _WriteJob(target, manifest, buffers, tickets, is_of_policy, needed + MARGIN_BYTES, extra)
        if self._thread is None:
            self._write(job)
        else:
            self._waiting = job

    def _skip(self) -> None:
        if self._is_due and self._ended is None:
            self._is_due = False
            self._left_out = self._place().step

    def _tell_left_out(self, step: int) -> None:
        self._left_out = None
        text = f"the checkpoint of step {step} was left out, as the one before was still being written"
        log.info(text)
        self._tell_once("slow", "checkpoint", text, step)

    def _next_target(self, step: int) -> tuple[Path, tuple[int, ...]]:
        """Where the next one goes, and the wishes that it fulfils."""
        own = step_folder(Path(self._spec.folder), step)
        paths = [None] if self._is_due else list(self._asked.values())[:1]
        tickets = tuple(ticket for ticket, path in self._asked.items() if path in paths)
        for ticket in tickets:
            del self._asked[ticket]
            self._tickets[ticket] = CheckpointState(ticket=ticket, state="writing")
        return paths[0] or own, tickets

    def _is_there(self, target: Path, place: RunProgress) -> bool:
        is_own = target == step_folder(Path(self._spec.folder), place.step)
        is_same = self._last_taken == (place.step, place.evaluated)
        try:
            return is_own and is_same and (target / MANIFEST_FILE).exists()
        except OSError:  # it is written again, and what is wrong with the folder is told then
            return False

    def _settle_as_there(self, target: Path, tickets: Sequence[int], step: int) -> None:
        if self._retention is not None:
            self._retention.release(step)
        self._settle(tickets, CheckpointState(ticket=0, state="durable", path=str(target), step=step))

    def _copy(self, place: RunProgress, buffers: dict[str, TensorBuffer]) -> Manifest:
        states = self._master.states
        own, tied, others = named_tensors(self._master) if states.version else self._tensors
        extra, extra_tensors = extra_of(self._master)
        optimizer, optimizer_tensors, _ = state_of(self._master.optimizer, "optimizer", is_strict=True)
        scheduler, scheduler_tensors, left_out = state_of(self._master.scheduler, "scheduler", is_strict=False)
        kept, kept_tensors = take_apart(self._master.functions.read(), root="kept")
        history, num_rows = history_of(self._columns)
        buffers[MODEL_FILE].fill(own, tied)
        in_optimizer = {**optimizer_tensors, **scheduler_tensors, **kept_tensors, **others, **extra_tensors}
        buffers[OPTIMIZER_FILE].fill(in_optimizer, {})
        buffers[HISTORY_FILE].fill(history, {})
        assert optimizer is not None
        return Manifest(
            digest="",
            format=FORMAT,
            name=self._spec.name,
            step=place.step,
            num_steps=self._spec.num_steps,
            evaluated=place.evaluated,
            num_history_rows=num_rows,
            time=time.time(),
            elapsed_seconds=place.elapsed_seconds,
            versions=versions(),
            metrics=in_json(self._measured(place.step)),
            parameters=facts_of(dict(self._master.model.named_parameters())),
            buffers=facts_of(dict(self._master.model.named_buffers())),
            tied=tied,
            optimizer=optimizer,
            scheduler=scheduler,
            left_out=left_out,
            spec=msgspec.structs.replace(self._spec, settings=without_variables(self._spec.settings)),
            files={},
            kept=kept or None,
            extra=extra,
            loose=tuple(states.now.buffers),
            empty=tuple(name for name, value in states.now.buffers.items() if value is None),
            transient=tuple(sorted(states.now.transient)),
            toggled=self._master.freezing.toggled,
            frozen_on_engines=tuple(sorted(self._master.freezing.on_engines)),
        )

    def _measured(self, step: int) -> dict[str, float]:
        measured = {name: values[-1] for name, values in self._columns.by_step.items() if values}
        for name, pairs in self._columns.by_evaluation.items():
            if pairs and pairs[-2] == step and name != "digest":
                measured[name] = pairs[-1]
        return measured

    # writing

    def _write(self, job: _WriteJob) -> None:
        self._buffers = job.buffers
        self._thread = threading.Thread(target=self._write_aside, args=(job,), name="dnb-checkpoint", daemon=True)
        self._thread.start()

    def _write_aside(self, job: _WriteJob) -> None:
        """In the thread: it touches only what was copied."""
        began = time.monotonic()
        try:
            free = self._disk.free_bytes(job.target.parent)
            if free < job.needed_bytes:  # the history needs the little there is
                raise OSError(errno.ENOSPC, "No space left on device")
            num_bytes = write_checkpoint(
                job.target,
                job.manifest,
                job.buffers,
                add_sources=lambda folder: self._sources.add_to(folder, self._disk),
                disk=self._disk,
                sign=self._signer.sign,
                extra=job.extra,
            )
        except BaseException as error:  # noqa: BLE001 - whatever it is, the run goes on, and says what it was
            self._outcomes.put(_WriteResult(job, error))
        else:
            self._outcomes.put(_WriteResult(job, None, num_bytes, time.monotonic() - began))

    def collect(self) -> None:
        """Take over what the thread has done."""
        try:
            outcome = self._outcomes.get_nowait()
        except Empty:
            return
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if outcome.error is None:
            self._succeed(outcome)
        else:
            self._explain(outcome.job, outcome.error)
        if self._waiting is not None:
            job, self._waiting = self._waiting, None
            self._write(job)
        elif self._retention is None:
            self._buffers = {}  # as large as model and optimizer: not kept for a wish that may not come
        if self._ended is not None and self._thread is None and not self._is_due and not self._asked:
            self._sources.forget_data()

    def _succeed(self, outcome: _WriteResult) -> None:
        job = outcome.job
        step = job.manifest.step
        if job.is_of_policy and self._retention is not None:
            gone = self._retention.add(step, self._measured_at(job.manifest))
            if job.tickets:
                self._retention.release(step)
            self._remove(gone)
        self._faults.clear()
        size = megabytes(outcome.num_bytes)
        self._tell("checkpoint", f"step {step} is in {job.target} ({size} in {outcome.seconds:.2g} s)", step)
        self._settle(job.tickets, CheckpointState(ticket=0, state="durable", path=str(job.target), step=step))
        if self._signer.fault and not self._is_unsigned_told:
            self._is_unsigned_told = True
            text = f"checkpoints are not signed: {self._signer.fault}; dnb.resume needs trust=True for their pickles"
            log.warning(text)
            self._tell("checkpoint", text, step)

    def _measured_at(self, manifest: Manifest) -> dict[str, float]:
        return {name: float(value) for name, value in manifest.metrics.items()}

    def _remove(self, steps: Sequence[int]) -> None:
        for step in steps:
            folder = step_folder(Path(self._spec.folder), step)
            try:
                remove_checkpoint(folder)
            except OSError as error:
                log.warning("the old checkpoint %s is not removed: %s", folder, error)

    def _explain(self, job: _WriteJob, error: BaseException) -> None:
        step = job.manifest.step
        if not isinstance(error, OSError):
            failure = describe_error(error)
            self._fail(job.tickets, step, "checkpoint", f"{failure.kind}: {failure.message}", error)
            return
        try:
            free = megabytes(self._disk.free_bytes(job.target.parent))
        except OSError:
            free = "unknown"
        needed = megabytes(job.needed_bytes)
        text = f"{job.target} cannot be written ({error.strerror}): {needed} needed, {free} free"
        self._fail(job.tickets, step, "disk", text, error)

    def _fail(
        self,
        tickets: Sequence[int],
        step: int,
        kind: Literal["checkpoint", "disk"],
        reason: str,
        error: BaseException,
    ) -> None:
        self._last_taken = (-1, -1)
        cause = f"{type(error).__name__} {error.errno if isinstance(error, OSError) else reason}"
        goes_on = "the run goes on, and " if self._ended is None else ""
        text = f"no checkpoint of step {step}: {reason}; {goes_on}earlier checkpoints stay"
        if self._ended is not None:
            self._faults.discard(cause)  # that the last one is missing is told in any case
        if cause not in self._faults:
            log.warning(text)
        self._tell_once(cause, kind, text, step)
        named = "SpaceError" if isinstance(error, OSError) and error.errno in _FULL else "ArgumentError"
        self._settle(tickets, CheckpointState(ticket=0, state="failed", error=named, message=text, step=step))

    def _tell_once(self, cause: str, kind: Literal["checkpoint", "disk"], text: str, step: int) -> None:
        if cause not in self._faults:
            self._faults.add(cause)
            self._tell(kind, text, step)

    def _settle(self, tickets: Sequence[int], state: CheckpointState) -> None:
        for ticket in tickets:
            self._tickets[ticket] = CheckpointState(
                ticket=ticket,
                state=state.state,
                path=state.path,
                step=state.step,
                error=state.error,
                message=state.message,
            )


_FILES = (MODEL_FILE, OPTIMIZER_FILE, HISTORY_FILE)


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
