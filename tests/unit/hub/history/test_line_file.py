"""Lines that a disk does not take, or that somebody removes, are all there in the end, once and in order."""

import os
import random
import shutil

import pytest

from dnb.hub.history.backlog import Backlog
from dnb.hub.history.line_file import LineFile
from tests.disks import files_end_at

LINES = [b"%d %s\n" % (number, b"x" * (7 * number % 40)) for number in range(200)]
WHOLE = b"".join(LINES)


@pytest.fixture
def memory(tmp_path):
    folder = tmp_path / "memory"
    folder.mkdir()
    return folder


@pytest.fixture
def open_file(tmp_path, memory):
    """Opens the file as each hub does; what a hub has open stays so, as if it had been killed."""
    return lambda: LineFile(tmp_path / "run" / "history.jsonl", Backlog([memory], "kept"))


def size(file):
    return file.path.stat().st_size


def add(file, lines):
    for line in lines:
        file.append(line)


def test_lines_are_written_at_once(open_file):
    file = open_file()
    add(file, LINES)
    assert (file.path.read_bytes(), file.is_whole) == (WHOLE, True)


@pytest.mark.parametrize("limit", [0, 1, 100, 1001, 2500])
def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(open_file, limit):
    file = open_file()
    with files_end_at(limit):
        add(file, LINES[:150])
        assert not file.is_whole
    add(file, LINES[150:])
    file.catch_up()
    assert (file.path.read_bytes(), file.num_waiting, file.fault) == (WHOLE, 0, None)


@pytest.mark.parametrize("limit", [1, 100, 1001, 2500])
def test_no_reader_sees_half_a_line_of_a_full_disk(open_file, limit):
    file = open_file()
    with files_end_at(limit):
        add(file, LINES)
    written = file.path.read_bytes()
    assert WHOLE.startswith(written)
    assert not written or written.endswith(b"\n")


@pytest.mark.parametrize("seed", range(20))
def test_every_line_is_there_once_whatever_room_there_is_and_whoever_is_killed(open_file, seed):
    draw = random.Random(seed)
    file, left = open_file(), list(LINES)
    while left:
        with files_end_at(draw.choice([draw.randrange(6000), 1 << 20])):
            for _ in range(draw.randrange(40)):
                if left:
                    file.append(left.pop(0))
            if draw.random() < 0.5:
                file.catch_up(limit_bytes=draw.choice([1, 300, None]))
            if draw.random() < 0.3 and file._backlog.is_shared:  # the limit is the memory's, too
                file = open_file()
    file.catch_up(limit_bytes=None)
    assert file.path.read_bytes() == WHOLE


def test_the_next_hub_finds_what_waits(open_file):
    file = open_file()
    with files_end_at(4000):
        add(file, LINES)
        assert open_file().content() == WHOLE
    following = open_file()
    assert (following.path.read_bytes(), following.was_behind) == (WHOLE, True)


def test_a_hub_that_is_killed_while_it_catches_up_leaves_nothing_twice(open_file):
    file = open_file()
    with files_end_at(4000):
        add(file, LINES)
    with files_end_at(4300):
        file.catch_up()
        assert 4000 < size(file) < len(WHOLE)
    assert open_file().path.read_bytes() == WHOLE


def test_without_memory_lines_wait_in_the_process(tmp_path):
    file = LineFile(tmp_path / "history.jsonl", Backlog([], "kept"))
    with files_end_at(1000):
        add(file, LINES)
    file.catch_up()
    assert file.path.read_bytes() == WHOLE


def test_memory_that_is_full_keeps_what_it_can(open_file):
    file = open_file()
    with files_end_at(1000):  # the backlog's file, too
        add(file, LINES)
        assert file.content() == WHOLE
    file.catch_up()
    assert file.path.read_bytes() == WHOLE


def test_nothing_is_left_in_memory_when_all_is_written(open_file, memory):
    file = open_file()
    with files_end_at(1000):
        add(file, LINES)
        assert [path.name for path in memory.iterdir()] == ["kept"]
    file.catch_up()
    assert list(memory.iterdir()) == []


def test_a_file_that_cannot_be_opened_is_written_when_it_can(open_file, tmp_path):
    in_the_way = tmp_path / "run" / "history.jsonl"
    in_the_way.mkdir(parents=True)
    file = open_file()
    add(file, LINES)
    assert (file.is_whole, file.fault.strerror) == (False, "Is a directory")
    in_the_way.rmdir()
    file.catch_up()
    assert file.path.read_bytes() == WHOLE


def test_a_disk_that_is_always_full_ends_nothing(tmp_path):
    (tmp_path / "history.jsonl").symlink_to("/dev/full")
    file = LineFile(tmp_path / "history.jsonl", Backlog([], "kept"))
    add(file, LINES)
    file.catch_up()
    assert (file.content(), file.fault.strerror) == (WHOLE, "No space left on device")
    assert os.stat("/dev/full").st_mode & 0o777 == 0o666


def test_lines_longer_than_a_piece_are_written_whole(open_file):
    file = open_file()
    lines = [b"y" * (3 << 20) + b"\n", b"short\n", b"z" * (2 << 20) + b"\n"]
    with files_end_at(10):
        add(file, lines)
    while not file.is_whole:
        file.catch_up(limit_bytes=1)
    assert file.path.read_bytes() == b"".join(lines)


def test_a_file_that_was_removed_is_written_anew(open_file, tmp_path):
    file = open_file()
    add(file, LINES[:100])
    shutil.rmtree(tmp_path / "run")
    assert not file.is_in_place()
    add(file, LINES[100:150])
    file.put_back()
    add(file, LINES[150:])
    assert (file.path.read_bytes(), file.is_in_place()) == (WHOLE, True)


def test_what_is_in_the_place_of_a_file_that_was_replaced_is_kept_beside_it(open_file):
    file = open_file()
    add(file, LINES[:100])
    file.path.unlink()
    file.path.write_bytes(b"another's\n")
    assert not file.is_in_place()
    file.put_back()
    add(file, LINES[100:])
    assert file.path.read_bytes() == WHOLE
    assert file.path.with_name("history.jsonl.other").read_bytes() == b"another's\n"


def test_a_file_that_cannot_be_written_anew_goes_on_without_a_name(open_file, tmp_path):
    file = open_file()
    add(file, LINES[:100])
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("no folder any more")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        file.put_back()
    add(file, LINES[100:])
    (tmp_path / "run").unlink()
    file.put_back()
    assert file.path.read_bytes() == WHOLE


def test_lines_that_are_all_forgotten_do_not_come_back(open_file):
    file = open_file()
    with files_end_at(1000):
        add(file, LINES)
        file.replace()
        add(file, LINES[:150])
    file.catch_up()
    assert file.path.read_bytes() == b"".join(LINES[:150])


def test_nobody_else_may_read_what_is_written_whatever_the_umask_says(open_file, memory):
    before = os.umask(0)
    try:
        file = open_file()
        with files_end_at(4000):
            add(file, LINES)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (file.path.parent, file.path, memory / "kept")]
    assert modes == [0o700, 0o600, 0o600]
