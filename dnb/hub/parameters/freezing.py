"""Parameters frozen or thawed by user code in mid-run: on engines, or in functions that the hub calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch


class Freezing:
    """The parameters of one run that train, or have trained, and so have a place in slabs.

    Args:
        named: all parameters, frozen or not as they are when the run begins.
    """

    def __init__(self, named: Mapping[str, torch.nn.Parameter]) -> None:
        self._named = dict(named)
        self._at_first = {name for name, parameter in named.items() if parameter.requires_grad}
        self._placed = set(self._at_first)
        self.on_engines: frozenset[str] = frozenset()  # names of those that have a place, and that engines have frozen

    @property
    def placed(self) -> frozenset[str]:
        """Names of those that have a place in slabs."""
        return frozenset(self._placed)

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Names of those that the hub's own copy says are to train, and that have no place yet."""
        return tuple(name for name, each in self._named.items() if each.requires_grad and name not in self._placed)

    @property
    def toggled(self) -> tuple[str, ...]:
        """Names of those that are frozen where they were not at first, or the other way round."""
        return tuple(name for name, each in self._named.items() if each.requires_grad != (name in self._at_first))

    @property
    def now(self) -> dict[str, bool]:
        """The present `requires_grad` of parameters that are `toggled`, or frozen on engines."""
        return {name: self._named[name].requires_grad for name in self.toggled} | dict.fromkeys(self.on_engines, False)

    def check(self, names: Iterable[str]) -> None:
        """Refuse names of parameters that cannot be thawed.

        Raises:
            ValueError: there is no such parameter, or it has a place.
        """
        for name in names:
            if name not in self._named or name in self._placed:
                raise ValueError(f"{name!r} is no parameter that was frozen")

    def thaw(self, names: Iterable[str]) -> None:
        """Give parameters a place, and let them train."""
        for name in names:
            self._named[name].requires_grad_(True)
            self._placed.add(name)

    def restore(self, toggled: Iterable[str], on_engines: Iterable[str]) -> None:
        """Let parameters be as they were when some were `toggled`, and some frozen `on_engines`.

        Raises:
            ValueError: there is no such parameter.
        """
        self.on_engines = frozenset(on_engines)
        toggled = list(toggled)
        for name in (*toggled, *self.on_engines):
            if name not in self._named:
                raise ValueError(f"there is no parameter {name!r}")
        for name in toggled:
            self._named[name].requires_grad_(name not in self._at_first)
        self._placed.update(self.unplaced)
