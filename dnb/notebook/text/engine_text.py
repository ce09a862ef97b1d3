"""One engine in words: its row shows and a summary reads out these same words."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from dnb.hub.server.members.heartbeats import SILENT_SECONDS
from dnb.notebook.formatting import counted, one_line
from dnb.notebook.text.pipeline_text import memory_in_words
from dnb.notebook.views import SHARES, RunView, WorkerView, has_ended
from dnb.units import amount

NOT_KNOWN = "not known"
GONE = frozenset({"dead", "left"})
# Older than this, a heartbeat is missing whatever the events say: the hub takes half of it as silence.
OVERDUE_SECONDS = 2 * SILENT_SECONDS
LATE_SECONDS = 2.0  # a younger heartbeat is no news
MAX_NAME = 60
# Finer steps would change with every look, and say nothing more.
CPU_STEP = 5
_AGES = (0.5, 1, 2, 3, 5, 10, 20, 30)  # seconds; above them whole minutes
_MISSING = {"peak": "peak memory", "share of the batch": "share of the batch"}
_HEARTS = {"hung": True, "recovered": False, "joined": False, "died": False, "left": False}


class Fact(NamedTuple):
    """One thing to say of an engine."""

    name: str
    words: str  # empty: not known


def hung_engines(run: RunView) -> frozenset[int]:
    """List the engines that the hub does not hear now, by its own events or by the last heartbeat's age."""
    if has_ended(run):
        return frozenset()
    silent: dict[int, bool] = {
        event.engine: _HEARTS[event.kind] for event in run.events if event.engine is not None and event.kind in _HEARTS
    }
    return frozenset(
        worker.engine
        for worker in run.workers
        if worker.state not in GONE
        and (silent.get(worker.engine, False) or (worker.heartbeat_age_seconds or 0.0) >= OVERDUE_SECONDS)
    )


def state_of(worker: WorkerView, *, hung: Collection[int] = ()) -> str:
    """Return an engine's state in one word: the hub's, or hung."""
    return "hung" if worker.engine in hung and worker.state not in GONE else worker.state


def facts_of(worker: WorkerView, *, num_shards: int = 0, is_over: bool = False) -> list[Fact]:
    """List the facts of an engine, known or missing, except those that could not be known.

    Args:
        worker: the engine.
        num_shards: of a batch; 0 if that is not known.
        is_over: the run has ended, so that nobody beats for it, and figures are final.
    """
    is_gone = worker.state in GONE
    facts = []
    if not is_gone:
        facts.append(Fact("CPU", cpu_words(worker)))
        facts.append(Fact("memory", memory_words(worker)))
    facts.append(Fact("peak", "" if worker.peak_rss_bytes is None else amount(worker.peak_rss_bytes)))
    facts.append(Fact("samples", samples_words(worker, is_exact=is_over or is_gone)))
    if not is_gone:
        facts.append(Fact("share of the batch", share_words(worker, num_shards=num_shards)))
    if not is_gone and not is_over and (late := late_words(worker.heartbeat_age_seconds)):
        facts.append(Fact("heartbeat", late))
    return facts


def worker_words(worker: WorkerView, *, hung: Collection[int] = (), num_shards: int = 0, is_over: bool = False) -> str:
    """Describe one engine on a line, with its shares of time; unknown facts are named at the end."""
    state = state_of(worker, hung=hung)
    mark = f" ({state})" if state in {"spare", "dead", "left", "hung"} else ""
    facts = facts_of(worker, num_shards=num_shards, is_over=is_over)
    missing = [_MISSING.get(fact.name, fact.name) for fact in facts if not fact.words]
    lines = [device_words(worker), *(_fact_text(fact) for fact in facts if fact.words and fact.name != "peak")]
    if missing:
        lines.append(f"{NOT_KNOWN}: {', '.join(missing)}")
    if peak := memory_in_words(worker):
        lines.append(peak)
    return f"engine {worker.engine}{mark} on {host_words(worker)}: {shares_words(worker)}; {'; '.join(lines)}"


