"""A few threads that share what memory, not arithmetic, limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch

# More move no more: memory is the limit, and engines want their cores back.
MOST_THREADS = 4
# Elements per thread that are worth the hand-over, which takes about 50 microseconds.
LEAST_ELEMENTS = 1 << 19
# Parts end at multiples of this, so that no element changes its place within a vector of the CPU, and bits stay.
PART_ELEMENTS = 1 << 18

T = TypeVar("T")


def usable_threads() -> int:
    """Return the threads for a team in this process: while the hub commits, engines leave their cores to it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    return max(1, min(MOST_THREADS, cores or 1))


class ThreadTeam:
    """Does tasks side by side; torch lets go of the GIL in each.

    These are Python's threads, not OpenMP's, which spin for a core that an engine may have by then.

    Args:
        num_threads: the caller's own is one of them.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._others: ThreadPoolExecutor | None = None

    def cut(self, num_elements: int) -> list[tuple[int, int]]:
        """Begin and end of each thread's part; a single one if there is too little to share."""
        num_parts = min(self.num_threads, num_elements // LEAST_ELEMENTS)
        if num_parts < 2:
            return [(0, num_elements)]
        size = -(-num_elements // (num_parts * PART_ELEMENTS)) * PART_ELEMENTS
        return [(begin, min(begin + size, num_elements)) for begin in range(0, num_elements, size)]

    def share(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks side by side and return their results in order.

        Raises:
            Exception: of the first task that failed, when all have ended.
        """
        if len(tasks) < 2:
            return [task() for task in tasks]
        if self._others is None:
            self._others = ThreadPoolExecutor(
                self.num_threads - 1,
                thread_name_prefix="dnb-thread-team",
                initializer=torch.set_num_threads,
                initargs=(1,),
            )
        futures = [self._others.submit(task) for task in tasks[1:]]
        try:
            first = tasks[0]()
        finally:
            for future in futures:
                future.exception()  # waits: no thread may still write when the caller goes on
        return [first, *(future.result() for future in futures)]

    def close(self) -> None:
        """End the threads."""
        if self._others is not None:
            self._others.shutdown()
            self._others = None
