"""Records of pools: of this version, of others, and what is none."""

import logging

import msgspec
import pytest

from dnb.hub.pool_files import StrangeRecord, read_pool_files, write_pool_file
from dnb.protocol.pool import PoolFacts, Process
from dnb.protocol.versions import POOL_FORMAT, VERSION

GUARDIAN = Process(host="here", pid=7, create_time=5.0, boot_id="b", pid_namespace="1")


def facts(**changes):
    fields = {
        "supervisor": GUARDIAN,
        "hub": GUARDIAN,
        "controller": GUARDIAN,
        "helpers": (),
        "engines": (),
        "owner": None,
    }
    return PoolFacts(**{"cluster_id": "one", "format": POOL_FORMAT, "version": VERSION, **fields, **changes})


def keep(folder, text, *, name="one"):
    (folder / f"dnb-pool-{name}.json").write_bytes(text)


def changed(**changes):
    return msgspec.json.encode({**msgspec.to_builtins(facts()), **changes})


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_pool_file(tmp_path, facts())
    assert read_pool_files(tmp_path) == [facts()]


def test_a_record_of_an_early_dnb_which_says_no_version_is_read(tmp_path):
    early = msgspec.to_builtins(facts())
    del early["format"], early["version"], early["guardian"]["boot_id"], early["guardian"]["pid_namespace"]
    keep(tmp_path, msgspec.json.encode(early))
    (read,) = read_pool_files(tmp_path)
    assert (read.version, read.format, read.supervisor.pid) == ("", 1, 7)


@pytest.mark.parametrize(
    ("changes", "writer", "reason"),
    [
        ({"new_field": 1}, f"dnb {VERSION} (format 1)", "the field 'new_field' is not known"),
        ({"new_field": 1, "version": "0.9"}, "dnb 0.9 (format 1)", "the field 'new_field' is not known"),
        ({"format": 2, "version": "2.0"}, "dnb 2.0 (format 2)", "it is of another format"),
        ({"helpers": "none"}, f"dnb {VERSION} (format 1)", "Expected `array`, got `str` - at `$.helpers`"),
    ],
    ids=["a field more", "a field more and a version", "a format", "another type"],
)
def test_a_record_of_another_version_is_seen_with_what_is_not_known_of_it(tmp_path, changes, writer, reason):
    keep(tmp_path, changed(**changes))
    assert read_pool_files(tmp_path) == [
        StrangeRecord(cluster_id="one", writer=writer, supervisor=GUARDIAN, reason=reason)
    ]


def test_a_guardian_with_a_field_more_is_still_found(tmp_path):
    keep(tmp_path, changed(guardian={**msgspec.to_builtins(GUARDIAN), "zone": 3}))
    (read,) = read_pool_files(tmp_path)
    assert (read.supervisor, read.reason) == (GUARDIAN, "the field 'zone' is not known")


def test_a_guardian_that_is_described_otherwise_is_not_guessed(tmp_path):
    keep(tmp_path, changed(guardian="here:7", format=3))
    assert [each.supervisor for each in read_pool_files(tmp_path)] == [None]


GARBAGE = {
    "empty": b"",
    "torn": changed()[:40],
    "binary": bytes(range(256)),
    "no_text": changed().replace(b"here", b"h\xff\xfee"),
    "no_record": b'["one"]',
    "nameless": b"{}",
    "of_another_name": changed(cluster_id="../one"),
    "deep": b"[" * 100_000,
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_record_is_skipped_with_one_line_and_the_others_are_read(tmp_path, caplog, name):
    keep(tmp_path, GARBAGE[name], name="a-bad")
    write_pool_file(tmp_path, facts())
    with caplog.at_level(logging.WARNING):
        assert read_pool_files(tmp_path) == [facts()]
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [
        f"{tmp_path}/dnb-pool-a-bad.json is not a pool's record"
    ]


def test_a_folder_in_the_place_of_a_record_is_skipped(tmp_path):
    (tmp_path / "dnb-pool-folder.json").mkdir()
    assert read_pool_files(tmp_path) == []
