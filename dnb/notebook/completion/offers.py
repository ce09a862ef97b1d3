"""Offers for the place of the cursor in a line of `%dtrain`: verbs, flags, and values that fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dnb.notebook.arguments import is_number
from dnb.notebook.commands.pool_commands import CELL
from dnb.notebook.commands.reference import flag_spelling
from dnb.notebook.commands.verbs import Verb, load_verbs
from dnb.notebook.completion.typed_lines import TypedLine
from dnb.notebook.completion.values import Names, Offer, values_for, values_in_list

_HELP = "--help"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """Offers in the place of the last letters before the cursor."""

    fragment: str
    offers: tuple[Offer, ...]


def offers_at(typed: TypedLine, names: Names) -> Offered:
    """Return what fits at the end of a line; only what begins as the letters before the cursor do.

    Args:
        typed: the line up to the cursor.
        names: the notebook's variables.
    """
    verbs = load_verbs()
    words, token = list(typed.words), typed.token
    if not words and not (typed.is_cell and token.startswith("-")):
        return _beginning_with(token, _verbs(verbs, is_cell=typed.is_cell))
    entry = CELL if typed.is_cell and (not words or words[0].startswith("-")) else verbs.get(words.pop(0))
    return Offered(fragment=token, offers=()) if entry is None else _of_verb(entry, words, token, names)


def _verbs(verbs: Mapping[str, Verb], *, is_cell: bool) -> Iterator[Offer]:
    yield from (Offer(name, "verb") for name in verbs)
    if is_cell:
        yield from (Offer(flag_spelling(name), "flag") for name in CELL.flags)
    yield Offer(_HELP, "flag")


def _of_verb(entry: Verb, words: Sequence[str], token: str, names: Names) -> Offered:
    given, open_flag, by_position = _given(entry, words)
    names = names.with_model(by_position[0] if by_position else "")
    if open_flag:
        return _values(entry, open_flag, token, names)
    if token.startswith("-") and not is_number(token):
        name, equals, value = token.lstrip("-").partition("=")
        if equals:
            return _values(entry, name.replace("-", "_"), value, names)
        return _beginning_with(token, _flags(entry, given))
    if entry.has_settings or entry.rest:
        fragment, values = values_in_list(entry.name, by_position, token, names)
    else:
        waiting = [name for name in _positions(entry) if name not in given]
        found = _values(entry, waiting[0], token, names) if waiting else _beginning_with(token, ())
        fragment, values = found.fragment, list(found.offers)
    more = [] if token else list(_flags(entry, given))
    return _beginning_with(fragment, [*values, *more])


def _given(entry: Verb, words: Sequence[str]) -> tuple[set[str], str, list[str]]:
    """Read complete words.

    Returns:
        The flags that have their value; one that still wants it, or ""; and the words by position.
    """
    given: set[str] = set()
    by_position: list[str] = []
    open_flag = ""
    for word in words:
        if open_flag:
            open_flag = ""
        elif word.startswith("-") and not is_number(word):
            name, equals, _ = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            name = name if name in entry.flags else name.removeprefix("no_")
            given.add(name)
            is_switch = name not in entry.flags or isinstance(entry.flags[name].default, bool)
            open_flag = "" if is_switch or equals else name
        else:
            waiting = next((name for name in _positions(entry) if name not in given), "")
            given.add(waiting)
            by_position.append(word)
    return given, open_flag, by_position


def _positions(entry: Verb) -> list[str]:
    required = [name for name, parameter in entry.flags.items() if parameter.default is parameter.empty]
    return [*required, entry.operand] if entry.operand else required


def _flags(entry: Verb, given: Iterable[str]) -> Iterator[Offer]:
    for name, parameter in entry.flags.items():
        if name not in given and parameter.default is not parameter.empty:
            is_on = parameter.default is True
            yield Offer(f"--no-{name.replace('_', '-')}" if is_on else flag_spelling(name), "flag")
    if entry is not CELL:
        yield Offer(_HELP, "flag")


def _values(entry: Verb, flag: str, token: str, names: Names) -> Offered:
    """Offer values; within a bracket, the variables that may stand there."""
    if flag not in entry.flags:
        return Offered(fragment=token, offers=())
    inside = re.search(r"[({\[](?:.*[^\w.])?(\w*)$", token, re.DOTALL)
    if inside is not None and (token[0] in "({[" or token[:2] == "$("):
        return _beginning_with(inside[1], names.within_brackets(flag))
    values = values_for(entry, flag, token, names)
    if token.startswith("$"):  # as elsewhere in IPython, in the place of the bare name
        values = [Offer(f"${value.text}", value.type) for value in values if value.text in names.own]
    return _beginning_with(token, values)


def _beginning_with(fragment: str, offers: Iterable[Offer]) -> Offered:
    fitting = {offer.text: offer for offer in offers if offer.text.startswith(fragment)}
    return Offered(fragment=fragment, offers=tuple(fitting.values()))
