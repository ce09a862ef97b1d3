"""Why hubs have ended, for those that outlive them: the supervisor, the next hub, and the user.

A hub keeps a small file in memory that its supervisor shares. Into it goes how many commits it has made, and, when it
ends by an exception, the traceback; the interpreter's own fault handler writes into it when a native call crashes. From
all crashes the next hub concludes how cautious it has to be with the run that it finds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import IO

import msgspec

from dnb.hub.guarded_calls import UserCodeError
from dnb.protocol.base import Record
from dnb.protocol.pool import HubRestart
from dnb.protocol.run import Failure
from dnb.transport.system.failures import MESSAGE_LENGTH, TRACEBACK_LENGTH, clean_text, describe_error

# A hub that has lived so long without having a run to advance is of use, too.
USEFUL_SECONDS = 2.0
# When so many hubs in a row have died before they were of any use, the next one fails the run that it finds, and keeps
# what was trained of it.
FAIL_DEATHS = 3
# If that one dies, too, the next one does not touch the run at all.
SHUN_DEATHS = 4
# And after so many the pool ends: the next one would die of the same.
MOST_DEATHS = 6
# Hubs that die of one cause in one step, whatever time that takes them. Whoever kills processes may do so often.
SAME_DEATHS, SAME_KILLS = 3, 6
# Crashes that are remembered.
NUM_KEPT = 8

_HEADER_BYTES = 4096
_COMMITS, _STEP, _AT_WORK, _USEFUL, _ENDED = range(5)
_RUN_OFFSET, _RUN_BYTES = 64, 128


class Caution(IntEnum):
    """The degree of caution with which a hub treats the run that it finds."""

    NONE = 0  # it goes on
    FAIL = 1  # it has failed: what was trained can still be had
    SHUN = 2  # it has failed, and nothing of it is opened


class Crash(Record, frozen=True):
    """One hub's unintended end."""

    cause: str  # the same for the same fault: "ValueError in _tick (service.py:700)", "SIGSEGV"
    reason: str  # for people
    traceback: str
    time: float  # seconds since the epoch
    lived_seconds: float
    num_commits: int
    step: int  # that was committed last
    run: str  # id of the run that it held
    was_at_work: bool  # on a run that was neither paused nor over
    was_healthy: bool


class Recorder:
    """A hub's side: notes how far it is. Made by the supervisor before it starts a hub.

    Args:
        descriptor: of the file, as another process has made it; None makes one.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _make_file() if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, _HEADER_BYTES)
        self._memory = mmap.mmap(self.descriptor, _HEADER_BYTES)
        self._words = memoryview(self._memory)[:_RUN_OFFSET].cast("q")
        self._stream: IO[bytes] | None = None

    # in the hub

    def begin(self) -> None:
        """Make this process, the hub, write its native crashes down, too."""
        self._stream = os.fdopen(os.dup(self.descriptor), "wb", buffering=0)
        faulthandler.enable(self._stream, all_threads=True)

    def count_commit(self, step: int) -> None:
        """Count a commit: of a step, or of an evaluation after it."""
        self._words[_COMMITS] += 1
        self._words[_STEP] = step

    def hold(self, run: str, *, step: int) -> None:
        """Record the run that the hub holds, and its step."""
        self._words[_STEP] = step
        packed = run.encode()[:_RUN_BYTES]
        self._memory[_RUN_OFFSET : _RUN_OFFSET + _RUN_BYTES] = packed.ljust(_RUN_BYTES, b"\0")

    def set_at_work(self, value: bool) -> None:
        """Record whether the run is to advance."""
        self._words[_AT_WORK] = value

    def report_healthy(self) -> None:
        """Record that the hub has been of use, so that its death is not one of those that lead nowhere."""
        self._words[_USEFUL] = 1

    def end_as_meant(self) -> None:
        """Record that the pool ends because somebody wants it to."""
        self._words[_ENDED] = 1

    def leave(self, error: BaseException) -> None:
        """Record the exception by which the hub ends."""
        place, error = (error.place, error.error) if isinstance(error, UserCodeError) else ("", error)
        failure = describe_error(error, place=", ".join(filter(None, (place, place_of(error)))))
        failure = msgspec.structs.replace(failure, whole="")  # it stays in memory as long as the pool lives
        os.lseek(self.descriptor, _HEADER_BYTES, os.SEEK_SET)
        os.write(self.descriptor, msgspec.json.encode(failure))

    # in the supervisor

    def reset(self) -> None:
        """Clear the record for another hub."""
        self._memory[:] = bytes(_HEADER_BYTES)
        os.ftruncate(self.descriptor, _HEADER_BYTES)
        os.lseek(self.descriptor, _HEADER_BYTES, os.SEEK_SET)

    @property
    def has_ended_as_meant(self) -> bool:
        """True if the hub has ended the pool."""
        return bool(self._words[_ENDED])

    def crash(self, code: int, *, lived_seconds: float) -> Crash:
        """Compose the record of a hub's end.

        Args:
            code: as `subprocess` counts.
            lived_seconds: it did.
        """
        size = os.fstat(self.descriptor).st_size - _HEADER_BYTES
        text = os.pread(self.descriptor, max(size, 0), _HEADER_BYTES)
        cause, reason, trace = _explain(code, text)
        run = self._memory[_RUN_OFFSET : _RUN_OFFSET + _RUN_BYTES].rstrip(b"\0").decode(errors="replace")
        return Crash(
            cause=cause,
            reason=reason,
            traceback=trace,
            time=time.time(),
            lived_seconds=lived_seconds,
            num_commits=self._words[_COMMITS],
            step=self._words[_STEP],
            run=run,
            was_at_work=bool(self._words[_AT_WORK]),
            was_healthy=bool(self._words[_USEFUL]) or lived_seconds > USEFUL_SECONDS,
        )


def place_of(error: BaseException) -> str:
    """Return the place where an exception was raised: "in _tick (service.py:700)"; empty if unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    last = frames[-1]
    return f"in {last.name} ({os.path.basename(last.filename)}:{last.lineno})"


