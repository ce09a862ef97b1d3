"""Probe what it costs to pass tensors between two engines, and to add and update them in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from statistics import quantiles
from typing import Any

import msgspec
import torch
import torch.distributed

from dnb.protocol.base import Record

# Not all of what is used here has types.
dist: Any = torch.distributed

SMALL_ROUNDS = 60
LARGE_ROUNDS = 6
ACTION_ROUNDS = 60
# What an action of a schedule takes besides its layers, to forward and backward of a single number: seen with 2, 8 and
# 32 micro-batches in two stages. It is torch's schedules and stages, the messages to and from the neighbours, autograd.
ACTION_TIMES = 6
LARGE_BYTES = 4_000_000
MEMORY_BYTES = 16_000_000
MEMORY_ROUNDS = 7
SPEED_WIDTH = 384


class Passed(Record, frozen=True):
    """Seconds between two processes."""

    latency_seconds: float
    bytes_per_second: float
    action_seconds: float  # of a forward or a backward that has next to nothing to compute


class Memory(Record, frozen=True):
    """Seconds of one process with its memory."""

    sum_seconds_per_byte: float
    update_seconds_per_byte: float  # AdamW


def pass_tensors(rank: int, *, port: int, prefix: str, timeout_seconds: float) -> bytes:
    """Run one side of the probe between two processes of one host; both at once.

    It has a process group of its own, apart from the default one.

    Args:
        rank: 0 or 1.
        port: of a TCPStore on this host.
        prefix: of this probe's keys in it.
        timeout_seconds: for the other side to come and to answer.

    Returns:
        The encoded `Passed`.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout))
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    group: Any = dist.ProcessGroupGloo(store, rank, 2, options)
    small = _way_seconds(group, rank, num_bytes=8, rounds=SMALL_ROUNDS)
    large = _way_seconds(group, rank, num_bytes=LARGE_BYTES, rounds=LARGE_ROUNDS)
    return msgspec.msgpack.encode(
        Passed(
            latency_seconds=small,
            bytes_per_second=LARGE_BYTES / max(large - small, 1e-9),
            action_seconds=_action_seconds(),
        )
    )


def _way_seconds(group: Any, rank: int, *, num_bytes: int, rounds: int) -> float:
    """Return the seconds of one way: half of there and back."""
    tensor = torch.zeros(num_bytes // 4)
    other = 1 - rank

    def there_and_back() -> None:
        if rank == 0:
            group.send([tensor], other, 0).wait()
            group.recv([tensor], other, 0).wait()
        else:
            group.recv([tensor], other, 0).wait()
            group.send([tensor], other, 0).wait()

    return _usual_seconds(there_and_back, rounds) / 2


def _action_seconds() -> float:
    """Estimate a scheduled forward or backward as so many plain ones, which any machine can measure alone."""
    layer = torch.nn.Linear(1, 1)
    one = torch.zeros(1, 1)
    return ACTION_TIMES * _usual_seconds(lambda: layer(one).mean().backward(), ACTION_ROUNDS)


def probe_memory() -> bytes:
    """Time the hub's sum and update of gradients in this process; the encoded `Memory`."""
    slab, total, parameter, mean, square = torch.zeros(5, MEMORY_BYTES // 4)
    step = torch.zeros(())

    def update() -> None:
        # torch.optim's own AdamW calls this; the class itself imports a compiler, which takes seconds.
        torch._fused_adamw_(
            [parameter], [slab], [mean], [square], [], [step],
            lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    return msgspec.msgpack.encode(
        Memory(
            sum_seconds_per_byte=_usual_seconds(lambda: total.add_(slab), MEMORY_ROUNDS) / MEMORY_BYTES,
            update_seconds_per_byte=_usual_seconds(update, MEMORY_ROUNDS) / MEMORY_BYTES,
        )
    )


def product_seconds() -> float:
    """Time a fixed product of matrices, by which the speeds of hosts are compared."""
    factor = torch.ones(SPEED_WIDTH, SPEED_WIDTH)
    return _usual_seconds(lambda: factor @ factor, MEMORY_ROUNDS * 3)


def _usual_seconds(act: Callable[[], object], rounds: int) -> float:
    """Return the lower quartile of all repetitions but the first, which meets new pages: others may be at work."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return quantiles(seconds[1:], n=4)[0]
