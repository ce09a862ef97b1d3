"""Random numbers that come out the same every time, and for every sample."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@contextmanager
def same_chance(seed: int = 0) -> Iterator[None]:
    """Let random numbers be the same every time, and the user's own be as they were afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def random_states() -> tuple[Any, ...]:
    """Return the states of all generators of random numbers."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, bytes(keys), rest, bytes(torch.default_generator.get_state().numpy())  # type: ignore[arg-type]


class WithoutChance(TorchFunctionMode):
    """Lets torch's random numbers be the same for every sample, so that parts have those of the whole."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = torch.default_generator.get_state()
        result = func(*args, **kwargs)
        if isinstance(kwargs.get("generator"), torch.Generator) or not torch.equal(
            before, torch.default_generator.get_state()
        ):
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    _make_even(func, leaf.detach())
        return result


def _make_even(func: Callable[..., Any], drawn: torch.Tensor) -> None:
    if func is torch.randperm:
        drawn.copy_(torch.arange(len(drawn)))
    else:
        drawn.fill_(0.5 if drawn.is_floating_point() else 0)
