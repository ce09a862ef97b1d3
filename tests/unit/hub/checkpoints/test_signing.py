"""Signatures of checkpoints: whose they are, and that their secret is private."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dnb.hub.checkpoints.signing import (
    SecretError,
    Signer,
    is_signed,
    keep_secret,
    read_secret,
    secret_path,
    sign_manifest,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "dnb" / "checkpoint_secret"


def test_the_secret_lies_with_jupyter_s_own_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    assert secret_path() == tmp_path / "dnb" / "checkpoint_secret"


def test_a_secret_is_made_once_and_stays(path: Path):
    secret = keep_secret(path)
    assert len(secret) == 32
    assert keep_secret(path) == read_secret(path) == secret


@pytest.mark.parametrize("umask", [0, 0o077, 0o777], ids=oct)
def test_only_this_user_may_read_the_secret_whatever_the_umask(path: Path, umask: int):
    path.parent.parent.mkdir()
    before = os.umask(umask)
    try:
        keep_secret(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_but_the_secret_is_left_in_its_folder(path: Path):
    keep_secret(path)
    assert [found.name for found in path.parent.iterdir()] == ["checkpoint_secret"]


def test_processes_that_make_it_at_once_have_the_same_one(path: Path):
    with ThreadPoolExecutor(8) as threads:
        secrets = set(threads.map(lambda _: keep_secret(path), range(64)))
    assert len(secrets) == 1


def test_without_links_the_file_is_renamed(path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert keep_secret(path) == read_secret(path)


def test_a_signature_is_of_one_text_and_one_secret():
    signature = sign_manifest(b"a" * 32, b"text")
    assert is_signed(b"a" * 32, b"text", signature)
    assert not is_signed(b"a" * 32, b"texT", signature)
    assert not is_signed(b"b" * 32, b"text", signature)
    assert not is_signed(b"a" * 32, b"text", b"")


def test_reading_makes_nothing(path: Path):
    with pytest.raises(SecretError, match="cannot be read"):
        read_secret(path)
    assert not path.parent.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602], ids=oct)
def test_a_secret_that_others_may_read_or_change_is_none(path: Path, mode: int):
    keep_secret(path)
    path.chmod(mode)
    with pytest.raises(SecretError, match=r"others may read or change .*checkpoint_secret \(mode 6..\): remove it"):
        keep_secret(path)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777], ids=oct)
def test_a_folder_in_which_others_may_replace_the_secret_is_none(path: Path, mode: int):
    keep_secret(path)
    path.parent.chmod(mode)
    with pytest.raises(SecretError, match="others may read or change"):
        read_secret(path)


@pytest.mark.parametrize("what", ["link to a file", "folder", "pipe"])
def test_a_secret_that_is_no_file_is_none(path: Path, tmp_path: Path, what: str):
    path.parent.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o700)
    if what == "link to a file":
        other = tmp_path / "theirs"
        other.write_bytes(b"x" * 32)
        other.chmod(0o600)
        path.symlink_to(other)
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path, 0o600)
    with pytest.raises(SecretError):
        keep_secret(path)


def test_a_folder_that_is_a_link_is_not_followed(path: Path, tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    path.parent.parent.mkdir()
    path.parent.symlink_to(theirs)
    with pytest.raises(SecretError, match="is a link or of another kind"):
        keep_secret(path)
    assert list(theirs.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_secret_of_another_user_is_none(path: Path, what: str):
    keep_secret(path)
    os.chown(path if what == "file" else path.parent, 65534, 65534)
    with pytest.raises(SecretError, match="belongs to another user"):
        keep_secret(path)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33], ids=len)
def test_a_file_of_another_size_is_no_secret(path: Path, content: bytes):
    keep_secret(path)
    path.write_bytes(content)
    with pytest.raises(SecretError, match="does not hold a secret of 32 bytes: remove it"):
        keep_secret(path)


def test_where_no_secret_can_be_kept_nothing_is_signed_and_the_reason_is_there(tmp_path: Path):
    (tmp_path / "data").write_text("no folder")
    signer = Signer(tmp_path / "data" / "dnb" / "checkpoint_secret")
    assert signer.sign(b"text") == b""
    assert "checkpoint_secret cannot be written (" in signer.fault


def test_a_signer_signs_as_soon_as_a_secret_can_be_kept(path: Path):
    path.parent.parent.write_text("no folder")
    signer = Signer(path)
    signer.sign(b"text")
    path.parent.parent.unlink()
    assert is_signed(keep_secret(path), b"text", signer.sign(b"text"))
    assert signer.fault == ""
