"""Objects of the notebook that a run has advanced elsewhere, brought to where a local loop would have left them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from dnb.errors import USER_ERRORS, summary_of
from dnb.hub.parameters.user_functions import state_of_functions
from dnb.planning.sample_order import BatchOrder, has_sampler, iterate_epochs
from dnb.protocol.client_messages import GetState, StateTree
from dnb.transport.pickling.function_state import KeptState
from dnb.transport.pickling.module_states import bring_states_home
from dnb.transport.sockets.channels import HubClient
from dnb.transport.state_trees import decode_state

log = logging.getLogger(__name__)

# How long a hub may take to send a trained state.
STATE_SECONDS = 120.0


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
        """Draw one batch; return True if there is one."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class NotebookObjects:
    """The notebook's own objects, of which a run trains copies.

    Args:
        model: gets the trained state when the run ends, pauses or stops.
        optimizer: an instance, likewise.
        scheduler: likewise.
        order: with the notebook's own sampler and generator, which are then where a local loop would have left them.
        functions: what the functions keep that the hub calls, which comes home, too.
    """

    model: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    scheduler: LRScheduler | None = None
    order: OrderFollower | None = None
    functions: KeptState | None = None

    @classmethod
    def of(
        cls,
        model: torch.nn.Module | None,
        *,
        optimizer: Any = None,
        scheduler: Any = None,
        order: OrderFollower | None = None,
        after_step: Callable[..., Any] | None = None,
    ) -> NotebookObjects:
        """Take what was given to a run; what is a name, or makes an object, is not the notebook's own."""
        own = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        return cls(
            model=model,
            optimizer=own,
            scheduler=scheduler if isinstance(scheduler, LRScheduler) else None,
            order=order,
            functions=None if model is None else state_of_functions(model, own, after_step),
        )

    def bring_home(self, hub: HubClient, run: str, step: int) -> None:
        """Copy the trained state of a run into these objects.

        Args:
            hub: that holds the run.
            run: its name.
            step: the last one that it has done.
        """
        if self.model is None:
            return
        request = GetState(
            run=run,
            optimizer=self.optimizer is not None,
            scheduler=self.scheduler is not None,
            kept=self.functions is not None and self.functions.are_there,
        )
        tree, frames = hub.ask(request, StateTree, timeout_seconds=STATE_SECONDS)
        state = decode_state(tree, frames)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state["parameters"][name])
                parameter.requires_grad_(state["trains"].get(name, parameter.requires_grad))
            bring_states_home(self.model, state)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            give_scheduler_home(self.scheduler, state["scheduler"])
        if self.functions is not None and "kept" in state:
            self.functions.give(state["kept"])
        if self.order is not None:
            self._follow_order(self.order, run, step)

    @staticmethod
    def _follow_order(order: OrderFollower, run: str, step: int) -> None:
        try:
            order.follow(step)
        except USER_ERRORS as error:  # of a sampler that gave the hub what it does not give here
            log.warning("the sampler of run %r stays where it was: %s", run, summary_of(error))


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Keep the global generators as they are: samplers may draw from them, and cells count on theirs."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def give_scheduler_home(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Set the notebook's scheduler to the state of the hub's.

    Args:
        scheduler: the notebook's own; functions that its state may hold stay.
        state: of the hub's, as far as it can travel.
    """
    scheduler.load_state_dict({**scheduler.state_dict(), **state})
