"""The process around a rehearsal: random state, prints and warnings of what is only tried do not show."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[list[warnings.WarningMessage]]:
    """Run user code whose prints and warnings are not shown, and leave random state as it was.

    Yields:
        The warnings, as they come.
    """
    states = random.getstate(), np.random.get_state()
    dtype = torch.get_default_dtype()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            _uncompiled(),
            warnings.catch_warnings(record=True) as caught,
            _hushed(),
        ):
            warnings.simplefilter("always")
            yield caught
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_default_dtype(dtype)


def _uncompiled() -> AbstractContextManager[Any]:
    """Let compiled models run as they were written: compiling takes seconds, and engines do it anyway."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class _Hushed:
    """A stream that drops what one thread writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _hushed() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    own: Any = _Hushed(sys.stdout), _Hushed(sys.stderr)
    sys.stdout, sys.stderr = own
    try:
        yield
    finally:
        if sys.stdout is own[0]:
            sys.stdout = before[0]
        if sys.stderr is own[1]:
            sys.stderr = before[1]
