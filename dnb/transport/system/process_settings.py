"""Process-wide settings: those of the notebook when it starts a run are those of the run, wherever it is computed."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from dnb.errors import ArgumentError, is_text
from dnb.protocol.run import Package, Settings, WarningFilter

log = logging.getLogger(__name__)

# Variables that say how a process is started, or that the pool itself decides on.
NOT_SENT = ("DNB_", "IPP_", "JPY_", "KMP_", "MKL_", "OMP_", "OPENBLAS_", "PYTEST_", "VECLIB_")
# Packages that are named where they differ.
MOST_PACKAGES = 5
_at_import = dict(os.environ)
_ever_changed: set[str] = set()


def notebook_settings() -> Settings:
    """Read the settings of this process; of its environment only what has changed since it was started.

    Raises:
        ArgumentError: it is one in which nothing can be trained.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ArgumentError(
            "gradients are switched off in this notebook (torch.no_grad, set_grad_enabled(False) or inference_mode), "
            "and nothing could be trained: torch.set_grad_enabled(True), or call fit outside of the block"
        )
    if torch.is_autocast_enabled("cpu"):
        raise ArgumentError(
            "fit was called under torch.autocast, which engines do not see: call it outside of the block, with "
            "precision='bfloat16'"
        )
    return Settings(
        default_dtype=str(torch.get_default_dtype()).removeprefix("torch."),
        deterministic=torch.get_deterministic_debug_mode(),
        matmul_precision=torch.get_float32_matmul_precision(),
        flags={name: read() for name, (read, _) in _FLAGS.items()},
        numpy_errors={name: str(how) for name, how in np.geterr().items() if how != "call"},
        recursion_limit=sys.getrecursionlimit(),
        variables=_changed_variables(),
        folder=_own_folder(),
        warnings=_own_filters(),
        packages=imported_packages(),
    )


def imported_packages() -> dict[str, Package]:
    """List every package that is imported here and says its version."""
    found = {}
    for name, module in list(sys.modules.items()):
        if "." in name or name in ("__main__", "dnb") or not isinstance(module, types.ModuleType):
            continue
        version, file = vars(module).get("__version__"), vars(module).get("__file__")
        if isinstance(version, str) and isinstance(file, str) and is_text(version + file):
            found[name] = Package(version=str(version), file=str(file))  # torch's version is no plain text
    return found


def differing_packages(packages: Mapping[str, Package]) -> str:
    """Say which packages are here in another version, or from another file that both processes see; "" if none is."""
    found = []
    for name, own in imported_packages().items():
        other = packages.get(name, own)
        if own.version != other.version:
            found.append(f"{name} {own.version} (the notebook has {other.version})")
        elif own.file != other.file and os.path.exists(other.file) and not _is_same_file(own.file, other.file):
            found.append(f"{name} from {own.file} (the notebook's is {other.file})")
    if not found:
        return ""
    more = f" and {len(found) - MOST_PACKAGES} more" if len(found) > MOST_PACKAGES else ""
    return (
        f"packages differ from the notebook's: {', '.join(found[:MOST_PACKAGES])}{more}; engines that are started anew "
        "(%dtrain shutdown, %dtrain start) import what is installed now"
    )


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is gone, as behind an installation
        return False


def without_variables(settings: Settings | None) -> Settings | None:
    """Leave the environment out of settings for a file, as it may hold secrets."""
    return None if settings is None else msgspec.structs.replace(settings, variables={}, packages={})


def _own_folder() -> str:
    with contextlib.suppress(OSError):  # it was removed
        return folder if is_text(folder := os.getcwd()) else ""
    return ""


def _changed_variables() -> dict[str, str | None]:
    """Return variables changed since the start, also those of an earlier run; None: there is none now."""
    before = _environment_at_start()
    now = {name: value for name, value in os.environ.items() if is_text(name) and is_text(value)}
    names = {name for name in now.keys() | before.keys() if now.get(name) != before.get(name) and is_text(name)}
    _ever_changed.update(name for name in names if not name.startswith(NOT_SENT))
    return {name: now.get(name) for name in sorted(_ever_changed)}


@cache
def _environment_at_start() -> Mapping[str, str]:
    try:
        raw = Path("/proc/self/environ").read_bytes()
    except OSError:  # not on this system
        return _at_import
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _own_filters() -> tuple[WarningFilter, ...]:
    found = []
    filters: Iterable[Any] = warnings.filters
    for action, message, category, module, line in filters:
        patterns = [each if each is None or isinstance(each, str) else each.pattern for each in (message, module)]
        found.append(
            WarningFilter(
                action=action,
                message=patterns[0] or "",
                category=f"{category.__module__}:{category.__qualname__}",
                module=patterns[1] or "",
                line=line,
            )
        )
    return tuple(found)


