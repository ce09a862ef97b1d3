"""The words by which engines are named in `%dtrain`, and what is done to them on purpose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dnb.errors import ArgumentError, nearest

MOST_IDS = 100_000

_EXAMPLES = {
    "kill": "%dtrain chaos kill 1",
    "stop": "%dtrain chaos stop 1 5s",
    "slow": "%dtrain chaos slow 2 4x",
    "hub": "%dtrain chaos hub",
}
CHAOS_VERBS = tuple(_EXAMPLES)
_UNITS = {"stop": "s", "slow": "x"}


@dataclass(frozen=True, slots=True)
class Act:
    """An action of `%dtrain chaos` on some engines, or on the hub."""

    verb: Literal["kill", "stop", "slow", "hub"]
    engines: tuple[int, ...] = ()
    amount: float = 0.0  # seconds, or how many times as slow


def read_ids(text: str, *, known: Sequence[int], example: str) -> list[int]:
    """Engine ids from words such as "0,2-3", in the order in which they are given.

    Raises:
        ArgumentError: it is no such words, or an engine is not there.
    """
    chosen: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if found is None:
            raise ArgumentError(f"{text!r}: {part!r} is no engine id or range; such as {example}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first >= MOST_IDS:
            raise ArgumentError(f"{text!r}: {part!r} is no range from a smaller to a larger id; such as {example}")
        chosen.extend(range(first, last + 1))
    missing = sorted(set(chosen) - set(known))
    if missing:
        raise ArgumentError(f"no engine {missing[0]}: there are {', '.join(map(str, known)) or 'none'}")
    return list(dict.fromkeys(chosen))


def read_chaos(words: Sequence[str], *, known: Sequence[int]) -> Act:
    """Read the action of `%dtrain chaos` from the words behind it.

    Raises:
        ArgumentError: an unknown verb, a missing amount, an engine that is not there; with an example.
    """
    verb, *rest = words or [""]
    if verb not in _EXAMPLES:
        hint = nearest(verb, _EXAMPLES) if verb else f"known: {', '.join(_EXAMPLES)}"
        raise ArgumentError(f"%dtrain chaos has no verb {verb!r}: {hint}; such as {_EXAMPLES['kill']}")
    example = _EXAMPLES[verb]
    if verb == "hub":
        if rest:
            raise ArgumentError(f"%dtrain chaos hub takes no other words, as a pool has one hub: {example}")
        return Act("hub")
    needed = 2 if verb in _UNITS else 1
    if len(rest) != needed:
        what = "an engine and an amount" if needed == 2 else "an engine"
        raise ArgumentError(f"%dtrain chaos {verb} takes {what}, not {len(rest)} words: {example}")
    engines = tuple(read_ids(rest[0], known=known, example=example))
    amount = _amount(rest[1], unit=_UNITS[verb], example=example) if verb in _UNITS else 0.0
    if verb == "slow" and amount < 1:
        raise ArgumentError(f"%dtrain chaos slow {rest[0]} {rest[1]}: an engine can only be slowed, by 1x or more")
    return Act(verb, engines, amount)  # type: ignore[arg-type]


def describe_act(act: Act) -> str:
    """Say in one line what was done, and how it ends."""
    who = "the hub" if act.verb == "hub" else f"engine{'s' * (len(act.engines) > 1)} {', '.join(map(str, act.engines))}"
    match act.verb:
        case "kill":
            return f"{who}: killed; what was under way there is done elsewhere"
        case "stop":
            return f"{who}: stopped for {act.amount:g} s"
        case "slow" if act.amount == 1:
            return f"{who}: as fast as ever again"
        case "slow":
            ids = ",".join(map(str, act.engines))
            return f"{who}: {act.amount:g} times as slow, also in later runs, until %dtrain chaos slow {ids} 1x"
    return f"{who}: killed; another one goes on from where it was"


def _amount(word: str, *, unit: str, example: str) -> float:
    found = re.fullmatch(rf"(\d+(?:\.\d*)?|\.\d+){unit}", word)
    if found is None or not float(found[1]):
        name = {"s": "number of seconds, such as 5s", "x": "factor, such as 4x"}[unit]
        raise ArgumentError(f"{word!r} is no {name}: {example}")
    return float(found[1])
