"""The parts that every kind of replica is built from."""

from __future__ import annotations

from dataclasses import dataclass, field

from dnb.engine.runtime.run_memory import EngineMemory, Publisher
from dnb.engine.runtime.telemetry import Stopwatch
from dnb.job import Data, Job
from dnb.protocol.engine_messages import Load, RankAssignment
from dnb.protocol.run import RunSpec
from dnb.transport.pickling.generators import OwnGenerators


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaContext:
    """One run, as an engine has received it."""

    spec: RunSpec  # the run's numbers
    job: Job  # as unpacked; its model, or what a replica uses of it, is bound to the memory
    data: Data  # as unpacked
    load: Load  # with the layouts of the memory, and the place in a team
    memory: EngineMemory  # parameters and slabs; of a team, shared with the hub and its other engines
    stopwatch: Stopwatch  # counts data and compute time
    publisher: Publisher | None = None  # sends what is written; None where the hub shares the memory
    generators: OwnGenerators = field(default_factory=OwnGenerators)  # of random numbers, inside job and data

    @property
    def assignment(self) -> RankAssignment:
        """The place in the team, of an engine that is in one."""
        assert self.load.assignment is not None
        return self.load.assignment
