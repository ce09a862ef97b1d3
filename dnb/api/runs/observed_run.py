"""Whoever is told when something of a run has changed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from dnb.errors import USER_ERRORS

log = logging.getLogger(__name__)

Listener = Callable[[Any], None]


class ObservedRun:
    """Calls others: listeners in the thread that watches the run, hooks in one that waits for it."""

    name: str

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._hooks: list[Listener] = []

    def add_listener(self, callback: Listener) -> None:
        """Call `callback` in the watching thread when something changed, and once more at the end."""
        self._listeners.append(callback)

    def remove_listener(self, callback: Listener) -> None:
        """Stop calling `callback`."""
        if callback in self._listeners:
            self._listeners.remove(callback)

    def add_wait_hook(self, callback: Listener) -> None:
        """Call `callback` in the thread that waits, several times a second and once at the end."""
        self._hooks.append(callback)

    def _tell_listeners(self) -> None:
        self._call(self._listeners)

    def _call_hooks(self) -> None:
        self._call(self._hooks)

    def _call(self, callbacks: list[Listener]) -> None:
        for callback in list(callbacks):
            try:
                callback(self)
            except USER_ERRORS as error:  # a callback of the user's may raise anything
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise
                log.exception("a viewer of run %r failed", self.name)
