"""A coordinator whose notes are said in words, as the run's history has them."""

from __future__ import annotations

from collections.abc import Iterable

from dnb.hub.scheduling.coordinator import Coordinator
from dnb.hub.scheduling.events import Action, Event, Note
from dnb.hub.scheduling.note_words import text_of


def worded(actions: Iterable[Action]) -> list[Action]:
    return [
        Note(action.kind, text_of(action), action.engine) if isinstance(action, Note) else action for action in actions
    ]


class WordedCoordinator(Coordinator):
    def handle(self, event: Event, now: float | None = None) -> list[Action]:
        return worded(super().handle(event, now))
