from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dnb.errors import SpaceError
from dnb.records import SegmentRef
from dnb.transport.segments import (
    FOLDERS_VARIABLE,
    create_segment,
    megabytes,
    open_segment,
    pool_folders,
    remove_pool_folders,
    segment_roots,
)

MEGABYTE = 1_000_000


@pytest.fixture
def small_tmpfs(tmp_path: Path):
    """A memory-backed folder of 1 MiB, like /dev/shm in a container, only smaller."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a failed test still maps what lies in it


# room --------------------------------------------------------------------------------------------------


def test_a_segment_lies_in_the_first_folder_that_has_room(tmp_path: Path):
    segment = create_segment("slab", 100, folders=[tmp_path / "a", tmp_path / "b"])
    segment.unlink()
    assert segment.path.parent == tmp_path / "a"


def test_a_segment_in_the_first_folder_has_no_note(tmp_path: Path):
    segment = create_segment("slab", 100, folders=[tmp_path])
    segment.unlink()
    assert segment.note == ""


def test_a_full_folder_falls_back_to_the_next(small_tmpfs: Path, tmp_path: Path):
    segment = create_segment("slab", 2 * MEGABYTE, folders=[small_tmpfs / "pool", tmp_path / "pool"])
    segment.unlink()
    assert segment.path.parent == tmp_path / "pool"


def test_the_note_of_a_fall_back_names_what_is_needed_what_is_free_and_what_is_used(small_tmpfs: Path, tmp_path: Path):
    segment = create_segment("slab", 2 * MEGABYTE, folders=[small_tmpfs / "pool", tmp_path / "pool"])
    segment.unlink()
    assert segment.note == (
        f"slab needs 2.0 MB: {small_tmpfs} has 1.0 MB free (No space left on device); using {tmp_path}"
    )


def test_a_segment_that_fell_back_can_be_written_to_its_end(small_tmpfs: Path, tmp_path: Path):
    segment = create_segment("slab", 2 * MEGABYTE, folders=[small_tmpfs / "pool", tmp_path / "pool"])
    segment.memory[-1:] = b"x"
    segment.unlink()
    assert segment.memory[-1:] == b"x"


def test_what_fills_a_folder_is_counted_in(small_tmpfs: Path, tmp_path: Path):
    first = create_segment("first", 700_000, folders=[small_tmpfs])
    second = create_segment("second", 700_000, folders=[small_tmpfs, tmp_path / "other"])
    assert (first.path.parent, second.path.parent) == (small_tmpfs, tmp_path / "other")


def test_no_room_anywhere_is_told_with_needed_and_free_and_the_way_out(small_tmpfs: Path):
    with pytest.raises(
        SpaceError,
        match=r"slab needs 2\.0 MB of shared memory, but .*small has 1\.0 MB free \(No space left on device\): "
        rf"free some, start the container with a larger --shm-size, or set {FOLDERS_VARIABLE}",
    ):
        create_segment("slab", 2 * MEGABYTE, folders=[small_tmpfs / "pool"])


def test_no_file_is_left_where_there_was_no_room(small_tmpfs: Path):
    with pytest.raises(SpaceError):
        create_segment("slab", 2 * MEGABYTE, folders=[small_tmpfs])
    assert list(small_tmpfs.iterdir()) == []


def test_a_folder_that_may_not_be_written_falls_back_to_the_next(small_tmpfs: Path, tmp_path: Path):
    subprocess.run(["mount", "-o", "remount,ro", small_tmpfs], check=True)  # root may write whatever the mode says
    segment = create_segment("slab", 100, folders=[small_tmpfs / "pool", tmp_path / "pool"])
    segment.unlink()
    assert "Read-only file system" in segment.note


def test_two_segments_of_one_name_do_not_share_memory(tmp_path: Path):
    first, second = (create_segment("slab", 1, folders=[tmp_path]) for _ in range(2))
    first.memory[:] = b"x"
    assert second.memory[:] == bytes(1)


# memory --------------------------------------------------------------------------------------------------


def test_a_segment_is_zeros(tmp_path: Path):
    assert create_segment("slab", 5, folders=[tmp_path]).memory[:] == bytes(5)


def test_a_segment_of_nothing_holds_one_byte(tmp_path: Path):
    assert create_segment("slab", 0, folders=[tmp_path]).ref.num_bytes == 1


def test_a_segment_is_readable_by_its_user_only(tmp_path: Path):
    segment = create_segment("slab", 5, folders=[tmp_path / "pool"])
    assert (segment.path.stat().st_mode & 0o777, segment.path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_what_is_written_through_a_mapping_is_seen_by_the_others(tmp_path: Path):
    segment = create_segment("slab", 5, folders=[tmp_path])
    open_segment(segment.ref).memory[:] = b"hello"
    assert segment.memory[:] == b"hello"


def test_what_is_written_to_a_private_mapping_is_not_seen_by_the_others(tmp_path: Path):
    segment = create_segment("slab", 5, folders=[tmp_path])
    private = open_segment(segment.ref, private=True)
    private.memory[:] = b"hello"
    assert private.memory[:] == b"hello"
    assert segment.memory[:] == bytes(5)


def test_unlink_removes_the_file(tmp_path: Path):
    create_segment("slab", 5, folders=[tmp_path]).unlink()
    assert list(tmp_path.iterdir()) == []


def test_unlink_keeps_the_memory(tmp_path: Path):
    segment = create_segment("slab", 5, folders=[tmp_path])
    other = open_segment(segment.ref)
    segment.unlink()
    other.memory[:] = b"hello"
    assert segment.memory[:] == b"hello"


def test_unlink_may_be_called_twice(tmp_path: Path):
    segment = create_segment("slab", 5, folders=[tmp_path])
    segment.unlink()
    segment.unlink()
    assert not segment.path.exists()


def test_a_segment_that_is_gone_cannot_be_opened(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="slab"):
        open_segment(SegmentRef(path=str(tmp_path / "slab"), num_bytes=5))


# folders ---------------------------------------------------------------------------------------------------


def test_shared_memory_is_the_first_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(FOLDERS_VARIABLE, raising=False)
    assert segment_roots()[0] == Path("/dev/shm")


def test_a_variable_names_other_folders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FOLDERS_VARIABLE, "/one:/two")
    assert pool_folders("abc") == [Path("/one/dnb-abc"), Path("/two/dnb-abc")]


def test_the_folders_of_one_pool_are_removed_and_those_of_another_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    create_segment("slab", 5, folders=pool_folders("mine"))
    create_segment("slab", 5, folders=pool_folders("other"))
    remove_pool_folders("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["dnb-other"]


def test_a_megabyte_is_a_million_bytes():
    assert megabytes(1_234_567_890) == "1,234.6 MB"
