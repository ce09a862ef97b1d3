"""The samples of each shard of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dnb.errors import ArgumentError
from dnb.hub.guarded_calls import UserCodeError
from dnb.hub.scheduling.failures import ranges_text
from dnb.planning.sample_order import BatchOrder, has_sampler, iterate_epochs, name_sampler
from dnb.planning.shards import shard_bounds, split_evenly
from dnb.protocol.measurements import WorkKind
from dnb.protocol.run import RunSpec


class Batches:
    """The batches of one run, in order; a step that is tried again keeps its own.

    A user's sampler is drawn one batch ahead, while the engines compute. Whatever it raises belongs to the step that
    needs the batch, and is raised there.

    Args:
        order: of the samples.
        num_steps: of the run.
        num_shards: logical shards of every batch.
        num_val_samples: of an evaluation.
        num_done: steps that need no batch any more, as an earlier run has done them.
        steps_per_epoch: batches of an epoch, as they were counted beforehand; None: nobody did.
        val_batch: samples of an evaluation that must be in one shard, as their loss is one; None: any may be cut.
        val_order: draws the samples of each evaluation; None: all, in order.
    """

    def __init__(
        self,
        order: BatchOrder,
        *,
        num_steps: int,
        num_shards: int,
        num_val_samples: int,
        num_done: int = 0,
        steps_per_epoch: int | None = None,
        val_batch: int | None = None,
        val_order: BatchOrder | None = None,
    ) -> None:
        self._val_batch = val_batch
        self._val_bounds: dict[int, list[tuple[int, int]]] = {}
        self._val_draws = None if val_order is None else _Evaluations(val_order, steps_per_epoch=steps_per_epoch or 1)
        self._draws = _Draws(order, steps_per_epoch=steps_per_epoch)
        self._num_steps = num_steps
        self._num_done = num_done
        self._num_shards = num_shards
        self._val_indices: NDArray[np.int64] = np.arange(num_val_samples)
        self._batch: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._batch_step = 0
        self._prepared: NDArray[np.int64] | None = None
        self._fault: BaseException | None = None  # of the sampler, which has no other batch
        self._bounds: dict[int, list[tuple[int, int]]] = {}

    def samples_of(self, kind: WorkKind, step: int, shards: Sequence[int]) -> tuple[tuple[int, ...], bytes]:
        """Return the number of samples of each shard, and the indices of all, one after the other, as bytes."""
        indices = self._indices(kind, step)
        bounds = self._bounds_of(kind, len(indices))
        ends = [bounds[shard] for shard in shards]
        sizes = tuple(last - first for first, last in ends)
        if shards[-1] - shards[0] == len(shards) - 1:  # neighbours
            return sizes, indices[ends[0][0] : ends[-1][1]].tobytes()
        return sizes, b"".join(indices[first:last].tobytes() for first, last in ends)

    def _bounds_of(self, kind: WorkKind, num_samples: int) -> list[tuple[int, int]]:
        """Return first and past the last sample of every shard."""
        if kind == "evaluation" and self._val_batch is not None:
            if num_samples not in self._val_bounds:
                size = self._val_batch
                batches = split_evenly(-(-num_samples // size), num_parts=self._num_shards)
                self._val_bounds = {
                    num_samples: [(min(a * size, num_samples), min(b * size, num_samples)) for a, b in batches]
                }
            return self._val_bounds[num_samples]
        bounds = self._bounds.get(num_samples)
        if bounds is None:
            bounds = self._bounds[num_samples] = shard_bounds(num_samples, num_shards=self._num_shards)
        return bounds

    def name_samples(self, kind: WorkKind, step: int, shards: Sequence[int]) -> str:
        """Name the samples of some shards of the task under way, for people."""
        if not shards:
            return ""
        _, raw = self.samples_of(kind, step, shards)
        indices = np.unique(np.frombuffer(raw, dtype=np.int64)).tolist()
        of = "" if kind != "evaluation" else " of the validation data"
        return f"sample{'s' * (len(indices) > 1)} {ranges_text(indices)}{of}" if indices else ""

    def num_samples(self, kind: WorkKind, step: int) -> int:
        """Samples of a whole task."""
        return len(self._indices(kind, step))

    def prepare(self) -> None:
        """Draw the next batch, while the engines compute; never raises."""
        if self._prepared is not None or self._fault is not None:
            return
        try:
            if self._draws.count < self._num_steps:
                self._prepared = self._draw()
            else:
                self._draws.look_beyond()
        except BaseException as error:  # noqa: BLE001 - a user's sampler may raise anything, SystemExit included
            self._fault = error

    def take_note(self) -> str:
        """Return, once, the note on the user's sampler; else empty."""
        note, self._draws.note = self._draws.note, ""
        return note

    def _indices(self, kind: WorkKind, step: int) -> NDArray[np.int64]:
        if kind == "evaluation":
            return self._val_indices if self._val_draws is None else self._val_draws.after(step)
        if step != self._batch_step:
            self._batch, self._batch_step = self._next(), step
        return self._batch

    def _next(self) -> NDArray[np.int64]:
        self.prepare()
        if self._fault is not None:
            raise UserCodeError("in the sampler", self._fault)
        assert self._prepared is not None
        batch, self._prepared = self._prepared, None
        return batch

    def _draw(self) -> NDArray[np.int64]:
        while self._draws.count < self._num_done:
            self._draws.next()
        return self._draws.next().numpy()


