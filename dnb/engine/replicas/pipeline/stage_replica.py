"""An engine's stages of a model that is divided over a team: the counterpart of `Replica` in a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from dnb.engine.replicas.outcome import NO_SUMS, WorkResult, added, part_seed, samples_text
from dnb.engine.replicas.pipeline.action_log import ActionLog
from dnb.engine.replicas.pipeline.micro_batches import fetch_micro_batches
from dnb.engine.replicas.pipeline.pipeline_step import PipelineFeed, PipelineStep
from dnb.engine.replicas.pipeline.schedules import Trouble, num_micro_batches_for
from dnb.engine.replicas.pipeline.stage_memory import StageMemory
from dnb.engine.replicas.pipeline.stage_passes import StageParts, StagePasses, stages_of
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.runtime.loose_states import EngineStates
from dnb.engine.runtime.process_group import PeerLostError, close_group, first_line, is_about_peers, open_group, release
from dnb.engine.runtime.run_memory import EngineMemory
from dnb.errors import PlanError
from dnb.job import DataSource, Job
from dnb.planning.shards import SAMPLES_AT_LEAST, first_filled_shard
from dnb.protocol.engine_messages import Diagnose, Diagnosis, Work
from dnb.protocol.measurements import Action, StageTrace, Sums
from dnb.protocol.run import Partition, RunSpec
from dnb.user_code.module_modes import Modes

__all__ = ["PeerLostError", "StageReplica"]

CPU = torch.device("cpu")


class StageReplica:
    """Computes the stages of one engine of a team; all engines of the team must be given the same work.

    Args:
        context: the run, and the place in the team; what of its model this engine uses is bound to the memory.
        device: of activations; the group is NCCL's on "cuda", gloo's elsewhere.

    Raises:
        PlanError: the model cannot be divided so.
        PeerLostError: the team does not come together.
    """

    def __init__(self, context: ReplicaContext, *, device: torch.device = CPU) -> None:
        spec, job, load, assignment = context.spec, context.job, context.load, context.assignment
        _check(spec, job, context.memory, assignment.partition, has_publisher=context.publisher is not None)
        self._spec = spec
        self._data = context.data
        self._stopwatch = context.stopwatch
        self._assignment = assignment
        of_team = spec.batch_size // max(spec.num_shards, 1)
        # A short batch is not cut into single samples, unless that is how whole ones are cut.
        self._least_samples = min(of_team // assignment.partition.num_micro_batches, SAMPLES_AT_LEAST) or 1
        self._timeline = ActionLog()
        self._trouble = Trouble()
        self._pipeline = PipelineStep(context, device=device)
        self._failed_samples = self._pipeline.feed.indices
        self._modes = Modes([job.model, *(job.stages or ())])
        self._has_group = False
        self._set_training(mode=True)
        self._parts = StageParts(context, self._pipeline)
        self._slots = StageMemory(job.model, load, context.memory, self._parts.first, assignment)
        placed = [slot.name for slot in load.buffer_layout.slots]
        self._states = EngineStates(job.model, placed=placed, rules=spec.buffers)
        self._passes = StagePasses(
            context,
            self._pipeline,
            self._parts,
            self._slots,
            timeline=self._timeline,
            trouble=self._trouble,
            device=device,
        )
        open_group(assignment, device)
        self._has_group = True

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of this engine."""
        return stages_of(self._assignment)

    def compute(self, work: Work, indices: torch.Tensor) -> WorkResult:
        """Do this engine's part of what the team is asked.

        Its own gradients are then in the slab; all other slots are reported as unused, so that what every engine of the
        team reports as unused is what the step did not use. Samples, loss and metrics are reported by the last stage.
        If it raises, this engine has left its group, and the replica can only be closed.

        Args:
            work: which shards of which task.
            indices: int64, of all shards, in order.

        Raises:
            PeerLostError: another engine of the team failed or died.
        """
        with self._leaving_if_it_fails():
            if work.states:
                self._states.adopt(work.states)
            if work.kind == "evaluation":
                return WorkResult((self._evaluate(indices),), is_sum=False)
            return self._step(work, indices)

    def diagnose(self, request: Diagnose, indices: torch.Tensor) -> Diagnosis:
        """Compute the shards one by one; the first that has a gradient here that is not finite."""
        fault: tuple[int, tuple[str, str]] | None = None
        with self._leaving_if_it_fails():
            self._set_training(mode=True)
            for shard, part in zip(request.shards, indices.split(request.shard_sizes), strict=True):
                self._slots.begin((request.slab,), fresh=True)
                seed = part_seed(self._spec.seed, request.step, shard)
                self._run(self._data.train, part, batch_samples=request.batch_samples, seed=seed)
                self._slots.finish()
                found = self._slots.first_fault()
                if found is not None and fault is None:  # the other stages still count on this one
                    fault = shard, found
        shard_or_none, (name, kind) = fault or (None, ("", ""))
        return Diagnosis(run=request.run, step=request.step, shard=shard_or_none, parameter=name, kind=kind)

    def replace_functions(self, *, step: Callable[..., Any] | None, loss: Callable[..., Any] | None) -> None:
        """Go on with another loss.

        Raises:
            PlanError: it is a step function.
        """
        if step is not None:
            raise PlanError("a pipeline cannot call a step function, as no engine has the whole model: mend its loss")
        self._pipeline.replace_functions(loss)

    def find_place(self, work: Work, _indices: torch.Tensor, error: BaseException) -> str:
        """Name the stage and the samples at which user code raised; nothing is computed again."""
        trouble = self._trouble
        if trouble.error is not error:
            return ""
        begins = self._parts.first[trouble.stage].begins
        where = f"stage {trouble.stage}" + (f" (from {begins})" if begins else "")
        shards = (
            f"one of shards {work.shards[0]} to {work.shards[-1]}"
            if len(work.shards) > 1
            else (f"shard {work.shards[0]}")
        )
        return f"{where}, {shards}, {samples_text(self._failed_samples)}"

    def probe(self) -> float | None:
        """Return None: no engine of a team has a loss of its own."""
        return None

    def digests(self) -> bytes:
        """Return digests as `Replica` does, for the parameters that are bound here."""
        return self._slots.digests()

    def timeline(self) -> tuple[Action, ...]:
        """Return this engine's actions in the last step, with their times."""
        return self._timeline.actions()

    def trace(self) -> StageTrace:
        """Return the same, with the bytes that were sent meanwhile."""
        return self._timeline.trace()

    def take_news(self) -> tuple[str, ...]:
        """Return nothing: a pipeline has no step function, whose metrics would be told of."""
        return ()

    def close(self) -> None:
        """Leave the group, and let go of gradients, parameters and samples."""
        self._leave(None)
        self._slots.close()
        vars(self).pop("_data", None)

    # A step ----------------------------------------------------------------------------------------

    def _step(self, work: Work, indices: torch.Tensor) -> WorkResult:
        self._set_training(mode=True)
        self._pipeline.whole_metrics.begin()
        self._timeline.is_counting = work.trace
        self._slots.begin(work.slabs, fresh=work.fresh)
        if work.fresh:
            self._states.begin()
        seed = part_seed(self._spec.seed, work.step, work.shards[0])
        feed = self._run(self._data.train, indices, batch_samples=work.batch_samples, seed=seed)
        unused = self._slots.finish()
        self._slots.check_written(work.step)
        self._slots.write_buffers(work.slabs[0])
        sums = added([*feed.sums, *self._pipeline.whole_metrics.take()]) if feed.sums else NO_SUMS
        is_first = first_filled_shard(work.batch_samples, num_shards=self._spec.num_shards) in work.shards
        states = self._states.collect(self._slots.misfits(self._states)) if is_first else b""
        return WorkResult((sums,), feed.is_sum, unused, states=states)

    def _evaluate(self, indices: torch.Tensor) -> Sums:
        assert self._data.val is not None
        self._slots.read_buffers()
        self._states.begin()
        self._pipeline.whole_metrics.begin()
        self._set_training(mode=False)
        most = max(1, self._spec.batch_size)
        parts = [
            sums
            for piece in indices.split(most)
            if len(piece)
            for sums in self._run(self._data.val, piece, batch_samples=None, seed=self._spec.seed).sums
        ]
        return added([*parts, *self._pipeline.whole_metrics.take()]) if parts else NO_SUMS

    def _run(self, source: DataSource, indices: torch.Tensor, *, batch_samples: int | None, seed: int) -> PipelineFeed:
        """Run all micro-batches through the pipeline once."""
        feed = self._pipeline.feed = PipelineFeed(indices, batch_samples=batch_samples, seed=seed)
        if not len(indices):
            return feed
        number = num_micro_batches_for(len(indices), self._assignment.partition, least=self._least_samples)
        feed.micro_samples = len(indices) // number
        self._pipeline.seed(seed)  # engines that read the same samples must read them alike
        feed.batches = self._fetch(source, indices, number)
        current = self._passes.find(source, indices, number, trains=batch_samples is not None)
        marks = (torch.arange(number),) if current.stages[0].is_first else ()
        targets = torch.arange(number) if current.stages[-1].is_last and batch_samples is not None else None
        self._timeline.begin(number)
        with nullcontext() if batch_samples is not None else torch.no_grad():
            current.schedule.step(*marks, target=targets)
        self._timeline.end()
        self._pipeline.count_whole()
        for stage in current.stages:
            stage.clear_runtime_states()  # else an evaluation's activations stay until the next one
        feed.batches = ()
        return feed

    def _fetch(self, source: DataSource, indices: torch.Tensor, number: int) -> Sequence[Any]:
        """Read the micro-batches, if anything here needs them: inputs, targets, or shapes that only they tell."""
        if not self._parts.reads_data and source.collate is None:
            return ()
        with self._stopwatch.measure("data"):
            return fetch_micro_batches(source, indices, number)

    # What surrounds it --------------------------------------------------------------------------------

    def _set_training(self, *, mode: bool) -> None:
        self._modes.set_training(mode=mode)

    def _leaving_if_it_fails(self) -> _Leaving:
        return _Leaving(self)

    def _leave(self, error: BaseException | None) -> None:
        """Leave the group, so that the other engines of the team are freed."""
        self._passes.clear()
        feed, self._pipeline.feed = self._pipeline.feed, PipelineFeed()
        size = feed.micro_samples
        self._failed_samples = feed.indices[self._trouble.micro_batch * size :][:size]
        if self._has_group:
            self._has_group = False
            close_group(error)


