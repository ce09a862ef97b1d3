"""Objects of the notebook that a run has advanced elsewhere, brought to where a local loop would have left them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from dnb.planning.sample_order import BatchOrder, has_sampler, iterate_epochs
from dnb.transport.trees import put_together


class OrderFollower:
    """Draws from the notebook's own generator and sampler what a run has drawn from their copies in the hub.

    Args:
        order: of the run, with the notebook's own objects.
        steps_per_epoch: as it was counted.
    """

    def __init__(self, order: BatchOrder, *, steps_per_epoch: int) -> None:
        self._order = order
        self._steps_per_epoch = steps_per_epoch
        self._epochs = iterate_epochs(order)
        self._epoch: Iterator[torch.Tensor] | None = None
        self._num_in_epoch = 0
        self._num_drawn = 0

    def follow(self, step: int) -> None:
        """Draw the batches up to a step; an epoch that is complete ends as a `for` loop over the loader ends it."""
        if not (has_sampler(self._order) or self._order.generator is not None):
            return  # drawn by the run's own seed
        with _global_generators_kept():
            while self._num_drawn < step:
                if not self._draw():
                    return
            if self._epoch is not None and self._num_in_epoch == self._steps_per_epoch:
                next(self._epoch, None)
                self._epoch = None

    def _draw(self) -> bool:
        """Draw one batch; whether there is one."""
        while True:
            if self._epoch is None:
                self._epoch, self._num_in_epoch = iter(next(self._epochs)), 0
            if next(self._epoch, None) is not None:
                self._num_drawn += 1
                self._num_in_epoch += 1
                return True
            self._epoch = None
            if self._num_in_epoch == 0:
                return False


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """A sampler may draw from them, and cells of the notebook count on theirs."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def give_scheduler_home(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Let the notebook's scheduler be where that of the hub is.

    Args:
        scheduler: the notebook's own; functions that its state may hold stay.
        state: "tree" and "tensors", as `dnb.transport.trees.take_apart` made them.
    """
    found = put_together(state["tree"], state["tensors"])
    scheduler.load_state_dict({**scheduler.state_dict(), **found})
