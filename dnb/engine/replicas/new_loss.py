"""A loss that no rehearsal has looked at, as it came in mid-run: judged where it is first computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dnb.protocol.run import Reduction, RunSpec
from dnb.user_code.loss_judge import judge_loss
from dnb.user_code.return_values import ReturnError

_WAY_OUT = (
    "run.resume(loss=) with a mean over samples, or one that returns dnb.Sum(total, weight); or run.stop(), and fit "
    "anew, which finds out what the loss is"
)


def judge_new_loss(
    loss: Callable[..., Any], output: Any, target: Any, *, num_samples: int, spec: RunSpec
) -> Reduction | None:
    """Tell how the losses of parts are put together in a run that has begun with another loss.

    Args:
        loss: callable(output, target).
        output: of the model, for some samples.
        target: of these.
        num_samples: there.
        spec: of the run, as it began.

    Returns:
        The reduction; None if nothing can be seen of so few samples.

    Raises:
        ReturnError: it looks at the whole batch, or is a sum where a mean was.
    """
    verdict = judge_loss(loss, output, target, num_samples=num_samples)
    if verdict.kind == "batch":
        raise ReturnError(f"this loss looks at the whole batch, and this run gathers no outputs: {_WAY_OUT}")
    if (verdict.kind == "sum") != (spec.reduction == "sum") and verdict.kind is not None:
        kinds = ("a sum over samples", "a mean") if verdict.kind == "sum" else ("a mean", "a sum over samples")
        raise ReturnError(f"this loss is {kinds[0]}, and the run has begun with {kinds[1]}: {_WAY_OUT}")
    if verdict.kind is None:
        return None
    return "sum" if verdict.kind == "sum" else "targets"