def caution_after(crashes: Sequence[Crash]) -> Caution:
    """Return the caution with which the next hub treats the run that it finds.

    Deaths with progress between them make nobody cautious, however many there are.

    Args:
        crashes: of all hubs of a pool, in order.
    """
    num_useless = num_idle_deaths(crashes)
    if num_useless >= SHUN_DEATHS:
        return Caution.SHUN
    limit = SAME_KILLS if crashes and crashes[-1].cause == "SIGKILL" else SAME_DEATHS
    is_stuck = _count_same(crashes) >= limit
    return Caution.FAIL if num_useless >= FAIL_DEATHS or is_stuck else Caution.NONE


def num_idle_deaths(crashes: Sequence[Crash]) -> int:
    """Count the last hubs in a row that have died before they were of any use."""
    return _count_back(crashes, lambda crash: not crash.was_healthy and not crash.num_commits)


def restarts_of(crashes: Sequence[Crash]) -> tuple[HubRestart, ...]:
    """Return the restarts that these crashes have caused, as users see them."""
    return tuple(HubRestart(time=each.time, reason=each.reason, traceback=each.traceback) for each in crashes)


def _count_same(crashes: Sequence[Crash]) -> int:
    """Count the last hubs in a row that have died of one cause in one step of one run."""
    if not crashes or not crashes[-1].was_at_work:
        return 0
    last = crashes[-1]

    def is_like_it(crash: Crash) -> bool:
        return crash.was_at_work and (crash.cause, crash.run, crash.step) == (last.cause, last.run, last.step)

    return _count_back(crashes, is_like_it)


def _count_back(crashes: Sequence[Crash], holds: Callable[[Crash], bool]) -> int:
    number = 0
    for crash in reversed(crashes):
        if not holds(crash):
            break
        number += 1
    return number


def _explain(code: int, text: bytes) -> tuple[str, str, str]:
    """Return cause, reason, and traceback of an end."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        shown = clean_text(text.decode(errors="replace"), length=TRACEBACK_LENGTH)
        last = _last_line_of_fault(shown)
        return (f"{name} {last}".strip(), f"it was ended by {name}{f' {last}' if last else ''}", shown)
    try:
        failure = msgspec.json.decode(text, type=Failure)
    except (msgspec.MsgspecError, ValueError):
        return f"exit {code}", f"its process ended with code {code}, and nothing says why", ""
    message = clean_text(failure.message, length=MESSAGE_LENGTH // 4)
    place = f" ({failure.place})" if failure.place else ""
    return f"{failure.kind} {failure.place}", f"{failure.kind}: {message}{place}", failure.traceback


def _last_line_of_fault(text: str) -> str:
    """Return the place of the crashed thread, from the fault handler's text; empty if it wrote nothing."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("Current thread"):
            frame = next(lines, "").strip()  # File "optimizer.py", line 12 in step
            return f"in {frame.rpartition(' in ')[2]} ({_place_in(frame)})" if " in " in frame else ""
    return ""


def _place_in(frame: str) -> str:
    path, _, rest = frame.removeprefix('File "').partition('"')
    return f"{os.path.basename(path)}:{rest.removeprefix(', line ').partition(' ')[0]}"


def _make_file() -> int:
    with contextlib.suppress(AttributeError, OSError):  # Linux has it
        return os.memfd_create("dnb-hub")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
