"""Names of runs, and the folders that bear them: one kernel has each, whoever else works in the same place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from dnb.errors import ArgumentError

RUNS_FOLDER = Path(".dnb") / "runs"
# Of a name: files of shared memory begin with it, and a file's name has room for 255 bytes.
MOST_LETTERS = 150
# Kernels that give up remove the folders above again while others make theirs: how often that is tried.
MOST_TRIES = 100


def check_name(name: Any) -> str | None:
    """Check the name that a user gives a run; None leaves it to be called as its model.

    Raises:
        ArgumentError: it is no text, or too long.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise ArgumentError(f"name must be a text, not {name!r}: name='digits'")
    if len(name) > MOST_LETTERS:
        raise ArgumentError(
            f"a run's name has at most {MOST_LETTERS} letters, as files bear it, and this one has {len(name)}: "
            f"name={name[:20] + '...'!r}"
        )
    lost = "".join(dict.fromkeys(letter for letter in name if letter.isalnum() and not letter.isascii()))
    if lost:
        raise ArgumentError(
            f"name={name[:40]!r} has letters that its folder and shared memory cannot bear ({lost[:10]}): use a to z, "
            "0 to 9, dots, dashes and underscores"
        )
    return name


def clean_name(wanted: str) -> str:
    """Return the folder's name nearest to a wanted one: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("-.")[:MOST_LETTERS] or "run"


def check_place() -> None:
    """Refuse a working folder in which no run could be kept, before anything is started.

    Raises:
        ArgumentError: names the folder, and what is wrong with it.
    """
    try:
        folder = RUNS_FOLDER.absolute()
        while not folder.exists():
            folder = folder.parent
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return
        probe = folder / f".dnb-probe-{os.getpid()}"
        probe.mkdir()  # only to learn what is wrong
        probe.rmdir()
    except OSError as error:
        raise _no_place(error) from error


@contextlib.contextmanager
def reserved_folder(wanted: str) -> Iterator[Path]:
    """Make a folder for a run that nobody else has; it is gone again if the block fails and nothing was put into it.

    Args:
        wanted: as a name; a number is put behind it if that is taken.

    Raises:
        ArgumentError: no folder can be made here.
    """
    base = clean_name(wanted)
    missing = [each for each in (RUNS_FOLDER.absolute().parent, RUNS_FOLDER.absolute()) if not each.exists()]
    try:
        folder = next(made for number in count(1) if (made := _make(base if number == 1 else f"{base}-{number}")))
    except OSError as error:
        _remove_empty(missing)
        raise _no_place(error) from error
    try:
        yield folder
    except BaseException:
        _remove_empty([*missing, folder])
        raise


def _make(name: str) -> Path | None:
    """Make a new folder of this name; return None if there is one, or anything else."""
    folder = RUNS_FOLDER.absolute() / name
    for tries in count(1):
        try:
            folder.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700)  # which only one process can do
        except FileNotFoundError:  # the one above was removed just now, by a kernel whose run was refused
            if tries >= MOST_TRIES:
                raise
        except FileExistsError:
            if not folder.parent.is_dir():
                raise
            return None
        else:
            return folder
    raise AssertionError("unreachable")


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of these folders that nothing is in, the innermost first."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _no_place(error: OSError) -> ArgumentError:
    reason = "a file is in its place" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror
    return ArgumentError(
        f"a run is kept in {RUNS_FOLDER} of the working folder, {_working_folder()}, and none can be made there "
        f"({reason}): os.chdir to a folder that you can write, and call it again"
    )


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "which was removed"


def find_folder(place: str | Path) -> Path:
    """Return the folder that a user means: a path, or the name of a run of the working folder."""
    path = Path(place).expanduser()
    return path if is_folder(path) else RUNS_FOLDER / path


def is_folder(path: Path) -> bool:
    """Say whether there is a folder; a name that none can have is no error."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
