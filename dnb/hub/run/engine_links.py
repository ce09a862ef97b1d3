"""Links of a run to its engines: who takes part, how each one is reached, and what it holds by now."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dnb.hub.parameters.master import Master
from dnb.hub.run.execution.rendezvous import Rendezvous, open_rendezvous
from dnb.hub.run.execution.run_coordinator import RunCoordinator
from dnb.hub.run.pool_links import PoolLinks
from dnb.hub.scheduling import events as machine
from dnb.protocol.engine_messages import (
    AddSlabs,
    Freeze,
    FunctionsReplaced,
    Load,
    RankAssignment,
    Shipped,
    Thaw,
    Unload,
)
from dnb.protocol.memory import Layout
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import RunSpec, TransportKind
from dnb.transport.segments import open_segment
from dnb.transport.sockets.wires import DATA_SLOT, JOB_SLOT, PARAMETERS_SLOT, Flat, Wire


@dataclass(slots=True)
class EngineLink:
    """The way in which an engine takes part."""

    transport: TransportKind
    is_near: bool  # on the hub's host
    wire: Wire | None = None
    version: int = 0  # of the parameters that it holds, if it holds its own
    num_filled: int = 0  # slabs of an exact step
    is_probed: bool = False
    has_loaded: bool = False
    is_written: bool = False  # user code has written into its own copy of the parameters
    states_version: int = 0  # of the loose states that it has
    gradient_layout: Layout | None = None  # that it was sent


class EngineLinks:
    """The engines of a run, their wires and slabs, and what they are sent.

    Args:
        spec: the run's numbers.
        frames: spec, job, data and signature as the client signed them.
        master: whose parameters and slabs the engines use.
        coordinator: knows the team and rank of each engine, and the slabs it writes into.
        pool: sends what goes over no wire, and offers wires.
        engines: those that take part from the start.
        functions: another step or loss function that the run goes on with, as pickle and signature.
    """

    def __init__(
        self,
        spec: RunSpec,
        frames: Sequence[bytes],
        master: Master,
        coordinator: RunCoordinator,
        pool: PoolLinks,
        *,
        engines: Iterable[EngineFacts],
        functions: tuple[bytes, bytes] | None = None,
    ) -> None:
        self._spec = spec
        self._frames = frames
        self._master = master
        self._coordinator = coordinator
        self._pool = pool
        self.functions = functions
        self.version = 0  # of the parameters
        self._host = socket.gethostname()
        self._rendezvous: dict[int, Rendezvous] = {}  # where teams find themselves
        self._departed: set[int] = set()  # whose slabs may still count in the task under way
        self._links: dict[int, EngineLink] = {}
        for facts in engines:
            self.add(facts)

    def __contains__(self, engine: object) -> bool:
        return engine in self._links

    def __len__(self) -> int:
        return len(self._links)

    def __getitem__(self, engine: int) -> EngineLink:
        return self._links[engine]

    def get(self, engine: int) -> EngineLink | None:
        """Return the link to an engine; None if it does not take part."""
        return self._links.get(engine)

    # who takes part

    def add(self, facts: EngineFacts) -> None:
        """Let an engine take part: reached as was asked for, else by memory if it is on this host."""
        transports = self._spec.transport
        is_near = facts.process.host == self._host
        kind = transports.get(str(facts.engine), transports.get(""))
        self._links[facts.engine] = EngineLink(kind or ("memory" if is_near else "socket"), is_near)

    def add_slabs(self, number: int) -> None:
        """Make slabs for those that take part from the start.

        Raises:
            SpaceError: there is no room for them.
        """
        for engine, link in self._links.items():
            self._master.add_slabs(engine, number, kind=link.transport)

    def remove(self, engine: int) -> None:
        """Forget an engine; its slabs stay until the task under way is committed."""
        if self._links.pop(engine, None) is not None:
            self._departed.add(engine)

    def take_departed(self) -> frozenset[int]:
        """Return, once, which engines have gone."""
        departed = frozenset(self._departed)
        self._departed.clear()
        return departed

    def drop_slabs(self, departed: frozenset[int]) -> None:
        """Give back the memory of engines that are gone; one that came back and left again may still count."""
        for engine in departed - self._links.keys() - self._departed:
            self._master.drop_slabs_of(engine)

    # what an engine needs to begin

    def load(self, engine: int) -> None:
        """Send the run to an engine.

        Raises:
            SpaceError: there is no room for its slabs.
        """
        link, master = self._links[engine], self._master
        link.has_loaded = False
        owner = self._coordinator.owner_of(engine)
        if not master.slabs_of(owner):
            master.add_slabs(owner, self._num_slabs(engine), kind=link.transport)
        link.gradient_layout = master.gradient_layout
        record = Load(
            run=self._spec.id,
            transport=link.transport,
            wire=self._pool.offer_wire(engine, link.transport, is_near=link.is_near),
            parameters=master.parameters_ref,
            parameter_layout=master.parameter_layout,
            gradient_layout=master.gradient_layout,
            buffer_layout=master.buffer_layout,
            assignment=self._assignment(engine),
        )
        self._pool.send(engine, record, self._frames)

    def attach(self, engine: int, wire: Wire) -> None:
        """Send an engine what it needs to load the run, now that its wire is there."""
        link = self._links[engine]
        link.wire, link.version, link.states_version = wire, self.version, 0
        if link.gradient_layout is not self._master.gradient_layout:  # it was to load the run before
            wire.queue(self._thaw_record())
        if frozen := self._master.freezing.on_engines:
            wire.queue(Freeze(run=self._spec.id, names=tuple(frozen)))
        slabs = self._master.slabs_of(self._coordinator.owner_of(engine))
        wire.queue(AddSlabs(run=self._spec.id, slabs=tuple(slab.ref for slab in slabs)))
        if link.transport == "socket":
            self._upload(wire)
            self._open_receive_buffers(engine, wire)
        if self.functions is not None:
            wire.queue(*self._replaced_frames())
        wire.flush()

    def change_to_socket(self, engine: int) -> bool:
        """Reach an engine over a socket from its next load on; return whether it was reached by memory before."""
        link = self._links.get(engine)
        if link is None or link.transport == "socket":
            return False
        link.transport = "socket"
        self._master.drop_slabs_of(engine)
        return True

    def disband(self, team: int) -> None:
        """End the rendezvous of a team, which frees whoever still waits in it."""
        self._rendezvous.pop(team, None)

    def unload(self, engines: Iterable[int]) -> None:
        """Let engines forget the run."""
        for engine in engines:
            self._pool.send(engine, Unload(run=self._spec.id), ())

    def replace_functions(self, pickled: bytes, signature: bytes) -> None:
        """Let all engines, and those that join later, go on with another step or loss function."""
        self.functions = pickled, signature
        for link in self._links.values():
            if link.wire is not None:
                link.wire.send(*self._replaced_frames())

    def _replaced_frames(self) -> tuple[FunctionsReplaced, bytes]:
        assert self.functions is not None
        pickled, signature = self.functions
        return FunctionsReplaced(run=self._spec.id, signature=signature), pickled

    def _assignment(self, engine: int) -> RankAssignment | None:
        assignment = self._coordinator.assignment_of(engine)
        if assignment is None:
            return None
        team, rank, partition = assignment
        if team not in self._rendezvous:
            self._rendezvous[team] = open_rendezvous()
        place = self._rendezvous[team]
        return RankAssignment(team=team, rank=rank, partition=partition, host=place.host, port=place.port)

    def _upload(self, wire: Wire) -> None:
        """Queue everything that an engine without shared memory has to be sent before it can load the run."""
        for slot, payload in ((JOB_SLOT, self._spec.job), (DATA_SLOT, self._spec.data)):
            if payload.segment is not None:
                memory = open_segment(payload.segment).memory
                wire.queue_pieces(slot, Flat(memoryview(memory)), [(0, payload.segment.num_bytes)])
        num_bytes = self._master.parameter_layout.num_bytes
        wire.queue_pieces(PARAMETERS_SLOT, self._master.parameters_flat, [(0, num_bytes)])
        wire.queue(Shipped(run=self._spec.id))

    def _open_receive_buffers(self, engine: int, wire: Wire) -> None:
        wire.receive_buffers = dict(enumerate(slab.flat.memory for slab in self._master.slabs_of(engine)))

    # what an engine needs to compute

    def bring_up_to_date(self, link: EngineLink, wire: Wire) -> bytes:
        """Queue the parameters that an engine without shared memory lacks; return the loose states that it lacks."""
        if link.transport == "socket" and (link.version != self.version or link.is_written):
            whole = [(0, self._master.parameter_layout.num_bytes)]
            ranges = whole if link.is_written else self._master.changing
            wire.queue_pieces(PARAMETERS_SLOT, self._master.parameters_flat, ranges)
            link.version, link.is_written = self.version, False
        states = self._master.states
        if link.states_version == states.version:
            return b""
        link.states_version = states.version
        return states.packed

    def slabs_for(self, action: machine.Assign) -> tuple[int, ...]:
        """Return the slabs into which an engine writes its shards; it is told of slabs that are new.

        Raises:
            SpaceError: there is no room for them.
        """
        if action.kind == "step" and (self._spec.exact or action.in_extra_slab):
            return self._more_slabs(action, self._links[action.engine])
        assignment = self._coordinator.assignment_of(action.engine)
        if assignment is not None and assignment[2].kind == "synced":
            return (assignment[1],)
        return (0, 1) if self._spec.ties else (0,)

    def _more_slabs(self, action: machine.Assign, link: EngineLink) -> tuple[int, ...]:
        """Return a slab for each shard of an exact run, else one for all, besides those that are filled already."""
        assert link.wire is not None
        if not self._spec.exact:
            first, last = 1, 2
        else:
            first = 0 if action.fresh and not action.in_extra_slab else link.num_filled
            last = link.num_filled = first + len(action.shards)
        added = self._master.add_slabs(action.engine, last, kind=link.transport)
        if added:
            link.wire.queue(AddSlabs(run=self._spec.id, slabs=tuple(slab.ref for slab in added)))
            if link.transport == "socket":
                self._open_receive_buffers(action.engine, link.wire)
        return tuple(range(first, last))

    @property
    def num_slabs(self) -> dict[int, int]:
        """The number of slabs that each engine has."""
        return {engine: len(self._master.slabs_of(engine)) for engine in self._links}

    def renew_slabs(self, numbers: Mapping[int, int]) -> None:
        """Make as many slabs as there were, now that gradients have another layout, and tell the engines.

        Raises:
            SpaceError: there is no room for them.
        """
        for engine, link in self._links.items():
            self._master.add_slabs(engine, numbers[engine], kind=link.transport)
            self._tell_of_thaw(engine, link)

    def freeze(self, names: Collection[str], *, is_new_to_all: bool) -> None:
        """Let engines freeze these parameters and no others: all of them, or those that are loading the run."""
        for link in self._links.values():
            if link.wire is not None and (is_new_to_all or not link.has_loaded):
                link.wire.send(Freeze(run=self._spec.id, names=tuple(sorted(names))))

    def _tell_of_thaw(self, engine: int, link: EngineLink) -> None:
        link.num_filled = 0
        if link.wire is None:
            return  # it is told when it connects
        link.gradient_layout = self._master.gradient_layout
        refs = tuple(slab.ref for slab in self._master.slabs_of(engine))
        link.wire.queue(self._thaw_record())
        link.wire.queue(AddSlabs(run=self._spec.id, slabs=refs))
        if link.transport == "socket":
            self._open_receive_buffers(engine, link.wire)
        link.wire.flush()

    def _thaw_record(self) -> Thaw:
        master = self._master
        return Thaw(run=self._spec.id, gradient_layout=master.gradient_layout, buffer_layout=master.buffer_layout)

    def _num_slabs(self, engine: int) -> int:
        """Return into how many slabs engines may write at once."""
        assignment = self._coordinator.assignment_of(engine)
        if assignment is not None and assignment[2].kind == "synced":
            return assignment[2].num_engines
        return 2 if self._spec.ties else 1
