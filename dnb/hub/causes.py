"""Failures of user code on several engines, as few causes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dnb.records import Failure

# More would not be read.
NUM_SHOWN = 3


def describe_causes(failures: Iterable[tuple[int, Failure]]) -> tuple[str, str]:
    """What failed and where, and one traceback per cause.

    Args:
        failures: with the engine of each.
    """
    engines: dict[tuple[str, str], list[int]] = {}
    tracebacks: dict[tuple[str, str], str] = {}
    for engine, failure in sorted(failures, key=lambda pair: pair[0]):
        cause = failure.kind, failure.message
        if engine not in engines.setdefault(cause, []):
            engines[cause].append(engine)
        tracebacks.setdefault(cause, failure.traceback)
    texts = [f"{kind}: {message} ({name_engines(engines[kind, message])})" for kind, message in engines]
    if len(texts) > NUM_SHOWN:
        texts[NUM_SHOWN:] = [f"and {len(texts) - NUM_SHOWN} other causes"]
    if len(tracebacks) == 1:
        return texts[0], next(iter(tracebacks.values()))
    parts = [f"On {name_engines(engines[cause])}:\n{text}" for cause, text in tracebacks.items()]
    return "; ".join(texts), "\n".join(parts[:NUM_SHOWN])


def name_engines(engines: Sequence[int]) -> str:
    """For a sentence."""
    return f"engine{'s' * (len(engines) > 1)} {', '.join(map(str, engines))}"
