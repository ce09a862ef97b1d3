"""The doctor's report: what it finds, what it keeps to itself."""

import os
import resource
from pathlib import Path

import pytest

from dnb.pool import doctor
from dnb.pool.doctor import HostFact, describe_findings, examine_host


def facts_of(findings: list[HostFact], subject: str) -> str:
    return next(each.facts for each in findings if each.subject == subject)


def problem_of(findings: list[HostFact], subject: str) -> str:
    return next(each.problem for each in findings if each.subject == subject)


@pytest.fixture
def segments(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "segments"
    folder.mkdir()
    monkeypatch.setenv("DNB_SEGMENT_FOLDERS", str(folder))
    return folder


def test_the_report_has_every_subject_of_a_bug_report():
    assert [each.subject for each in examine_host()] == [
        "system", "python", "packages", "beside them", "devices", "memory", "shared memory", "disk", "open files",
        "ports", "encryption", "pools", "left behind", "variables",
    ]  # fmt: skip


def test_versions_are_those_that_are_installed():
    import torch

    assert f"torch {torch.__version__}" in facts_of(examine_host(), "packages")


def test_the_home_folder_is_shortened_and_a_longer_name_is_not():
    home = Path.home()
    found = [HostFact(subject="disk", facts=f"1 GB free in {home}/work", problem=f"{home}2 is full")]
    assert describe_findings(found).splitlines() == [
        "disk          1 GB free in ~/work",
        "",
        f"problem: {home}2 is full",
    ]


def test_only_variables_that_dnb_knows_are_printed(monkeypatch):
    monkeypatch.setenv("DNB_DISPLAY", "text")
    monkeypatch.setenv("DNB_TOKEN", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    report = describe_findings(examine_host())
    assert "DNB_DISPLAY=text" in report
    assert "hunter2" not in report


def test_a_report_without_problems_says_so():
    assert describe_findings([HostFact(subject="ports", facts="127.0.0.1")]).endswith(
        "\nnothing here keeps a pool from running"
    )


def test_a_package_that_is_too_old_is_named_with_the_line_that_mends_it(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "numpy>=1", "pytest; extra == 'dev'"])
    problem = problem_of(examine_host(), "packages")
    assert problem.startswith("torch ")
    assert problem.endswith("does not fit: pip install 'torch>=99'")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["no-such-package>=1"])
    assert problem_of(examine_host(), "packages") == "no-such-package is missing: pip install 'no-such-package>=1'"


def test_folders_that_no_pool_owns_are_told_as_left_behind_with_their_size(segments):
    (segments / "dnb-0123").mkdir()
    (segments / "dnb-0123" / "slab").write_bytes(bytes(2_000_000))
    found = examine_host()
    assert facts_of(found, "left behind") == "1 folders of shared memory"
    assert "(2 MB)" in problem_of(found, "left behind")
    assert f"rm -r {segments / 'dnb-0123'}" in problem_of(found, "left behind")


def test_without_leftovers_there_is_no_problem_with_them(segments):
    assert problem_of(examine_host(), "left behind") == ""


def test_little_shared_memory_is_a_problem_with_its_way_out(segments, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_SHARED_BYTES", 10**18)
    assert "--shm-size 1g" in problem_of(examine_host(), "shared memory")


def test_too_few_open_files_are_a_problem_with_its_way_out(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    problem = problem_of(examine_host(), "open files")
    assert problem.endswith("64 are allowed: ulimit -n 4096")


def test_the_limit_of_open_files_is_left_as_it_was():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    examine_host()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.chdir(tmp_path)
    assert "start in another folder" in problem_of(examine_host(), "disk")
