"""The failures and deaths of several engines, as few causes."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence

from dnb.hub.scheduling.task import Death
from dnb.protocol.run import Failure

# More would not be read.
NUM_SHOWN = 3
_NOBODY: Mapping[int, str] = {}
MOST_RANGES = 12


def describe_causes(failures: Iterable[tuple[int, Failure]], names: Mapping[int, str] = _NOBODY) -> tuple[str, str]:
    """Say what failed and where, and give one traceback per cause.

    Args:
        failures: with the engine of each.
        names: of teams among them, by their numbers.
    """
    engines: dict[tuple[str, str], dict[int, str]] = {}  # per cause, and where in each one's work
    tracebacks: dict[tuple[str, str], str] = {}
    for engine, failure in sorted(failures, key=lambda pair: pair[0]):
        cause = failure.kind, failure.message
        engines.setdefault(cause, {}).setdefault(engine, failure.place)
        tracebacks.setdefault(cause, failure.traceback)
    texts = [f"{kind}: {message} ({_name_places(engines[kind, message], names)})" for kind, message in engines]
    if len(texts) > NUM_SHOWN:
        texts[NUM_SHOWN:] = [f"and {len(texts) - NUM_SHOWN} other causes"]
    if len(tracebacks) == 1:
        return texts[0], next(iter(tracebacks.values()))
    parts = [f"On {name_engines(list(engines[cause]), names)}:\n{text}" for cause, text in tracebacks.items()]
    return "; ".join(texts), "\n".join(parts[:NUM_SHOWN])


def _name_places(places: Mapping[int, str], names: Mapping[int, str]) -> str:
    if not any(places.values()):
        return name_engines(list(places), names)
    named = [name_engines([engine], names) + (f": {place}" if place else "") for engine, place in places.items()]
    more = [f"and {len(named) - NUM_SHOWN} more engines"] if len(named) > NUM_SHOWN else []
    return "; ".join(named[:NUM_SHOWN] + more)


def describe_deaths(deaths: Sequence[Death], samples: str) -> str:
    """Describe the deaths of engines at the same shards.

    Args:
        deaths: of those engines.
        samples: of the shards that all of them had, in words.
    """
    by_reason: dict[str, list[int]] = {}
    for death in deaths:
        by_reason.setdefault(death.reason, []).append(death.engine)
    ended = " and ".join(f"{name_engines(sorted(engines))} {reason}" for reason, engines in by_reason.items())
    shards = sorted(frozenset.intersection(*(death.shards for death in deaths)))
    who = "it" if len(deaths) == 1 else "both" if len(deaths) == 2 else "all"
    named = f"shard{'s' * (len(shards) > 1)} {ranges_text(shards)}"
    return f"{ended} while {who} had {named}{f': {samples}' if samples else ''}"


def describe_exit(code: int | None, *, is_wanted: bool = False) -> str:
    """Describe the end of a process.

    Args:
        code: as `subprocess` counts; None if it is not known.
        is_wanted: it was killed on purpose.
    """
    if code is None:
        return "died"
    if code >= 0:
        return f"died (exit code {code})"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", as by the system when memory runs out" if code == -signal.SIGKILL and not is_wanted else ""
    return f"died by {name}{hint}"


def is_crash(code: int | None) -> bool:
    """Return True if a process has ended by itself: no signal that others send, and no unknown end."""
    others = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return code is not None and -code not in others


def ranges_text(numbers: Sequence[int]) -> str:
    """Numbers in order, for a sentence: neighbours as a range, and only the first of many."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [f"{first}" if first == last else f"{first} to {last}" for first, last in ranges[:MOST_RANGES]]
    left = sum(last - first + 1 for first, last in ranges[MOST_RANGES:])
    return ", ".join(shown) + (f" and {left} more" if left else "")


def name_engines(engines: Sequence[int], names: Mapping[int, str] = _NOBODY) -> str:
    """Name engines in a sentence; numbers of teams by the teams' names."""
    plain = [engine for engine in engines if engine not in names]
    parts = [f"engine{'s' * (len(plain) > 1)} {', '.join(map(str, plain))}"] if plain else []
    return " and ".join([*parts, *(names[engine] for engine in engines if engine in names)])
