"""What tests do with a real pool: wait for a run, lose engines, and let one more join."""

import contextlib
import os
import signal
import threading
import time

from dnb.api import pools
from dnb.api.launching import Pool
from dnb.engine.process.worker import join_pool
from dnb.errors import DnbError
from dnb.pool.startup import profile_folder, start_pool
from dnb.protocol.run import ENDED

# The limits of waits say when nothing more is to be expected: they are not reached on a machine whose cores are all at
# other work, where everything takes several times as long.
PATIENCE_SECONDS = 120
THREADS = max(1, (os.cpu_count() or 1) // 2)  # of each engine of two


class SharedPool:
    """One pool that many tests train on, one after the other, as starting one costs seconds; the kernel's own.

    Its engines bear other ids after some of them were killed or removed.
    """

    def __init__(self) -> None:
        self._pool: Pool | None = None

    def of(self, num_engines: int) -> Pool:
        """The pool with so many engines that are ready; another pool if a test has broken this one."""
        if self._pool is None or not self._is_sound():
            self.close()
            pools._pool = None
            # 2, so that engines have as many threads whoever is first.
            self._pool = pools.start(n=2, timeout_seconds=PATIENCE_SECONDS)
        pool = pools._pool = self._pool
        _resize(pool, num_engines)
        return pool

    def calm(self) -> None:
        """End what a test left running, so that the next one finds the pool as it was; if it can be found so."""
        if self._pool is None or not self._pool.is_open:
            return
        pool = self._pool
        for engine in pool.engines:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine.pid, signal.SIGCONT)
        if pool.run is not None and pool.facts.run_status not in (None, *ENDED):
            pool.run.stop()
            with contextlib.suppress(DnbError):
                wait_until(pool.run, lambda run: not run.is_active, what="the run has ended")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _is_sound(self) -> bool:
        assert self._pool is not None
        try:
            self.calm()
            pool = self._pool
            if not pool.is_open or pool.facts.run_status not in (None, *ENDED):
                return False
            if any(engine.cores != THREADS for engine in pool.engines):  # added when no other was left
                return False
            pool.restart = "never"
            pool._stop_keeping()
            if pool.spares:
                pool.keep_spares(0)
            until(lambda: all(engine.state == "ready" for engine in pool.engines), what="all engines are ready")
        except (AssertionError, DnbError):
            return False
        return True


def _resize(pool: Pool, num_engines: int) -> None:
    engines = [engine.id for engine in pool.engines]
    if len(engines) > num_engines:
        pool.remove(engines[num_engines:])
    elif len(engines) < num_engines:
        pool.add(num_engines - len(engines), timeout_seconds=PATIENCE_SECONDS)


def until(holds, *, what, limit_seconds=PATIENCE_SECONDS):
    deadline = time.monotonic() + limit_seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_seconds} s: {what}"
        time.sleep(0.02)


def open_small_pool(n, *, profile_dir=None):
    """A pool with one thread per engine, apart from the kernel's own; a context manager."""
    return start_pool(
        Pool,
        n=n,
        profile_dir=profile_dir or profile_folder(None),
        launcher="local",
        threads_per_engine=1,
        timeout_seconds=PATIENCE_SECONDS,
    )


def wait(run):
    """Wait until a run has ended or paused; an error of it is raised."""
    run.wait(timeout_seconds=2 * PATIENCE_SECONDS)
    assert run.status in (*ENDED, "paused"), f"not within {2 * PATIENCE_SECONDS} s: the run has ended: {run}"
    return run


def wait_until(run, holds, *, what):
    """Wait for something that a run tells its viewers."""
    reached = threading.Event()
    run.add_listener(lambda run: reached.set() if holds(run) or not run.is_active else None)
    if not holds(run) and run.is_active:  # a run that has ended tells nothing more
        assert reached.wait(PATIENCE_SECONDS), f"not within {PATIENCE_SECONDS} s: {what}: {run}"
    assert holds(run) or run.is_active, f"the run has ended before {what}: {run}: {run.error}"


def go_on_and_stop(run, *, after, num_steps=30):
    """Let a run do some steps more once an event of a kind has come, and end it."""
    wait_until(run, lambda run: after in [event.kind for event in run.events], what=f"an event {after!r}")
    at = run.step
    wait_until(run, lambda run: run.step >= at + num_steps, what=f"{num_steps} steps more")
    run.stop()
    assert wait(run).status == "stopped", run


def start_engine(pool):
    """One more engine that has not joined the hub yet; its id."""
    before = set(pool.client.ids)
    pool._cluster.start_engines_sync(1)
    pool.client.wait_for_engines(len(before) + 1, timeout=PATIENCE_SECONDS, interactive=False)
    (engine,) = set(pool.client.ids) - before
    return engine


def let_join(pool, engine):
    """Let a started engine meet the hub."""
    cluster = pool._cluster
    file = f"{cluster.profile_dir}/security/ipcontroller-{cluster.cluster_id}-engine.json"
    pool.client[engine].apply_sync(
        join_pool, engine, num_threads=1, connection_file=file, timeout_seconds=PATIENCE_SECONDS
    )
