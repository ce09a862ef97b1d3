"""Messages in the language in which the user works: lines of `%dtrain` in place of calls in Python."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dnb.notebook.views import RunView

# What is done by calls of these is done by a verb of the same name, but for those that are named otherwise.
_CALLS = {
    "run": {"wait", "pause", "resume", "stop", "set", "checkpoint", "prove", "export"},
    "dnb": {"start", "fit", "resume", "attach", "shutdown", "plan", "compare"},
    "pool": {"add", "remove", "keep_spares", "chaos.kill", "chaos.stop", "chaos.slow", "chaos.hub"},
}
_VERBS = {"keep_spares": "spares", "chaos.kill": "chaos kill", "chaos.stop": "chaos stop"}
_VERBS |= {"chaos.slow": "chaos slow", "chaos.hub": "chaos hub"}
_UNITS = {"chaos.stop": "s", "chaos.slow": "x"}
_BEGIN = re.compile(r"\b(run|dnb|pool)\.((?:chaos\.)?[a-z_]+)\(")

# By id(run), as runs need not be hashable.
_of_magics: weakref.WeakValueDictionary[int, RunView] = weakref.WeakValueDictionary()


def speak_magic(run: RunView) -> None:
    """Remember that a run was begun, or is followed, by `%dtrain`."""
    _of_magics[id(run)] = run


def worded(text: str, run: RunView) -> str:
    """Return a sentence about a run in the language of whoever began it."""
    return as_magic(text) if _of_magics.get(id(run)) is run else text


def as_magic(text: str) -> str:
    """Return a text in which calls such as `run.set(lr=1e-4)` are the lines `%dtrain set lr=1e-4`.

    A call that no verb stands for stays as it is.
    """
    return "".join(_pieces(text))


def _pieces(text: str) -> Iterator[str]:
    position = 0
    for found in _BEGIN.finditer(text):
        owner, name = found.groups()
        end = _closing(text, found.end())
        if found.start() < position or name not in _CALLS[owner] or end is None:
            continue
        yield text[position : found.start()]
        yield " ".join(["%dtrain", _VERBS.get(name, name), *_words(name, text[found.end() : end])])
        position = end + 1
    yield text[position:]


def _closing(text: str, begin: int) -> int | None:
    """Return the place of the parenthesis that closes a call whose arguments begin there."""
    depth = 1
    for position in range(begin, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if not depth:
            return position
    return None


def _words(name: str, arguments: str) -> Iterator[str]:
    for number, argument in enumerate(_split(arguments)):
        key, equals, value = argument.partition("=")
        if not equals or not key.isidentifier():
            yield _word(argument) + (_UNITS.get(name, "") if number == 1 else "")
        elif name == "set":
            yield argument
        else:
            flag = key.replace("_", "-")
            words = {"True": [f"--{flag}"], "False": [f"--no-{flag}"], "": [f"--{flag}"]}
            yield from words.get(value, [f"--{flag}", _word(value)])


def _split(arguments: str) -> Iterator[str]:
    """Cut arguments at commas outside brackets."""
    depth, begin = 0, 0
    for position, character in enumerate(arguments):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            yield arguments[begin:position].strip()
            begin = position + 1
    if last := arguments[begin:].strip():
        yield last


def _word(value: str) -> str:
    """Return a value as one word of a line."""
    if re.fullmatch(r"\[[\d, ]+\]", value):  # ids of engines
        return value[1:-1].replace(" ", "")
    plain = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    return f'"{plain}"' if re.search(r"\s", plain) and value[0] not in "([{" else plain
