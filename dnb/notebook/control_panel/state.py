"""The state of pool and run in the control panel, in words, and the obstacles in the way of each action."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from dnb.errors import DnbError
from dnb.notebook.text.summary import one_line
from dnb.protocol.run import ENDED
from dnb.transport.system.processes import is_this_process

log = logging.getLogger(__name__)

NO_POOL = "no pool is running"
POOL_ACTIONS = ("start", "add", "remove", "shutdown", "plan", "fit", "attach")
RUN_ACTIONS = ("pause", "resume", "stop", "set", "checkpoint", "dashboard")


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelState:
    """A pool and its run as they are at one moment."""

    engines: tuple[tuple[int, str, str], ...] | None = None  # id, state, host; None without a pool
    run: str = ""  # the one that the hub holds
    status: str = ""  # its
    is_held: bool = False  # whether this kernel has it in hand
    steered_by: int | None = None  # another kernel's pid
    trouble: str = ""

    @property
    def is_active(self) -> bool:
        """True if there is a run that has not ended."""
        return bool(self.run) and self.status not in ENDED


def look(pool: Any) -> PanelState:
    """Ask the hub; a pool that cannot be asked is told as trouble.

    Args:
        pool: a `dnb.Pool`, or None.
    """
    if pool is None:
        return PanelState()
    try:
        facts, engines = pool.facts, pool.engines
    except DnbError as error:
        return PanelState(trouble=one_line(str(error)))
    run, owner = pool.run, facts.owner
    is_held = run is not None and run.name == facts.run
    return PanelState(
        engines=tuple((engine.id, engine.state, engine.host) for engine in engines),
        run=facts.run or "",
        status=run.status if is_held else facts.run_status or "",
        is_held=is_held,
        steered_by=None if owner is None or is_this_process(owner) else owner.pid,
        trouble=one_line(pool.trouble),
    )


def pool_sentence(now: PanelState) -> str:
    """Describe the pool in a sentence."""
    if now.engines is None:
        return f"{NO_POOL}{_behind(now.trouble)}"
    count = "1 engine" if len(now.engines) == 1 else f"{len(now.engines)} engines"
    hosts = sorted({host for _, _, host in now.engines})
    where = f" on {one_line(', '.join(hosts), limit=60)}" if hosts else ""
    each = ", ".join(f"{engine} is {state}" for engine, state, _ in now.engines[:16])
    more = f", {len(now.engines) - 16} more" if len(now.engines) > 16 else ""
    steered = "" if now.steered_by is None else f"; the kernel with pid {now.steered_by} steers it, this one watches"
    return f"{count}{where}: {each or 'all are gone'}{more}{steered}{_behind(now.trouble)}"


def run_sentence(now: PanelState) -> str:
    """Describe the run that there is to steer, where it does not describe itself."""
    if now.engines is None or not now.run:
        return "no run"
    return f"run {one_line(now.run, limit=60)} is {now.status}; this kernel does not hold it"


def obstacles(now: PanelState, *, pool_line: str = "", run_line: str = "") -> dict[str, str]:
    """Say by action why it cannot be taken now; "" if it can.

    Args:
        now: pool and run.
        pool_line: under way for pool or form.
        run_line: under way for the run.
    """
    known = {action: _pool_obstacle(now, action) for action in POOL_ACTIONS}
    known |= {action: _run_obstacle(now, action) for action in RUN_ACTIONS}
    for actions, line in ((POOL_ACTIONS, pool_line), (RUN_ACTIONS, run_line)):
        if line:
            known |= dict.fromkeys(actions, f"waits for %dtrain {line}")
    return known


def _pool_obstacle(now: PanelState, action: str) -> str:
    if action == "attach":
        return "" if now.steered_by is not None or not now.is_held else "this kernel holds the run"
    if action == "plan":
        return ""
    if now.engines is None:
        return "" if action == "start" else "start a pool first"
    if action == "start":
        return "a pool is running"
    if action == "shutdown":
        return ""
    if now.steered_by is not None:
        return f"the kernel with pid {now.steered_by} steers this pool: attach takes over"
    if action == "fit" and now.is_active:
        return f"run {one_line(now.run, limit=60)} is {now.status}: stop it, or wait for its end"
    return ""


def _run_obstacle(now: PanelState, action: str) -> str:
    if now.engines is None or not now.run:
        return "no run"
    if not now.is_held:
        return "attach to the run first"
    if action == "dashboard":
        return ""
    if not now.is_active:
        return f"the run has {now.status}" if now.status != "stopped" else "the run was stopped"
    if now.steered_by is not None:
        return f"the kernel with pid {now.steered_by} steers the run: attach takes over"
    if action in ("pause", "resume") and (now.status == "paused") != (action == "resume"):
        return "the run is paused" if action == "pause" else "the run is not paused"
    return ""


def _behind(trouble: str) -> str:
    return f"; {trouble}" if trouble else ""
