"""Writing seen in the moment: which tensors an operation writes, also through `.data` and from native code."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dnb.errors import DnbError


class WrittenError(DnbError):
    """User code is about to write memory that is not its own."""


class WriteWatch(TorchDispatchMode):
    """Notes which of some tensors are written; those that are shared with the notebook are not let be.

    Args:
        watched: by name.
        shared: names of those whose memory is the user's own.
    """

    def __init__(self, watched: Mapping[str, torch.Tensor], *, shared: frozenset[str] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: dict[str, str] = {}  # and by which operation first
        self._names: dict[int, str] = {}
        for name, tensor in watched.items():
            self._names.setdefault(tensor.untyped_storage()._cdata, name)
        self._shared = shared

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False without asking torch, which would import its compiler for a second: none comes here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, keyword in _written_arguments(func):
            value = args[position] if position < len(args) else kwargs.get(keyword)
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                    self._note(tensor, func)
        return func(*args, **kwargs)

    def _note(self, tensor: torch.Tensor, func: Any) -> None:
        name = self._names.get(tensor.untyped_storage()._cdata)
        if name is None:
            return
        self.written.setdefault(name, str(func))
        if name in self._shared:
            raise WrittenError(f"{name!r} is written by {func}")


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that an operation writes."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
