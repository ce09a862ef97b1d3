from __future__ import annotations

import os
from pathlib import Path

import pytest

from dnb.hub.handover import StatsHandover, read_handover, write_handover
from dnb.transport.system.own_files import open_file, read_file, remove_folder, replace_file


def test_a_file_is_replaced_whole_and_for_its_user_only(tmp_path: Path):
    replace_file(tmp_path / "record", b"one")
    replace_file(tmp_path / "record", b"two")
    assert read_file(tmp_path / "record") == b"two"
    assert (tmp_path / "record").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "record").symlink_to(precious)
    replace_file(tmp_path / "record", b"new")
    assert precious.read_text() == "precious"
    assert not (tmp_path / "record").is_symlink()


def test_what_a_killed_process_left_aside_is_removed_by_the_next(tmp_path: Path):
    (tmp_path / "record.0123456789abcdef.new").touch()
    replace_file(tmp_path / "record", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_nothing_is_left_aside_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no room"):
        replace_file(tmp_path / "record", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_told_with_its_whole_path(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "record")):
        read_file(tmp_path / "record")


def test_a_file_that_cannot_be_trusted_leaves_no_descriptor_open(tmp_path: Path):
    (tmp_path / "record").touch()
    (tmp_path / "record").chmod(0o666)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(PermissionError):
            open_file(tmp_path / "record")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_of_the_users_choice_may_be_another_users(tmp_path: Path):
    folder = tmp_path / "volume"
    folder.mkdir()
    folder.chmod(0o777)
    replace_file(folder / "record", b"new", in_any_folder=True)
    assert read_file(folder / "record", in_any_folder=True) == b"new"


def test_a_folder_is_removed_with_all_that_is_in_it(tmp_path: Path):
    replace_file(tmp_path / "pool" / "record", b"new", make_folder=True)
    remove_folder(tmp_path / "pool")
    assert list(tmp_path.iterdir()) == []


def test_a_memo_is_not_written_through_a_link_that_was_laid_for_it(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("memo", "memo.new"):
        (tmp_path / name).symlink_to(precious)
    write_handover([tmp_path], "memo", StatsHandover(departed=()))
    assert precious.read_text() == "precious"
    assert read_handover([tmp_path], "memo", StatsHandover) == StatsHandover(departed=())


def test_a_memo_that_another_user_has_written_is_of_no_use(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    write_handover([tmp_path], "memo", StatsHandover(departed=()))
    os.chown(tmp_path / "memo", 65534, 65534)
    assert read_handover([tmp_path], "memo", StatsHandover) is None
