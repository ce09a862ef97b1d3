"""The engines of a pool that work, are spares, or are about to leave: decisions without I/O for the service."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from dnb.errors import ArgumentError


class Standing(Protocol):
    """The roster's facts of an engine."""

    is_spare: bool
    is_retiring: bool


def becomes_spare(others: Iterable[Standing], *, wanted: int) -> bool:
    """Return True if a newcomer becomes a spare: spares are missing, and somebody works already."""
    staying = [other for other in others if not other.is_retiring]
    num_spares = sum(other.is_spare for other in staying)
    return num_spares < wanted and num_spares < len(staying)


def choose_successor(engines: Mapping[int, Standing]) -> int | None:
    """Return the spare that was there first, the likeliest to have loaded the run; None if there is none."""
    spares = (number for number, engine in engines.items() if engine.is_spare and not engine.is_retiring)
    return min(spares, default=None)


def lacks_workers(engines: Mapping[int, Standing]) -> bool:
    """Return True if all that stay are spares."""
    return all(engine.is_spare or engine.is_retiring for engine in engines.values())


def check_retirement(
    asked: Iterable[int], engines: Mapping[int, Standing], *, active_run: str | None, force: bool
) -> tuple[int, ...]:
    """Refuse to let engines leave that are not there, or that an active run cannot do without.

    Args:
        asked: their ids.
        engines: of the pool.
        active_run: its name; None if no run is active.
        force: let the last one leave, too.

    Raises:
        ArgumentError: with the known engines, or with what would happen.
    """
    leaving = tuple(dict.fromkeys(asked))
    check_known(leaving, engines)
    staying = [n for n, engine in engines.items() if n not in leaving and not engine.is_retiring]
    if active_run is not None and not staying and not force:
        raise ArgumentError(
            f"run {active_run!r} is active, and nobody would be left to go on with it: keep an engine, or pause the "
            f"run until engines are added with %dtrain remove {','.join(map(str, leaving))} --force"
        )
    return leaving


def check_known(asked: Iterable[int], engines: Iterable[int]) -> None:
    """Refuse engines that are not in the pool."""
    known = sorted(engines)
    missing = sorted(set(asked) - set(known))
    if missing:
        raise ArgumentError(f"no engine {missing[0]}: there are {', '.join(map(str, known)) or 'none'}")
