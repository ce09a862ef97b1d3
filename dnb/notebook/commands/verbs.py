"""The table of the verbs of `%dtrain`: name, function, flags and one sentence of each."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dnb.errors import ArgumentError, nearest
from dnb.notebook.arguments import bind, flags_of, parse_settings
from dnb.notebook.commands.docstrings import argument_sentences, summary_sentence
from dnb.notebook.magic_words import as_magic


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb, as it is called, and as help and completion tell it."""

    name: str
    function: Callable[..., Any]  # takes the flags' values by name, and the shell if it has a parameter of that name
    flags: Mapping[str, inspect.Parameter]
    sentence: str
    sentences: Mapping[str, str]  # on the flags, and what else docstrings tell of parameters, by name
    group: str  # under which help lists it
    example: str
    operand: str = ""  # a flag with a default that a word by position may stand for
    rest: str = ""  # the parameter that takes all words by position, as they are
    has_settings: bool = False  # NAME=VALUE in place of flags
    alone: Verb | None = None  # in place of this one for a line that begins with no word by position


# Filled where the modules of verbs are imported: `load_verbs`.
VERBS: dict[str, Verb] = {}
_MODULES = ("pool_commands", "run_commands", "plan_command", "help_command")
# `fit?`, `--help`, `fit model --help`.
_ASKS = re.compile(r"(?P<verb>[\w-]*)\s*\?{1,2}|(?:(?P<other>\w[\w-]*)\s+(?:.*\s)?)?(?:--help|-h)(?:\s.*)?", re.DOTALL)


def load_verbs() -> Mapping[str, Verb]:
    """Return the whole table; its modules import torch, so it is not loaded before somebody types a line."""
    for module in _MODULES:
        importlib.import_module(f"dnb.notebook.commands.{module}")
    return VERBS


def verb(  # noqa: PLR0913 - the columns of the table
    name: str,
    *,
    group: str,
    flags_of: Callable[..., Any] | None = None,
    args_of: Collection[Callable[..., Any]] = (),
    more: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
    operand: str = "",
    rest: str = "",
    has_settings: bool = False,
    alone: Callable[..., Any] | None = None,
    example: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put the decorated function into the table; its docstring's first sentence is the verb's.

    Args:
        name: behind `%dtrain`.
        group: see `Verb`.
        flags_of: the function whose parameters are the flags; the decorated one if None.
        args_of: further functions whose docstrings tell of flags, besides the decorated one and `flags_of`.
        more: annotations of flags beyond them, by name; without a value they are None.
        left_out: parameters that are no flags.
        operand: see `Verb`.
        rest: see `Verb`.
        has_settings: see `Verb`.
        alone: another function for lines that begin with no word by position; its parameters are their flags.
        example: a line that works, with `model`, `train` and `val` as variables; the verb alone if left out.
    """
    example = example or f"%dtrain {name}"
    more = more or {}

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        entry = entry_of(name, function, source=flags_of, args_of=args_of, more=more, left_out={*left_out, rest})
        other = None if alone is None else entry_of(name, alone, args_of=args_of)
        named = replace(entry, group=group, example=example, alone=other)
        VERBS[name] = replace(named, operand=operand, rest=rest, has_settings=has_settings)
        return function

    return enter


def entry_of(
    name: str,
    function: Callable[..., Any],
    *,
    source: Callable[..., Any] | None = None,
    args_of: Collection[Callable[..., Any]] = (),
    more: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
) -> Verb:
    """Make an entry of the table, without putting it there."""
    flags = flags_of(source or function, left_out={"self", "shell", *left_out}, more=more)
    sentences: dict[str, str] = {}
    for told_by in (function, *([source] if source is not None else []), *args_of):
        sentences = argument_sentences(told_by) | sentences
    return Verb(
        name=name,
        function=function,
        flags=flags,
        sentence=summary_sentence(function),
        sentences=sentences,
        group="",
        example="",
    )


def run_line(line: str, *, shell: Any) -> Any:
    """Call the verb that a line begins with, and return what it returns.

    Raises:
        ArgumentError: there is no such verb, or the line does not fit its flags.
    """
    name, rest = begin_of(as_help_line(line))
    if name not in VERBS:
        raise ArgumentError(_no_verb(name, rest, names=shell.user_ns))
    entry = VERBS[name]
    if entry.alone is not None and (not rest.strip() or rest.lstrip().startswith("-")):
        entry = entry.alone
    return call(entry, rest, shell=shell)


def as_help_line(line: str) -> str:
    """Return the line that asks for help in the place of another way to ask: nothing at all, `--help`, `fit?`."""
    text = line.strip()
    found = _ASKS.fullmatch(text)
    if text and found is None:
        return line
    name = "" if found is None else found["verb"] or found["other"] or ""
    return f"help {name}".strip()


def begin_of(line: str) -> tuple[str, str]:
    """Return the word that a line begins with, and the rest."""
    name, *rest = line.split(None, 1) or [""]
    return name, rest[0] if rest else ""


# As other tools call them.
_SYNONYMS = {"train": "fit", "run": "fit", "begin": "start", "up": "start", "init": "start", "launch": "start"}
_SYNONYMS |= {"kill": "chaos kill", "end": "shutdown", "down": "shutdown", "quit": "shutdown", "exit": "shutdown"}
_SYNONYMS |= {"info": "status", "ls": "status", "list": "status", "show": "dashboard", "plot": "dashboard"}
_SYNONYMS |= {"save": "checkpoint", "continue": "resume", "cancel": "stop", "abort": "stop", "scale": "add"}
_SYNONYMS |= {"workers": "status", "engines": "status", "join": "wait", "report": "export", "connect": "attach"}


def _no_verb(name: str, rest: str, *, names: Mapping[str, Any]) -> str:
    begin = f"%dtrain has no verb {name!r}"
    called, parenthesis, _ = f"{name} {rest}".partition("(")
    if parenthesis and called in VERBS:
        return f"%dtrain takes words, not a call: did you mean {as_magic(f'dnb.{name} {rest}'.strip())}?"
    meant = _SYNONYMS.get(name.lower(), name.lower() if name.lower() in VERBS else "")
    if name in names and not meant:  # who begins with the model means to train it
        return f"{begin}, and {name!r} is a variable: did you mean %dtrain fit {name} {rest}".rstrip() + "?"
    if meant:
        line = f"%dtrain {meant} {rest}" if rest else VERBS[meant.split()[0]].example
        return f"{begin}: did you mean {line}? known: {', '.join(sorted(VERBS))}"
    return f"{begin}: {nearest(name, sorted(VERBS))}"


def call(entry: Verb, line: str, *, shell: Any, **more: Any) -> Any:
    """Call a verb with what the line stands for, and what is no flag of it."""
    names = dict(shell.user_ns)
    if entry.has_settings:
        options = parse_settings(line, names=names)
    else:
        options = bind(
            entry.flags,
            line,
            names=names,
            verb=entry.name,
            operand=entry.operand,
            rest=entry.rest,
            example=entry.example,
        )
    if "shell" in inspect.signature(entry.function).parameters:
        more["shell"] = shell
    return entry.function(**options, **more)
