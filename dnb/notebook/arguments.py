"""The words behind `%dtrain`, turned into the arguments of a function by its signature."""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dnb.errors import ArgumentError, nearest

_CLOSING = {"{": "}", "(": ")", "[": "]"}
# A word may name a variable, except where a function wants just a word.
_WORDS_ONLY = frozenset({"str", "str | None"})
# By position, too, a word that names no variable is itself where a path is wanted.
_PATHS = frozenset({"str | Path", "str | Path | None"})


@dataclass(frozen=True, slots=True)
class Word:
    """One word of the line; an expression stood in braces."""

    text: str
    is_expression: bool = False


def split_line(line: str) -> list[Word]:
    """Cut a line at blanks, but not inside quotes, braces or brackets.

    Raises:
        ArgumentError: a quote or brace is not closed.
    """
    return list(_words(line))


def _words(line: str) -> Iterator[Word]:
    position = 0
    while position < len(line):
        if line[position].isspace():
            position += 1
            continue
        end = _end_of_word(line, position)
        text = line[position:end]
        if text[0] == "{":
            yield Word(text[1:-1].strip() if _parses(text[1:-1]) else text, is_expression=True)
        elif text[0] in "\"'" and text[-1] == text[0]:
            yield Word(text[1:-1])
        else:
            yield Word(text)
        position = end


def _end_of_word(line: str, begin: int) -> int:
    expected: list[str] = []
    quote = ""
    for position in range(begin, len(line)):
        character = line[position]
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _CLOSING:
            expected.append(_CLOSING[character])
        elif expected and character == expected[-1]:
            expected.pop()
        elif character.isspace() and not expected:
            return position
    if quote or expected:
        raise ArgumentError(f"a {quote or expected[-1]} is missing at the end of: {line[begin:]}")
    return len(line)


def _parses(text: str) -> bool:
    try:
        ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    return True


def flags_of(
    function: Callable[..., Any], *, left_out: Collection[str] = (), more: Mapping[str, str] | None = None
) -> dict[str, inspect.Parameter]:
    """Return the flags that a function has: its parameters, by name.

    Args:
        function: parameters without a default come first on the line, by position.
        left_out: parameters that are not flags.
        more: annotations of further flags, by name; their default is None.
    """
    own = inspect.signature(function).parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    further = [inspect.Parameter(name, kind, default=None, annotation=word) for name, word in (more or {}).items()]
    named = (parameter for parameter in (*own, *further) if parameter.kind is not inspect.Parameter.VAR_KEYWORD)
    return {parameter.name: parameter for parameter in named if parameter.name not in left_out}


def bind(
    flags: Mapping[str, inspect.Parameter],
    line: str,
    *,
    names: Mapping[str, Any],
    verb: str,
    operand: str = "",
    rest: str = "",
) -> dict[str, Any]:
    """Return the keyword arguments that a line stands for.

    Args:
        flags: by name; those without a default come first, by position.
        line: such as "model train --batch-size 256 --no-shuffle".
        names: the notebook's variables.
        verb: for messages.
        operand: a flag with a default that may be given by position, too.
        rest: under this name go the texts of all words by position, if there is a name.

    Raises:
        ArgumentError: an unknown or repeated flag, a missing value, a name that is not defined.
    """
    required = [name for name, parameter in flags.items() if parameter.default is parameter.empty]
    by_position = [*required, operand] if operand else required
    bound: dict[str, Any] = {}
    texts: list[str] = []
    words = split_line(line)
    while words:
        word = words.pop(0)
        waiting = [name for name in by_position if name not in bound]
        if _is_flag(word):
            name, value = _flag(word.text, words, flags, names=names, verb=verb)
        elif rest:
            texts.append(word.text)
            continue
        elif waiting:
            name, value = waiting[0], _by_position(word, flags[waiting[0]], names)
        else:
            raise ArgumentError(f"%dtrain {verb}: {word.text!r} is one argument too many")
        if name in bound:
            raise ArgumentError(f"%dtrain {verb}: {name} is given twice")
        bound[name] = value
    missing = [name for name in required if name not in bound]
    if missing:
        raise ArgumentError(f"%dtrain {verb} needs {' and '.join(required)}: {missing[0]} is missing")
    return {**bound, rest: texts} if rest else bound


