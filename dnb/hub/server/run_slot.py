"""The run of a pool: at most one; it is asked for by its name, and outlives its hub by what the hub leaves of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from dnb.errors import ArgumentError, DnbError, HubError, RunError
from dnb.hub.handover import (
    LOST_FILE,
    RUN_FILE,
    STATS_FILE,
    RunHandover,
    StatsHandover,
    read_handover,
    remove_handover,
    write_handover,
)
from dnb.hub.hub_failures import Caution, Crash, Recorder, caution_after
from dnb.hub.server.no_run import NoRun
from dnb.protocol.base import Message
from dnb.protocol.client_messages import CheckpointState, GetCheckpoint, GetRun, GetState, JobFrames, TakeCheckpoint
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import Failure, RunSpec, RunStatus
from dnb.transport.segments import open_segment
from dnb.transport.system.failures import describe_error

if TYPE_CHECKING:  # torch takes seconds to import: the sockets are bound first
    from dnb.hub.run.active_run import ActiveRun
    from dnb.hub.run.run_opening import RunOpener
    from dnb.hub.server.lost_run import LostRun

T = TypeVar("T")

log = logging.getLogger(__name__)


class RunSlot:
    """The run that the pool computes, or has computed last, or nothing; or what is left of one that hubs have died of.

    Args:
        folders: of the pool's memory.
        recorder: notes what the hub is about.
    """

    def __init__(self, *, folders: Sequence[Path], recorder: Recorder) -> None:
        self.held: ActiveRun | NoRun = NoRun()
        self.run_id: str | None = None  # of the run that is held
        self.lost: LostRun | None = None  # that hubs have died of
        self.changed = False  # since the next hub could last read it
        self._folders = folders
        self._recorder = recorder
        self._was_at_work = False

    # which run it is

    @property
    def name(self) -> str | None:
        """The name of the run, for people; None if there is none."""
        if not isinstance(self.held, NoRun):
            return self.held.spec.name
        return None if self.lost is None else self.lost.spec.name

    @property
    def status(self) -> RunStatus | None:
        """The status of the run, for people; None if there is none."""
        if not isinstance(self.held, NoRun):
            return self.held.status
        return None if self.lost is None else self.lost.status

    @property
    def active_name(self) -> str | None:
        """The name of the run while it may still change; None: none may."""
        return self.name if self.held.is_active else None

    def has(self, run_id: str) -> bool:
        """Return whether a run was submitted already, perhaps to the hub before, which died before it said so."""
        return run_id == self.run_id or (self.lost is not None and run_id == self.lost.spec.id)

    def named(self, name: str) -> ActiveRun:
        """Return the run of a name.

        Raises:
            HubError: it is not there, or hubs have died of it.
        """
        if self.lost is not None and self.lost.spec.name == name:
            raise HubError(f"run {name!r} is {self.lost.status}: {self.lost.error}")
        if isinstance(self.held, NoRun) or self.held.spec.name != name:
            raise HubError(f"the hub does not hold a run {name!r}: %dtrain status says which it holds")
        return self.held

    def _active(self, name: str, verb: str) -> ActiveRun:
        run = self.named(name)
        if not run.is_active:
            raise ArgumentError(f"run {name!r} is {_standing(run)}: there is nothing to {verb}")
        return run

    # another run

    def clear(self) -> None:
        """Let go of the run before, and of what the next hub would find of it.

        Raises:
            ArgumentError: it is not over.
        """
        if not isinstance(self.held, NoRun):
            if not self.held.is_over:
                raise ArgumentError(_still_active(self.held))
            self.held.close()
            self.held, self.run_id = NoRun(), None
        self.lost = None
        self._forget_handovers()

    def hold(self, run: ActiveRun, *, step: int) -> None:
        """Hold a run that is about to start after a step."""
        self.held, self.run_id = run, run.spec.id
        self.changed = True
        self._recorder.hold(run.spec.id, step=step)
        self.note_work()

    def take_over(self, opener: RunOpener, crashes: Sequence[Crash], *, engines: Sequence[EngineFacts]) -> None:
        """Go on with what the hub before has left.

        Args:
            opener: makes the run.
            crashes: how hubs have ended.
            engines: those that are to come back.
        """
        handover = read_handover(self._folders, RUN_FILE, RunHandover)
        if handover is not None:
            self._take_over_run(handover, crashes, opener=opener, engines=engines)
            return
        from dnb.hub.server.lost_run import LostRun

        self.lost = read_handover(self._folders, LOST_FILE, LostRun)

    def _take_over_run(
        self, handover: RunHandover, crashes: Sequence[Crash], *, opener: RunOpener, engines: Sequence[EngineFacts]
    ) -> None:
        """Go on with the run, unless hubs have died of it: then it has failed.

        An exception ends this hub, too, and the next one tries again: in the end that makes it cautious.
        """
        try:
            spec = opener.verified_spec(handover.frames)
        except (DnbError, ValueError, msgspec.MsgspecError):
            log.exception("what is left of the run is of no use")
            self._forget_handovers()
            return
        self._recorder.hold(spec.id, step=crashes[-1].step if crashes else 0)
        caution = caution_after(crashes)
        resume = partial(self._resume, opener, handover, spec, engines=engines)
        if caution is Caution.NONE:
            resume(reason=crashes[-1].reason if crashes else "")
            return
        error, traceback = _verdict(crashes), crashes[-1].traceback
        if caution is Caution.FAIL:
            try:
                resume(failure=Failure(kind="HubError", message=error, traceback=traceback))
                return
            except Exception:  # whatever it is: without the run, the pool can still be used
                log.exception("the run cannot be taken over")
        self._lose(spec, error=error, traceback=traceback)

    def _resume(
        self,
        opener: RunOpener,
        handover: RunHandover,
        spec: RunSpec,
        *,
        engines: Sequence[EngineFacts],
        reason: str = "",
        failure: Failure | None = None,
    ) -> None:
        run = opener.reopen(handover, spec, engines=engines, reason=reason, failure=failure)
        self.hold(run, step=run.step)
        run.start()

    def _lose(self, spec: RunSpec, *, error: str, traceback: str) -> None:
        from dnb.hub.server.lost_run import lose

        self.held, self.run_id = NoRun(), None
        self.lost = lose(spec, error=error, remote_traceback=traceback, folders=self._folders)
        self._forget_handovers()
        write_handover(self._folders, LOST_FILE, self.lost)

    # what the next hub will find

    def write_handover(self) -> None:
        """Keep what was submitted, if it is not kept as it is now."""
        if self.changed and not isinstance(self.held, NoRun):
            self.changed = not write_handover(self._folders, RUN_FILE, self.held.handover)

    def write_stats(self) -> None:
        """Keep the accounts of engines that are gone."""
        if not isinstance(self.held, NoRun):
            write_handover(self._folders, STATS_FILE, StatsHandover(departed=self.held.departed))

    def _forget_handovers(self) -> None:
        for name in (RUN_FILE, STATS_FILE, LOST_FILE):
            remove_handover(self._folders, name)

    def note_work(self) -> None:
        """Let whoever asks why this hub has ended know what it was about."""
        is_at_work = self.held.status in ("starting", "running")
        if is_at_work != self._was_at_work:
            self._was_at_work = is_at_work
            self._recorder.set_at_work(is_at_work)
        if self.held.has_advanced:
            self._recorder.report_healthy()

    # what clients ask for

    def control(self, name: str, verb: Literal["pause", "resume", "stop"]) -> None:
        """Pause, resume or stop the run of a name.

        Raises:
            ArgumentError: it is not in a state for that.
        """
        run = self.named(name)
        if verb == "pause" and _standing(run) != "running":
            raise ArgumentError(f"run {name!r} is {_standing(run)}, not running: there is nothing to pause")
        if verb == "resume" and run.status != "paused":
            raise ArgumentError(f"run {name!r} is {_standing(run)}, not paused: there is nothing to resume")
        run.ask(verb)

    def set_options(self, name: str, options: Mapping[str, float | None]) -> None:
        """Change numbers of the run of a name.

        Raises:
            ArgumentError: it has ended, or they cannot be changed.
        """
        self._active(name, "set").set(options)
        self.changed = True

    def replace_functions(self, name: str, pickled: bytes, signature: bytes) -> None:
        """Give the run of a name another step or loss function, whose signature was verified.

        Raises:
            ArgumentError: it is not paused.
        """
        run = self._active(name, "mend")
        if run.status != "paused":
            raise ArgumentError(f"run {name!r} is {run.status}, not paused: pause it before it gets other functions")
        run.replace_functions(pickled, signature)
        self.changed = True

    def state(self, request: GetRun, *, heartbeats: Mapping[int, float], num_owed: int) -> tuple[Message, list[bytes]]:
        """Return what a viewer does not have yet.

        Args:
            request: with what it has.
            heartbeats: seconds since each living engine was heard.
            num_owed: engines that the pool lacks.
        """
        if self.lost is not None and self.lost.spec.name == request.run:
            return read(partial(self.lost.state, request))
        run = self.named(request.run)
        run.catch_up()
        return read(partial(run.state, request, heartbeats=heartbeats, num_owed=num_owed))

    def tensors(self, request: GetState) -> tuple[Message, Sequence[Any]]:
        """Return parameters, and the states that are asked for."""
        return read(partial(_tensors_of, self.named(request.run), request))

    def gradients(self, name: str) -> tuple[Message, list[bytes]]:
        """Return what was seen of the gradients of the run of a name."""
        return read(self.named(name).gradients)

    def job(self, name: str) -> tuple[Message, Sequence[Any]]:
        """Return what was sent for the run of a name."""
        return JobFrames(), read(partial(_sent, self.named(name)))

    def serve_checkpoint(self, request: TakeCheckpoint | GetCheckpoint) -> CheckpointState:
        """Let a checkpoint be written, or return how one stands."""
        run = self.named(request.run)
        if isinstance(request, GetCheckpoint):
            return run.checkpoint_state(request.ticket)
        return run.take_checkpoint(None if request.path is None else Path(request.path))

    def stop(self) -> None:
        """Let the run end, as the pool does."""
        if not isinstance(self.held, NoRun) and self.held.is_active:
            self.held.ask("stop")


def read(look: Callable[[], T]) -> T:
    """Look at something without changing it: what goes wrong then ends nothing, the user's own code included.

    Raises:
        RunError: with what went wrong.
    """
    try:
        return look()
    except DnbError:
        raise
    except BaseException as error:
        log.exception("a question cannot be answered")
        failure = describe_error(error)
        raise RunError(f"{failure.kind}: {failure.message}", remote_traceback=failure.traceback) from error


def _verdict(crashes: Sequence[Crash]) -> str:
    """Say why a run has failed, for people."""
    last = crashes[-1]
    number = sum((crash.cause, crash.step) == (last.cause, last.step) for crash in crashes)
    times = f"{number} times" if number > 1 else "again and again"
    return f"the hub died {times} in step {last.step + 1}, and does not go on with it: {last.reason}"


def _tensors_of(run: ActiveRun, request: GetState) -> tuple[Message, Sequence[Any]]:
    from dnb.hub.checkpoints.contents import named_tensors
    from dnb.transport.state_trees import encode_state, put_together, take_items_apart

    own, tied, _ = named_tensors(run.master)
    state: dict[str, Any] = {
        "names": [*own, *tied],  # of a state_dict
        "tied": tied,
        "parameters": dict(run.master.model.named_parameters()),
        "buffers": dict(run.master.model.named_buffers()),
        "loose": run.master.states.as_tensor(),
        "trains": run.master.freezing.now,
    }
    if request.optimizer:
        state["optimizer"] = run.master.optimizer.state_dict()
    if request.scheduler:
        scheduler = run.master.scheduler
        apart = None if scheduler is None else take_items_apart(scheduler.state_dict(), root="scheduler")
        state["scheduler"] = None if apart is None else put_together(*apart[:2])
    if request.kept:
        state["kept"] = run.master.functions.read()
    return encode_state(state)


def _sent(run: ActiveRun) -> list[Any]:
    """Return the frames as the client signed them, and the memory in which the job's tensors came."""
    segment = run.spec.job.segment
    return [*run.frames, b"" if segment is None else open_segment(segment).memory]


def _standing(run: ActiveRun) -> str:
    """Say how a run stands, for people."""
    return run.status if run.is_active or run.is_over else "writing its last checkpoint"


def _still_active(run: ActiveRun) -> str:
    return (
        f"run {run.spec.name!r} is {_standing(run)}: wait for it with %dtrain wait, or end it with %dtrain stop, "
        "before the next fit"
    )
