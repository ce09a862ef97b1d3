"""One engine's copy of the model: parameters read from the hub, gradients born in this engine's slabs."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from dnb.engine.replicas.new_loss import judge_new_loss
from dnb.engine.replicas.outcome import (
    WorkResult,
    added,
    is_out_of_memory,
    narrowed,
    one_kind,
    part_seed,
    pieces_of,
    samples_text,
)
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.runtime.bound_parameters import BoundParameters, ModelChangedError
from dnb.engine.runtime.gradients import Gradients
from dnb.engine.runtime.model_buffers import ModelBuffers
from dnb.engine.runtime.run_memory import Publisher
from dnb.engine.runtime.write_guard import ParameterWrittenError
from dnb.errors import USER_ERRORS, kind_of, summary_of, text_of
from dnb.job import DataSource, Sum
from dnb.planning.shards import SAMPLES_AT_LEAST, first_filled_shard
from dnb.protocol.engine_messages import Diagnose, Diagnosis, Work
from dnb.protocol.measurements import StageTrace, Sums
from dnb.protocol.memory import Layout
from dnb.protocol.run import Reduction
from dnb.transport.layout import slot_views
from dnb.user_code.loader import fetch_batch
from dnb.user_code.loss_weights import counting_targets, part_of, weighed_loss
from dnb.user_code.model_call import arguments_of
from dnb.user_code.module_modes import Modes
from dnb.user_code.return_values import OWN_LOOP, MetricReader, Metrics, ReturnError, read_loss, read_step, weighed

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
        self._job = job
        self._data = context.data
        self._memory = memory
        self._stopwatch = context.stopwatch
        master = slot_views(load.parameter_layout, memory.parameters)
        self._parameters = BoundParameters(job.model, master, memory)
        self._of_this_step: list[tuple[Work, torch.Tensor]] = []
        self._place_gradients(load.gradient_layout, context.publisher)
        self._buffers = ModelBuffers(job.model, master, layout=load.buffer_layout, memory=memory, rules=spec.buffers)
        self._found_states = 0, b""  # step, and what its first shard has made of them
        self._most_at_once = spec.micro_batch
        self._modes = Modes([job.model])
        self._reduction: Reduction = spec.reduction
        self._is_loss_new = spec.is_loss_new
        self._step_metrics = MetricReader()
        self._evaluates_gradients = False
        self._unit: float | None = None  # of what is added up in the slab under way, once there is something
        self._units: dict[int, float | None] = {}  # likewise, of slabs
        self._initial_state: tuple[object, torch.Tensor] = None, torch.empty(0)  # of backward; mostly the same again

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
        self._be_training(mode=True)
        self._parameters.begin_work()
        try:
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
        self._be_training(mode=True)
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
        if step is not None or loss is not self._job.loss:  # else what is known of it stays so, to the bit
            self._reduction = "targets"  # where it is a mean over targets; all else is a mean over samples
            self._is_loss_new = loss is not None
        self._job = dataclasses.replace(self._job, step=step, loss=loss)
        self._step_metrics = MetricReader()

    def find_place(self, work: Work, indices: torch.Tensor, error: BaseException) -> str:
        """The shard and the samples at which an error comes up again, as narrow as can be found, for people.

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

        shards = [*zip(work.shards, indices.split(work.shard_sizes), strict=True)]
        for shard, part in shards:
            if len(part) and fails(part):
                return f"shard {shard}, {samples_text(narrowed(part, fails))}"
        return f"one of shards {work.shards[0]} to {work.shards[-1]}" if len(shards) > 1 else f"shard {shards[0][0]}"

    def probe(self) -> float | None:
        """The loss of the first samples, to be held against other engines; None if it cannot be had by itself."""
        indices = torch.arange(min(self._spec.probe_samples, self._spec.num_samples))
        self._buffers.read()
        self._be_training(mode=False)
        states = random.getstate(), np.random.get_state()
        self._seed(0, 0, also_python=True)
        try:
            with torch.no_grad():
                sums, _ = self._forward(self._data.train, indices, batch_samples=None)
        except USER_ERRORS as error:  # a step function may need gradients; its own step will tell
            log.info("the model was not probed: %s", summary_of(error))
            return None
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        weight = self._spec.batch_size if self._reduction == "sum" else sums.loss_weight
        return sums.loss_total / weight if weight else None

    def digests(self) -> bytes:
        """Return the CRC-32 of every tensor as the model holds it, as uint32; 0 for the hub's own memory."""
        return self._parameters.digests()

    def trace(self) -> StageTrace | None:
        """Return nothing: there are no stages."""
        return None

    def close(self) -> None:
        """Let go of the gradients."""
        self._gradients.close()

    def _compute_step(self, work: Work, indices: torch.Tensor) -> WorkResult:
        if self._spec.exact:
            return self._compute_each_shard(work, indices)
        return self._compute_together(work, indices)

    def _with_states(self, work: Work, outcome: WorkResult) -> WorkResult:
        step, packed = self._found_states
        if not packed or step != work.step or self._first_shard(work.batch_samples) not in work.shards:
            return outcome
        return dataclasses.replace(outcome, states=packed)

    def _first_shard(self, batch_samples: int) -> int:
        return first_filled_shard(batch_samples, num_shards=self._spec.num_shards)

    def _collect_states(self, step: int, shards: Sequence[int], batch_samples: int) -> None:
        """After a forward: what it has made of loose states counts if it had the batch's first shard."""
        if self._first_shard(batch_samples) in shards:
            self._found_states = step, self._buffers.collect_states()

    def _compute_together(self, work: Work, indices: torch.Tensor) -> WorkResult:
        """All shards in one forward, or in as many micro-batches as memory wants."""
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
        """Every shard from the same beginning into a slab of its own, so that it matters not who computes it."""
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
        return WorkResult(tuple(parts), one_kind(kinds), tuple(sorted(unused or ())))

    def _begin(self, slab: int, *, fresh: bool, reads: bool = True) -> None:
        flat = self._memory.slabs[slab]
        if fresh and reads:
            self._buffers.read()
        self._unit = None if fresh else self._units.get(slab)
        self._gradients.begin(slab, flat, fresh=fresh)
        if self._publisher is not None:
            self._publisher.begin(slab, flat)

    def _end(self, slab: int, *, publish: bool) -> tuple[int, ...]:
        unused = self._gradients.finish()
        self._units[slab] = self._unit
        self._parameters.find_thawed(refuses=bool(self._spec.partitions))
        self._write_buffers(slab)
        self._parameters.check_unused(unused)
        if not self._spec.partitions:
            self._parameters.note_frozen(unused)
        if self._publisher is not None and publish:
            self._publisher.finish()
        return unused

    def _pieces(self, indices: torch.Tensor) -> Sequence[torch.Tensor]:
        """What goes through forward at once in a step."""
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
        self,
        source: DataSource,
        indices: torch.Tensor,
        *,
        batch_samples: int | None,
        needs_gradient: bool = False,
    ) -> tuple[Sums, bool]:
        """Loss and metrics of one micro-batch, with backward if it is part of a global batch."""
        needs_gradient = needs_gradient or batch_samples is not None
        with self._stopwatch.measure("data"):
            batch = fetch_batch(source, indices)
        num_samples = indices.numel()
        with self._stopwatch.measure("compute"):
            step, reduction = self._job.step, self._reduction
            if self._job.val_step is not None and source is self._data.val:
                step, reduction = self._job.val_step, "targets"
            with self._autocast(), counting_targets(reduction) as weights:
                loss, metrics = self._apply(step, batch, num_samples, needs_gradient=needs_gradient)
            if self._spec.exact and reduction == "targets":
                loss = weighed_loss(loss, weights)  # its bits are those of totals, and a product shows in them
            part = part_of(
                loss,
                reduction=reduction,
                weights=weights,
                num_samples=num_samples,
                batch_samples=batch_samples or self._spec.batch_size,
            )
            unit = part.unit
            if batch_samples is not None:
                if part.is_sum:
                    unit = self._unit = self._unit or unit  # one for all that is added up in a slab
                if part.tensor.requires_grad:
                    self._go_back(part.tensor, part.factor / unit)
            value = part.tensor.item()
        sums = Sums(
            loss_total=value * part.factor,
            loss_weight=part.weight,
            metric_totals={name: total for name, (total, _) in metrics.items()},
            metric_weights={name: weight for name, (_, weight) in metrics.items()},
            num_samples=num_samples,
            unit=unit if part.is_sum else 1.0,
        )
        return sums, part.is_sum

    def _go_back(self, loss: torch.Tensor, scale: float) -> None:
        """Backward of a multiple of a loss, without a product that autograd would have to follow."""
        if type(loss) is not torch.Tensor:
            (loss * scale).backward()
            return
        key = scale, loss.dtype, loss.shape
        if self._initial_state[0] != key:
            self._initial_state = key, torch.full_like(loss, scale, requires_grad=False)
        loss.backward(self._initial_state[1])

    def _apply(
        self, step: Callable[..., Any] | None, batch: Any, num_samples: int, *, needs_gradient: bool
    ) -> tuple[torch.Tensor | Sum, Metrics]:
        model, job = self._job.model, self._job
        if step is not None:
            before = self._gradients.versions()
            returned = step(model, batch)
            if self._gradients.versions() != before:
                raise ReturnError(f"step {OWN_LOOP}")
            loss, found = read_step(returned, needs_gradient=needs_gradient)
            return loss, self._step_metrics.read(found, num_samples) if found else {}
        given = arguments_of(model, batch, has_target=job.loss is not None)
        output = model(*given.positional, **given.keywords)
        if job.loss is None:
            loss, compared = read_step(output, needs_gradient=needs_gradient, by="model")[0], batch
        else:
            if self._is_loss_new and needs_gradient and self._spec.loss_over == "samples":
                self._judge_loss(job.loss, output, given.target, num_samples)
            loss, compared = read_loss(job.loss(output, given.target), needs_gradient=needs_gradient), given.target
        if not job.metrics:
            return loss, {}
        with torch.no_grad():
            return loss, self._measure(output, compared, num_samples)

    def _measure(self, output: Any, compared: Any, num_samples: int) -> Metrics:
        """The metrics of one micro-batch."""
        return {
            name: weighed(metric(output, compared), num_samples, name=name)
            for name, metric in self._job.metrics.items()
        }

    def _judge_loss(self, loss: Callable[..., Any], output: Any, target: Any, num_samples: int) -> None:
        found = judge_new_loss(loss, output, target, num_samples=num_samples, spec=self._spec)
        if found is not None or num_samples > SAMPLES_AT_LEAST:  # else more samples may tell
            self._reduction, self._is_loss_new = found or self._reduction, False

    def _evaluate(self, work: Work, indices: torch.Tensor) -> Sums:  # noqa: ARG002 - see `dnb.engine.replicas.gathered_loss`
        assert self._data.val is not None
        self._buffers.read()
        self._be_training(mode=False)
        size = self._most_at_once or self._spec.batch_size
        if self._job.val_step is not None and self._spec.val_batch_size is not None:
            size = self._spec.val_batch_size  # whole batches, as the hub deals them
        return added([self._evaluate_piece(self._data.val, piece) for piece in pieces_of(indices, size) if len(piece)])

    def _evaluate_piece(self, source: DataSource, indices: torch.Tensor) -> Sums:
        """Loss and metrics without gradients, unless they are made of gradients, as a penalty on them is."""
        try:
            with torch.set_grad_enabled(self._evaluates_gradients):
                return self._forward(source, indices, batch_samples=None)[0]
        except RuntimeError as error:
            if self._evaluates_gradients or "does not require grad" not in text_of(error):
                raise
        self._evaluates_gradients = True
        return self._evaluate_piece(source, indices)

    def _be_training(self, *, mode: bool) -> None:
        self._modes.be_training(mode=mode)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._spec.precision == "float32":
            return nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def _seed(self, step: int, shard: int, *, also_python: bool = False) -> None:
        """Random numbers depend on the step and the shard, never on the engine."""
        seed = part_seed(self._spec.seed, step, shard)
        # torch.manual_seed takes 0.3 ms, as it looks for every kind of accelerator.
        torch.default_generator.manual_seed(seed)
        if len(self._generators):
            self._generators.seed(seed)
        if self._spec.exact or also_python:  # what a data set or a model may draw from besides
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)

    def _write_buffers(self, slab: int) -> None:
        self._buffers.write(slab)

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
