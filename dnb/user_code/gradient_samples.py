"""A few elements of every gradient, by which two computations of one step are held against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

# So many first steps of a run are sampled if nothing is asked for.
USUAL_STEPS = 20
# Elements of all tensors together, and of one of them.
MOST_ELEMENTS = 1 << 14
MOST_OF_A_TENSOR = 256
LEAST_OF_A_TENSOR = 8


def positions(sizes: Sequence[int]) -> list[torch.Tensor]:
    """Choose elements of tensors of these sizes: all of a small one, else some that lie anywhere.

    Args:
        sizes: numbers of elements.

    Returns:
        int64 indices into each flattened tensor; whoever asks gets the same.
    """
    share = min(MOST_OF_A_TENSOR, max(LEAST_OF_A_TENSOR, MOST_ELEMENTS // max(len(sizes), 1)))
    generator = torch.Generator().manual_seed(0)
    return [
        torch.arange(size) if size <= share else torch.randint(size, (share,), generator=generator) for size in sizes
    ]


def take(gradients: Iterable[torch.Tensor | None], chosen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gather the chosen elements of all tensors in one row of float64; those of an absent gradient are 0."""
    parts = [
        torch.zeros(len(places), dtype=torch.float64)
        if gradient is None
        else _real(gradient.detach().reshape(-1)[places]).to(torch.float64)
        for gradient, places in zip(gradients, chosen, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _real(values: torch.Tensor) -> torch.Tensor:
    return values.abs() if values.is_complex() else values
