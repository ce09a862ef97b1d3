"""One engine's copy of the model: parameters read from the hub, gradients born in this engine's slabs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from dnb.engine.replicas.forward_pass import ForwardPass
from dnb.engine.replicas.model_loss import ModelLoss
from dnb.engine.replicas.outcome import (
    WorkResult,
    added,
    failing_place,
    is_out_of_memory,
    one_kind,
    part_seed,
    pieces_of,
    refuse_unlike_parts,
)
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.runtime.bound_parameters import BoundParameters, ModelChangedError
from dnb.engine.runtime.gradients import Gradients
from dnb.engine.runtime.model_buffers import ModelBuffers
from dnb.engine.runtime.random_states import same_python_states, seed_everything
from dnb.engine.runtime.run_memory import Publisher
from dnb.engine.runtime.scaled_backward import ScaledBackward
from dnb.engine.runtime.write_guard import ParameterWrittenError
from dnb.errors import USER_ERRORS, kind_of, summary_of, text_of
from dnb.job import DataSource, Job, Sum
from dnb.planning.shards import first_filled_shard
from dnb.protocol.engine_messages import Diagnose, Diagnosis, Work
from dnb.protocol.measurements import StageTrace, Sums
from dnb.protocol.memory import Layout
from dnb.transport.layout import slot_views
from dnb.user_code.module_modes import Modes

log = logging.getLogger(__name__)


class Replica:
    """Computes shards of steps and evaluations of one run.

    Args:
        context: the run; its model is bound to the memory.
    """

    _gathers = False

    def __init__(self, context: ReplicaContext) -> None:
        spec, job, load, memory = context.spec, context.job, context.load, context.memory
        self._spec = spec
        self._generators = context.generators
        self._data = context.data
        self._memory = memory
        self._stopwatch = context.stopwatch
        master = slot_views(load.parameter_layout, memory.parameters)
        self._parameters = BoundParameters(job.model, master, memory)
        self._of_this_step: list[tuple[Work, torch.Tensor]] = []
        self._place_gradients(load.gradient_layout, context.publisher)
        self._buffers = ModelBuffers(job.model, master, layout=load.buffer_layout, memory=memory, rules=spec.buffers)
        self._most_at_once = spec.micro_batch
        self._modes = Modes([job.model])
        self._evaluates_gradients = False
        self._news: list[str] = []  # of metrics
        self._loss = ModelLoss(context, self._gradients)
        self._backward = ScaledBackward()
        self._forward_pass = ForwardPass(context, self._loss, self._backward)

    @property
    def _job(self) -> Job:
        """The run's model, and its functions as they are by now."""
        return self._loss.job

    def _place_gradients(self, layout: Layout, publisher: Publisher | None) -> None:
        """Let gradients be born in slabs of a layout."""
        self._publisher = publisher
        self._gradients = Gradients(
            self._parameters.place(layout),
            layout,
            is_written=None if publisher is None else publisher.gradient_is_written,
        )

    def thaw(self, gradients: Layout, buffers: Layout, publisher: Publisher | None) -> None:
        """Go on with slabs of another layout, in which parameters have a place that were frozen until now.

        Args:
            gradients: their layout.
            buffers: their layout in the same slabs.
            publisher: of such slabs.
        """
        self._gradients.close()
        self._of_this_step.clear()
        self._place_gradients(gradients, publisher)
        self._loss.gradients = self._gradients
        self._buffers.move(buffers)

    def freeze(self, names: Collection[str]) -> None:
        """Let these parameters be frozen, of those that have a place in slabs, and all others train."""
        self._parameters.freeze(names)

    def compute(self, work: Work, indices: torch.Tensor) -> WorkResult:
        """Do what is asked; for a step, the gradients are then in the slabs.

        Args:
            work: which shards of which task.
            indices: int64, of all shards, in order.

        Raises:
            MemoryError: not even a single sample fits.
            ModelChangedError: user code replaced a parameter.
            ParameterWrittenError: user code wrote a parameter.
            ReturnError: user code returned what is no loss, or no metric.
        """
        if work.states:
            self._buffers.states.adopt(work.states)
        if work.kind == "evaluation":
            if len(self._generators):
                self._generators.seed(part_seed(self._spec.seed, work.step, work.shards[0]))
            evaluated = WorkResult((self._evaluate(work, indices),), is_sum=False)
            self._parameters.guard.check(work.step, thoroughly=work.check_copy)
            return evaluated
        self._set_training(mode=True)
        self._parameters.begin_work()
        try:
            if self._loss.has_new_step and work.fresh and work.kind == "step":
                self._judge_step(work, indices)
            outcome = self._with_states(work, self._compute_step(work, indices))
            self._parameters.guard.check(work.step, thoroughly=work.check_copy)
            thawed, frozen = self._parameters.thawed, self._parameters.frozen
            if thawed or frozen:
                return dataclasses.replace(outcome, thawed=tuple(thawed), frozen=tuple(sorted(frozen)))
            return outcome
        except USER_ERRORS:
            self._parameters.check_all()  # if one was replaced, that is the cause
            self._parameters.guard.check(work.step)  # or written
            raise

    def diagnose(self, request: Diagnose, indices: torch.Tensor) -> Diagnosis:
        """Compute the shards one by one, until one has a gradient that is not finite."""
        self._set_training(mode=True)
        for shard, part in zip(request.shards, indices.split(request.shard_sizes), strict=True):
            self._begin(request.slab, fresh=True)
            self._seed(request.step, shard)
            self._run_pieces(part, batch_samples=request.batch_samples)
            self._gradients.finish()
            fault = self._gradients.first_fault()
            if fault is not None:
                return Diagnosis(run=request.run, step=request.step, shard=shard, parameter=fault[0], kind=fault[1])
        return Diagnosis(run=request.run, step=request.step, shard=None, parameter="", kind="")

    def replace_functions(self, *, step: Callable[..., Any] | None, loss: Callable[..., Any] | None) -> None:
        """Go on with another step function, or another loss; one of them is None."""
        self._loss.replace(step=step, loss=loss)

    def find_place(self, work: Work, indices: torch.Tensor, error: BaseException) -> str:
        """Name the shard and the samples at which an error comes up again, as narrow as can be found.

        Only forward is computed again, by halves; what does not come up again is said to lie somewhere in the work.
        """
        if is_out_of_memory(error) or isinstance(error, ModelChangedError | ParameterWrittenError):
            return ""
        is_step = work.kind == "step"
        source = self._data.train if is_step else self._data.val
        assert source is not None

        def fails(part: torch.Tensor) -> bool:
            try:
                self._seed(work.step, work.shards[0])
                with torch.set_grad_enabled(is_step or self._evaluates_gradients):
                    self._forward(source, part, batch_samples=None, needs_gradient=is_step)
            except USER_ERRORS as again:  # whatever a user's model raises
                return kind_of(again) == kind_of(error)  # a class may be made where it is raised
            return False

        return failing_place(work, indices, fails)

    def probe(self) -> float | None:
        """Return the loss of the first samples, for comparison of engines; None if it cannot be computed alone."""
        indices = torch.arange(min(self._spec.probe_samples, self._spec.num_samples))
        self._buffers.read()
        self._set_training(mode=False)
        try:
            with same_python_states(), torch.no_grad():
                self._seed(0, 0, also_python=True)
                sums, _ = self._forward(self._data.train, indices, batch_samples=None)
        except USER_ERRORS as error:  # a step function may need gradients; its own step will tell
            log.info("the model was not probed: %s", summary_of(error))
            return None
        weight = self._spec.batch_size if self._loss.reduction == "sum" else sums.loss_weight
        return sums.loss_total / weight if weight else None

    def digests(self) -> bytes:
        """Return CRC-32 of every tensor as the model holds it, as uint32; 0 for those that are the hub's own memory."""
        return self._parameters.digests()

    def trace(self) -> StageTrace | None:
        """Return nothing: there are no stages."""
        return None

    def take_news(self) -> tuple[str, ...]:
        """Return what is to be told of metrics, for the last time."""
        news, self._news = tuple(self._news), []
        return news

    def close(self) -> None:
        """Let go of the gradients."""
        self._gradients.close()

    def _compute_step(self, work: Work, indices: torch.Tensor) -> WorkResult:
        if self._spec.exact:
            return self._compute_each_shard(work, indices)
        return self._compute_together(work, indices)

    def _with_states(self, work: Work, outcome: WorkResult) -> WorkResult:
        packed = self._buffers.found_states(work.step)
        if not packed or self._first_shard(work.batch_samples) not in work.shards:
            return outcome
        return dataclasses.replace(outcome, states=packed)

    def _first_shard(self, batch_samples: int) -> int:
        return first_filled_shard(batch_samples, num_shards=self._spec.num_shards)

    def _collect_states(self, step: int, shards: Sequence[int], batch_samples: int) -> None:
        """After a forward: what it has made of loose states counts if it had the batch's first shard."""
        if self._first_shard(batch_samples) in shards:
            self._buffers.collect_states(step)

    def _compute_together(self, work: Work, indices: torch.Tensor) -> WorkResult:
        """Compute all shards in one forward, or in as many micro-batches as memory wants."""
        self._remember(work, indices)
        note = ""
        fresh = work.fresh
        while True:
            try:
                sums, is_sum, unused = self._accumulate(work, indices, fresh=fresh)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                note = self._shrink(len(indices), error)
                fresh = self._redo_earlier(work.slabs)
            else:
                return WorkResult((sums,), is_sum, unused, note)

    def _remember(self, work: Work, indices: torch.Tensor) -> None:
        if work.fresh:  # in another slab may lie something of the same step
            self._of_this_step = [
                earlier
                for earlier in self._of_this_step
                if earlier[0].step == work.step and earlier[0].slabs != work.slabs
            ]
        self._of_this_step.append((work, indices))

    def _accumulate(
        self, work: Work, indices: torch.Tensor, *, fresh: bool, publish: bool = True
    ) -> tuple[Sums, bool, tuple[int, ...]]:
        slab = work.slabs[0]
        self._begin(slab, fresh=fresh)
        self._seed(work.step, work.shards[0])
        sums, is_sum = self._run_pieces(indices, batch_samples=work.batch_samples)
        self._collect_states(work.step, work.shards, work.batch_samples)
        return sums, is_sum, self._end(slab, publish=publish)

    def _compute_each_shard(self, work: Work, indices: torch.Tensor) -> WorkResult:
        """Compute every shard from the same beginning into a slab of its own, so that any engine may compute it."""
        parts: list[Sums] = []
        unused: set[int] | None = None
        kinds: list[bool] = []
        for shard, slab, part in zip(work.shards, work.slabs, indices.split(work.shard_sizes), strict=True):
            self._begin(slab, fresh=True)
            self._seed(work.step, shard)
            try:
                sums, shard_is_sum = self._run_pieces(part, batch_samples=work.batch_samples)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise MemoryError(f"shard {shard} with {len(part)} samples does not fit: {text_of(error)}") from error
            self._collect_states(work.step, (shard,), work.batch_samples)
            left = set(self._end(slab, publish=True))
            unused = left if unused is None else unused & left
            if sums.num_samples:
                kinds.append(shard_is_sum)
            parts.append(sums)
        refuse_unlike_parts(parts)
        return WorkResult(tuple(parts), one_kind(kinds), tuple(sorted(unused or ())))

    def _begin(self, slab: int, *, fresh: bool, reads: bool = True) -> None:
        flat = self._memory.slabs[slab]
        if fresh and reads:
            self._buffers.read()
        self._backward.begin(slab, fresh=fresh)
        self._gradients.begin(slab, flat, fresh=fresh)
        if self._publisher is not None:
            self._publisher.begin(slab, flat)

    def _end(self, slab: int, *, publish: bool) -> tuple[int, ...]:
        unused = self._gradients.finish()
        self._backward.end()
        self._parameters.find_thawed(refuses=bool(self._spec.partitions))
        self._buffers.write(slab)
        self._parameters.check_unused(unused)
        if not self._spec.partitions:
            self._parameters.note_frozen(unused)
        if self._publisher is not None and publish:
            self._publisher.finish()
        return unused

    def _pieces(self, indices: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the samples that go through forward at once in a step."""
        return pieces_of(indices, self._most_at_once)

    def _run_pieces(self, indices: torch.Tensor, *, batch_samples: int) -> tuple[Sums, bool]:
        pieces = [piece for piece in self._pieces(indices) if piece.numel()]
        parts = []
        for number, piece in enumerate(pieces, 1):
            if self._publisher is not None:
                self._publisher.is_last_backward = number == len(pieces)
            parts.append(self._forward(self._data.train, piece, batch_samples=batch_samples))
            if len(pieces) > 1 and not self._spec.partitions:
                self._parameters.note_frozen()  # another one may have written a gradient of what this one has frozen
            if number < len(pieces):
                self._gradients.bring_home()
        if len(parts) == 1:
            return parts[0]
        return added([sums for sums, _ in parts]), one_kind([is_sum for _, is_sum in parts])

    def _forward(
        self, source: DataSource, indices: torch.Tensor, *, batch_samples: int | None, needs_gradient: bool = False
    ) -> tuple[Sums, bool]:
        """Compute loss and metrics of one micro-batch, with backward if it is part of a global batch."""
        needs_gradient = needs_gradient or batch_samples is not None
        return self._forward_pass.run(source, indices, batch_samples=batch_samples, needs_gradient=needs_gradient)

    def _judge_step(self, work: Work, indices: torch.Tensor) -> None:
        """Look at a step function that came in mid-run, by some samples of the first part that it computes."""
        self._buffers.read()
        self._set_training(mode=False)
        with same_python_states():
            self._seed(work.step, work.shards[0])
            news = self._loss.judge_step(self._step_on, self._data.train, indices)
        self._set_training(mode=True)
        if news and self._first_shard(work.batch_samples) in work.shards:
            self._news.append(news)

    def _step_on(self, batch: Any) -> tuple[torch.Tensor | Sum, Mapping[str, Any]]:
        return self._loss.step_on(batch)

    def _evaluate(self, work: Work, indices: torch.Tensor) -> Sums:  # noqa: ARG002 - see `dnb.engine.replicas.gathered_loss`
        assert self._data.val is not None
        self._buffers.read()
        self._set_training(mode=False)
        size = self._most_at_once or self._spec.batch_size
        if self._job.val_step is not None and self._spec.val_batch_size is not None:
            size = self._spec.val_batch_size  # whole batches, as the hub deals them
        return added([self._evaluate_piece(self._data.val, piece) for piece in pieces_of(indices, size) if len(piece)])

    def _evaluate_piece(self, source: DataSource, indices: torch.Tensor) -> Sums:
        """Loss and metrics without gradients, unless these tell what they are made of, or are made of gradients."""
        try:
            with torch.set_grad_enabled(self._evaluates_gradients):
                sums = self._forward(source, indices, batch_samples=None)[0]
                if self._evaluates_gradients or not sums.targets_per_sample:
                    return sums  # else only a graph tells which of the means that were computed are in the loss
        except RuntimeError as error:
            if self._evaluates_gradients or "does not require grad" not in text_of(error):
                raise
        self._evaluates_gradients = True
        return self._evaluate_piece(source, indices)

    def _set_training(self, *, mode: bool) -> None:
        self._modes.set_training(mode=mode)

    def _seed(self, step: int, shard: int, *, also_python: bool = False) -> None:
        """Seed random numbers by the step and the shard, never by the engine."""
        seed = part_seed(self._spec.seed, step, shard)
        seed_everything(seed, self._generators, also_python=self._spec.exact or also_python)

    def _shrink(self, num_samples: int, error: Exception) -> str:
        """Halve the micro-batch; the sentence that says so."""
        before = min(self._most_at_once or num_samples, num_samples)
        if self._spec.loss_over == "batch" and not self._gathers:
            raise MemoryError(
                f"the loss needs {num_samples} samples at once, which do not fit: {text_of(error)}"
            ) from error
        if before == 1:
            raise MemoryError(f"not even one sample fits: {text_of(error)}") from error
        self._most_at_once = before // 2
        return f"out of memory with {before} samples at once: goes on with {self._most_at_once}"

    def _redo_earlier(self, slabs: tuple[int, ...]) -> bool:
        """After a failure the slab is torn: compute again what this step had brought into it before."""
        earlier = [pair for pair in self._of_this_step[:-1] if pair[0].slabs == slabs]
        for number, (work, indices) in enumerate(earlier):
            self._accumulate(work, indices, fresh=number == 0, publish=False)
        return not earlier
