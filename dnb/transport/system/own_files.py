"""Folders and files that no other user can have made, read or replaced; no link is followed to them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

FOLDER_MODE = 0o700
FILE_MODE = 0o600
_ASIDE = ".new"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@contextlib.contextmanager
def open_folder(path: Path, *, make: bool = False, of_anybody: bool = False) -> Iterator[int]:
    """Open a folder in which no other user can replace anything, for `dir_fd`; its descriptor.

    Args:
        path: of the folder; a link is not followed.
        make: if it is missing; then only its user can enter it.
        of_anybody: the folder is the user's choice, and not looked at.

    Raises:
        PermissionError: another user owns it, or could write into it.
    """
    if make:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # whose it is, is seen below
            path.mkdir(mode=FOLDER_MODE)
            path.chmod(FOLDER_MODE)  # whatever the umask took away
    try:
        no_link = 0 if of_anybody else os.O_NOFOLLOW
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | no_link)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise PermissionError(errno.EACCES, "a link or file has its name", str(path)) from error
        raise
    try:
        status = os.fstat(descriptor)
        # In a sticky folder of root's, such as /dev/shm, only owners remove or rename what everybody may make there.
        is_shared = status.st_uid == 0 and status.st_mode & stat.S_ISVTX
        if not (is_shared or of_anybody):
            _check_own(status, path)
        yield descriptor
    finally:
        os.close(descriptor)


def create_file(name: str, *, folder: int) -> int:
    """Create a file, open for reading and writing; its descriptor.

    Args:
        name: in the folder.
        folder: of `open_folder`.

    Raises:
        FileExistsError: something of that name is there, also a link that leads nowhere.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, FILE_MODE, dir_fd=folder)
    os.fchmod(descriptor, FILE_MODE)
    return descriptor


def open_file(path: Path, *, writable: bool = False, in_any_folder: bool = False) -> int:
    """Open a file that this user has made, in a folder of this user; its descriptor.

    Args:
        path: of the file; a link is not followed.
        writable: for writing, too.
        in_any_folder: the folder is the user's choice, and not looked at.

    Raises:
        PermissionError: another user owns or could write it or its folder, or it is no plain file.
    """
    # O_NONBLOCK: to open a pipe would wait for its other end.
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with open_folder(path.parent, of_anybody=in_any_folder) as folder:
        try:
            descriptor = os.open(path.name, flags, dir_fd=folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise PermissionError(errno.EACCES, "a link has its name", str(path)) from error
            raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(errno.EACCES, "it is no plain file", str(path))
        _check_own(status, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: Path, *, in_any_folder: bool = False) -> bytes:
    """Read all bytes of a file of this user, see `open_file`."""
    with os.fdopen(open_file(path, in_any_folder=in_any_folder), "rb") as file:
        return file.read()


def replace_file(path: Path, content: bytes, *, make_folder: bool = False, in_any_folder: bool = False) -> None:
    """Put a file in its place in one move; whoever reads it has the old one or the new one, whole.

    Args:
        path: in a folder of this user.
        content: all of it.
        make_folder: if the folder is missing.
        in_any_folder: the folder is the user's choice, and not looked at.
    """
    with open_folder(path.parent, make=make_folder, of_anybody=in_any_folder) as folder:
        for left in path.parent.glob(f"{path.name}.*{_ASIDE}"):  # by a process that was killed just then
            left.unlink(missing_ok=True)
        aside = f"{path.name}.{secrets.token_hex(8)}{_ASIDE}"
        try:
            with os.fdopen(create_file(aside, folder=folder), "wb") as file:
                file.write(content)
            os.replace(aside, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside, dir_fd=folder)
            raise


def remove_folder(path: Path) -> None:
    """Remove a folder of this user with all that is in it; what another user has put there under its name stays."""
    try:
        with open_folder(path):
            pass
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is not removed: %s", path, error)
        return
    shutil.rmtree(path, ignore_errors=True)


def _check_own(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EACCES, f"it belongs to user {status.st_uid}", str(path))
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(errno.EACCES, "other users may write there", str(path))
