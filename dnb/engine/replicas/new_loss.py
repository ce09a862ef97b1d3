"""A loss or step function that no rehearsal has looked at, as it came in mid-run: judged where it is first computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dnb.protocol.run import Reduction, RunSpec
from dnb.user_code.loss_judge import Verdict, judge_loss, judge_step, text_of_step_metrics
from dnb.user_code.return_values import ReturnError

# So many samples of its first part show what a step function returns.
MOST_SAMPLES = 8
_WAY_OUT = (
    "run.resume(loss=) with a mean over samples, or one that returns dnb.Sum(total, weight); or run.stop(), and fit "
    "anew, which finds out what the loss is"
)
_WAY_OUT_OF_STEP = (
    "run.resume(step=) with a mean over samples, or one that returns dnb.Sum(total, weight); or run.stop(), and fit "
    "anew with loss=callable(output, target)"
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
    _refuse_another_kind(verdict, spec, called="this loss", way_out=_WAY_OUT)
    if verdict.kind is None:
        return None
    return "sum" if verdict.kind == "sum" else "targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewStep:
    """A step function that came in mid-run, as far as some samples show.

    Args:
        reduction: how its losses are put together.
        target_metrics: names of metrics that weigh as its loss does.
        text: said of metrics that are no means.
    """

    reduction: Reduction
    target_metrics: tuple[str, ...]
    text: str


def judge_new_step(
    compute: Callable[[Any], tuple[Any, Mapping[str, Any]]],
    batch: Any,
    *,
    num_samples: int,
    fetch: Callable[[int, int], Any],
    spec: RunSpec,
) -> NewStep | None:
    """Tell how the losses of a step function are put together in a run that has begun with another one.

    Args:
        compute: loss and metrics of a batch.
        batch: of some samples.
        num_samples: there.
        fetch: some of them, from one to another, as a batch of their own.
        spec: of the run, as it began.

    Returns:
        What is found; None if nothing can be seen of so few samples.

    Raises:
        ReturnError: its loss is no mean over samples, or is a sum where a mean was.
    """
    verdict, kinds = judge_step(compute, batch, num_samples=num_samples, fetch=fetch, refuses_unlike=True)
    if verdict.kind == "batch":
        raise ReturnError(
            f"step's loss is no mean over samples: of {verdict.num_samples} of them it is {verdict.whole:.6g}, and the "
            f"mean of their parts {verdict.parts:.6g}: {_WAY_OUT_OF_STEP}"
        )
    _refuse_another_kind(verdict, spec, called="step's loss", way_out=_WAY_OUT_OF_STEP)
    if verdict.kind is None:
        return None
    reduction: Reduction = "terms" if verdict.is_of_terms and verdict.kind == "targets" else verdict.kind
    target_metrics = tuple(name for name, kind in kinds.items() if kind == "targets")
    return NewStep(reduction=reduction, target_metrics=target_metrics, text=text_of_step_metrics(kinds))


def _refuse_another_kind(verdict: Verdict, spec: RunSpec, *, called: str, way_out: str) -> None:
    if verdict.kind is None or (verdict.kind == "sum") == (spec.reduction == "sum"):
        return
    kinds = ("a sum over samples", "a mean") if verdict.kind == "sum" else ("a mean", "a sum over samples")
    raise ReturnError(f"{called} is {kinds[0]}, and the run has begun with {kinds[1]}: {way_out}")
