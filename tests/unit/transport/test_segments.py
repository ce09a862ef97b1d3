from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dnb.errors import SpaceError
from dnb.protocol.memory import SegmentRef
from dnb.transport.segments import (
    FOLDERS_VARIABLE,
    create_segment,
    draw_pool_folders,
    megabytes,
    named_folders,
    open_segment,
    pool_folders,
    remove_folders,
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


def test_no_two_pools_and_no_two_roots_have_folders_of_one_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FOLDERS_VARIABLE, "/one:/two")
    names = [folder.name for _ in range(10) for folder in draw_pool_folders()]
    assert len(set(names)) == 20


def test_a_pool_s_folders_lie_in_the_roots_in_their_order_under_a_name_of_128_random_bits(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(FOLDERS_VARIABLE, "/one:/two")
    folders = draw_pool_folders()
    assert [folder.parent for folder in folders] == [Path("/one"), Path("/two")]
    assert all(re.fullmatch("dnb-[0-9a-f]{32}", folder.name) for folder in folders)


def test_the_folders_are_those_that_a_record_names():
    assert named_folders(["/one/a", "/two/b"], "cluster") == [Path("/one/a"), Path("/two/b")]


def test_a_record_of_an_older_dnb_that_names_no_folders_means_those_of_its_cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FOLDERS_VARIABLE, "/one:/two")
    assert named_folders([], "cluster") == [Path("/one/dnb-cluster"), Path("/two/dnb-cluster")]


# strangers -------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    """What another user has put where a pool's folder shall be."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    folder = tmp_path / "pool"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    os.chown(folder, 65534, 65534)
    return folder


def test_a_folder_of_another_user_is_not_used(foreign_folder: Path):
    with pytest.raises(SpaceError, match="it belongs to user 65534"):
        create_segment("slab", 5, folders=[foreign_folder])
    assert list(foreign_folder.iterdir()) == []


def test_a_segment_that_a_folder_of_another_user_is_in_the_way_of_goes_to_the_next(
    foreign_folder: Path, tmp_path: Path
):
    segment = create_segment("slab", 5, folders=[foreign_folder, tmp_path / "other"])
    assert segment.path.parent == tmp_path / "other"


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path):
    tmp_path.chmod(0o777)
    with pytest.raises(SpaceError, match="other users may write there"):
        create_segment("slab", 5, folders=[tmp_path])


@pytest.mark.parametrize("place", ["there", "nowhere"])
def test_a_link_in_a_folder_s_place_is_not_followed(tmp_path: Path, place: str):
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "pool").symlink_to(tmp_path / place)
    with pytest.raises(SpaceError, match="a link or file has its name"):
        create_segment("slab", 5, folders=[tmp_path / "pool"])
    assert list((tmp_path / "there").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("umask", [0, 0o022, 0o377])
def test_folder_and_file_are_for_their_user_only_whatever_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        segment = create_segment("slab", 5, folders=[tmp_path / "pool"])
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (segment.path.parent, segment.path)]
    assert modes == [0o700, 0o600]


def test_a_file_that_another_user_has_put_in_a_segment_s_place_is_not_mapped(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    segment = create_segment("slab", 5, folders=[tmp_path])
    os.chown(segment.path, 65534, 65534)
    with pytest.raises(PermissionError, match="it belongs to user 65534"):
        open_segment(segment.ref)


def test_a_segment_in_a_folder_that_another_user_has_taken_over_is_not_mapped(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    segment = create_segment("slab", 5, folders=[tmp_path / "pool"])
    os.chown(segment.path.parent, 65534, 65534)
    with pytest.raises(PermissionError, match="it belongs to user 65534"):
        open_segment(segment.ref)


def test_a_file_that_others_may_write_is_not_mapped(tmp_path: Path):
    segment = create_segment("slab", 5, folders=[tmp_path])
    segment.path.chmod(0o666)
    with pytest.raises(PermissionError, match="other users may write there"):
        open_segment(segment.ref)


def test_a_link_to_a_file_is_not_mapped(tmp_path: Path):
    segment = create_segment("slab", 5, folders=[tmp_path])
    (tmp_path / "link").symlink_to(segment.path)
    with pytest.raises(PermissionError, match="a link has its name"):
        open_segment(SegmentRef(path=str(tmp_path / "link"), num_bytes=5))


def test_a_pipe_is_not_waited_for_but_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(PermissionError, match="no plain file"):
        open_segment(SegmentRef(path=str(tmp_path / "pipe"), num_bytes=5))


def test_a_segment_that_was_cut_short_is_not_mapped(tmp_path: Path):
    segment = create_segment("slab", 5000, folders=[tmp_path])
    os.truncate(segment.path, 10)
    with pytest.raises(ValueError, match="greater than file size"):
        open_segment(segment.ref)


def test_what_another_user_has_put_under_the_name_of_a_pool_s_folder_is_not_removed(foreign_folder: Path):
    (foreign_folder / "theirs").touch()
    remove_folders([foreign_folder])
    assert [path.name for path in foreign_folder.iterdir()] == ["theirs"]


def test_removing_a_pool_s_folder_follows_no_link(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "pool").symlink_to(tmp_path / "precious")
    remove_folders([tmp_path / "pool"])
    assert (tmp_path / "precious" / "file").exists()


def test_a_pool_s_folder_that_is_not_there_is_no_trouble(tmp_path: Path):
    remove_folders([tmp_path / "pool"])
    assert list(tmp_path.iterdir()) == []


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
