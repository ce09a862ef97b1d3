"""The replica of a model in an engine, as its session drives it, whatever of the model it has and computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from dnb.engine.replicas.outcome import WorkResult
from dnb.protocol.engine_messages import Diagnose, Diagnosis, Work
from dnb.protocol.measurements import StageTrace


class EngineReplica(Protocol):
    """A replica that computes shards of one run, by itself or as a part of a team."""

    def compute(self, work: Work, indices: torch.Tensor, /) -> WorkResult:
        """Do what is asked with the samples of these indices; of a step, the gradients are then in the slabs."""

    def diagnose(self, request: Diagnose, indices: torch.Tensor, /) -> Diagnosis:
        """Find the shard and the parameter whose gradient is not finite."""

    def find_place(self, work: Work, indices: torch.Tensor, error: BaseException, /) -> str:
        """Say for people where in some work user code has raised an error; empty if that is not known."""

    def replace_functions(self, *, step: Callable[..., Any] | None, loss: Callable[..., Any] | None) -> None:
        """Go on with another step function, or another loss; one of them is None."""

    def probe(self) -> float | None:
        """Return the loss of the first samples, to be held against other engines; None if it cannot be had."""

    def digests(self) -> bytes:
        """Return the CRC-32 of every tensor as the model holds it, as uint32."""

    def trace(self) -> StageTrace | None:
        """Return what was done in the last step, and when; None if there are no stages."""

    def take_news(self) -> tuple[str, ...]:
        """Return what is to be told of metrics, for the last time."""

    def close(self) -> None:
        """Let go of gradients and memory, and leave the team."""