def parse_settings(line: str, *, names: Mapping[str, Any]) -> dict[str, Any]:
    """Parse `name=value` words; a value may be a variable, a number, none, or an expression in braces.

    Raises:
        ArgumentError: a word is not of that form, or a name is given twice.
    """
    settings: dict[str, Any] = {}
    number = inspect.Parameter("value", inspect.Parameter.KEYWORD_ONLY)
    for word in split_line(line):
        name, equals, text = word.text.lstrip("-").partition("=")
        values = split_line(text)
        if word.is_expression or not equals or len(values) != 1:
            raise ArgumentError(f"%dtrain set: {word.text!r} is not NAME=VALUE, such as lr=1e-4 or clip_norm=none")
        name = name.replace("-", "_")
        if name in settings:
            raise ArgumentError(f"%dtrain set: {name} is given twice")
        settings[name] = _value(values[0], number, names)
    return settings


def _flag(
    text: str,
    words: list[Word],
    known: Mapping[str, inspect.Parameter],
    *,
    names: Mapping[str, Any],
    verb: str,
) -> tuple[str, Any]:
    name, has_value, inline = text.lstrip("-").partition("=")
    name = name.replace("-", "_")
    negated = name.removeprefix("no_")
    if name not in known and negated in known and _is_switch(known[negated]):
        return negated, False
    if name not in known:
        flags = ["-n" if each == "n" else f"--{each.replace('_', '-')}" for each in known]
        raise ArgumentError(f"%dtrain {verb} has no flag {text!r}: {nearest(text, flags)}")
    parameter = known[name]
    if has_value:
        words[:0] = split_line(inline)
    is_followed = bool(words) and not _is_flag(words[0]) and not (has_value and not inline)
    if _is_switch(parameter) and not (is_followed and words[0].text.lower() in ("true", "false")):
        return name, True
    if not is_followed:
        raise ArgumentError(f"%dtrain {verb}: {text} needs a value")
    return name, _value(words.pop(0), parameter, names)


def _value(word: Word, parameter: inspect.Parameter, names: Mapping[str, Any]) -> Any:
    if word.is_expression:
        return _evaluate(word.text, names)
    if str(parameter.annotation) in _WORDS_ONLY:
        return word.text
    root = word.text.partition(".")[0]
    if root in names and _parses(word.text):
        return _evaluate(word.text, names)
    if word.text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[word.text.lower()]
    try:
        return ast.literal_eval(word.text)
    except (ValueError, SyntaxError):
        return word.text


def _by_position(word: Word, parameter: inspect.Parameter, names: Mapping[str, Any]) -> Any:
    if str(parameter.annotation) in _PATHS and not word.is_expression and word.text not in names:
        return word.text
    return _variable(word, names)


def _variable(word: Word, names: Mapping[str, Any]) -> Any:
    if not word.is_expression and word.text.isidentifier() and word.text not in names:
        own = [name for name in names if not name.startswith("_")]
        close = nearest(word.text, own).partition("known:")[0]
        raise ArgumentError(f"no variable {word.text!r} in this notebook: {close or 'define it in a cell first'}")
    return _evaluate(word.text, names)


def _evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    try:
        return eval(expression, {"__builtins__": builtins}, dict(names))  # noqa: S307 - the user's own cell
    except Exception as error:
        raise ArgumentError(f"{{{expression}}} cannot be evaluated: {type(error).__name__}: {error}") from error


def _is_flag(word: Word) -> bool:
    return not word.is_expression and word.text.startswith("-") and not is_number(word.text)


def _is_switch(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.default, bool)


def is_number(text: str) -> bool:
    """Say whether a word is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
