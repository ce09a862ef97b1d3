"""Random numbers of an engine: they depend on the step and the shard, never on the engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dnb.transport.pickling.generators import OwnGenerators


def seed_everything(seed: int, generators: OwnGenerators, *, also_python: bool) -> None:
    """Seed whatever a model may draw from.

    Args:
        seed: of a part of a step.
        generators: of the user's objects.
        also_python: also what a data set or a model may draw from besides torch.
    """
    # torch.manual_seed takes 0.3 ms, as it looks for every kind of accelerator.
    torch.default_generator.manual_seed(seed)
    if len(generators):
        generators.seed(seed)
    if also_python:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def same_python_states() -> Iterator[None]:
    """Let the generators of Python and NumPy be afterwards as they were before."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
