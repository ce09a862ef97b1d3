"""The table of the verbs of `%dtrain`: name, function, flags and one sentence of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dnb.errors import ArgumentError, nearest
from dnb.notebook.arguments import bind, flags_of, parse_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb, as it is called, and as help and completion tell it."""

    name: str
    function: Callable[..., Any]  # takes the flags' values by name, and the shell if it has a parameter of that name
    flags: Mapping[str, inspect.Parameter]
    sentence: str
    operand: str = ""  # a flag with a default that a word by position may stand for
    rest: str = ""  # the parameter that takes all words by position, as they are
    has_settings: bool = False  # NAME=VALUE in place of flags
    alone: Verb | None = None  # in place of this one for a line that begins with no word by position


# Filled where the modules of verbs are imported, which `magics` does.
VERBS: dict[str, Verb] = {}


def verb(
    name: str,
    *,
    flags_of: Callable[..., Any] | None = None,
    more: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
    operand: str = "",
    rest: str = "",
    has_settings: bool = False,
    alone: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put the decorated function into the table; its docstring's first sentence is the verb's.

    Args:
        name: behind `%dtrain`.
        flags_of: the function whose parameters are the flags; the decorated one if None.
        more: annotations of flags beyond them, by name; without a value they are None.
        left_out: parameters that are no flags.
        operand: see `Verb`.
        rest: see `Verb`.
        has_settings: see `Verb`.
        alone: another function for lines that begin with no word by position; its parameters are their flags.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        entry = entry_of(name, function, source=flags_of, more=more or {}, left_out={*left_out, rest})
        other = None if alone is None else entry_of(name, alone)
        VERBS[name] = replace(entry, operand=operand, rest=rest, has_settings=has_settings, alone=other)
        return function

    return enter


def entry_of(
    name: str,
    function: Callable[..., Any],
    *,
    source: Callable[..., Any] | None = None,
    more: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
) -> Verb:
    """Make an entry of the table, without putting it there."""
    sentence = (inspect.getdoc(function) or "").partition("\n")[0]
    flags = flags_of(source or function, left_out={"self", "shell", *left_out}, more=more)
    return Verb(name=name, function=function, flags=flags, sentence=sentence)


def run_line(line: str, *, shell: Any) -> Any:
    """Call the verb that a line begins with, and return what it returns.

    Raises:
        ArgumentError: there is no such verb, or the line does not fit its flags.
    """
    name, _, rest = line.strip().partition(" ")
    if name not in VERBS:
        raise ArgumentError(f"%dtrain has no verb {name!r}: {nearest(name, sorted(VERBS))}")
    entry = VERBS[name]
    if entry.alone is not None and (not rest.strip() or rest.lstrip().startswith("-")):
        entry = entry.alone
    return call(entry, rest, shell=shell)


def call(entry: Verb, line: str, *, shell: Any, **more: Any) -> Any:
    """Call a verb with what the line stands for, and what is no flag of it."""
    names = dict(shell.user_ns)
    if entry.has_settings:
        options = parse_settings(line, names=names)
    else:
        options = bind(entry.flags, line, names=names, verb=entry.name, operand=entry.operand, rest=entry.rest)
    if "shell" in inspect.signature(entry.function).parameters:
        more["shell"] = shell
    return entry.function(**options, **more)
