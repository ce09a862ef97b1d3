import mmap

import pytest

from dnb.engine.runtime import process_memory as module
from dnb.engine.runtime.process_memory import Footprint
from dnb.engine.runtime.telemetry import Stopwatch

PIECE = 64_000_000


@pytest.fixture
def footprint():
    made = Footprint()
    made.begin()
    if not made._has_own_peak:
        pytest.skip("this system does not tell a process's own peak")
    return made


def fill(num_bytes: int, *, flags: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, flags=flags)
    for offset in range(0, num_bytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def test_the_peak_counts_what_was_given_back_before_anybody_looked(footprint: Footprint):
    fill(PIECE, flags=mmap.MAP_PRIVATE).close()
    footprint.sample()
    assert footprint.peak_bytes - footprint.start_bytes >= 0.9 * PIECE


def test_another_run_begins_with_another_peak(footprint: Footprint):
    fill(PIECE, flags=mmap.MAP_PRIVATE).close()
    footprint.begin()
    assert footprint.peak_bytes - footprint.start_bytes < 0.5 * PIECE


def test_shared_memory_counts_as_resident_and_not_as_private(footprint: Footprint):
    private = footprint.peak_private_bytes
    memory = fill(PIECE, flags=mmap.MAP_SHARED)
    footprint.sample()
    assert footprint.peak_bytes - footprint.start_bytes >= 0.9 * PIECE
    assert footprint.peak_private_bytes - private < 0.5 * PIECE
    memory.close()


def test_where_the_system_keeps_no_peak_the_most_that_was_seen_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CLEAR", tmp_path / "none" / "clear_refs")
    made = Footprint()
    made.begin()
    fill(PIECE, flags=mmap.MAP_PRIVATE).close()
    made.sample()
    assert made.peak_bytes - made.start_bytes < 0.5 * PIECE


def test_without_proc_resident_memory_is_asked_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_STATUS", tmp_path / "status")
    made = Footprint()
    made.begin()
    assert made.peak_bytes == made.start_bytes
    assert made.start_bytes > 1_000_000
    assert made.peak_private_bytes is None


def test_the_first_steps_of_a_run_tell_their_memory():
    stopwatch = Stopwatch()
    stopwatch.begin_run()
    fill(PIECE, flags=mmap.MAP_PRIVATE).close()
    telemetry = stopwatch.collect()
    assert telemetry.peak_rss_bytes - telemetry.start_rss_bytes >= 0.5 * PIECE
