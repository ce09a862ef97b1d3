"""What a timeline shows, and a plan had predicted, in words; of runs whose model is divided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dnb.notebook.views import RunView, WorkerView
from dnb.planning.step_timeline import FULL_SHARE, Timeline
from dnb.protocol.measurements import Prediction, StageTraffic
from dnb.units import amount, milliseconds

# More stages than this are not told one by one.
MOST_STAGES = 4


def timeline_lines(run: RunView) -> list[str]:
    """The timeline of a run, a line for each thing, and what was predicted; none of a run that has neither."""
    lines = words_of(run.timeline, run.prediction) if run.timeline else []
    if run.prediction is not None and (seconds := step_seconds(run, run.prediction)) is not None:
        predicted = milliseconds(run.prediction.step_seconds)
        lines.append(f"{predicted} per step predicted, {milliseconds(seconds)} measured (median), hub included")
    return lines


def words_of(timeline: Timeline, prediction: Prediction | None = None) -> list[str]:
    """The bubble, what passes between stages, memory, and what to keep in mind."""
    lines = [
        headline(timeline, prediction),
        traffic_line(timeline),
        memory_line(timeline, prediction),
        core_remark(timeline),
    ]
    return [line for line in lines if line]


def headline(timeline: Timeline, prediction: Prediction | None = None) -> str:
    """How long the step took, and how much of it went by idle."""
    predicted = "" if prediction is None else f" ({milliseconds(prediction.compute_seconds)} predicted)"
    took = f"step {timeline.step:,}: {milliseconds(timeline.seconds)}{predicted} until the last gradient"
    return f"{took}, {bubble(timeline, prediction)}"


def bubble(timeline: Timeline, prediction: Prediction | None = None) -> str:
    """Measured, by the formula, and as predicted."""
    told = [f"formula {timeline.ideal_bubble:.0%}"]
    if prediction is not None and prediction.stage_bytes[1:]:
        told.append(f"predicted {prediction.bubble:.0%}")
    if timeline.record is not None and timeline.record.num_sampled > 1:
        told.append(f"median of {timeline.record.num_sampled} steps {timeline.median_bubble:.0%}")
    return f"bubble {timeline.bubble:.0%} ({', '.join(told)})"


def traffic_line(timeline: Timeline) -> str:
    """What passes between stages for every micro-batch."""
    number = max(timeline.num_micro_batches, 1)
    passed = [each for each in timeline.traffic if each.forward_bytes or each.backward_bytes]
    if not passed:
        return "nothing passes between engines"
    told = list(_stages_in_words(passed, number))
    if len(told) > MOST_STAGES:
        told = [*told[:MOST_STAGES], f"{len(told) - MOST_STAGES} more"]
    whole = sum(each.forward_bytes + each.backward_bytes for each in passed)
    return f"between stages, per micro-batch: {', '.join(told)}; {amount(whole)} in the step's {number} micro-batches"


def _stages_in_words(passed: Iterable[StageTraffic], number: int) -> Iterator[str]:
    for each in passed:
        if each.forward_bytes:
            yield f"{each.stage} to {each.stage + 1} {amount(each.forward_bytes / number)}"
        if each.backward_bytes:
            yield f"{each.stage} back to {each.stage - 1} {amount(each.backward_bytes / number)}"


def core_remark(timeline: Timeline) -> str:
    """Why bars are longer than what is computed in them; empty if engines had their cores to themselves."""
    if timeline.core_share >= FULL_SHARE:
        return ""
    return (
        f"engines had a core for {timeline.core_share:.0%} of their forwards and backwards: they share cores, so bars "
        "and waits hold time that others took"
    )


def memory_line(timeline: Timeline, prediction: Prediction | None = None) -> str:
    """What each engine held at most; empty if none has said it."""
    told = []
    for engine in [engine for engine in timeline if engine.grown_bytes is not None][:MOST_STAGES]:
        sizes = () if prediction is None else prediction.stage_bytes
        predicted = f" ({amount(sizes[engine.rank])} predicted)" if engine.rank < len(sizes) else ""
        told.append(f"engine {engine.engine} {amount(max(engine.grown_bytes or 0, 0))}{predicted}")
    more = f", and {len(timeline) - len(told)} more" if len(told) < len(timeline) else ""
    return f"memory of the run, at most: {', '.join(told)}{more}" if told else ""


def step_seconds(run: RunView, prediction: Prediction) -> float | None:
    """What a step takes, hub included: the median over the second half of the run so far."""
    _, speeds = run.history.column("samples_per_second")
    usual = sorted(float(speed) for speed in speeds[len(speeds) // 2 :])
    return prediction.batch_size / usual[len(usual) // 2] if usual and usual[len(usual) // 2] > 0 else None


def memory_in_words(worker: WorkerView) -> str:
    """The most that an engine's process held; empty if it is not known."""
    peak, start = worker.peak_rss_bytes, worker.start_rss_bytes
    if peak is None:
        return ""
    grown = "" if start is None else f", {amount(max(peak - start, 0))} more than before the run"
    return f"at most {amount(peak)} of memory{grown}"
