"""The functions of a pool that its run calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dnb.protocol.base import Message
from dnb.protocol.engine_messages import WireOffer


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLinks:
    """The functions by which a run reaches its pool."""

    send: Callable[[int, Message, Sequence[Any]], None]  # a record with frames, to an engine
    offer_wire: Callable[..., WireOffer]  # lets an engine connect its wire: `Connections.offer`
    release: Callable[[int], None]  # an engine that was asked to leave owes the run nothing any more
    evict: Callable[[int], None]  # ends an engine that holds others up
    replace: Callable[[int], None]  # so many engines are to take the place of those that the run's work has ended
    count_commit: Callable[[int], None]  # told of every step and evaluation that counts from now on
