"""Names behind a dot that are for users: of the package, and of the objects that it gives them."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

# Public among dnb's own floors, and nothing for a notebook: by the class that has it.
_INTERNAL: Mapping[str, Collection[str]] = {
    "Run": {
        "add_listener", "remove_listener", "add_wait_hook", "samples_at", "open", "watch", "submission", "num_owed",
    },
    "EnginePool": {
        "hub", "key", "facts", "statuses", "cluster_id", "segment_folders", "await_engines", "fill_up", "take_over",
        "follow", "ends_with_block",
    },
    "History": {"append", "num_rows"},
}  # fmt: skip
_BEHIND_DOT = re.compile(r"(?:^|[^\w.\])}\"'])(?P<path>[^\W\d]\w*(?:\.[^\W\d]\w*)*)\.(?P<start>\w*)$")
_IMPORTED = re.compile(r"(?:^|\n|;)\s*from\s+dnb\s+import\s+(?:\(?[\w\s,]*[,(]\s*)?(?P<start>\w*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundNames:
    """Public names, with their kinds, in the place of the last letters before the cursor."""

    fragment: str
    names: Mapping[str, str]


def attributes_at(text: str, variables: Mapping[str, Any]) -> FoundNames | None:
    """Return the public names that may stand at the end of a text; None if it is about nothing of dnb's.

    No code of the user's runs: only attributes that an object holds itself are followed.

    Args:
        text: of a cell, up to the cursor.
        variables: of the notebook.
    """
    package = sys.modules["dnb"]
    imported = _IMPORTED.search(text)
    if imported is not None:
        return _beginning_with(imported["start"], package)
    found = _BEHIND_DOT.search(text)
    if found is None or found["start"].startswith("_"):
        return None
    root, *inner = found["path"].split(".")
    value = variables.get(root, package if root == "dnb" and re.search(r"\bimport dnb\b", text) else None)
    for name in inner:
        value = _held(value, name)
    is_ours = value is package or (type(value).__module__.partition(".")[0] == "dnb" and not isinstance(value, type))
    return _beginning_with(found["start"], value) if is_ours else None


def public_names(value: Any) -> dict[str, str]:
    """Return the names of a value that are for users, each with its kind, in alphabetical order."""
    internal = internal_names(type(value))
    names = sorted((name for name in dir(value) if not name.startswith("_") and name not in internal), key=str.lower)
    return {name: _kind_of(value, name) for name in names}


def internal_names(kind: type) -> set[str]:
    """Return the names of a class that have no underscore, and are for dnb itself."""
    return {name for base in kind.__mro__ for name in _INTERNAL.get(base.__name__, ())}


def _beginning_with(start: str, value: Any) -> FoundNames:
    names = {name: kind for name, kind in public_names(value).items() if name.startswith(start)}
    return FoundNames(fragment=start, names=names)


def _held(value: Any, name: str) -> Any:
    """Return what an object holds under a name, without calling a property; of dnb's package what is imported."""
    try:
        return object.__getattribute__(value, "__dict__").get(name)
    except AttributeError:  # it has slots, or nothing at all
        return None


def _kind_of(value: Any, name: str) -> str:
    found = inspect.getattr_static(value, name, None)
    if isinstance(found, type):
        return "class"
    return "function" if isinstance(found, (types.FunctionType, staticmethod, classmethod)) else "instance"
