"""When a run's scheduler is stepped: after every step, or once an epoch, also by a value of the evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dnb.errors import ArgumentError
from dnb.hub.guarded_calls import user_code

PACES = ("step", "epoch")
VALUE_PREFIX = "val_"
# A share of the largest learning rate with which nothing is learned any more.
NOTHING = 1e-3


class SchedulerPace:
    """A run's scheduler, and when it is stepped.

    Args:
        scheduler: of the run's optimizer; None: there is none.
        every: "step", "epoch", or the value of an evaluation, "val_accuracy", that a plateau is looked for in.
        steps_per_epoch: batches of an epoch.
    """

    def __init__(self, scheduler: LRScheduler | None = None, *, every: str = "step", steps_per_epoch: int = 1) -> None:
        self.scheduler = scheduler
        self._steps_per_epoch = 1 if every == "step" else steps_per_epoch
        self._value = every if every.startswith(VALUE_PREFIX) else "val_loss"

    def is_due(self, step: int) -> bool:
        """Return whether the scheduler is stepped with the commit of this step."""
        if self.scheduler is None or isinstance(self.scheduler, ReduceLROnPlateau):
            return False
        return step % self._steps_per_epoch == 0

    def take_step(self, step: int) -> None:
        """Step the scheduler, if this step is one after which it is."""
        if self.scheduler is not None and self.is_due(step):
            with user_code("in the scheduler"):
                self.scheduler.step()

    def take_evaluation(self, step: int, values: Mapping[str, float]) -> bool:
        """Step a scheduler that looks for a plateau, at the end of an epoch; whether that was done."""
        if not isinstance(self.scheduler, ReduceLROnPlateau) or step % self._steps_per_epoch:
            return False
        with user_code("in the scheduler"):
            if self._value not in values:
                raise ArgumentError(f"scheduler_every={self._value!r} is not measured: there is {', '.join(values)}")
            self.scheduler.step(values[self._value])
        return True


class DecayWatch:
    """Notices a learning rate that decays to nothing within the first epoch, as one does that is meant to decay once.

    Args:
        steps_per_epoch: batches of an epoch.
        num_steps: of the run; a rate that ends at nothing in its second half is meant to.
        largest: rate so far.
    """

    def __init__(self, *, steps_per_epoch: int, num_steps: int, largest: float = 0.0) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._last = min(steps_per_epoch, num_steps // 2)
        self._largest = largest

    def check(self, step: int, lr: float) -> str:
        """Return a warning, once, if the rate of this step is next to nothing; else empty."""
        if step > self._last:
            return ""
        self._largest = max(self._largest, lr)
        if lr >= self._largest * NOTHING:
            return ""
        self._last = 0
        return (
            f"the learning rate has fallen from {self._largest:.3g} to {lr:.3g} within {step} of the "
            f"{self._steps_per_epoch} steps of the first epoch, as the scheduler is stepped with every step: "
            "scheduler_every='epoch' steps it once an epoch"
        )


def check_pace(scheduler: object, *, every: object, has_val: bool) -> None:
    """Refuse a pace that a scheduler cannot keep.

    Args:
        scheduler: the instance; if it is yet to be made, only the word is looked at.
        every: as the user gives it.
        has_val: whether there are evaluations.

    Raises:
        ArgumentError: says what to give instead.
    """
    if not isinstance(every, str) or not (every in PACES or every.startswith(VALUE_PREFIX)):
        raise ArgumentError(
            f"no scheduler_every {every!r}: 'step', 'epoch', or for ReduceLROnPlateau a value such as 'val_accuracy'"
        )
    if scheduler is None and every != "step":
        raise ArgumentError(f"scheduler_every={every!r} says when a scheduler is stepped: give scheduler=")
    if isinstance(scheduler, ReduceLROnPlateau):
        _check_plateau(scheduler, every=every, has_val=has_val)
    elif every.startswith(VALUE_PREFIX) and isinstance(scheduler, LRScheduler):
        raise ArgumentError(
            f"scheduler_every={every!r} is for ReduceLROnPlateau, and {type(scheduler).__name__} looks at no value: "
            "scheduler_every='epoch'"
        )


def _check_plateau(scheduler: ReduceLROnPlateau, *, every: str, has_val: bool) -> None:
    if every == "step":
        raise ArgumentError(
            "ReduceLROnPlateau waits for a value of each epoch, and a scheduler is stepped with every step: give "
            "scheduler_every='epoch' for the loss on val=, or scheduler_every='val_accuracy' for a metric"
        )
    if not has_val:
        raise ArgumentError("ReduceLROnPlateau waits for a value of each evaluation, and none is made: give val=")
    if scheduler.mode == "max" and every == "epoch":
        raise ArgumentError(
            "ReduceLROnPlateau(mode='max') waits for a value that grows, and a loss falls: give "
            "scheduler_every='val_accuracy', or another metric"
        )
