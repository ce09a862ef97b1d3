"""The formation of teams: which engines compute together, and which are free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dnb.hub.scheduling.events import WorkDone
from dnb.protocol.run import Partition

# Teams are numbered from here, so that no engine has the number of one.
FIRST_TEAM = 1 << 20
# A member says that it lost a peer; if nobody is found dead by then, the team is formed anew all the same.
GRACE_SECONDS = 1.0


@dataclass(slots=True)
class Team:
    """Some engines, in the order of their ranks."""

    number: int
    members: tuple[int, ...]
    partition: Partition
    loading: set[int]
    lease: int | None = None  # under way
    reports: dict[int, WorkDone] = field(default_factory=dict)  # of it
    is_whole: bool = True
    broken_since: float | None = None

    @property
    def owner(self) -> int:
        """The member whose slab all write into."""
        return self.members[-1]

    @property
    def name(self) -> str:
        """The name of the team, for people."""
        engines = ", ".join(map(str, self.members))
        kind = {"tensor": "tensor team", "synced": "team", "pipeline": "pipeline"}[self.partition.kind]
        return f"the {kind} of engines {engines}" if len(self.members) > 1 else f"engine {engines}"

    @property
    def plan(self) -> str:
        """The part of the work that each member has, for people."""
        size = len(self.members)
        if self.partition.kind == "synced":
            part = f"each has 1/{size} of every batch" if size > 1 else "it has every batch"
            return f"{self.name}: {part}; BatchNorm takes statistics of the whole batch"
        if self.partition.kind == "tensor":
            num_layers = len(self.partition.styles)
            part = f"each has 1/{size} of {num_layers} layers" if num_layers else "it has the whole model"
            return f"{self.name}: {part}"
        stages = [
            f"stage{'s' * (self.partition.num_stages > size)} "
            f"{', '.join(map(str, range(rank, self.partition.num_stages, size)))} on engine {engine}"
            for rank, engine in enumerate(self.members)
        ]
        return f"{self.name}: {'; '.join(stages)}"


class TeamFormation:
    """The engines of a run, in teams or free.

    Args:
        partitions: how the model is divided over so many engines.
        size: engines of a team; None: as many as there are, up to the largest partition.
        engines: that take part from the start.
        returning: engines that are to join again, as the run is taken over.
        first: number of the first team.
    """

    def __init__(
        self,
        partitions: Mapping[int, Partition],
        *,
        size: int | None,
        engines: Iterable[int],
        returning: Iterable[int],
        first: int,
    ) -> None:
        self._partitions = dict(partitions)
        self._size = size
        self._next = first
        self.names: dict[int, str] = {}  # of all teams, also of those that are gone
        self.rosters: dict[int, tuple[int, ...]] = {}  # likewise: their members
        self.teams: dict[int, Team] = {}
        self.team_of: dict[int, Team] = {}
        self.free: set[int] = set(engines)
        self.spares: set[int] = set()
        self.retiring: set[int] = set()
        self.returning: set[int] = set(returning)

    def form(self) -> list[Team]:
        """Form as many teams as there are engines for; return those that are new."""
        formed: list[Team] = []
        while (members := self._choose()) is not None:
            team = Team(self._next, members, self._partitions[len(members)], set(members))
            self._next += 1
            self.teams[team.number] = team
            self.names[team.number] = team.name
            self.rosters[team.number] = members
            self.free -= set(members)
            for engine in members:
                self.team_of[engine] = team
            formed.append(team)
        return formed

    def disband(self, team: Team, *, dead: int | None) -> None:
        """End a team; its members are free, but for one that is dead."""
        team.is_whole = False
        team.reports.clear()
        for engine in team.members:
            del self.team_of[engine]
            if engine != dead:
                self.free.add(engine)
        del self.teams[team.number]

    def forget(self, engine: int) -> bool:
        """Count on an engine no more; return whether it was known. Its team is to be disbanded."""
        is_known = engine in self.free or engine in self.team_of or engine in self.returning
        for group in (self.free, self.returning, self.spares, self.retiring):
            group.discard(engine)
        return is_known

    def release(self) -> list[int]:
        """Let engines go that are to leave and are free; return them."""
        leaving = sorted(self.retiring & self.free)
        self.retiring -= set(leaving)
        self.free -= set(leaving)
        return leaving

    def find_wider(self) -> tuple[Team, int] | None:
        """Return the only team of a run over all engines, and over how many it can be formed anew if these are more."""
        if self._size is not None or len(self.teams) != 1:
            return None
        team = next(iter(self.teams.values()))
        able = len(team.members) + len(self.free - self.spares - self.retiring)
        wanted = max((number for number in self._partitions if number <= able), default=0)
        if not team.is_whole or team.loading or wanted <= len(team.members):
            return None
        return team, wanted

    def find_broken(self, now: float) -> list[Team]:
        """Return teams that have lost a connection, and none of whose members was found dead."""
        return [
            team
            for team in self.teams.values()
            if team.broken_since is not None and now - team.broken_since > GRACE_SECONDS
        ]

    def _choose(self) -> tuple[int, ...] | None:
        """Return engines for one more team: of the usual size, or of what is left if there is no team at all."""
        able = sorted(self.free - self.spares - self.retiring)
        if not able:
            return None
        largest = max(self._partitions)
        size = min(self._size or largest, largest)
        if len(able) < size:
            if any(team.is_whole for team in self.teams.values()):
                return None
            size = max((number for number in self._partitions if number <= len(able)), default=0)
        return tuple(able[:size]) if size else None
