"""Members of teams that are not heard: silent ones, and those that are busy in a call."""

from __future__ import annotations

from collections.abc import Mapping

from dnb.hub.scheduling.team_formation import Team

# How long a member may be silent, after the hub has noticed it, until it is ended: one that was stopped, and one that
# loads, or may sleep in a call that lets no other thread of its process run.
SILENT_SECONDS, ASLEEP_SECONDS = 1.0, 30.0


class MemberWatch:
    """The hub's observations of engines that do not beat."""

    def __init__(self) -> None:
        self._silent: dict[int, tuple[float, str, float]] = {}  # since when, what the hub says, how long it may be
        self._busy: set[int] = set()
        self._reported_busy: set[int] = set()

    def is_busy(self, team: Team) -> bool:
        """Return whether a member of a team is busy."""
        return not self._busy.isdisjoint(team.members)

    def note_silent(self, engine: int, now: float, reason: str, *, is_asleep: bool) -> bool:
        """Note that an engine is silent; return whether that is new."""
        if engine in self._silent:
            return False
        self._silent[engine] = now, reason, ASLEEP_SECONDS if is_asleep else SILENT_SECONDS
        return True

    def note_busy(self, engine: int) -> bool:
        """Note that an engine is busy; return whether that is new. Who was silent before stays so until it is heard."""
        if engine in self._silent or engine in self._busy:
            return False
        self._busy.add(engine)
        return True

    def note_reported(self, engine: int) -> bool:
        """Return True if it was not noted before that an engine is busy; it is now."""
        is_new = engine not in self._reported_busy
        self._reported_busy.add(engine)
        return is_new

    def end_silence(self, engine: int) -> None:
        """Note that an engine is silent no more."""
        self._silent.pop(engine, None)

    def end_busy(self, engine: int) -> bool:
        """Note that an engine is busy no more; return whether it was."""
        was_busy = engine in self._busy
        self._busy.discard(engine)
        return was_busy

    def take_overdue(self, teams: Mapping[int, Team], now: float) -> list[tuple[int, str]]:
        """Return, once, members that are silent for too long, with what the hub says of them.

        Args:
            teams: by member.
            now: seconds on the clock by which they were noticed.
        """
        overdue: list[tuple[int, str]] = []
        for engine, (since, reason, patience) in list(self._silent.items()):
            team = teams.get(engine)
            patience = ASLEEP_SECONDS if team is not None and engine in team.loading else patience
            if team is not None and now - since > patience:
                del self._silent[engine]
                overdue.append((engine, reason))
        return overdue
