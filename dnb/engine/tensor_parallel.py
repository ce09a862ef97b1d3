"""An engine's part of every divided layer: the counterpart of `Replica` in tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dnb.engine.memory import EngineMemory, Publisher
from dnb.engine.replica import NO_SUMS, Outcome, Replica, samples_text
from dnb.engine.team_group import PeerLost, close_group, first_line, is_about_peers, open_group
from dnb.engine.telemetry import Stopwatch
from dnb.engine.tensor_layers import TeamGradients, divide
from dnb.engine.tensor_noise import OwnNoise
from dnb.errors import PlanError, text_of
from dnb.records import Diagnose, Diagnosis, Load, RunSpec, Seat, Sums, Work
from dnb.transport.job import Data, DataSource, Job
from dnb.transport.layout import slot_views
from dnb.transport.own_generators import OwnGenerators

__all__ = ["PeerLost", "TensorReplica"]


class TensorReplica(Replica):
    """Computes the whole batch with one part of every divided layer; all engines of the team are given the same work.

    What is not divided is computed by all engines, from the same random numbers. Between a layer that is divided by
    columns and the one by rows behind it, each engine has features of its own, and random numbers of its own: a
    dropout there depends on the number of engines.

    Args:
        spec: the run's numbers.
        job: as unpacked; its model is bound to the memory, and divided.
        data: as unpacked.
        load: the layouts of that memory.
        memory: parameters and slabs, shared with the hub and the other engines of the team.
        stopwatch: counts data and compute time, with the time in which engines wait for each other inside a layer.
        seat: the place in the team.
        publisher: must be None.

    Raises:
        PlanError: this engine does not share the hub's memory.
        PeerLost: the team does not come together.
    """

    def __init__(
        self,
        spec: RunSpec,
        job: Job,
        data: Data,
        load: Load,
        *,
        memory: EngineMemory,
        stopwatch: Stopwatch,
        seat: Seat,
        publisher: Publisher | None = None,
        generators: OwnGenerators | None = None,
    ) -> None:
        if spec.exact:
            raise PlanError("exact=True needs a gradient per shard, and tensor parallelism has one per step")
        if memory.kind != "memory" or publisher is not None:
            raise PlanError("the engines of a team share the hub's memory: they must be on its host")
        super().__init__(spec, job, data, load, memory=memory, stopwatch=stopwatch, generators=generators)
        self._gradients.close()
        self._rank = seat.rank
        self._samples = torch.empty(0, dtype=torch.int64)
        self._had_fast_path = torch.backends.mha.get_fastpath_enabled()
        open_group(seat, torch.device("cpu"))
        self._has_group = True
        # Torch's fused encoder layer reads weights past their layers, as if they were whole.
        torch.backends.mha.set_fastpath_enabled(False)
        group = dist.group.WORLD
        assert group is not None
        model = divide(job.model, seat.partition, group, slot_views(load.parameter_layout, memory.parameters))
        self._entrance = model.entrance
        self._divided = {each.name for each in model.parameters}
        self._noise = OwnNoise(job.model, seat.partition.styles, seat.rank)
        trained = {slot.name for slot in load.gradient_layout.slots}
        whole = {
            name: parameter for name, parameter in self._named.items() if name in trained and name not in self._divided
        }
        self._gradients: Any = TeamGradients(
            load.gradient_layout,
            whole=whole,
            divided=model.parameters,
            rank=seat.rank,
            num_engines=seat.partition.num_engines,
        )

    def compute(self, work: Work, indices: torch.Tensor) -> Outcome:
        """Do this engine's part of what the team is asked.

        Samples, loss and metrics are reported by the first engine of the team. Slots that another engine writes are
        reported as unused. If it raises, this engine has left its group, and the replica can only be closed.

        Raises:
            PeerLost: another engine of the team failed or died.
        """
        with self._leaving_if_it_fails():
            outcome = super().compute(work, indices)
        # States are the same on all engines: the first one tells of them.
        return outcome if self._rank == 0 else Outcome((NO_SUMS,), outcome.is_sum, outcome.unused)

    def diagnose(self, request: Diagnose, indices: torch.Tensor) -> Diagnosis:
        """Compute all shards one by one, as the others do; the first that has a gradient here that is not finite."""
        fault: tuple[int, tuple[str, str]] | None = None
        with self._leaving_if_it_fails():
            self._be_training(mode=True)
            for shard, part in zip(request.shards, indices.split(request.shard_sizes), strict=True):
                self._begin(request.slab, fresh=True)
                self._seed(request.step, shard)
                self._run_pieces(part, batch_samples=request.batch_samples)
                self._gradients.finish()
                found = self._gradients.first_fault()
                if found is not None and fault is None:
                    fault = shard, found
        shard_or_none, (name, kind) = fault or (None, ("", ""))
        return Diagnosis(run=request.run, step=request.step, shard=shard_or_none, parameter=name, kind=kind)

    def find_place(self, work: Work, indices: torch.Tensor, error: BaseException) -> str:  # noqa: ARG002
        """The samples at which user code raised, for people; nothing is computed again, as the others are gone."""
        first, last = work.shards[0], work.shards[-1]
        shards = f"one of shards {first} to {last}" if last != first else f"shard {first}"
        return f"{shards}, {samples_text(self._samples)}"

    def probe(self) -> float | None:
        """Nothing: no engine of a team has a loss of its own."""
        return None

    def close(self) -> None:
        """Leave the group, and let go of the gradients."""
        self._leave(None)
        self._gradients.close()
        torch.backends.mha.set_fastpath_enabled(self._had_fast_path)

    def _forward(
        self,
        source: DataSource,
        indices: torch.Tensor,
        *,
        batch_samples: int | None,
        needs_gradient: bool = False,
    ) -> tuple[Sums, bool]:
        self._samples = indices
        result = super()._forward(source, indices, batch_samples=batch_samples, needs_gradient=needs_gradient)
        self._entrance.forget()
        return result

    def _seed(self, step: int, shard: int, *, also_python: bool = False) -> None:
        self._noise.forget()
        super()._seed(step, shard, also_python=also_python)

    def _write_buffers(self, slab: int) -> None:
        if self._rank == 0:  # they are the same on all engines
            super()._write_buffers(slab)

    def _check_parameter(self, name: str) -> None:
        if name not in self._divided:
            super()._check_parameter(name)

    def _shrink(self, num_samples: int, error: Exception) -> str:
        """The others cannot be told to halve their batch, too."""
        raise MemoryError(
            f"{min(self._most_at_once or num_samples, num_samples)} samples at once do not fit: "
            f"give micro_batch=, which all engines of a team keep to ({text_of(error)})"
        ) from error

    @contextmanager
    def _leaving_if_it_fails(self) -> Iterator[None]:
        """Around work: what raises is told apart, after this engine has left its group."""
        if not self._has_group:
            raise PeerLost("this engine has left its team after an error, and has not joined another")
        try:
            yield
        except BaseException as error:
            self._leave(error)
            if is_about_peers(error):
                raise PeerLost(f"another engine of the team is gone: {first_line(error)}") from None
            raise

    def _leave(self, error: BaseException | None) -> None:
        """Leave the group, so that the other engines of the team are freed."""
        self._entrance.forget()
        if self._has_group:
            self._has_group = False
            close_group(error)