class _Leaving:
    """Around work: what raises is told apart, after this engine has left its group."""

    def __init__(self, replica: StageReplica) -> None:
        self._replica = replica

    def __enter__(self) -> None:
        if not self._replica._has_group:
            raise PeerLostError("this engine has left its team after an error, and has not joined another")
        self._replica._trouble.error = None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        replica = self._replica
        own = replica._trouble.error
        if own is not None:
            release(own)
        replica._leave(error)
        if own is not None and own is not error:
            raise own from own.__cause__
        if own is None and is_about_peers(error):
            raise PeerLostError(f"another engine of the team is gone: {first_line(error)}") from None


def _check(spec: RunSpec, job: Job, memory: EngineMemory, partition: Partition, *, has_publisher: bool) -> None:
    if partition.kind != "pipeline":
        raise PlanError(f"a {partition.kind} team has no stages")
    if job.step is not None:
        raise PlanError(
            "a pipeline cannot call a step function, as no engine has the whole model: give loss= instead of step="
        )
    if job.val_step is not None:
        raise PlanError("a pipeline cannot call val_step, as no engine has the whole model: leave it out")
    if spec.exact:
        raise PlanError("exact=True needs a gradient per shard, and a pipeline has one per step: leave it out")
    if memory.kind != "memory" or has_publisher:
        raise PlanError("the engines of a pipeline share the hub's memory: they must be on its host")
    if partition.num_stages % partition.num_engines or (partition.num_engines == 1 and partition.num_stages > 1):
        raise PlanError(
            f"{partition.num_stages} stages cannot be dealt evenly to {partition.num_engines} engines: "
            f"ask for {partition.num_engines} or a multiple"
        )
