"""Steps whose loss looks at the whole batch: an engine gives its outputs, gets those of all, and finishes backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dnb.engine.replicas.outcome import WorkResult, added, is_out_of_memory, mean_sums, pieces_of
from dnb.engine.replicas.replica import Replica
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.replicas.whole_batch.gathered_batch import GatheredBatch, unpack_batch
from dnb.engine.replicas.whole_batch.output_form import (
    OutputForm,
    check_constant,
    compared_form,
    form_of,
    join_pairs,
    join_rows,
    leaf_of,
    rows_of,
    tree_of,
)
from dnb.errors import USER_ERRORS, PlanError
from dnb.job import DataSource, Sum
from dnb.protocol.engine_messages import Work
from dnb.protocol.measurements import Sums
from dnb.user_code.loader import fetch_batch
from dnb.user_code.model_call import arguments_of
from dnb.user_code.return_values import Metrics, read_loss, weighed

# So many samples, and one fewer, show which tensors have a row for each.
NUM_LEARNED = 3


@dataclass(frozen=True, slots=True)
class _KeptForward:
    """One forward, with its graph."""

    shards: tuple[int, ...]
    outputs: Sequence[torch.Tensor]
    buffers: Sequence[torch.Tensor | None]  # as they were after it


class GatheringReplica(Replica):
    """Computes shards of a run whose loss looks at the whole batch.

    A step is two pieces of work. For the first, "outputs", forward is computed, and its graph kept. For the second,
    "step", the loss of all outputs is computed, with its gradient by them, and backward goes on from there through the
    graph. What has no graph here, as the engine that had it is gone or as memory is short, goes through forward again,
    with the same samples and random numbers.
    """

    _gathers = True

    def __init__(self, context: ReplicaContext) -> None:
        super().__init__(context)
        self._kept: list[_KeptForward] = []
        self._form: OutputForm | None = None
        self._batch_memory = memoryview(b"")

    def take_gathered(self, memory: memoryview) -> None:
        """Keep the outputs gathered for the step that is to be computed next."""
        self._batch_memory = memory

    def replace_functions(self, *, step: Callable[..., Any] | None, loss: Callable[..., Any] | None) -> None:
        """Go on with another loss.

        Raises:
            PlanError: it is a step function.
        """
        if step is not None:
            raise PlanError(
                "this run gathers outputs before the loss is computed, and a step function does both at once: mend its "
                "loss"
            )
        super().replace_functions(step=step, loss=loss)

    def _seed(self, step: int, shard: int, *, also_python: bool = True) -> None:
        """Seed also the generators of data sets: a forward that is computed again must have the same samples."""
        super()._seed(step, shard, also_python=also_python)

    # Outputs ------------------------------------------------------------------------------------------

    def _compute_step(self, work: Work, indices: torch.Tensor) -> WorkResult:
        return self._give_outputs(work, indices) if work.kind == "outputs" else self._finish_step(work, indices)

    def _give_outputs(self, work: Work, indices: torch.Tensor) -> WorkResult:
        if self._form is None:
            self._form = self._learn()
        if work.fresh:
            self._kept.clear()
        note = ""
        while True:
            try:
                tensors = self._outputs_of(work, indices)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._kept.clear()  # so that all of them are computed again in the second half
                note = self._shrink(len(indices), error)
        has_rows = rows_of(tensors, self._form, num_samples=len(indices))
        leaves = tuple(leaf_of(tensor, has_rows=rows) for tensor, rows in zip(tensors, has_rows, strict=True))
        return WorkResult((_counted(len(indices)),), is_sum=False, note=note, leaves=leaves, tensors=tensors)

    def _outputs_of(self, work: Work, indices: torch.Tensor) -> list[torch.Tensor]:
        parts: list[list[torch.Tensor]] = []
        sizes: list[int] = []
        for number, (shards, part) in enumerate(self._forwards(work, indices)):
            if not len(part):
                continue
            if self._spec.exact or (work.fresh and number == 0) or not self._kept:
                self._buffers.read()
            self._seed(work.step, shards[0])
            pieces = [piece for piece in pieces_of(part, self._most_at_once) if len(piece)]
            for piece in pieces:
                with torch.set_grad_enabled(len(pieces) == 1):
                    outputs, targets = self._forward_tensors(self._data.train, piece)
                if len(pieces) == 1:
                    self._kept.append(_KeptForward(shards, outputs, self._buffers.keep() if self._spec.exact else []))
                parts.append([tensor.detach() for tensor in (*outputs, *targets)])
                sizes.append(len(piece))
            self._collect_states(work.step, shards, work.batch_samples)
        return join_rows(parts, sizes, form=self._form)

    def _forwards(self, work: Work, indices: torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Yield the shards that go through forward together, and their samples."""
        if not self._spec.exact:
            yield work.shards, indices
            return
        for shard, part in zip(work.shards, indices.split(work.shard_sizes), strict=True):
            yield (shard,), part

    def _forward_tensors(
        self, source: DataSource, indices: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the tensors of output and target."""
        output, target = self._forward_pair(source, indices)
        form = self._form
        leaves, spec = pytree.tree_flatten((output, target))
        if form is None or spec != form.spec:
            form = self._form = form_of(output, target)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return tensors[: form.num_outputs], tensors[form.num_outputs :]

    def _forward_pair(self, source: DataSource, indices: torch.Tensor) -> tuple[Any, Any]:
        with self._stopwatch.measure("data"):
            given = arguments_of(self._job.model, fetch_batch(source, indices), has_target=True)
        with self._stopwatch.measure("compute"), self._loss.autocast():
            return self._job.model(*given.positional), given.target

    def _learn(self) -> OutputForm:
        """Compute few samples, and one fewer, and see which tensors have a row for each."""
        most = min(NUM_LEARNED, self._spec.num_samples)
        self._buffers.read()
        self._set_training(mode=True)
        self._seed(0, 0)
        found = []
        with torch.no_grad():
            for number in (most, most - 1):
                try:
                    found.append(self._forward_pair(self._data.train, torch.arange(number)))
                except USER_ERRORS:  # BatchNorm takes no single sample, a generated batch no such number
                    break
        if len(found) < 2:
            output, target = found[0] if found else self._forward_pair(self._data.train, torch.arange(most))
            return form_of(output, target)
        return compared_form(*found, num_samples=most)

    # The step -----------------------------------------------------------------------------------------

    def _finish_step(self, work: Work, indices: torch.Tensor) -> WorkResult:
        if self._form is None:
            self._form = self._learn()
        whole = self._whole_of(work)
        if self._spec.exact:
            return self._finish_each_shard(work, whole)
        self._remember(work, indices)
        note, fresh = "", work.fresh
        while True:
            try:
                unused = self._finish_together(work, whole, fresh=fresh, publish=True)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._kept.clear()
                note = self._shrink(len(indices), error)
                earlier = [each for each, _ in self._of_this_step[:-1] if each.slabs == work.slabs]
                for number, before in enumerate(earlier):
                    self._finish_together(before, whole, fresh=number == 0, publish=False)
                fresh = not earlier
            else:
                return WorkResult((whole.sums_of(work.shards),), is_sum=False, unused=unused, note=note)

    def _finish_together(self, work: Work, whole: GatheredBatch, *, fresh: bool, publish: bool) -> tuple[int, ...]:
        assert work.gathered is not None
        groups = work.gathered.groups
        kept = {each.shards: each for each in self._kept}
        self._kept.clear()
        is_kept = fresh and kept.keys() == set(groups)
        slab = work.slabs[0]
        self._begin(slab, fresh=fresh, reads=not is_kept)
        wanted = frozenset(work.shards)
        for number, group in enumerate(groups, 1):
            is_last = number == len(groups)
            if is_kept:
                self._go_back(kept.pop(group), wanted, whole, is_last=is_last)
            else:
                self._recompute(work.step, group, wanted, whole, is_last=is_last)
        return self._end(slab, publish=publish)

    def _finish_each_shard(self, work: Work, whole: GatheredBatch) -> WorkResult:
        kept = {each.shards: each for each in self._kept}
        self._kept.clear()
        unused: set[int] | None = None
        for shard, slab in zip(work.shards, work.slabs, strict=True):
            found = kept.pop((shard,), None)
            self._begin(slab, fresh=True, reads=found is None)
            if found is not None:
                self._buffers.put(found.buffers)
                self._go_back(found, {shard}, whole, is_last=True)
            elif whole.gathered.shard_sizes[shard]:
                self._recompute(work.step, (shard,), {shard}, whole, is_last=True)
            left = set(self._end(slab, publish=True))
            unused = left if unused is None else unused & left
        parts = tuple(whole.sums_of((shard,)) for shard in work.shards)
        return WorkResult(parts, is_sum=False, unused=tuple(sorted(unused or ())))

    def _recompute(
        self,
        step: int,
        group: tuple[int, ...],
        wanted: Set[int],
        whole: GatheredBatch,
        *,
        is_last: bool,
    ) -> None:
        """Forward of some shards as it was, and backward from the rows that are wanted."""
        self._seed(step, group[0])
        positions = whole.positions(group)
        needed = torch.isin(positions, whole.positions([s for s in group if s in wanted]))
        pieces = pieces_of(torch.arange(len(positions)), self._most_at_once)
        for number, places in enumerate(pieces, 1):
            is_needed = bool(needed[places].any())
            with torch.set_grad_enabled(is_needed):
                outputs, _ = self._forward_tensors(self._data.train, whole.indices[positions[places]])
            if is_needed:
                is_first = whole.first in wanted and bool((positions[places] == whole.edges[whole.first]).any())
                is_end = is_last and number == len(pieces)
                self._descend(outputs, positions[places], needed[places], whole, is_first=is_first, is_last=is_end)
        self._collect_states(step, group, len(whole.indices))

    def _go_back(self, done: _KeptForward, wanted: Set[int], whole: GatheredBatch, *, is_last: bool) -> None:
        """Backward of a forward that was kept."""
        positions = whole.positions(done.shards)
        needed = torch.isin(positions, whole.positions([s for s in done.shards if s in wanted]))
        is_first = whole.first in wanted and whole.first in done.shards
        self._descend(done.outputs, positions, needed, whole, is_first=is_first, is_last=is_last)

    def _descend(
        self,
        outputs: Sequence[torch.Tensor],
        positions: torch.Tensor,
        needed: torch.Tensor,
        whole: GatheredBatch,
        *,
        is_first: bool,
        is_last: bool,
    ) -> None:
        roots: list[torch.Tensor] = []
        seeds: list[torch.Tensor] = []
        leaves = whole.gathered.leaves
        for number, output in enumerate(outputs):
            gradient = whole.gradients[number]
            if not leaves[number].has_rows:
                check_constant(output, whole.outputs[number])
            if gradient is None or not output.requires_grad or not (leaves[number].has_rows or is_first):
                continue
            if leaves[number].has_rows:
                gradient = gradient[positions]
                gradient[~needed] = 0
            roots.append(output)
            seeds.append(gradient)
        if self._publisher is not None:
            self._publisher.is_last_backward = is_last
        if roots:
            with self._stopwatch.measure("compute"):
                torch.autograd.backward(roots, seeds)
        if not is_last:
            self._gradients.bring_home()

    def _whole_of(self, work: Work) -> GatheredBatch:
        """Compute the loss of the whole batch, and its gradient by the outputs."""
        gathered, form = work.gathered, self._form
        assert gathered is not None
        assert form is not None
        indices, tensors = unpack_batch(self._batch_memory, gathered, num_samples=work.batch_samples)
        roots = [t.requires_grad_() if t.is_floating_point() or t.is_complex() else t for t in tensors]
        used = [*(root.clone() for root in roots[: form.num_outputs]), *(t.detach() for t in roots[form.num_outputs :])]
        output, target = tree_of(form, used)
        with self._stopwatch.measure("compute"):
            self._seed(work.step, self._spec.num_shards)
            loss, metrics = self._loss_and_metrics(output, target, work.batch_samples, needs_gradient=True)
            sources = [root for root in roots[: form.num_outputs] if root.requires_grad]
            found = iter(torch.autograd.grad(loss, sources, allow_unused=True))
        gradients = [next(found) if root.requires_grad else None for root in roots[: form.num_outputs]]
        edges = tuple(accumulate(gathered.shard_sizes, initial=0))
        return GatheredBatch(gathered, indices, edges, roots, loss.item(), gradients, metrics)

    def _loss_and_metrics(
        self,
        output: Any,
        target: Any,
        num_samples: int,
        *,
        needs_gradient: bool,
        among: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, Metrics]:
        job = self._job
        assert job.loss is not None
        with self._loss.autocast():
            loss = read_loss(job.loss(output, target), needs_gradient=needs_gradient)
        value = loss.total / loss.weight if isinstance(loss, Sum) else loss
        wanted = job.metrics if among is None else among
        if not wanted:
            return value, {}
        with torch.no_grad():
            used = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, output)
            metrics = {name: weighed(metric(used, target), num_samples, name=name) for name, metric in wanted.items()}
        return value, metrics

    # Evaluations --------------------------------------------------------------------------------------

    def _evaluate(self, work: Work, indices: torch.Tensor) -> Sums:
        """Evaluate whole batches, as the hub deals these: each has a loss of its own."""
        assert self._data.val is not None
        if self._job.val_step is not None:
            return super()._evaluate(work, indices)
        size = self._spec.val_batch_size or self._spec.batch_size
        self._buffers.read()
        self._set_training(mode=False)
        parts: list[Sums] = []
        seen: list[tuple[Any, Any]] = []  # outputs and targets that metrics want to see together
        sizes: list[int] = []
        with torch.no_grad():
            for batch in (
                batch for part in indices.split(work.shard_sizes) for batch in part.split(size) if len(batch)
            ):
                pair = self._evaluated(batch)
                parts.append(self._sums_of_batch(pair, len(batch)))
                if self._spec.whole_metrics:
                    seen.append(pair)
                    sizes.append(len(batch))
            if seen:
                parts.append(self._sums_of_all(seen, sizes))
        return added(parts)

    def _evaluated(self, indices: torch.Tensor) -> tuple[Any, Any]:
        """Return output and target of a batch."""
        assert self._data.val is not None
        pieces = pieces_of(indices, self._most_at_once)
        pairs = [self._forward_pair(self._data.val, piece) for piece in pieces]
        return join_pairs(pairs, list(map(len, pieces)), form=self._form)

    def _sums_of_batch(self, pair: tuple[Any, Any], num_samples: int) -> Sums:
        means = {name: each for name, each in self._job.metrics.items() if name not in self._spec.whole_metrics}
        loss, metrics = self._loss_and_metrics(*pair, num_samples, needs_gradient=False, among=means)
        return mean_sums(loss.item(), metrics, num_samples=num_samples)

    def _sums_of_all(self, pairs: Sequence[tuple[Any, Any]], sizes: Sequence[int]) -> Sums:
        """Metrics of all that was evaluated, which are no means of those of batches."""
        output, target = join_pairs(pairs, sizes, form=self._form)
        wanted = {name: self._job.metrics[name] for name in self._spec.whole_metrics if name in self._job.metrics}
        found = {name: weighed(metric(output, target), sum(sizes), name=name) for name, metric in wanted.items()}
        return mean_sums(0.0, found, num_samples=0)


def _counted(num_samples: int) -> Sums:
    return Sums(loss_total=0.0, loss_weight=0.0, metric_totals={}, metric_weights={}, num_samples=num_samples)
