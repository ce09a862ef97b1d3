"""A live view without a browser: the notebook's own dashboard, whose messages are encoded and then dropped."""

from __future__ import annotations

import importlib
import json
import time
from typing import Any

import comm
from comm.base_comm import BaseComm

import dnb
from dnb.notebook.live.dashboard import Dashboard

JOIN_SECONDS = 30.0
LOOK_SECONDS = 0.05


class Browserless(BaseComm):
    """A line to a browser that is not there."""

    num_bytes = 0  # of all lines together

    def publish_msg(self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **_: Any) -> None:
        """Do what a kernel does with a message, but for the sending."""
        del msg_type, metadata
        sizes = (memoryview(buffer).nbytes for buffer in buffers or ())
        Browserless.num_bytes += len(json.dumps(data)) + sum(sizes)


class Viewer:
    """Watches one run at a time, as the cell of a notebook would."""

    def __init__(self) -> None:
        live_figure = importlib.import_module(
            "dnb.notebook.live.browser.live_figure"
        )  # seconds, which a short run does not have
        live_figure.LiveFigure.is_resting = False  # a page that draws in no time: every refresh is paid for
        comm.create_comm = Browserless
        self._dashboard: Dashboard | None = None

    def watch(self, run: dnb.Run) -> None:
        """Show the live view of a run."""
        self._run = run
        self._dashboard = Dashboard(run, publish=_drop)
        self._dashboard.show()

    def wait_for_figure(self) -> None:
        """Block until the figure is built, once in a run's life however long that is.

        Raises:
            TimeoutError: it is not.
        """
        deadline = time.monotonic() + JOIN_SECONDS
        while self._dashboard is not None and self._dashboard.figure is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"there was no figure within {JOIN_SECONDS:g} s")
            time.sleep(LOOK_SECONDS)

    def be_watching(self, is_watching: bool) -> None:
        """Go on painting, or sleep although there is news."""
        assert self._dashboard is not None
        self._run.remove_listener(self._dashboard._listener)
        if is_watching:
            self._run.add_listener(self._dashboard._listener)

    def close(self) -> None:
        """Wait until the view of a run that has ended has let go.

        Raises:
            TimeoutError: it does not.
        """
        assert self._dashboard is not None
        if not self._dashboard.join(timeout_seconds=JOIN_SECONDS):
            raise TimeoutError(f"the view did not end within {JOIN_SECONDS:g} s")
        assert self._dashboard.figure is not None, "the run ended before there was a figure"


def _drop(content: dict[str, Any], *, display_id: str, update: bool = False) -> None:
    del display_id, update
    json.dumps({name: value for name, value in content.items() if isinstance(value, str)})
