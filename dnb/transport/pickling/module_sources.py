"""Modules of the user's own, told from installed packages, and digests of their files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any, NamedTuple

SOURCE_SUFFIXES = (".py", ".pyw")


class UserModule(NamedTuple):
    """A module of the user's own, as the notebook has it."""

    name: str
    file: str
    digest: str  # of its source


def own_place(module: types.ModuleType | None) -> UserModule | None:
    """Return the name, file and digest of a user's module; None if it belongs to Python, to a package, or to dnb."""
    if not isinstance(module, types.ModuleType):
        return None
    name, file = vars(module).get("__name__"), vars(module).get("__file__")
    if not isinstance(name, str) or not isinstance(file, str) or name in ("__main__", "__mp_main__"):
        return None
    if not file.endswith(SOURCE_SUFFIXES) or is_installed(file):
        return None
    return UserModule(name, os.path.abspath(file), digest_of(file))


def own_names() -> list[str]:
    """Return the names of all modules of the user's own that are imported; there are thousands of others."""
    return [name for name, module in _modules_now() if _is_own(name, module)]


def _modules_now() -> list[tuple[str, Any]]:
    """Copy the table of all modules, as other threads import meanwhile."""
    while True:
        try:
            return list(sys.modules.items())
        except RuntimeError:  # the dictionary has changed its size
            continue


_own_by_module: dict[str, tuple[int, bool]] = {}


def _is_own(name: str, module: Any) -> bool:
    known = _own_by_module.get(name)
    if known is None or known[0] != id(module):
        known = _own_by_module[name] = id(module), own_place(module) is not None
    return known[1]


@functools.lru_cache(maxsize=4096)
def is_installed(file: str) -> bool:
    """Say whether a file belongs to Python, to dnb or to another package that was installed."""
    folders = _installed_folders()
    if file.startswith(("<frozen", *folders)):
        return True
    path = os.path.realpath(file)
    return path.startswith(folders) or any(part in ("site-packages", "dist-packages") for part in Path(path).parts)


@functools.lru_cache(maxsize=1)
def _installed_folders() -> tuple[str, ...]:
    known = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    known.append(str(Path(__file__).parents[2]))
    return tuple({form(path) + os.sep for path in known if path for form in (os.path.realpath, os.path.abspath)})


def digest_of(file: str) -> str:
    """Return the digest of a module's source; empty if the file is gone."""
    try:
        facts = os.stat(file)
    except OSError:
        return ""
    return _digest_as_of(file, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=4096)
def _digest_as_of(file: str, _changed: int, _size: int) -> str:
    with contextlib.suppress(OSError):
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
    return ""
