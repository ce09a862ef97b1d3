"""Generators of random numbers inside user objects: data sets, transforms and models that bring their own.

Copied as they are, all engines would draw the same numbers. So they are seeded like all other randomness, by seed, step
and shard, and by the state in which the user gave them: two that begin alike stay alike.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


def is_generator(obj: Any) -> bool:
    """Say whether an object draws random numbers from a state of its own."""
    if isinstance(obj, random.Random):
        return not isinstance(obj, random.SystemRandom)
    if isinstance(obj, torch.Generator):
        return obj.device.type == "cpu"
    return isinstance(obj, np.random.BitGenerator | np.random.RandomState)


class OwnGenerators:
    """The generators of a run's objects in this process.

    Args:
        generators: as they arrived.
    """

    def __init__(self, generators: Iterable[Any] = ()) -> None:
        self._generators = [(each, _digest(each)) for each in generators]

    def __add__(self, other: OwnGenerators) -> OwnGenerators:
        """Join those of two payloads."""
        both = OwnGenerators()
        both._generators = self._generators + other._generators
        return both

    def __len__(self) -> int:
        return len(self._generators)

    def __iter__(self) -> Iterator[Any]:
        """Give the generators themselves."""
        return iter([generator for generator, _ in self._generators])

    def states(self) -> list[bytes]:
        """Return digests of the generators' states: one that has drawn has another one."""
        return [_digest(generator) for generator in self]

    def seed(self, seed: int) -> None:
        """Begin a part of a step.

        Args:
            seed: of that part, whoever computes it.
        """
        for generator, digest in self._generators:
            key = hashlib.blake2b(b"%d/%s" % (seed, digest), digest_size=8).digest()
            _seed(generator, int.from_bytes(key, "little") >> 1)


def _digest(generator: Any) -> bytes:
    return hashlib.blake2b(_state(generator), digest_size=16).hexdigest().encode()


def _state(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return repr(generator.getstate()).encode()
    with np.printoptions(threshold=1 << 20):  # else the middle of a state would be left out
        if isinstance(generator, np.random.RandomState):
            return repr(generator.get_state(legacy=False)).encode()
        return repr(generator.state).encode()


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        # Its own `seed` is for one kind of bit generator only; a normal number may be left of the last pair.
        state = type(generator._bit_generator)(seed).state
        generator.set_state({**state, "has_gauss": 0, "gauss": 0.0})
    else:
        generator.state = type(generator)(seed).state
