"""Words for the timeline of a run whose model is divided, and for its plan's prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dnb.notebook.views import RunView, WorkerView
from dnb.planning.step_timeline import FULL_SHARE, Timeline
from dnb.protocol.measurements import Prediction, StageTraffic
from dnb.units import amount, milliseconds

# More stages than this are not listed one by one.
MOST_STAGES = 4


def timeline_lines(run: RunView) -> list[str]:
    """Describe the timeline of a run, a line for each thing, and its prediction; no line if it has neither."""
    lines = words_of(run.timeline, run.prediction) if run.timeline else []
    if run.prediction is not None and (seconds := step_seconds(run, run.prediction)) is not None:
        predicted = milliseconds(run.prediction.step_seconds)
        lines.append(f"{predicted} per step predicted, {milliseconds(seconds)} measured (median), hub included")
    return lines


def words_of(timeline: Timeline, prediction: Prediction | None = None) -> list[str]:
    """Describe the bubble, the traffic between stages, memory, and reservations."""
    lines = [
        headline(timeline, prediction),
        traffic_line(timeline),
        memory_line(timeline, prediction),
        core_remark(timeline),
    ]
    return [line for line in lines if line]


def headline(timeline: Timeline, prediction: Prediction | None = None) -> str:
    """Say how long the step took, and how much of it went by idle."""
    predicted = "" if prediction is None else f" ({milliseconds(prediction.compute_seconds)} predicted)"
    took = f"step {timeline.step:,}: {milliseconds(timeline.seconds)}{predicted} until the last gradient"
    return f"{took}, {bubble(timeline, prediction)}"


def bubble(timeline: Timeline, prediction: Prediction | None = None) -> str:
    """Write the bubble as measured, by the formula, and as predicted."""
    lines = [f"formula {timeline.ideal_bubble:.0%}"]
    if prediction is not None and prediction.stage_bytes[1:]:
        lines.append(f"predicted {prediction.bubble:.0%}")
    if timeline.record is not None and timeline.record.num_sampled > 1:
        lines.append(f"median of {timeline.record.num_sampled} steps {timeline.median_bubble:.0%}")
    return f"bubble {timeline.bubble:.0%} ({', '.join(lines)})"


def traffic_line(timeline: Timeline) -> str:
    """List the bytes that pass between stages for every micro-batch."""
    number = max(timeline.num_micro_batches, 1)
    passed = [each for each in timeline.traffic if each.forward_bytes or each.backward_bytes]
    if not passed:
        return "nothing passes between engines"
    lines = list(_stages_in_words(passed, number))
    if len(lines) > MOST_STAGES:
        lines = [*lines[:MOST_STAGES], f"{len(lines) - MOST_STAGES} more"]
    whole = sum(each.forward_bytes + each.backward_bytes for each in passed)
    return f"between stages, per micro-batch: {', '.join(lines)}; {amount(whole)} in the step's {number} micro-batches"


def _stages_in_words(passed: Iterable[StageTraffic], number: int) -> Iterator[str]:
    for each in passed:
        if each.forward_bytes:
            yield f"{each.stage} to {each.stage + 1} {amount(each.forward_bytes / number)}"
        if each.backward_bytes:
            yield f"{each.stage} back to {each.stage - 1} {amount(each.backward_bytes / number)}"


def core_remark(timeline: Timeline) -> str:
    """Say why bars are longer than their computing; empty if engines had their cores to themselves."""
    if timeline.core_share >= FULL_SHARE:
        return ""
    return (
        f"engines had a core for {timeline.core_share:.0%} of their forwards and backwards: they share cores, so bars "
        "and waits hold time that others took"
    )


def memory_line(timeline: Timeline, prediction: Prediction | None = None) -> str:
    """List the most memory that each engine held; empty if none has reported it."""
    lines = []
    for engine in [engine for engine in timeline if engine.grown_bytes is not None][:MOST_STAGES]:
        sizes = () if prediction is None else prediction.stage_bytes
        predicted = f" ({amount(sizes[engine.rank])} predicted)" if engine.rank < len(sizes) else ""
        lines.append(f"engine {engine.engine} {amount(max(engine.grown_bytes or 0, 0))}{predicted}")
    more = f", and {len(timeline) - len(lines)} more" if len(lines) < len(timeline) else ""
    return f"peak memory of the run: {', '.join(lines)}{more}" if lines else ""


def step_seconds(run: RunView, prediction: Prediction) -> float | None:
    """Return the seconds of a step, hub included: the median over the second half of the run so far."""
    _, speeds = run.history.column("samples_per_second")
    usual = sorted(float(speed) for speed in speeds[len(speeds) // 2 :])
    return prediction.batch_size / usual[len(usual) // 2] if usual and usual[len(usual) // 2] > 0 else None


def memory_in_words(worker: WorkerView) -> str:
    """Write the most memory that an engine's process held; empty if it is not known."""
    peak, start = worker.peak_rss_bytes, worker.start_rss_bytes
    if peak is None:
        return ""
    grown = "" if start is None else f", {amount(max(peak - start, 0))} more than before the run"
    return f"peak {amount(peak)} of memory{grown}"