def batches_of(spec: RunSpec, order: BatchOrder, *, num_done: int, val_order: BatchOrder | None) -> Batches:
    """Return the batches of a run that begins after so many steps."""
    return Batches(
        order,
        num_steps=spec.num_steps,
        num_shards=spec.num_shards,
        num_val_samples=spec.num_val_samples,
        num_done=num_done,
        steps_per_epoch=spec.steps_per_epoch,
        val_batch=_val_batch(spec),
        val_order=val_order,
    )


def _val_batch(spec: RunSpec) -> int | None:
    """Return how many samples of an evaluation one engine must have together."""
    if spec.whole_metrics:
        return max(spec.num_val_samples, 1)
    return spec.val_batch_size or (spec.batch_size if spec.loss_over == "batch" else None)


class _Evaluations:
    """Draws the samples of each evaluation, an epoch of the validation loader's own order.

    They depend on the number of the evaluation alone, so that a hub that takes a run over draws the same.

    Args:
        order: of the validation loader.
        steps_per_epoch: steps between two evaluations.
    """

    def __init__(self, order: BatchOrder, *, steps_per_epoch: int) -> None:
        self._order = order
        self._steps_per_epoch = steps_per_epoch
        self._epochs = iterate_epochs(order)
        self._number = 0  # of the evaluation that was drawn last
        self._indices: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def after(self, step: int) -> NDArray[np.int64]:
        """Return the indices of the evaluation after this step.

        Raises:
            UserCodeError: the user's sampler raised, or yielded nothing.
        """
        number = -(-step // self._steps_per_epoch)
        try:
            while self._number < number:
                self._indices = np.concatenate([np.empty(0, np.int64), *(each.numpy() for each in next(self._epochs))])
                self._number += 1
        except BaseException as error:  # a user's sampler may raise anything, SystemExit included
            raise UserCodeError("in the sampler of val", error) from error
        if not len(self._indices):
            empty = ArgumentError(f"{name_sampler(self._order)} yielded no batch")
            raise UserCodeError("in the sampler of val", empty)
        return self._indices


class _Draws:
    """Draws from epoch after epoch, and notices an epoch of another length than was counted on.

    Args:
        order: of the samples.
        steps_per_epoch: as it was counted; None: whatever there is, is right.
    """

    def __init__(self, order: BatchOrder, *, steps_per_epoch: int | None) -> None:
        self._order = order
        self._steps_per_epoch = steps_per_epoch
        self._epochs = iterate_epochs(order)
        self._epoch: Iterator[torch.Tensor] | None = None
        self._number = 0  # of the epoch, from 1
        self._num_in_epoch = 0
        self._is_told = False
        self.count = 0
        self.note = ""

    def next(self) -> torch.Tensor:
        """Draw the next batch.

        Raises:
            ArgumentError: it is none, or there is none in a whole epoch.
        """
        while True:
            if self._epoch is None:
                self._epoch = iter(next(self._epochs))
                self._number += 1
                self._num_in_epoch = 0
            batch = next(self._epoch, None)
            if batch is not None:
                self.count += 1
                self._num_in_epoch += 1
                if self._num_in_epoch - 1 == self._steps_per_epoch:
                    self._tell("more")
                return batch
            self._epoch = None
            if self._num_in_epoch == 0:
                raise ArgumentError(f"{name_sampler(self._order)} yielded no batch in epoch {self._number}")
            if self._steps_per_epoch is not None and self._num_in_epoch < self._steps_per_epoch:
                self._tell(f"{self._num_in_epoch}")

    def look_beyond(self) -> None:
        """Look, once the last batch is drawn, if its epoch has more of them than was counted on."""
        if self._epoch is not None and self._num_in_epoch == self._steps_per_epoch and has_sampler(self._order):
            if next(self._epoch, None) is not None:
                self._tell("more")
            self._epoch = None

    def _tell(self, found: str) -> None:
        if self._is_told or not has_sampler(self._order):
            return
        self._is_told = True
        self.note = (
            f"{name_sampler(self._order)} gave {found} batches in epoch {self._number}, and by its __len__ it has "
            f"{self._steps_per_epoch}: the run's steps and epochs are counted by that. Mend its __len__, or give "
            "steps= instead of epochs="
        )
