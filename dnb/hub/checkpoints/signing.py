"""Signatures of checkpoints: with a secret of this user, so that one's own are told from those of strangers.

A checkpoint holds pickles, which run code when they are read. Its manifest has a digest of every file, and the hub that
writes it signs the manifest (HMAC-SHA256). The secret lies beside Jupyter's own data, in a folder and a file that
nobody else can read, and is seen nowhere else.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from jupyter_core.paths import jupyter_data_dir

SECRET_FILE = "checkpoint_secret"
_SECRET_BYTES = 32
# What is signed begins with this, so that the secret never signs anything else by mistake.
_CONTEXT = b"dnb checkpoint manifest\0"
# Bits of a mode by which others could replace what is in a folder, or read a file.
_WRITABLE, _READABLE = 0o022, 0o077


class SecretError(Exception):
    """The secret of this user is missing, is not private, or cannot be made; says why."""


def secret_path() -> Path:
    """Return the path of this user's secret."""
    return Path(jupyter_data_dir()) / "dnb" / SECRET_FILE


def read_secret(path: Path | None = None) -> bytes:
    """Read the secret, if there is one.

    Args:
        path: of its file; this user's own if left out.

    Raises:
        SecretError: there is none, or others could have read or replaced it.
    """
    path = path or secret_path()
    try:
        _check_private(path.parent.lstat(), path.parent, is_kind=stat.S_ISDIR, forbidden=_WRITABLE)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SecretError(f"{path} cannot be read ({error.strerror})") from error
    try:
        _check_private(os.fstat(descriptor), path, is_kind=stat.S_ISREG, forbidden=_READABLE)
        secret = os.read(descriptor, _SECRET_BYTES + 1)
    except OSError as error:
        raise SecretError(f"{path} cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)
    if len(secret) != _SECRET_BYTES:
        raise SecretError(f"{path} does not hold a secret of {_SECRET_BYTES} bytes: remove it, and another is made")
    return secret


def keep_secret(path: Path | None = None) -> bytes:
    """Return the secret; made if there is none.

    Raises:
        SecretError: it cannot be made, or others could have read or replaced it.
    """
    path = path or secret_path()
    if not os.path.lexists(path):
        try:
            _make_secret(path)
        except OSError as error:
            raise SecretError(f"{path} cannot be written ({error.strerror})") from error
    return read_secret(path)


def sign_manifest(secret: bytes, manifest: bytes) -> bytes:
    """Return the signature of a manifest's text (HMAC-SHA256, RFC 2104), in hexadecimal digits."""
    return hmac.digest(secret, _CONTEXT + manifest, "sha256").hex().encode()


def is_signed(secret: bytes, manifest: bytes, signature: bytes) -> bool:
    """Return True if the holder of the secret signed this very text."""
    return hmac.compare_digest(sign_manifest(secret, manifest), signature)


class Signer:
    """Signs what a hub writes; without a secret it leaves that out, as training goes on without it.

    Args:
        path: of the secret's file; this user's own if left out.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._secret = b""
        self.fault = ""  # why there is no signature

    def sign(self, manifest: bytes) -> bytes:
        """Return the signature of a manifest's text; empty if there is no secret to sign it with."""
        if not self._secret:
            try:
                self._secret = keep_secret(self._path)
            except (SecretError, RuntimeError) as error:  # RuntimeError: there is no home
                self.fault = str(error)
                return b""
        self.fault = ""
        return sign_manifest(self._secret, manifest)


def _make_secret(path: Path) -> None:
    """Write a new secret; if two processes do so at once, one of them is the first, and both have its secret."""
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700)
        path.parent.chmod(0o700)  # whatever the umask took away
    _check_private(path.parent.lstat(), path.parent, is_kind=stat.S_ISDIR, forbidden=_WRITABLE)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, secrets.token_bytes(_SECRET_BYTES))
        os.fsync(descriptor)
        _give_name(aside, path)
    finally:
        os.close(descriptor)
        aside.unlink(missing_ok=True)


def _give_name(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)  # unlike a rename, it never replaces the secret of another
    except FileExistsError:
        return
    except OSError:  # a file system without links
        if not os.path.lexists(path):
            aside.rename(path)


def _check_private(facts: os.stat_result, path: Path, *, is_kind: Callable[[int], bool], forbidden: int) -> None:
    if not is_kind(facts.st_mode):
        raise SecretError(f"{path} is a link or of another kind than it should be: remove it, and another is made")
    if facts.st_uid != os.geteuid():
        raise SecretError(f"{path} belongs to another user (uid {facts.st_uid})")
    mode = stat.S_IMODE(facts.st_mode)
    if mode & forbidden:
        raise SecretError(f"others may read or change {path} (mode {mode:o}): remove it, and another is made")
