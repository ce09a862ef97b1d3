"""The events of a run that are news to whoever watches it. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from dnb.notebook.views import EventView

# Kinds of events by which engines come and go.
MEMBERSHIP = frozenset({"died", "left", "joined", "removed", "reassigned"})
_GONE = frozenset({"died", "left", "removed"})


def news_of(events: Sequence[EventView]) -> list[EventView]:
    """Return all events but of engines that join though they never left: a hub that restarts hears all of them anew.

    Nor is an engine that is heard again after a while news of the kind "recovered", which is the hub's.
    """
    present: set[int] = set()
    shown = []
    for event in events:
        if event.engine is not None and event.kind in _GONE:
            present.discard(event.engine)
        is_known = event.kind == "joined" and event.engine in present
        if event.engine is not None and event.kind == "joined":
            present.add(event.engine)
        if not is_known and not (event.kind == "recovered" and event.engine is not None):
            shown.append(event)
    return shown
