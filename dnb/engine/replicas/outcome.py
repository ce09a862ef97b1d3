"""The results of an engine's work, and what every kind of replica needs to come to them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dnb.errors import text_of
from dnb.planning.shards import SAMPLES_AT_LEAST
from dnb.protocol.engine_messages import OutputLeaf, Work
from dnb.protocol.measurements import Sums
from dnb.user_code.loss_weights import fault_of_terms
from dnb.user_code.return_values import Metrics, ReturnError

MOST_SAMPLES_SHOWN = 8

# Of a member of a team that has no part in the loss.
NO_SUMS = Sums(loss_total=0.0, loss_weight=0.0, metric_totals={}, metric_weights={}, num_samples=0)


@dataclass(frozen=True, slots=True)
class WorkResult:
    """The results of a work item; the gradients are in the slabs."""

    parts: tuple[Sums, ...]
    is_sum: bool  # the gradients are yet to be divided by the weight
    unused: tuple[int, ...] = ()
    note: str = ""
    states: bytes = b""  # loose ones that have changed
    leaves: tuple[OutputLeaf, ...] = ()  # of outputs that are gathered
    tensors: Sequence[torch.Tensor] = ()
    thawed: tuple[str, ...] = ()  # parameters without a slot that got a gradient
    frozen: tuple[int, ...] = ()  # slots that were frozen in one of the parts at least


def mean_sums(loss: float, metrics: Metrics, *, num_samples: int) -> Sums:
    """Build the sums of a part whose loss is a mean over its samples."""
    return Sums(
        loss_total=loss * num_samples,
        loss_weight=float(num_samples),
        metric_totals={name: total for name, (total, _) in metrics.items()},
        metric_weights={name: weight for name, (_, weight) in metrics.items()},
        num_samples=num_samples,
    )


def part_seed(seed: int, step: int, shard: int) -> int:
    """Return the seed of random numbers in a part of a step; it does not depend on who computes it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{shard}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def failing_place(work: Work, indices: torch.Tensor, fails: Callable[[torch.Tensor], bool]) -> str:
    """Name the shard and the samples at which some work fails, as narrow as can be found, for people.

    Args:
        work: that has failed.
        indices: of its samples.
        fails: whether some of them fail by themselves.
    """
    shards = [*zip(work.shards, indices.split(work.shard_sizes), strict=True)]
    for shard, part in shards:
        if len(part) and fails(part):
            return f"shard {shard}, {samples_text(_narrowed(part, fails))}"
    return f"one of shards {work.shards[0]} to {work.shards[-1]}" if len(shards) > 1 else f"shard {shards[0][0]}"


def _narrowed(part: torch.Tensor, fails: Callable[[torch.Tensor], bool]) -> torch.Tensor:
    """Return the smallest half of a half of samples that still fails."""
    while len(part) > 1:
        half = next((half for half in part.split(-(-len(part) // 2)) if fails(half)), None)
        if half is None:
            break
        part = half
    return part


def samples_text(samples: torch.Tensor) -> str:
    """Name samples by their indices, for people."""
    shown = ", ".join(str(sample) for sample in samples[:MOST_SAMPLES_SHOWN].tolist())
    if len(samples) == 1:
        return f"sample {shown}"
    more = len(samples) - MOST_SAMPLES_SHOWN
    return f"samples {shown}{f' and {more} more' if more > 0 else ''}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that there is not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = text_of(error)
    return "DefaultCPUAllocator" in text or "not enough memory" in text


def one_kind(are_sums: Sequence[bool]) -> bool:
    """Return True if the parts of a step are `Sum`s, as all of them must be, or none.

    Raises:
        ReturnError: some are.
    """
    if len(set(are_sums)) > 1:
        raise ReturnError(
            "step must return dnb.Sum(total, weight) for all samples of a step, or for none: "
            f"it did for {sum(are_sums)} of {len(are_sums)} parts"
        )
    return any(are_sums)


def pieces_of(indices: torch.Tensor, size: int | None) -> Sequence[torch.Tensor]:
    """Split indices into pieces of at most `size`, none of which has one sample, unless that is the size.

    A rest of one is given a sample of the piece before it, or, if that has only two, is added to it.
    """
    if size is None or len(indices) <= size:
        return [indices]
    whole, rest = divmod(len(indices), size)
    sizes = [size] * whole + ([rest] if rest else [])
    if rest == 1 and size > 1:
        sizes[-2:] = [size - 1, 2] if size > SAMPLES_AT_LEAST else [size + 1]
    return torch.split(indices, sizes)


def refuse_unlike_parts(parts: Sequence[Sums]) -> None:
    """Refuse parts whose losses have terms that weigh differently in each.

    Raises:
        ReturnError: says so.
    """
    if fault := fault_of_terms(("", part) for part in parts):
        raise ReturnError(fault)


def added(parts: Sequence[Sums]) -> Sums:
    """Add the sums of several parts.

    Raises:
        ReturnError: they cannot be put together.
    """
    refuse_unlike_parts(parts)
    names = {name for part in parts for name in part.metric_totals}
    return Sums(
        loss_total=sum(part.loss_total for part in parts),
        loss_weight=sum(part.loss_weight for part in parts),
        metric_totals={name: sum(part.metric_totals.get(name, 0.0) for part in parts) for name in names},
        metric_weights={name: sum(part.metric_weights.get(name, 0.0) for part in parts) for name in names},
        num_samples=sum(part.num_samples for part in parts),
        unit=parts[0].unit if parts else 1.0,
        targets_per_sample=next((part.targets_per_sample for part in parts if part.num_samples), ()),
    )
