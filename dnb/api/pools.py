"""The pool of this kernel: started, found again, shut down; and runs that are found again in one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dnb.api.arguments.checks import check_choice, check_number, check_positive
from dnb.api.launching import LINGER_SECONDS, Pool
from dnb.api.runs.run import Run
from dnb.api.runs.run_folders import RUNS_FOLDER
from dnb.api.runs.write_back import NotebookObjects
from dnb.errors import ArgumentError, HubError, PoolError
from dnb.pool.discovery import PoolsOnDisk, clear_doubtful, find_pools, reap_dead
from dnb.pool.startup import adopt_pool, profile_folder, start_pool
from dnb.progress import long_work
from dnb.protocol.pool import PoolFacts

log = logging.getLogger(__name__)

# More engines than this are started only when asked for.
MOST_BY_DEFAULT = 4
RESTARTS = ("never", "always")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRequest:
    """The arguments of `start` with its defaults, as they were given: nothing is checked. See there what each means."""

    n: int | None = None
    profile: str | None = None
    launcher: str = "local"
    threads_per_engine: int | None = None
    timeout_seconds: float = 60.0
    linger_seconds: float = LINGER_SECONDS
    restart: str = "never"


_pool: Pool | None = None
# Held by whoever starts or ends it: a cell and the control panel may want to at the same time.
_changing = threading.RLock()


def start(
    n: int | None = None,
    *,
    profile: str | None = None,
    launcher: str = "local",
    threads_per_engine: int | None = None,
    timeout_seconds: float = 60.0,
    linger_seconds: float = LINGER_SECONDS,
    restart: str = "never",
) -> Pool:
    """Start a pool of engines with a hub, or return the one that is running.

    `with dnb.start() as pool:` ends the pool behind the block, unless it was running before.

    Args:
        n: number of engines; one per core, at most 4, if left out.
        profile: IPython profile whose folder holds the connection files.
        launcher: how ipyparallel starts engines: "local", or another of its launchers.
        threads_per_engine: threads for torch in each engine; the host's cores are shared out if left out.
        timeout_seconds: how long the start may take.
        linger_seconds: how long the pool outlives a dead kernel after its run has ended.
        restart: "always" replaces engines that die, as long as this kernel lives; "never" leaves them dead.

    Raises:
        ArgumentError: n is not a number of engines that this host can hold.
        PoolError: the pool did not come up.
    """
    request = PoolRequest(
        n=n,
        profile=profile,
        launcher=launcher,
        threads_per_engine=threads_per_engine,
        timeout_seconds=timeout_seconds,
        linger_seconds=linger_seconds,
        restart=restart,
    )
    pool, notices = open_pool(request)
    for notice in notices:
        log.warning(notice)
    return pool


def open_pool(request: PoolRequest) -> tuple[Pool, list[str]]:
    """Do what `start` does; return sentences on what was found, too: a running pool, one that a dead kernel left."""
    check_choice(request.restart, name="restart", known=RESTARTS, available=RESTARTS)
    if request.n is not None:
        check_positive(request.n, name="n")
    with _changing:
        held = _pool
        pool, notices = _open_pool(request)
        pool.ends_with_block = pool is not held
    if request.restart == "always":
        pool.restart = "always"
    return pool, notices


def _open_pool(request: PoolRequest) -> tuple[Pool, list[str]]:
    global _pool
    if _pool is not None and _pool.is_open:
        return _pool, [_already(_pool, asked=request.n)]
    if request.threads_per_engine is not None:
        check_positive(request.threads_per_engine, name="threads_per_engine")
    check_number(request.timeout_seconds, name="timeout_seconds")
    if _pool is not None:
        _pool.shutdown()  # its hub has died: clear up what it left
        _pool = None
    profile_dir = profile_folder(request.profile)
    found = find_pools(profile_dir / "security")
    notices = _clear(found, profile_dir)
    _pool = _adopt_first(found.orphans, profile_dir, notices=notices)
    if _pool is not None:
        return _pool, [*notices, _adopted(_pool)]
    _pool = start_pool(
        Pool,
        n=min(os.cpu_count() or 1, MOST_BY_DEFAULT) if request.n is None else request.n,
        profile_dir=profile_dir,
        launcher=request.launcher,
        threads_per_engine=request.threads_per_engine,
        timeout_seconds=request.timeout_seconds,
    )
    _pool.linger_seconds = request.linger_seconds
    return _pool, notices


def current_pool() -> Pool | None:
    """Return the pool that this kernel steers, if it is open."""
    return _pool if _pool is not None and _pool.is_open else None


def describe_others() -> str:
    """Tell of the pools that hold a run and that this kernel does not steer, with the line that finds it; or ""."""
    found = find_pools(profile_folder(None) / "security")
    holders = [(facts, "") for facts in found.orphans] + [(facts, " of another kernel") for facts in found.foreign]
    return "; ".join(
        f"a pool of {_counted(len(facts.engines))}{whose} holds run {facts.run!r} ({facts.run_status}): %dtrain attach"
        for facts, whose in holders
        if facts.run is not None
    )


def _counted(num_engines: int) -> str:
    return "1 engine" if num_engines == 1 else f"{num_engines} engines"


def last_pool() -> Pool | None:
    """Return the pool that this kernel has, also one whose hub has died; None once it was shut down."""
    return _pool


def shutdown() -> bool:
    """End the pool of this kernel; say whether there was one."""
    global _pool
    with _changing:
        if _pool is None:
            return False
        _pool.shutdown()
        _pool = None
        return True


def attach(
    name: str | None = None, *, model: torch.nn.Module | None = None, steer: bool = False, clear: bool = False
) -> Run:
    """Find a run again, after a kernel restart, beside the kernel that steers it, or in its folder.

    Args:
        name: name of the run; the one that a pool's hub holds if left out.
        model: module that gets the trained state when the run ends, like the one that was given to `fit`.
        steer: take over from a living kernel, which then only watches; from one that is gone anyway.
        clear: first remove the records of pools of other hosts and containers that do not answer from here, and those
            of other versions of dnb whose processes are gone; what has died on this host is cleared anyway.

    Raises:
        ArgumentError: no folder has that name, or it was written by a newer dnb.
        PoolError: nothing is running; says which pools were found that cannot be reached.
    """
    if name is not None and not isinstance(name, str):
        raise ArgumentError(f"a run is found by its name, a text, not {name!r}: dnb.attach('digits')")
    pool, notices = current_pool(), list[str]()
    if pool is None or clear:
        pool, notices = _adopt_any(clear=clear)
    if pool is not None and steer:
        pool.take_over()
    held = None if pool is None else pool.facts.run
    if pool is not None and held is not None and name in (None, held):
        if pool.run is not None and pool.run.name == held and model is None:
            return pool.run
        run = pool.follow(Run(held, pool.hub, folder=RUNS_FOLDER / held, own=NotebookObjects.of(model), key=pool.key))
        if not pool.is_steered_here:
            log.warning(
                "run %r is steered by the kernel with pid %d, this one watches: %%dtrain attach --steer takes over",
                held,
                pool.facts.owner.pid if pool.facts.owner is not None else 0,
            )
        return run
    if name is not None:
        with long_work(f"reading run {name!r} from its folder"):
            return Run.open(RUNS_FOLDER / name)
    found = "; ".join(notices) or "no pool holds a run"
    raise PoolError(f"nothing to attach to: {found}. dnb.attach('NAME') reads one that has ended from .dnb/runs")


def _already(pool: Pool, *, asked: int | None) -> str:
    num_engines = len(pool.engines)
    differs = asked is not None and asked != num_engines
    change = f"; %dtrain shutdown first to start {asked}" if differs else ""
    if asked is not None and asked > num_engines:
        change = f"; %dtrain add {asked - num_engines} makes them {asked}"
    return f"using the running pool of {_counted(num_engines)}{change}"


def _adopted(pool: Pool) -> str:
    facts = pool.facts
    return (
        f"found a pool of {len(facts.engines)} engines, which a kernel that is gone had started, and took it over: "
        f"run {facts.run!r} is {facts.run_status}; %dtrain attach shows it, %dtrain shutdown ends both"
    )


def _clear(found: PoolsOnDisk, profile_dir: Path) -> list[str]:
    """Reap dead pools; say what else is there."""
    notices = [*_clear_dead(found, profile_dir), *found.doubtful]
    num_foreign = sum(len(facts.engines) for facts in found.foreign)
    if num_foreign:
        notices.append(f"another kernel runs {num_foreign} engines on this host, which share its cores")
    return notices


def _clear_dead(found: PoolsOnDisk, profile_dir: Path, *, and_doubtful: bool = False) -> list[str]:
    """Remove what dead pools have left; a sentence, if there were any."""
    places = {"security_dir": profile_dir / "security", "log_dir": profile_dir / "log"}
    num_cleared = reap_dead(found, **places)
    if and_doubtful:
        num_cleared += clear_doubtful(found, **places)
    return [f"cleared what {num_cleared} dead pool{'s' if num_cleared > 1 else ''} had left"] if num_cleared else []


def _adopt_any(*, clear: bool) -> tuple[Pool | None, list[str]]:
    """Find a pool that holds a run: one whose kernel is gone, or else one that another kernel steers, to watch it.

    Returns:
        The pool, and sentences on what else was found.
    """
    global _pool
    profile_dir = profile_folder(None)
    with _changing:
        with long_work("looking for pools that hold a run"):
            found = find_pools(profile_dir / "security")
        notices = [*_clear_dead(found, profile_dir, and_doubtful=clear), *found.doubtful]
        if current_pool() is None:
            _pool = _adopt_first(found.orphans, profile_dir, notices=notices)
            _pool = _pool or _adopt_first(found.foreign, profile_dir, mode="watch", notices=notices)
        return _pool, notices


def _adopt_first(
    candidates: Sequence[PoolFacts],
    profile_dir: Path,
    *,
    mode: Literal["steer", "watch"] = "steer",
    notices: list[str],
) -> Pool | None:
    """Take over, or watch, the first pool that holds a run; reasons to pass over others are added to `notices`."""
    for facts in candidates:
        if facts.run is not None:
            try:
                return adopt_pool(Pool, facts, profile_dir=profile_dir, mode=mode)
            except (HubError, PoolError) as error:
                log.info("a pool that was found could not be taken: %s", error)
                notices.append(str(error))
    return None
