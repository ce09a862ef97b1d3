"""Checkpoints that were asked for, by number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dnb.errors import ArgumentError
from dnb.protocol.client_messages import CheckpointState


class CheckpointTickets:
    """Wishes for checkpoints besides those of the policy, and what became of them.

    Args:
        run: its name.
        first: no ticket of a hub before had a larger number.
    """

    def __init__(self, run: str, *, first: int) -> None:
        self._run = run
        self._first = first
        self._asked: dict[int, Path | None] = {}  # by ticket; None: in the run's own folder
        self._states: dict[int, CheckpointState] = {}

    def __bool__(self) -> bool:
        return bool(self._asked)

    def ask(self, path: Path | None) -> CheckpointState:
        """Note a request."""
        ticket = self._first + len(self._states) + 1
        self._asked[ticket] = path
        self._states[ticket] = CheckpointState(ticket=ticket, state="waiting")
        return self._states[ticket]

    def state_of(self, ticket: int) -> CheckpointState:
        """Return the state of a request.

        Raises:
            ArgumentError: there was no such request.
        """
        if ticket not in self._states:
            raise ArgumentError(f"no checkpoint of run {self._run!r} was asked for with the number {ticket}")
        return self._states[ticket]

    def take(self, *, is_own: bool) -> tuple[Path | None, tuple[int, ...]]:
        """Return where the next one goes, and the tickets of all requests for that place: they wait no more.

        Args:
            is_own: it goes into the run's own folder in any case, which is None.
        """
        path = None if is_own else next(iter(self._asked.values()))
        tickets = tuple(ticket for ticket, target in self._asked.items() if target == path)
        for ticket in tickets:
            del self._asked[ticket]
            self._states[ticket] = CheckpointState(ticket=ticket, state="writing")
        return path, tickets

    def settle(self, tickets: Sequence[int], state: CheckpointState) -> None:
        """Set the state of requests that are served."""
        for ticket in tickets:
            self._states[ticket] = msgspec.structs.replace(state, ticket=ticket)
