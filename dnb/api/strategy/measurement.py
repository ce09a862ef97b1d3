"""Measure what a plan needs: the model on an engine or here, the pool's exchange, its engines' memory and cores."""

from __future__ import annotations

import os
import socket
import uuid
import weakref
from concurrent.futures import FIRST_EXCEPTION
from datetime import timedelta
from typing import Any

import ipyparallel
import msgspec
import torch.distributed

from dnb.engine.profiling.exchange_probe import Memory, Passed, pass_tensors, probe_memory, product_seconds
from dnb.engine.profiling.profiler import ProfileInput, profile_payload, profile_trial
from dnb.errors import USER_ERRORS, PlanError, PoolError, SpaceError
from dnb.planning.capacity import choose_num_threads
from dnb.planning.search.profiles import USUAL_EXCHANGE, EngineTraits, Exchange, Profile, Site, mean_profile
from dnb.pool.engine_pool import EnginePool
from dnb.pool.engine_starter import count_ready, free_bytes
from dnb.pool.engines import Engine
from dnb.progress import long_work
from dnb.protocol.memory import PayloadRef
from dnb.transport.pickling.payloads import explain_unpicklable, pickle_payload
from dnb.transport.segments import Segment
from dnb.transport.system.process_settings import notebook_settings

# How long two engines may take to find and answer each other.
PROBE_SECONDS = 20.0
# How long an engine may take to profile a model, what it runs already included.
MEASURE_SECONDS = 300.0
# Hosts whose speed differs less are alike: a single timing swings as much.
ALIKE = 0.15

_exchanges: weakref.WeakKeyDictionary[EnginePool, Exchange] = weakref.WeakKeyDictionary()


def working_engines(pool: EnginePool) -> list[Engine]:
    """List the engines that are no spares.

    Raises:
        PoolError: there is none.
    """
    engines = [engine for engine in pool.engines if engine.state != "spare"]
    if not engines:
        raise PoolError("no engine of the pool is alive: %dtrain add 2 starts some")
    return engines


def profile_on(
    pool: EnginePool, trial: ProfileInput, *, sys_path: tuple[str, ...], sizes: tuple[int, ...] | None = None
) -> Profile:
    """Profile in the main threads of engines that share a host, at the same time.

    Alone an engine would have all of the host's memory bandwidth, and its processor's clock would be higher: a model
    of large matrices takes a third longer per engine once others compute beside it.

    Args:
        pool: may be training meanwhile; then what is measured is what is left of the cores.
        trial: what to measure.
        sys_path: where this kernel imports from.
        sizes: samples of the micro-batches; chosen by the batch if left out.

    Raises:
        PlanError: the model fails on the batch.
        ShippingError: something cannot be sent to an engine.
    """
    settings = msgspec.msgpack.encode(notebook_settings())
    engines = _engines_at_once(pool)
    pickled, payload, segment = _pack(trial, pool)
    try:
        calls = {
            engine: pool.client[engine].apply_async(
                profile_payload,
                pickled,
                msgspec.msgpack.encode(payload),
                sizes=sizes,
                sys_path=sys_path,
                settings=settings,
            )
            for engine in engines
        }
        with long_work(f"profiling {type(trial.model).__name__}") as report:
            report(lambda: f"{count_ready(calls)} of {len(calls)} engines have measured it")
            encoded = [_result(call, engine=engine) for engine, call in calls.items()]
    finally:
        if segment is not None:
            segment.unlink()
    return mean_profile([msgspec.msgpack.decode(each, type=Profile) for each in encoded])


