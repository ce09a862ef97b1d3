"""Failures of user code on several engines, as few causes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dnb.records import Failure

# More would not be read.
NUM_SHOWN = 3


def describe_causes(failures: Iterable[tuple[int, Failure]]) -> tuple[str, str]:
    """What failed and where, and one traceback per cause.

    Args:
        failures: with the engine of each.
    """
    engines: dict[tuple[str, str], dict[int, str]] = {}  # per cause, and where in each one's work
    tracebacks: dict[tuple[str, str], str] = {}
    for engine, failure in sorted(failures, key=lambda pair: pair[0]):
        cause = failure.kind, failure.message
        engines.setdefault(cause, {}).setdefault(engine, failure.place)
        tracebacks.setdefault(cause, failure.traceback)
    texts = [f"{kind}: {message} ({_name_places(engines[kind, message])})" for kind, message in engines]
    if len(texts) > NUM_SHOWN:
        texts[NUM_SHOWN:] = [f"and {len(texts) - NUM_SHOWN} other causes"]
    if len(tracebacks) == 1:
        return texts[0], next(iter(tracebacks.values()))
    parts = [f"On {name_engines(list(engines[cause]))}:\n{text}" for cause, text in tracebacks.items()]
    return "; ".join(texts), "\n".join(parts[:NUM_SHOWN])


def _name_places(places: Mapping[int, str]) -> str:
    if not any(places.values()):
        return name_engines(list(places))
    named = [f"engine {engine}: {place}" if place else f"engine {engine}" for engine, place in places.items()]
    more = [f"and {len(named) - NUM_SHOWN} more engines"] if len(named) > NUM_SHOWN else []
    return "; ".join(named[:NUM_SHOWN] + more)


def name_engines(engines: Sequence[int]) -> str:
    """For a sentence."""
    return f"engine{'s' * (len(engines) > 1)} {', '.join(map(str, engines))}"
