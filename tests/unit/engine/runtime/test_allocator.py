from __future__ import annotations

import subprocess
import sys

import pytest

from dnb.engine.runtime.allocator import _glibc

# In a process of its own, as the options stay for ever.
SCRIPT = """
import resource
import psutil, torch
from dnb.engine.runtime.allocator import keep_freed_memory, release_freed_memory

MEGABYTES = 40
def faults_of_round():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(MEGABYTES << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{keep}
faults_of_round()
faults = faults_of_round()
held = psutil.Process().memory_info().rss
release_freed_memory()
print(faults, held - psutil.Process().memory_info().rss)
"""


def faults_and_released(keep: str) -> tuple[int, int]:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(keep=keep)], capture_output=True, text=True, check=True, timeout=120
    )
    faults, released = map(int, ran.stdout.split())
    return faults, released


@pytest.mark.skipif(_glibc() is None, reason="only glibc's allocator has these options")
def test_blocks_that_are_freed_are_used_again_and_given_back_when_told():
    faults, released = faults_and_released("keep_freed_memory()")
    assert faults < 1000
    assert released > 30 << 20


@pytest.mark.skipif(_glibc() is None, reason="only glibc's allocator has these options")
def test_without_that_every_block_is_mapped_anew():
    faults, _ = faults_and_released("")
    assert faults > 10_000


RATIONED = """
import psutil, torch
from dnb.engine.runtime.allocator import keep_freed_memory, ration

keep_freed_memory()
start = psutil.Process().memory_info().rss
pinned = []
for _ in range(20):  # what is freed lies between small blocks that are in use, and does not serve again
    torch.ones(1 << 20)
    pinned += [torch.ones(8) for _ in range(50)]
    torch.ones(2 << 20)
ration.set({limit}, start_bytes=start)
before = psutil.Process().memory_info().rss
ration.check()
print(before - psutil.Process().memory_info().rss)
"""


def given_back(limit: int | None) -> int:
    script = RATIONED.format(limit=limit)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(_glibc() is None, reason="only glibc's allocator has these options")
def test_a_process_that_has_grown_to_most_of_its_ration_gives_back_what_is_freed():
    assert given_back(4_000_000) > 3_000_000


@pytest.mark.parametrize("limit", [None, 1_000_000_000])
def test_where_there_is_room_what_is_freed_is_kept(limit: int | None):
    assert given_back(limit) < 1_000_000
