"""What tests do with a real pool: wait for a run, lose engines, and let one more join."""

import os
import signal
import threading
import time

from dnb.engine.worker import join_pool
from dnb.pool.starting import profile_folder, start_pool
from dnb.training import Pool


def open_small_pool(n, *, profile_dir=None):
    """A pool with one thread per engine, apart from the kernel's own; a context manager."""
    return start_pool(
        Pool,
        n=n,
        profile_dir=profile_dir or profile_folder(None),
        launcher="local",
        threads_per_engine=1,
        timeout_seconds=120,
    )


def wait(run):
    return run.wait(timeout_seconds=120)


def wait_until(run, holds, *, what):
    """Wait for something that a run tells its viewers."""
    reached = threading.Event()
    run.add_listener(lambda run: reached.set() if holds(run) or not run.is_active else None)
    assert reached.wait(60), f"not within 60 s: {what}: {run}"


def shrink(pool, num_engines):
    """Kill engines, the last ones first, until so many are left; the hub has noticed."""
    for engine in pool.engines[num_engines:]:
        os.kill(engine.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while len(pool.engines) > num_engines:
        assert time.monotonic() < deadline, f"the hub still counts {len(pool.engines)} engines after 30 s"
    return pool


def start_engine(pool):
    """One more engine that has not joined the hub yet; its id."""
    before = set(pool.client.ids)
    pool._cluster.start_engines_sync(1)
    pool.client.wait_for_engines(len(before) + 1, timeout=60, interactive=False)
    (engine,) = set(pool.client.ids) - before
    return engine


def let_join(pool, engine):
    """Let a started engine meet the hub."""
    cluster = pool._cluster
    file = f"{cluster.profile_dir}/security/ipcontroller-{cluster.cluster_id}-engine.json"
    pool.client[engine].apply_sync(join_pool, engine, num_threads=1, connection_file=file, timeout_seconds=60)
