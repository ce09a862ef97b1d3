"""The error tree: everything that dnb raises for a user to read.

DnbError
├── ArgumentError     a wrong argument: refused before any process starts (also a ValueError)
│   └── ShippingError an object that cannot be sent to the engines
├── PlanError         work that cannot be divided as asked
├── PoolError         a pool that cannot start, answer or be found
├── HubError          the hub does not answer, or refuses
├── SpaceError        no room for shared memory, or on disk
└── RunError          a run that failed; carries the engine's traceback
"""

from __future__ import annotations

import difflib
import linecache
import re
from collections.abc import Iterable
from pathlib import Path

_RED, _PLAIN = "\x1b[31m", "\x1b[39m"  # as IPython writes the class of an exception
_PACKAGE = Path(__file__).parent
_FRAME = re.compile(r'  File "(?P<path>[^"\n]*)", line (?P<line>\d+)')


class DnbError(Exception):
    """Base of all errors raised by dnb for a user to read.

    `except dnb.DnbError` catches each of them. What your own code raises on an engine is none: it pauses the run.
    """

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the message, as frames of dnb itself help nobody there."""
        return [f"{_RED}{type(self).__name__}{_PLAIN}: {self}"]


class ArgumentError(DnbError, ValueError):
    """An argument is wrong; nothing was started.

    Raised by every function and verb while it reads what it was given, and by the rehearsal: a misspelt word, a target
    of the wrong dtype, a loss that does not fit the model. The message says what to type in its place. Type that, and
    run the cell again: no engine has seen anything of it.
    """


class ShippingError(ArgumentError):
    """An object cannot be pickled, so the engines cannot have it.

    Raised by `fit` when model, loss, data or a callback holds an open file, a lock, a generator or a connection. The
    message names the part. Open it where it is used, as in `__getitem__` of the data set, or leave it out.
    """


class PlanError(DnbError):
    """The work cannot be divided over the engines as asked.

    Raised when a pipeline, tensor parallelism, a plan or a memory limit does not fit the model or the pool. The message
    says what is in the way: add engines (`%dtrain add 2`), ask for fewer stages, or leave `strategy` out.
    """


class PoolError(DnbError):
    """A pool cannot start, does not answer, or is not there.

    Raised by `start`, `attach` and everything that needs engines. `%dtrain start -n 2` starts a pool where none is;
    `%dtrain status` says what there is; `%dtrain doctor` examines ports, memory and folders of this machine.
    """


class HubError(DnbError):
    """The hub does not answer in time, or refuses a request.

    A hub that died is started again within a second: `%dtrain status` says when it is there, and the run goes on.
    Raised where that is not enough: end the pool (`%dtrain shutdown`), start another one, and resume the run.
    """


class SpaceError(DnbError):
    """No folder has room for a shared-memory segment, or a disk none for a checkpoint.

    Containers often have 64 MB of shared memory: start them with `--shm-size=2g`. Or name a folder with room, or free
    some; the message says how much is needed.
    """


class RunError(DnbError):
    """A run failed.

    Raised by `run.wait()` and `%dtrain wait`. Your model, loss or data set has raised: the run is paused, so mend it in
    a cell, then `%dtrain resume --loss mended` (or `--step`). Or nothing can go on, as a sampler, optimizer or
    scheduler has raised: `%dtrain resume .dnb/runs/<name>` begins again at its last checkpoint. The message names
    engine and step, and the traceback begins with your own frame.

    Args:
        message: what failed, with engine and step.
        remote_traceback: the engine's own traceback, as text; empty if the hub failed the run itself.
    """

    def __init__(self, message: str, *, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the message, and the frames of the user's own code."""
        lines = [f"{_RED}{type(self).__name__}{_PLAIN}: {super().__str__()}"]
        return [*lines, "", fold_frames(self.remote_traceback)] if self.remote_traceback else lines

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n\n{self.remote_traceback}" if self.remote_traceback else message


def fold_frames(traceback: str) -> str:
    """Return a traceback in which frames of dnb and torch stand in one line; code of cells has its source line.

    Args:
        traceback: of an engine, as text.
    """
    folded: list[str] = []
    hidden = 0
    for part in re.split(r'(?m)^(?=  File ")', traceback):
        frame = _FRAME.match(part)
        rest = "" if frame is None else "".join(re.findall(r"(?m)^(?! ).*\n?", part))  # what follows the last frame
        if frame is not None and _is_internal(frame["path"]):
            hidden += 1
            part = rest
        if hidden and part:
            folded.append(f"  ... {hidden} frame{'s' * (hidden > 1)} of dnb and torch\n")
            hidden = 0
        folded.append(_with_source(part, frame))
    return "".join(folded)


def _is_internal(path: str) -> bool:
    parts = Path(path).parts
    if "site-packages" in parts and "torch" in parts:
        return True
    places = [place for place, part in enumerate(parts) if part == _PACKAGE.name]
    return any((_PACKAGE / Path(*parts[place + 1 :])).is_file() for place in places)


def _with_source(part: str, frame: re.Match[str] | None) -> str:
    """Add the line of source that an engine could not read, as it stands in a cell of this notebook."""
    if frame is None or part.count("\n    "):
        return part
    source = linecache.getline(frame["path"], int(frame["line"])).strip()
    head, newline, rest = part.partition("\n")
    return f"{head}\n    {source}\n{rest}" if source and newline else part


def nearest(word: str, choices: Iterable[str]) -> str:
    """Compose the end of an error message: the closest of `choices`, and all of them."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


# What user code may raise: also what is no Exception, such as PanicException of Rust libraries, asyncio.CancelledError,
# SystemExit, or a KeyboardInterrupt of its own. No Ctrl-C arrives in the threads that call user code on engines and in
# the hub; where one may, in the notebook's own process, `except KeyboardInterrupt: raise` stands before it.
USER_ERRORS = (BaseException,)

# Of a text within a sentence, in characters.
SUMMARY_LENGTH = 1_000
_MARK_LENGTH = 50  # of what stands where something was cut out


def kind_of(error: BaseException) -> str:
    """Return the name of an exception's class, also of one whose metaclass would say something else."""
    name: str = type.__dict__["__name__"].__get__(type(error))
    return name


def text_of(error: BaseException) -> str:
    """Return the text of an exception, as long as it is; never raises, as a user's `__str__` may do anything."""
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001 - see above
        return f"(its text cannot be had: __str__ raised {kind_of(second)})"
    return text if type(text) is str else str.__str__(text)


def summary_of(error: BaseException, *, length: int = SUMMARY_LENGTH) -> str:
    """Return class and text of an exception, for a sentence; never raises."""
    text = text_of(error).strip()
    return clean_text(f"{kind_of(error)}: {text}" if text else kind_of(error), length=length)


def clean_text(text: str, *, length: int) -> str:
    """Make text fit to be encoded as UTF-8 and to be shown: no lone surrogates, no NUL, and not too long.

    What was cut to a length once is not cut to it again.
    """
    text = text.replace("\0", "\\x00")
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= length:
        return text
    half = (length - _MARK_LENGTH) // 2 if length > 2 * _MARK_LENGTH else length // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def is_text(text: str) -> bool:
    """Tell whether it can be sent: a file name in another encoding has lone surrogates, which are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
