"""The search for a number that is not finite: in which shard, and in which parameter's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dnb.hub.parameters.master import Contribution, NotFinite
from dnb.hub.run.engine_links import EngineLinks
from dnb.hub.run.execution.gathered_batch import gathers_outputs
from dnb.hub.run.execution.pending_reports import PendingReports
from dnb.hub.run.execution.sample_batches import Batches
from dnb.hub.scheduling.events import CommitRefused
from dnb.protocol.engine_messages import Diagnose, Diagnosis
from dnb.protocol.run import RunSpec


@dataclass(frozen=True, slots=True)
class NonFiniteStep:
    """A step that is not finite, while its engine looks for the place."""

    engine: int
    step: int
    text: str


class NonFiniteSearch:
    """At most one search: the engine whose gradient it is looks, and the step is refused when it has.

    Args:
        spec: the run's numbers.
        links: to the engines.
        batches: the samples of the step.
        pending: says which shards a slab held.
    """

    def __init__(self, spec: RunSpec, links: EngineLinks, batches: Batches, pending: PendingReports) -> None:
        self._spec = spec
        self._links = links
        self._batches = batches
        self._pending = pending
        self._found: NonFiniteStep | None = None
        self._has_whole_loss = bool(spec.partitions) or gathers_outputs(spec)  # no shard has a loss of its own

    def begin(
        self, step: int, verdict: NotFinite, contributions: Sequence[Contribution], *, remark: str = ""
    ) -> CommitRefused | None:
        """Ask the engine whose gradient it is; return the refusal at once, with a remark, if nobody can look."""
        link = None if self._has_whole_loss else self._links.get(verdict.engine)
        if link is None or link.wire is None:
            return CommitRefused(step, f"{verdict}{remark}")
        shards = self._shards_behind(verdict, contributions)
        sizes, raw = self._batches.samples_of("step", step, shards)
        self._found = NonFiniteStep(verdict.engine, step, str(verdict))
        request = Diagnose(
            run=self._spec.id,
            step=step,
            shards=shards,
            shard_sizes=sizes,
            slab=verdict.slab,
            batch_samples=self._batches.num_samples("step", step),
        )
        link.wire.send(request, raw)
        return None

    def finish(self, engine: int, diagnosis: Diagnosis) -> CommitRefused | None:
        """Return the refusal of the step, with the place; None if this engine was not asked for it."""
        if self._found is None or (self._found.engine, self._found.step) != (engine, diagnosis.step):
            return None
        return self._refuse(diagnosis)

    def give_up(self, engine: int) -> CommitRefused | None:
        """Return the refusal of the step if it was this engine that was to find the place."""
        return None if self._found is None or self._found.engine != engine else self._refuse(None)

    def _refuse(self, diagnosis: Diagnosis | None) -> CommitRefused:
        found, self._found = self._found, None
        assert found is not None
        where = f"engine {found.engine}"
        if diagnosis is not None and diagnosis.shard is not None:
            where += f", shard {diagnosis.shard}: the gradient of {diagnosis.parameter!r} is {diagnosis.kind}"
        return CommitRefused(found.step, f"{found.text} ({where})")

    def _shards_behind(self, verdict: NotFinite, contributions: Sequence[Contribution]) -> tuple[int, ...]:
        """Return the shards whose gradients are in the slab."""
        if self._spec.exact:
            return tuple(c.shard for c in contributions if (c.engine, c.slab) == (verdict.engine, verdict.slab))
        return self._pending.shards_in(verdict.engine, verdict.slab)