def _fact_text(fact: Fact) -> str:
    if fact.name == "heartbeat":
        return fact.words
    is_counted = fact.name == "samples" and fact.words[0].isdecimal()
    return fact.words.replace(" in ", " samples in ", 1) if is_counted else f"{fact.name} {fact.words}"


def host_words(worker: WorkerView) -> str:
    """Name an engine's host; not yet escaped for HTML."""
    return one_line(worker.host, limit=MAX_NAME) or "a host without a name"


def shares_words(worker: WorkerView) -> str:
    """List the four shares of an engine's time."""
    shares = [(name, getattr(worker, name)) for name in SHARES]
    if not any(share for _, share in shares):
        return "no shares of time yet"
    return ", ".join(f"{name} {share:.0%}" for name, share in shares)


def device_words(worker: WorkerView) -> str:
    """Name device and number of torch's threads: "cpu, 2 cores"; it says so where one is not known."""
    device = one_line(worker.device or "", limit=MAX_NAME)
    cores = f"cores {NOT_KNOWN}" if worker.cores is None else counted(worker.cores, "core")
    return f"{device}, {cores}" if device else f"device {NOT_KNOWN}, {cores}"


def cpu_words(worker: WorkerView) -> str:
    """Return the CPU use in percent, where one core is 100 %; rounded."""
    if worker.cpu_percent is None:
        return ""
    percent = CPU_STEP * round(worker.cpu_percent / CPU_STEP)
    # 180 % of 2 cores is 90 % of what it may use: both halves are needed to read it
    return f"{percent} %" if worker.cores in (None, 1) else f"{percent} % of {100 * (worker.cores or 1)} %"


def memory_words(worker: WorkerView) -> str:
    """Return the resident memory now, of the host's physical memory."""
    if worker.rss_bytes is None:
        return ""
    return amount(worker.rss_bytes) + (f" of {amount(worker.memory_bytes)}" if worker.memory_bytes else "")


def samples_words(worker: WorkerView, *, is_exact: bool) -> str:
    """Count samples and steps, with three digits while they grow; engines that share a model count as one."""
    steps = counted(worker.steps, "step") if is_exact else f"{rounded(worker.steps)} step{'s' * (worker.steps != 1)}"
    if worker.steps and not worker.samples:
        return f"by its team in {steps}"
    return f"{worker.samples:,} in {steps}" if is_exact else f"{rounded(worker.samples)} in {steps}"


def share_words(worker: WorkerView, *, num_shards: int) -> str:
    """Write the share of each batch that an engine holds; its number of shards, if it is not known of how many."""
    if worker.shards is None:
        return ""
    if not num_shards:
        return counted(len(worker.shards), "shard")
    return f"{len(worker.shards) / num_shards:.0%}".replace("%", " %")


def stages_of(run: RunView) -> dict[int, str]:
    """Return the stage of each engine of a pipeline: "stage 1 of 2", counted from 0; empty where there is none."""
    timeline = run.timeline
    size = timeline.num_stage_engines if timeline else 0
    return {each.engine: f"stage {each.rank} of {size}" for each in timeline} if size > 1 else {}


def place_words(worker: WorkerView) -> str:
    """Name host and device of an engine: "node-1 · cpu, 2 cores"."""
    return f"{host_words(worker)} · {device_words(worker)}"


def late_words(seconds: float | None) -> str:
    """Say for how long an engine was not heard; "" while that says nothing."""
    if seconds is None or seconds < LATE_SECONDS:
        return ""
    return f"no word for {heard_words(seconds).removesuffix(' ago')}"


def heard_words(seconds: float | None) -> str:
    """Return the age of the last heartbeat, in steps so coarse that it does not change at every refresh."""
    if seconds is None:
        return ""
    if seconds < _AGES[0]:
        return "now"
    if seconds >= 60:
        return f"{int(seconds // 60)} min ago"
    return f"{max(age for age in _AGES if age <= seconds):g} s ago"


def rounded(count: int) -> str:
    """Write a count with three digits: 12,812 is 12.8 k."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size * 0.9995 and count >= 1000:
            return f"{count / size:.3g} {prefix}"
    return f"{count:,}"