# Applying ------------------------------------------------------------------------------------------


class AppliedSettings:
    """Settings of a run in the process that computes it, until they are taken back.

    Args:
        settings: of the notebook; None: of an older dnb, nothing changes.
        everything: also the working folder and the filters of warnings, which belong to whoever runs user code.
    """

    def __init__(self, settings: Settings | None, *, everything: bool = True) -> None:
        self._undo: list[Callable[[], object]] = []
        self.notes: list[str] = []  # for people: what could not be as in the notebook
        if settings is None:
            return
        try:
            self._apply(settings, everything=everything)
        except BaseException:
            self.take_back()
            raise

    def take_back(self) -> None:
        """Let everything be as before; once."""
        while self._undo:
            try:
                self._undo.pop()()
            except (OSError, RuntimeError, ValueError) as error:  # such as a folder that is gone
                log.info("a setting was not taken back: %s", error)

    def _apply(self, settings: Settings, *, everything: bool) -> None:
        before: Any = torch.get_default_dtype()
        self._undo.append(lambda: torch.set_default_dtype(before))
        torch.set_default_dtype(getattr(torch, settings.default_dtype))
        self._set(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, settings.deterministic)
        self._set(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, settings.matmul_precision)
        for name, value in settings.flags.items():
            if name in _FLAGS:
                self._set(*_FLAGS[name], value)
        errors = np.seterr(**settings.numpy_errors)  # type: ignore[arg-type]
        self._undo.append(lambda: np.seterr(**errors))
        if settings.recursion_limit > sys.getrecursionlimit():  # a smaller one may be too small for what runs here
            self._set(sys.getrecursionlimit, sys.setrecursionlimit, settings.recursion_limit)
        for name, text in settings.variables.items():
            self._set_variable(name, text)
        if everything:
            self._change_folder(settings.folder)
            self._filter_warnings(settings.warnings)

    def _set(self, read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> None:
        before = read()
        if before != value:
            self._undo.append(lambda: write(before))
            write(value)

    def _set_variable(self, name: str, text: str | None) -> None:
        before = os.environ.get(name)
        if before != text:
            self._undo.append(lambda: _put(name, before))
            _put(name, text)

    def _change_folder(self, folder: str) -> None:
        if not folder:
            return
        before = _own_folder()
        if before == folder:
            return
        try:
            os.chdir(folder)
        except OSError as error:
            self.notes.append(
                f"the notebook's folder {folder} cannot be used there ({error.strerror}): files are read from {before}"
            )
            return
        self._undo.append(lambda: os.chdir(before))

    def _filter_warnings(self, filters: Iterable[WarningFilter]) -> None:
        # warnings.catch_warnings would be for one thread, or for a block.
        before = warnings.filters[:]
        self._undo.append(lambda: _set_filters(before))
        found = []
        for each in filters:
            category = _category(each.category)
            if category is not None:
                message = re.compile(each.message, re.IGNORECASE) if each.message else None
                module = re.compile(each.module) if each.module else None
                found.append((each.action, message, category, module, each.line))
        _set_filters(found)


def _put(name: str, text: str | None) -> None:
    if text is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = text


def _category(place: str) -> type[Warning] | None:
    module, _, name = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        log.info("no filter for %s here: %s", place, error)
        return None
    return found if isinstance(found, type) and issubclass(found, Warning) else None


def _set_filters(filters: Iterable[Any]) -> None:
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(list(filters)):
        patterns: dict[str, Any] = {
            key: each if isinstance(each, str) else each.pattern
            for key, each in (("message", message), ("module", module))
            if each is not None
        }
        warnings.filterwarnings(action, category=category, lineno=line, **patterns)


_FLAGS: dict[str, tuple[Callable[[], bool], Callable[[bool], object]]] = {
    "anomalies": (torch.is_anomaly_enabled, lambda mode: torch.autograd.set_detect_anomaly(mode)),
    "cudnn_benchmark": (
        lambda: bool(torch.backends.cudnn.benchmark),
        lambda mode: setattr(torch.backends.cudnn, "benchmark", mode),
    ),
    "cudnn_deterministic": (
        lambda: bool(torch.backends.cudnn.deterministic),
        lambda mode: setattr(torch.backends.cudnn, "deterministic", mode),
    ),
    "mha_fast_path": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
}
