"""Our side of the row `reduce`: slabs in shared memory, a process per engine, a hub that adds them up.

The one place to change when the way in which gradients are added up changes: `open_reduce` and what it starts.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from benchmarks.pairs import collective_seconds
from benchmarks.workspace import segment_folders
from dnb.hub.parameters.master import sum_regions
from dnb.hub.parameters.thread_team import ThreadTeam, usable_threads
from dnb.protocol.memory import Layout, SegmentRef
from dnb.transport.layout import plan_layout, region_views
from dnb.transport.segments import create_segment, open_segment

READY, MEAN = b"r", b"m"
TURN_SECONDS = 300.0

Turn = Callable[[int, int], list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    num_elements: int
    layout: Layout
    slabs: tuple[SegmentRef, ...]
    rounds: int


@contextmanager
def open_reduce(num_engines: int) -> Iterator[Turn]:
    """Start engines and hub, which sleep between turns.

    Yields:
        turn(num_elements, rounds): the seconds of each round, from when the last engine has its gradient in place
        until the last one may read the mean.
    """
    context = multiprocessing.get_context("spawn")
    hands = [context.Pipe() for _ in range(num_engines)]
    lines = [context.Pipe() for _ in range(num_engines + 1)]
    engines = [
        context.Process(target=_engine, args=(rank, hands[rank][0], lines[rank][1]), daemon=True)
        for rank in range(num_engines)
    ]
    hub = context.Process(target=_hub, args=([hand for _, hand in hands], lines[-1][1]), daemon=True)
    processes: list[BaseProcess] = [*engines, hub]
    try:
        for process in processes:
            process.start()
        # Only the processes keep these ends: each reads the end of file when another is gone.
        for end in (*(end for pair in hands for end in pair), *(theirs for _, theirs in lines)):
            end.close()
        yield lambda num_elements, rounds: _turn([own for own, _ in lines], num_elements, rounds)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()  # nothing is theirs to save
        for own, _ in lines:
            own.close()


def _turn(lines: Sequence[Connection], num_elements: int, rounds: int) -> list[float]:
    layout = plan_layout([("gradient", torch.empty(num_elements, device="meta"))])
    slabs = [
        create_segment(f"slab-{rank}", layout.num_bytes, folders=segment_folders()) for rank in range(len(lines) - 1)
    ]
    job = _Job(num_elements=num_elements, layout=layout, slabs=tuple(slab.ref for slab in slabs), rounds=rounds)
    for line in lines:
        line.send(job)
    starts, ends = zip(*(_answer(line) for line in lines[:-1]), strict=True)
    _answer(lines[-1])
    for slab in slabs:  # after an error the folder goes with all that is in it
        slab.unlink()
    return collective_seconds(starts, ends)


def _answer(line: Connection) -> tuple[list[float], list[float]]:
    if not line.poll(TURN_SECONDS):
        raise TimeoutError(f"no answer within {TURN_SECONDS:g} s")
    answer: tuple[list[float], list[float]] = line.recv()
    return answer


def _jobs(line: Connection) -> Iterator[_Job]:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends us
    while True:
        try:
            yield line.recv()
        except EOFError:  # the benchmark has closed the line, or is gone
            return


def _slabs(job: _Job) -> list[torch.Tensor]:
    return [region_views(job.layout, open_segment(ref).memory)[0] for ref in job.slabs]


def _engine(rank: int, hub: Connection, line: Connection) -> None:
    for job in _jobs(line):
        slabs = _slabs(job)
        source = torch.full_like(slabs[rank], float(rank + 1))
        starts: list[float] = []
        ends: list[float] = []
        for _ in range(job.rounds):
            slabs[rank].copy_(source)
            starts.append(time.monotonic())
            hub.send_bytes(READY)
            hub.recv_bytes()
            ends.append(time.monotonic())
        line.send((starts, ends))


def _hub(engines: Sequence[Connection], line: Connection) -> None:
    thread_team = ThreadTeam(usable_threads())
    for job in _jobs(line):
        slabs = _slabs(job)
        for _ in range(job.rounds):
            for engine in engines:
                engine.recv_bytes()
            add_up(slabs, thread_team)
            for engine in engines:
                engine.send_bytes(MEAN)
        # Outside of what is timed; after the last round nobody writes any more.
        assert bool((slabs[0][: job.num_elements] == (len(slabs) + 1) / 2).all())
        line.send(([], []))


def add_up(slabs: Sequence[torch.Tensor], thread_team: ThreadTeam) -> None:
    """Leave the mean of all slabs in the first, as the hub does, its check for NaN and infinity included."""
    first, *others = slabs
    assert math.isfinite(sum_regions(first, others, divisor=float(len(slabs)), thread_team=thread_team))
