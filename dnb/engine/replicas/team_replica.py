"""A replica that computes together with others, over a process group that each of them leaves when it fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dnb.engine.replicas.outcome import samples_text
from dnb.engine.replicas.replica import Replica
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.runtime.process_group import PeerLostError, close_group, first_line, is_about_peers, open_group
from dnb.errors import PlanError, text_of
from dnb.job import DataSource, Sum
from dnb.protocol.engine_messages import Work
from dnb.protocol.measurements import Sums


class TeamReplica(Replica):
    """Computes with the whole model, and waits inside it for the other engines of its team.

    Args:
        context: the run, and the place in the team; its model is bound to the memory.

    Raises:
        PlanError: this engine does not share the hub's memory.
        PeerLostError: the team does not come together.
    """

    def __init__(self, context: ReplicaContext) -> None:
        assignment = context.assignment
        if context.spec.exact:
            raise PlanError(
                "exact=True needs a gradient per shard, and engines that compute together have one per step"
            )
        if context.memory.kind != "memory" or context.publisher is not None:
            raise PlanError("the engines of a team share the hub's memory: they must be on its host")
        super().__init__(context)
        self._rank = assignment.rank
        self._num_engines = assignment.partition.num_engines
        self._samples = torch.empty(0, dtype=torch.int64)
        open_group(assignment, torch.device("cpu"))
        self._has_group = True

    def find_place(self, work: Work, indices: torch.Tensor, error: BaseException) -> str:  # noqa: ARG002
        """Name the samples at which user code raised; nothing is computed again, as the others are gone."""
        first, last = work.shards[0], work.shards[-1]
        shards = f"one of shards {first} to {last}" if last != first else f"shard {first}"
        return f"{shards}, {samples_text(self._samples)}"

    def probe(self) -> float | None:
        """Return None: no engine of a team has a loss of its own."""
        return None

    def close(self) -> None:
        """Leave the group, and let go of the gradients."""
        self._leave(None)
        self._gradients.close()

    def _forward(
        self,
        source: DataSource,
        indices: torch.Tensor,
        *,
        batch_samples: int | None,
        needs_gradient: bool = False,
    ) -> tuple[Sums, bool]:
        self._samples = indices
        result = super()._forward(source, indices, batch_samples=batch_samples, needs_gradient=needs_gradient)
        self._forget()
        return result

    def _judge_step(self, work: Work, indices: torch.Tensor) -> None:
        super()._judge_step(work, indices)
        if self._rank:  # the first engine tells of it
            self._news.clear()

    def _step_on(self, batch: Any) -> tuple[torch.Tensor | Sum, Mapping[str, Any]]:
        result = super()._step_on(batch)
        self._forget()
        return result

    def _forget(self) -> None:
        """Let go of what belongs to one forward, or to a group that is left."""

    def _shrink(self, num_samples: int, error: Exception) -> str:
        """Refuse: the others cannot be told to halve their batch, too."""
        raise MemoryError(
            f"{min(self._most_at_once or num_samples, num_samples)} samples at once do not fit: "
            f"give micro_batch=, which all engines of a team keep to ({text_of(error)})"
        ) from error

    @contextmanager
    def _leaving_if_it_fails(self) -> Iterator[None]:
        """Around work: what raises is told apart, after this engine has left its group."""
        if not self._has_group:
            raise PeerLostError("this engine has left its team after an error, and has not joined another")
        try:
            yield
        except BaseException as error:
            self._leave(error)
            if is_about_peers(error):
                raise PeerLostError(f"another engine of the team is gone: {first_line(error)}") from None
            raise

    def _leave(self, error: BaseException | None) -> None:
        """Leave the group, so that the other engines of the team are freed."""
        self._forget()
        if self._has_group:
            self._has_group = False
            close_group(error)
