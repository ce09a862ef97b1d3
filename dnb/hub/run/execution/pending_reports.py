"""Reports of the task under way: which engine computes what into which slabs, and what it has said of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from dnb.hub.parameters.master import Contribution
from dnb.protocol.engine_messages import WorkReport
from dnb.protocol.measurements import StageTrace, Sums
from dnb.transport.pickling.module_states import LooseStates
from dnb.user_code.loss_weights import fault_of_terms

# Of a member of a team that has no part in the loss.
NO_SUMS = Sums(loss_total=0.0, loss_weight=0.0, metric_totals={}, metric_weights={}, num_samples=0)

Key = tuple[int, tuple[int, ...]]  # engine and shards


@dataclass(slots=True)
class PendingReport:
    """Shards that an engine computes, or has reported."""

    owner: int  # whose slabs these are
    slabs: tuple[int, ...]
    report: WorkReport | None = None


@dataclass(frozen=True, slots=True)
class TaskReports:
    """All that engines have reported of a task that is to be committed."""

    contributions: list[Contribution]
    states: LooseStates | None
    traces: dict[int, StageTrace]  # by engine; empty unless every one of them has one
    thawed: frozenset[str]  # names of parameters that have no place in the slabs, and got a gradient
    frozen: frozenset[int]  # slots that are frozen in one of the parts at least


class PendingReports:
    """The shards given to engines in the task under way, and the engines' reports of them.

    Args:
        is_divided: whether the model is, so that several engines report the same shards.
    """

    def __init__(self, *, is_divided: bool) -> None:
        self._is_divided = is_divided
        self._pending: dict[Key, PendingReport] = {}
        self._states: dict[Key, LooseStates] = {}
        self._shards: dict[tuple[int, int], tuple[int, ...]] = {}  # of the last task, by owner and slab

    def expect(self, engine: int, shards: tuple[int, ...], *, owner: int, slabs: tuple[int, ...]) -> None:
        """Remember into which slabs an engine computes some shards."""
        self._pending[engine, shards] = PendingReport(owner, slabs)

    def num_slabs(self, engine: int, shards: tuple[int, ...]) -> int:
        """Return into how many slabs an engine computes these shards."""
        return len(self._pending[engine, shards].slabs)

    def add(self, engine: int, report: WorkReport, states: LooseStates | None) -> None:
        """Keep a report, and the loose states that came with it."""
        self._pending[engine, report.shards].report = report
        if states is not None:
            self._states[engine, report.shards] = states

    def take(self, keys: Sequence[Key]) -> TaskReports:
        """Return the reports that are committed of these engines and shards, and forget the task."""
        taken = TaskReports(
            contributions=[contribution for key in keys for contribution in self._contributions(*key)],
            states=self._merged_states(keys),
            traces=self._traces(keys),
            thawed=frozenset(name for key in keys for name in self._report(key).thawed),
            frozen=frozenset(slot for key in keys for slot in self._report(key).frozen),
        )
        self._shards = {}
        for engine, shards in keys:
            pending = self._pending[engine, shards]
            place = pending.owner, pending.slabs[0]
            self._shards[place] = self._shards.get(place, ()) + shards
        self._pending.clear()
        self._states.clear()
        return taken

    def go_on_with_step(self) -> None:
        """Forget the reports of outputs; the loose states that came with them belong to the step that follows."""
        self._pending.clear()

    def shards_in(self, owner: int, slab: int) -> tuple[int, ...]:
        """Return the shards of the last task whose gradients are in a slab."""
        return self._shards.get((owner, slab), ())

    def _report(self, key: Key) -> WorkReport:
        report = self._pending[key].report
        assert report is not None
        return report

    def _contributions(self, engine: int, shards: tuple[int, ...]) -> list[Contribution]:
        pending, report = self._pending[engine, shards], self._report((engine, shards))
        slabs, owner = pending.slabs, pending.owner
        if self._is_divided:
            nothing = msgspec.structs.replace(NO_SUMS, unit=report.parts[0].unit)
            return [
                Contribution(owner, slab, shards[0], sums, report.is_sum, report.unused)
                for slab, sums in zip(slabs, (report.parts[0], nothing), strict=False)
            ]
        firsts = shards if len(report.parts) == len(slabs) == len(shards) else shards[:1]
        return [
            Contribution(owner, slab, shard, sums, report.is_sum, report.unused)
            for slab, shard, sums in zip(slabs, firsts, report.parts, strict=True)
        ]

    def _merged_states(self, keys: Iterable[Key]) -> LooseStates | None:
        """Return what the first shard has made of loose states; in a pipeline each engine has some of them."""
        found = [self._states[key] for key in keys if key in self._states]
        if not found:
            return None
        merged = LooseStates()
        for states in reversed(found):  # of the first engine that has one
            merged.update(states)
        return merged

    def _traces(self, keys: Iterable[Key]) -> dict[int, StageTrace]:
        found: dict[int, StageTrace] = {}
        for engine, shards in keys:
            report = self._pending[engine, shards].report
            if report is None or report.trace is None:
                return {}
            found[engine] = report.trace
        return found


def half_frozen(taken: TaskReports) -> frozenset[int]:
    """Return the slots that are frozen in one part of a step and have a gradient in another."""
    if not taken.frozen:
        return frozenset()
    return taken.frozen - frozenset.intersection(*(frozenset(each.unused) for each in taken.contributions))


def describe_mixed_sums(contributions: Iterable[Contribution]) -> str:
    """Return why the parts of a step cannot be added up; empty if they can."""
    found = {c.is_sum: c.engine for c in contributions if c.sums.num_samples}
    if len(found) < 2:
        return ""
    return (
        f"step must return dnb.Sum(total, weight) for all samples of a step, or for none: it did on engine "
        f"{found[True]}, and not on engine {found[False]}"
    )


def describe_unlike_terms(contributions: Iterable[Contribution]) -> str:
    """Return why the parts of a loss of several terms cannot be added up; empty if they can."""
    return fault_of_terms((f" on engine {c.engine}", c.sums) for c in contributions)


def describe_mixed_parts(contributions: Sequence[Contribution]) -> str:
    """Return why the parts of a step or evaluation cannot be added up; empty if they can."""
    return describe_unlike_terms(contributions) or describe_mixed_sums(contributions)
