"""An engine's stages of a model that is divided over a team: the counterpart of `Replica` in a pipeline."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dnb.engine.replicas.new_loss import judge_new_loss
from dnb.engine.replicas.pipeline.action_log import ActionLog
from dnb.engine.replicas.pipeline.micro_batches import fetch_micro_batches, model_inputs, shapes_of
from dnb.engine.replicas.pipeline.schedules import Trouble, WatchedStage, build_schedule, num_micro_batches_for
from dnb.engine.replicas.pipeline.stage_memory import StageMemory
from dnb.engine.replicas.pipeline.whole_loss import WholeLoss
from dnb.engine.replicas.replica import NO_SUMS, WorkResult, added, one_kind, part_seed, samples_text
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.replicas.whole_metrics import WholeMetrics
from dnb.engine.runtime.loose_states import EngineStates
from dnb.engine.runtime.process_group import PeerLostError, close_group, first_line, is_about_peers, open_group, release
from dnb.engine.runtime.run_memory import EngineMemory
from dnb.errors import PlanError
from dnb.job import DataSource, Job, Sum
from dnb.partitioning.pipeline.stage_builder import StageBuilder
from dnb.partitioning.pipeline.stage_module import StagePart
from dnb.planning.shards import SAMPLES_AT_LEAST, first_filled_shard
from dnb.protocol.engine_messages import Diagnose, Diagnosis, Work
from dnb.protocol.measurements import Action, StageTrace, Sums
from dnb.protocol.run import Partition, Reduction, RunSpec
from dnb.user_code.loader import fetch_batch
from dnb.user_code.loss_weights import counting_targets, nothing_of, weighed_loss
from dnb.user_code.model_call import plain_batch
from dnb.user_code.module_modes import Modes
from dnb.user_code.return_values import Metrics, read_loss, weighed

__all__ = ["PeerLostError", "StageReplica"]

# Shapes of batches for which stages are kept; a data set whose batches all differ builds them anew each time.
MOST_SHAPES = 8
CPU = torch.device("cpu")


@dataclass(slots=True)
class _Feed:
    """What one pass through the pipeline is about."""

    indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    batches: Sequence[Any] = ()  # micro-batches; none where no stage of this engine reads them
    micro_samples: int = 0
    batch_samples: int | None = None  # of the global batch; None: no gradients
    seed: int = 0
    sums: list[Sums] = field(default_factory=list)
    are_sums: list[bool] = field(default_factory=list)  # of `sums`
    whole: WholeLoss | None = None  # on the last stage, where the loss looks at the whole batch

    @property
    def is_sum(self) -> bool:
        return one_kind(self.are_sums)


class _Body(torch.nn.Module):
    """One stage as `torch.distributed.pipelining` calls it: random numbers, inputs, and the loss at the end."""

    def __init__(self, part: StagePart, index: int, *, is_last: bool, replica: StageReplica) -> None:
        super().__init__()
        self.part_module = part.module
        self.micro_batch = 0
        self._inputs = part.inputs
        self._index = index
        self._is_last = is_last
        self.__dict__["_replica"] = replica  # no submodule, and no parameter of it

    def forward(self, *received: torch.Tensor) -> Any:
        """Compute a micro-batch; the last stage gives the part of the loss that backward begins with."""
        replica: StageReplica = self.__dict__["_replica"]
        feed = replica._feed
        replica._seed(part_seed(feed.seed, self._index, self.micro_batch))
        values = model_inputs(replica._job, feed.batches[self.micro_batch]).values if self._inputs else ()
        own = [values[position] for position in self._inputs]
        with replica._autocast():
            output = self.part_module(*(received if self._index else ()), *own)
            if not self._is_last:
                return tuple(_sendable(value) for value in output)
            return replica._loss_of(output, feed.batches[self.micro_batch])


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
        self._job = job
        self._data = context.data
        self._stopwatch = context.stopwatch
        self._partition = assignment.partition
        of_team = spec.batch_size // max(spec.num_shards, 1)
        # A short batch is not cut into single samples, unless that is how whole ones are cut.
        self._least_samples = min(of_team // assignment.partition.num_micro_batches, SAMPLES_AT_LEAST) or 1
        self._rank = assignment.rank
        self._device = device
        self._generators = context.generators
        self._passes: OrderedDict[Any, _StagePass] = OrderedDict()
        self._timeline = ActionLog()
        self._reduction: Reduction = spec.reduction
        self._is_loss_new = spec.is_loss_new
        self._trouble = Trouble()
        self._whole_metrics = WholeMetrics(job.metrics, spec.whole_metrics)
        self._feed = _Feed()
        self._failed_samples = self._feed.indices
        self._modes = Modes([job.model, *(job.stages or ())])
        self._has_group = False
        self._divider = StageBuilder(
            job.model,
            assignment.partition,
            stages=job.stages if assignment.partition.num_stages > 1 and not assignment.partition.cuts else None,
            autocast=self._autocast,
        )
        parts = self._first_parts()
        self._begins = [part.begins for part in parts]
        self._slots = StageMemory(job.model, load, context.memory, parts, assignment)
        placed = [slot.name for slot in load.buffer_layout.slots]
        self._states = EngineStates(job.model, placed=placed, rules=spec.buffers)
        open_group(assignment, self._device)
        self._has_group = True

    @property
    def stages(self) -> tuple[int, ...]:
        """Which stages are here."""
        return tuple(range(self._rank, self._partition.num_stages, self._partition.num_engines))

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
            self._be_training(mode=True)
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
        self._job = dataclasses.replace(self._job, loss=loss)
        self._reduction, self._is_loss_new = "targets", loss is not None

    def find_place(self, work: Work, _indices: torch.Tensor, error: BaseException) -> str:
        """The stage and the samples at which user code raised, for people; nothing is computed again."""
        trouble = self._trouble
        if trouble.error is not error:
            return ""
        begins = self._begins[trouble.stage]
        where = f"stage {trouble.stage}" + (f" (from {begins})" if begins else "")
        shards = (
            f"one of shards {work.shards[0]} to {work.shards[-1]}"
            if len(work.shards) > 1
            else (f"shard {work.shards[0]}")
        )
        return f"{where}, {shards}, {samples_text(self._failed_samples)}"

    def probe(self) -> float | None:
        """Nothing: no engine of a team has a loss of its own."""
        return None

    def digests(self) -> bytes:
        """As of `Replica`, for the parameters that are bound here."""
        return self._slots.digests()

    def timeline(self) -> tuple[Action, ...]:
        """What this engine did in the last step, and when."""
        return self._timeline.actions()

    def trace(self) -> StageTrace:
        """The same, with what was sent meanwhile."""
        return self._timeline.trace()

    def close(self) -> None:
        """Leave the group, and let go of gradients, parameters and samples."""
        self._leave(None)
        self._slots.close()
        vars(self).pop("_data", None)

    # A step ----------------------------------------------------------------------------------------

    def _step(self, work: Work, indices: torch.Tensor) -> WorkResult:
        self._be_training(mode=True)
        self._whole_metrics.begin()
        self._timeline.is_counting = work.trace
        self._slots.begin(work.slabs, fresh=work.fresh)
        if work.fresh:
            self._states.begin()
        seed = part_seed(self._spec.seed, work.step, work.shards[0])
        feed = self._run(self._data.train, indices, batch_samples=work.batch_samples, seed=seed)
        unused = self._slots.finish()
        self._slots.check_written(work.step)
        self._slots.write_buffers(work.slabs[0])
        sums = added([*feed.sums, *self._whole_metrics.take()]) if feed.sums else NO_SUMS
        is_first = first_filled_shard(work.batch_samples, num_shards=self._spec.num_shards) in work.shards
        states = self._states.collect(self._slots.misfits(self._states)) if is_first else b""
        return WorkResult((sums,), feed.is_sum, unused, states=states)

    def _evaluate(self, indices: torch.Tensor) -> Sums:
        assert self._data.val is not None
        self._slots.read_buffers()
        self._states.begin()
        self._whole_metrics.begin()
        self._be_training(mode=False)
        most = max(1, self._spec.batch_size)
        parts = [
            sums
            for piece in indices.split(most)
            if len(piece)
            for sums in self._run(self._data.val, piece, batch_samples=None, seed=self._spec.seed).sums
        ]
        return added([*parts, *self._whole_metrics.take()]) if parts else NO_SUMS

    def _run(self, source: DataSource, indices: torch.Tensor, *, batch_samples: int | None, seed: int) -> _Feed:
        """One pass of all micro-batches."""
        feed = self._feed = _Feed(indices, batch_samples=batch_samples, seed=seed)
        if not len(indices):
            return feed
        number = num_micro_batches_for(len(indices), self._partition, least=self._least_samples)
        feed.micro_samples = len(indices) // number
        self._seed(seed)  # engines that read the same samples must read them alike
        feed.batches = self._fetch(source, indices, number)
        current = self._pass_of(source, indices, number, trains=batch_samples is not None)
        marks = (torch.arange(number),) if current.stages[0].is_first else ()
        targets = torch.arange(number) if current.stages[-1].is_last and batch_samples is not None else None
        self._timeline.begin(number)
        with nullcontext() if batch_samples is not None else torch.no_grad():
            current.schedule.step(*marks, target=targets)
        self._timeline.end()
        if feed.whole is not None:
            self._count_whole(feed.whole, feed)
        for stage in current.stages:
            stage.clear_runtime_states()  # else an evaluation's activations stay until the next one
        feed.batches = ()
        return feed

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if len(self._generators):
            self._generators.seed(seed)

    def _loss_of(self, output: Any, batch: Any) -> torch.Tensor:
        """What backward begins with; its value and the metrics are kept for the report."""
        feed, job = self._feed, self._job
        if self._spec.loss_over == "batch":
            if feed.whole is None:
                feed.whole = WholeLoss(self._whole_loss, micro_samples=feed.micro_samples)
            self._whole_metrics.add(output, batch[-1], feed.micro_samples)
            return feed.whole.add(output, batch[-1])
        has_target = job.loss is not None
        metrics: Metrics = {}
        counted: Sequence[float] = ()
        value = output
        if has_target:
            assert job.loss is not None
            if self._is_loss_new and feed.batch_samples is not None:
                found = judge_new_loss(job.loss, output, batch[-1], num_samples=feed.micro_samples, spec=self._spec)
                if found is not None:
                    self._reduction, self._is_loss_new = found, False
            with counting_targets(self._reduction) as counted:
                value = job.loss(output, batch[-1])
            self._whole_metrics.add(output, batch[-1], feed.micro_samples)
            with torch.no_grad():
                metrics = {
                    name: weighed(metric(output, batch[-1]), feed.micro_samples, name=name)
                    for name, metric in self._whole_metrics.of_parts.items()
                }
        loss = read_loss(
            value,
            needs_gradient=feed.batch_samples is not None,
            by="loss" if has_target else "model",
            device=self._device,
        )
        if self._reduction == "targets":
            loss = weighed_loss(loss, counted)
        is_sum = isinstance(loss, Sum)
        total = loss.total if isinstance(loss, Sum) else loss
        adds_up = is_sum or self._reduction == "sum"
        if feed.batch_samples is not None and not total.requires_grad:
            total = total + nothing_of(output)  # every micro-batch goes back through all stages
        number = total.item()
        factor = 1 if is_sum else (feed.batch_samples or self._spec.batch_size) if adds_up else feed.micro_samples
        feed.are_sums.append(is_sum)
        feed.sums.append(
            Sums(
                loss_total=number * factor,
                loss_weight=loss.weight if isinstance(loss, Sum) else float(feed.micro_samples),
                metric_totals={name: total for name, (total, _) in metrics.items()},
                metric_weights={name: weight for name, (_, weight) in metrics.items()},
                num_samples=feed.micro_samples,
            )
        )
        scale = 1.0 if adds_up or feed.batch_samples is None else feed.micro_samples / feed.batch_samples
        scaled = total * scale if scale != 1.0 else total
        # Schedules join the outputs of micro-batches, and detach them, which a view does not allow.
        return torch.stack((scaled if scaled.dim() == 0 else scaled.sum(),))

    def _whole_loss(self, output: Any, target: Any, num_samples: int) -> tuple[torch.Tensor, Metrics]:
        """Loss and metrics of all micro-batches together."""
        feed, job = self._feed, self._job
        assert job.loss is not None
        torch.default_generator.manual_seed(part_seed(feed.seed, self._partition.num_stages, 0))
        with self._autocast():
            loss = read_loss(
                job.loss(output, target), needs_gradient=feed.batch_samples is not None, device=self._device
            )
        with torch.no_grad():
            metrics = {
                name: weighed(metric(output, target), num_samples, name=name)
                for name, metric in self._whole_metrics.of_parts.items()
            }
        return loss.total / loss.weight if isinstance(loss, Sum) else loss, metrics

    def _count_whole(self, whole: WholeLoss, feed: _Feed) -> None:
        """Report the loss of a whole batch; of an evaluation it is computed only now."""
        if feed.batch_samples is None:
            whole.settle(needs_gradient=False)
        feed.are_sums.append(False)
        feed.sums.append(
            Sums(
                loss_total=whole.loss * whole.num_samples,
                loss_weight=float(whole.num_samples),
                metric_totals={name: total for name, (total, _) in whole.metrics.items()},
                metric_weights={name: weight for name, (_, weight) in whole.metrics.items()},
                num_samples=whole.num_samples,
            )
        )

    # Stages per shape -------------------------------------------------------------------------------

    def _fetch(self, source: DataSource, indices: torch.Tensor, number: int) -> Sequence[Any]:
        """The micro-batches, if anything here needs them: inputs, targets, or shapes that only they tell."""
        if not self._reads_data and source.collate is None:
            return ()
        with self._stopwatch.measure("data"):
            return fetch_micro_batches(source, indices, number)

    def _pass_of(self, source: DataSource, indices: torch.Tensor, number: int, *, trains: bool) -> _StagePass:
        key: Any = (trains, len(indices), number, None if source.collate is None else shapes_of(self._feed.batches[0]))
        if key not in self._passes:
            example = self._feed.batches[0] if self._feed.batches else None
            if example is None:
                example = plain_batch(fetch_batch(source, indices[: len(indices) // number]))
            known = self._first if trains and shapes_of(example) == self._first[0] else None
            parts = known[1] if known is not None else self._divider.parts(model_inputs(self._job, example))
            self._passes[key] = self._build(parts, number, trains=trains)
            while len(self._passes) > MOST_SHAPES:
                self._passes.popitem(last=False)
        self._passes.move_to_end(key)
        return self._passes[key]

    def _first_parts(self) -> tuple[StagePart, ...]:
        """The stages for the first samples, to know who owns what."""
        self._be_training(mode=True)
        size = max(1, min(self._spec.batch_size, self._spec.num_samples) // self._partition.num_micro_batches)
        example = plain_batch(fetch_batch(self._data.train, torch.arange(size)))
        parts = self._divider.parts(model_inputs(self._job, example))
        self._first = shapes_of(example), parts
        mine = [parts[stage] for stage in self.stages]
        self._reads_data = any(part.inputs for part in mine) or mine[-1] is parts[-1]
        return parts

    def _build(self, parts: Sequence[StagePart], number: int, *, trains: bool) -> _StagePass:
        self._slots.adopt(parts, trains=trains)
        stages = [
            WatchedStage(
                _Body(parts[stage], stage, is_last=stage == len(parts) - 1, replica=self),
                parts[stage],
                index=stage,
                num_stages=len(parts),
                device=self._device,
                timeline=self._timeline,
                stopwatch=self._stopwatch,
                trouble=self._trouble,
            )
            for stage in self.stages
        ]
        schedule = build_schedule(stages, self._partition, number, loss=_given if trains else None)
        return _StagePass(stages, schedule)

    # What surrounds it --------------------------------------------------------------------------------

    def _be_training(self, *, mode: bool) -> None:
        self._modes.be_training(mode=mode)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._spec.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _leaving_if_it_fails(self) -> _Leaving:
        return _Leaving(self)

    def _leave(self, error: BaseException | None) -> None:
        """Leave the group, so that the other engines of the team are freed."""
        self._passes.clear()
        size = self._feed.micro_samples
        self._failed_samples = self._feed.indices[self._trouble.micro_batch * size :][:size]
        self._feed = _Feed()
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


@dataclass(slots=True)
class _StagePass:
    """Stages and schedule for batches of one shape."""

    stages: Sequence[WatchedStage]
    schedule: Any


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


def _sendable(value: torch.Tensor) -> torch.Tensor:
    """Gloo sends what is contiguous, and schedules detach what they have sent, which a view does not allow."""
    return value.clone(memory_format=torch.contiguous_format) if value._is_view() else value.contiguous()


def _given(output: torch.Tensor, _number: torch.Tensor) -> torch.Tensor:
    """The loss is what the last stage gives."""
    return output