def _engines_at_once(pool: EnginePool) -> list[int]:
    """List as many engines of the first one's host as it has cores for: those that would compute at the same time."""
    first, *others = working_engines(pool)
    beside = [engine.id for engine in others if engine.host == first.host]
    return [first.id, *beside[: max(1, (os.cpu_count() or 1) // max(1, first.cores)) - 1]]


def _pack(trial: ProfileInput, pool: EnginePool) -> tuple[bytes, PayloadRef, Segment | None]:
    try:
        return pickle_payload(trial, name="profile", folders=pool.segment_folders)
    except (SpaceError, KeyboardInterrupt):
        raise
    except USER_ERRORS as error:
        parts = ((name, getattr(trial, name)) for name in ("model", "batch", "loss", "step"))
        found = (explain_unpicklable(part, name=name) for name, part in parts)
        raise next((each for each in found if each is not None), error) from error


def profile_here(trial: ProfileInput, *, num_threads: int, sizes: tuple[int, ...] | None = None) -> Profile:
    """Profile in this process, with as many threads as an engine would have."""
    with long_work(f"profiling {type(trial.model).__name__} in this process") as report:
        return profile_trial(trial, sizes=sizes, num_threads=num_threads, report=report)


def _call(pool: EnginePool, engine: int, function: Any, *arguments: Any, **options: Any) -> Any:
    return _result(pool.client[engine].apply_async(function, *arguments, **options), engine=engine)


def _result(call: Any, *, engine: int) -> Any:
    """Wait for the result of a call; a `PlanError` is raised here as it was there."""
    call.wait(MEASURE_SECONDS, return_when=FIRST_EXCEPTION)  # a plain get() sits on a dead engine for all of its time
    if not call.ready():
        raise PoolError(
            f"engine {engine} did not measure within {MEASURE_SECONDS:g} s: a cell may run on it; %dtrain status"
        )
    try:
        return call.get()
    except ipyparallel.error.RemoteError as error:
        if error.ename == "PlanError":
            raise PlanError(error.evalue) from None
        raise PoolError(f"engine {engine} could not measure: {error.ename}: {error.evalue}") from error


def exchange_of(pool: EnginePool) -> Exchange:
    """Return the cost of passing tensors in this pool: probed once, then kept for as long as the pool is."""
    if pool not in _exchanges:
        engines = working_engines(pool)
        memory = msgspec.msgpack.decode(_call(pool, engines[0].id, probe_memory), type=Memory)
        with long_work("probing how fast engines pass tensors"):
            passed = _probe_pair(pool, engines) if len(engines) > 1 else None
        _exchanges[pool] = Exchange(
            latency_seconds=passed.latency_seconds if passed else USUAL_EXCHANGE.latency_seconds,
            bytes_per_second=passed.bytes_per_second if passed else USUAL_EXCHANGE.bytes_per_second,
            action_seconds=passed.action_seconds if passed else USUAL_EXCHANGE.action_seconds,
            hub_seconds=USUAL_EXCHANGE.hub_seconds,
            message_seconds=USUAL_EXCHANGE.message_seconds,
            sum_seconds_per_byte=memory.sum_seconds_per_byte,
            update_seconds_per_byte=memory.update_seconds_per_byte,
            is_measured=passed is not None,
        )
    return _exchanges[pool]


def _probe_pair(pool: EnginePool, engines: list[Engine]) -> Passed:
    """Let two engines pass tensors to each other; they meet in a store that exists here only for the probe."""
    timeout = timedelta(seconds=PROBE_SECONDS)
    dist: Any = torch.distributed
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    prefix = f"probe-{uuid.uuid4().hex}"
    calls = {
        engine.id: pool.client[engine.id].apply_async(
            pass_tensors, rank, port=store.port, prefix=prefix, timeout_seconds=PROBE_SECONDS
        )
        for rank, engine in enumerate(engines[:2])
    }
    sides = [msgspec.msgpack.decode(_result(call, engine=engine), type=Passed) for engine, call in calls.items()]
    return min(sides, key=lambda side: side.latency_seconds)


def site_of(pool: EnginePool, *, memory_limit: int | None, num_engines: int | None = None) -> Site:
    """Describe the pool's engines as they are, or as many as there might be, each further one like the last.

    Args:
        pool: its first working engine is the one that was profiled.
        memory_limit: bytes per engine; what its host has free, shared out, if that is less.
        num_engines: those that are if left out.
    """
    engines = working_engines(pool)
    speeds = _speeds(pool, engines)
    cores = {engine.host: os.cpu_count() or 1 for engine in engines}
    traits = [
        EngineTraits(engine=engine.id, host=engine.host, threads=engine.cores, speed=speeds[engine.host])
        for engine in engines
    ]
    wanted = len(traits) if num_engines is None else num_engines
    extra = _imagined(wanted - len(traits), like=traits[-1], first=max(each.engine for each in traits) + 1)
    chosen = [*traits[:wanted], *extra]
    cores |= {each.host: os.cpu_count() or 1 for each in extra}
    return Site(engines=_with_memory(chosen, limit=memory_limit), cores=cores, exchange=exchange_of(pool))


def site_without_pool(*, num_engines: int, memory_limit: int | None, hosts: int | None = None) -> Site:
    """Describe a pool that does not exist yet, on hosts like this one.

    Args:
        num_engines: in all.
        memory_limit: bytes per engine.
        hosts: so many; as many as give every engine a core of its own if left out.
    """
    cores = os.cpu_count() or 1
    hosts = hosts or -(-num_engines // cores)
    per_host = -(-num_engines // hosts)
    threads = choose_num_threads(cores, num_engines=per_host)
    names = [socket.gethostname(), *(f"host {number}" for number in range(1, hosts))]
    traits = [
        EngineTraits(engine=index, host=names[index // per_host], threads=threads) for index in range(num_engines)
    ]
    return Site(engines=_with_memory(traits, limit=memory_limit), cores=dict.fromkeys(names, cores))


def _imagined(count: int, *, like: EngineTraits, first: int) -> list[EngineTraits]:
    """Engines on further hosts like the one that is there, each with cores of its own."""
    per_host = max(1, (os.cpu_count() or 1) // like.threads)
    return [
        msgspec.structs.replace(like, engine=first + index, host=f"host {1 + index // per_host}")
        for index in range(max(0, count))
    ]


def _with_memory(engines: list[EngineTraits], *, limit: int | None) -> tuple[EngineTraits, ...]:
    """Give each its share of its host's free memory, which for other hosts is taken to be as much as here."""
    crowd = {engine.host: sum(each.host == engine.host for each in engines) for engine in engines}
    free = free_bytes()
    return tuple(
        msgspec.structs.replace(engine, memory_bytes=min(free // crowd[engine.host], limit or free))
        for engine in engines
    )


def _speeds(pool: EnginePool, engines: list[Engine]) -> dict[str, float]:
    """Return the speed of each host, relative to the first one; engines of one host are alike."""
    first_of = {engine.host: engine.id for engine in reversed(engines)}
    if len(first_of) == 1:
        return dict.fromkeys(first_of, 1.0)
    seconds = {host: float(_call(pool, engine, product_seconds)) for host, engine in first_of.items()}
    own = seconds[engines[0].host]
    return {host: 1.0 if abs(own / each - 1) < ALIKE else own / each for host, each in seconds.items()}
