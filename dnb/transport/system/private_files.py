"""Folders and files of the user's choice that only their user may open, whatever the umask says.

Who has made them is not asked, and links are followed: for what lies where other users may write, see
`dnb.transport.system.own_files`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from dnb.transport.system.own_files import FILE_MODE, FOLDER_MODE


def make_private_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, with mode 0700; one of this user's that is there gets it.

    Raises:
        OSError: it is not there and cannot be made, or is no folder.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        close_to_others(folder, FOLDER_MODE)


def open_private(path: Path, flags: int) -> int:
    """Open a file, which gets mode 0600 if it is made or belongs to this user; its descriptor.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
    with contextlib.suppress(OSError):  # another's, or of a file system without modes
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) and stat.S_IMODE(mode) != FILE_MODE:
            os.fchmod(descriptor, FILE_MODE)
    return descriptor


def close_to_others(path: Path, mode: int) -> None:
    """Give what belongs to this user a mode; what does not, or lies where there are no modes, stays as it is."""
    with contextlib.suppress(OSError):
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
