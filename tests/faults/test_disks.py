"""Disks that are full or read-only, folders that are removed: no run ends, and what was missing is there afterwards."""

import contextlib
import os
import shutil
import signal
import time

import pytest

from dnb.api.runs.run import Run
from dnb.errors import ArgumentError, PoolError
from dnb.hub.checkpoints.reader import newest_step
from dnb.hub.history.run_files import read_events, read_history, read_summary, read_usage
from dnb.hub.pool_files import read_pool_files
from tests.disks import Filler, read_only, small_disk
from tests.engines.pools import open_small_pool, until, wait, wait_until
from tests.models import digits, mlp

pytestmark = [pytest.mark.engines, pytest.mark.faults]


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "4m") as folder:
        yield folder


def fit(pool, **options):
    return pool.fit(mlp(), digits(), **{"loss": "cross_entropy", "lr": 1e-3, "epochs": 100_000, **options})


def wait_for_steps(run, number):
    step = run.step + number
    wait_until(run, lambda run: run.step >= step, what=f"{number} more steps")


def kill_hub(pool):
    before = pool.facts.hub
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: pool.facts.hub.pid != before.pid, what="another hub answers")


def disk_events(run):
    return [event.text for event in run.events if event.kind == "disk"]


def check_files(run):
    """All that the kernel has seen is on disk, once and in order."""
    run = wait(run)
    until(lambda: len(read_usage(run.folder)) >= len(run.utilisation), what="all usage is there")
    rows = [row for row in read_history(run.folder) if row.kind == "step"]
    assert [row.step for row in rows] == list(range(1, run.step + 1))
    assert [row.values["loss"] for row in rows] == run.history["loss"]
    written = read_events(run.folder)
    assert written[: len(run.events)] == run.events
    assert len({(event.time, event.text) for event in written}) == len(written)
    assert read_summary(run.folder).status == run.status
    reader = Run.open(run.folder)
    assert (reader.status, reader.history["loss"]) == (run.status, run.history["loss"])


# the run's folder


def test_what_a_full_disk_did_not_take_is_there_when_there_is_room(shared, disk, tmp_path, monkeypatch):
    monkeypatch.chdir(disk)
    run = fit(shared.of(2))
    monkeypatch.chdir(tmp_path)
    wait_for_steps(run, 20)
    filler = Filler(disk)
    filler.fill()
    wait_until(run, lambda run: disk_events(run), what="it is told")
    run.pause()
    wait_until(run, lambda run: run.status == "paused", what="it is paused")
    run.resume()
    wait_for_steps(run, 50)
    assert len(read_history(run.folder)) < run.step
    filler.free()
    wait_until(run, lambda run: len(disk_events(run)) > 1, what="it is whole again")
    run.stop()
    check_files(run)
    assert disk_events(run) == [
        f"{run.folder} cannot be written (No space left on device): training goes on, and what is missing there is "
        "written as soon as it can be",
        f"{run.folder} is whole again: all that waited for the disk is there",
    ]


@pytest.mark.parametrize("state", ["running", "paused"])
def test_a_hub_that_is_killed_while_the_disk_is_full_leaves_the_next_one_all_of_it(
    shared, disk, tmp_path, monkeypatch, state
):
    monkeypatch.chdir(disk)
    pool = shared.of(2)
    run = fit(pool)
    monkeypatch.chdir(tmp_path)
    wait_for_steps(run, 20)
    filler = Filler(disk)
    filler.fill()
    wait_until(run, lambda run: disk_events(run), what="it is told")
    if state == "paused":
        run.pause()
        wait_until(run, lambda run: run.status == "paused", what="it is paused")
    for _ in range(2):
        kill_hub(pool)
        if state == "running":
            wait_for_steps(run, 20)
    assert run.status == state
    filler.free()
    wait_until(run, lambda run: "whole again" in disk_events(run)[-1], what="it is whole again")
    run.stop()
    check_files(run)


def test_a_read_only_folder_is_written_when_it_can_be(pool):
    run = fit(pool)
    wait_for_steps(run, 20)
    with read_only(run.folder):
        kill_hub(pool)  # who opens its files anew
        wait_for_steps(run, 20)
        wait_until(run, lambda run: disk_events(run), what="it is told")
    wait_until(run, lambda run: len(disk_events(run)) > 1, what="it is whole again")
    run.stop()
    check_files(run)
    assert "(Read-only file system)" in disk_events(run)[0]


def test_a_folder_that_is_removed_is_written_anew(pool):
    run = fit(pool, checkpoint_every=200)
    wait_for_steps(run, 20)
    shutil.rmtree(run.folder)
    wait_until(run, lambda run: disk_events(run), what="it is told")
    step = run.step
    wait_until(run, lambda run: (newest_step(run.folder) or 0) > step, what="a later checkpoint is there")
    run.stop()
    check_files(run)
    assert "had been removed or replaced: written anew" in disk_events(run)[0]


def test_a_run_is_refused_before_it_begins_where_nothing_can_be_written(pool, disk, tmp_path, monkeypatch):
    folder = disk / ".dnb" / "runs"
    folder.mkdir(parents=True)
    monkeypatch.chdir(disk)
    with read_only(disk), pytest.raises(ArgumentError, match=r"\(Read-only file system\): os\.chdir to a folder"):
        fit(pool)
    filler = Filler(disk)
    filler.fill()
    with pytest.raises(ArgumentError, match=r"No space left on device, 0\.0 MB free.*%cd.*nothing was started"):
        fit(pool)
    assert list(folder.iterdir()) == []
    assert pool.facts.run_status in (None, "finished", "stopped", "failed")
    filler.free()
    run = wait(fit(pool, epochs=1))
    monkeypatch.chdir(tmp_path)
    assert run.status == "finished"


def test_run_folders_and_logs_are_their_users_alone_whatever_the_umask_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(0)
    try:
        with open_small_pool(1, profile_dir=tmp_path / "ipython" / "profile_default") as pool:
            pool.add(1)
            run = wait(fit(pool, epochs=1, checkpoint_every=10))
            run.checkpoint()
            logs = sorted((tmp_path / "ipython" / "profile_default" / "log").iterdir())
            private = [tmp_path / ".dnb", *(tmp_path / ".dnb").rglob("*"), *logs]
            private += (tmp_path / "ipython" / "profile_default" / "security").iterdir()
            modes = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o77) for path in private}
    finally:
        os.umask(before)
    assert {path: mode for path, mode in modes.items() if mode != "0o0"} == {}
    assert [log.name.split("-")[0] for log in logs] == ["ipcontroller", "ipengine", "ipengine"]
    assert len(modes) > 20


# the profile


def test_a_full_profile_ends_nothing_and_is_brought_up_to_date(tmp_path, disk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_small_pool(2, profile_dir=disk / "profile_default") as pool:
        run = fit(pool)
        wait_for_steps(run, 10)
        filler = Filler(disk)
        filler.fill()
        pool.chaos.kill(1)
        until(lambda: [engine.id for engine in pool.engines] == [0], what="its death is seen")
        until(lambda: pool.client.ids == [0], what="ipyparallel has seen it, too")
        added = pool.add(1)
        wait_for_steps(run, 20)
        filler.free()
        staying = [0, *added]
        until(lambda: known_engines(disk / "profile_default") == staying, what="the record is up to date")
        run.stop()
        wait(run)
        assert run.status == "stopped"


def known_engines(profile_dir):
    (facts,) = read_pool_files(profile_dir / "security")
    return sorted(engine.engine for engine in facts.engines)


def test_an_engine_whose_log_cannot_be_written_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile_dir = tmp_path / "ipython" / "profile_default"
    with open_small_pool(1, profile_dir=profile_dir) as pool:
        run = fit(pool)
        with read_only(profile_dir):
            with pytest.raises(PoolError, match=r"1 of 1 engines did not come up.*Read-only file system.*ipengine"):
                pool.add(1)
            wait_for_steps(run, 10)
        assert pool.add(1) == [1]
        run.stop()
        wait(run)


# the heart monitor


def monitor_of(pool):
    import psutil

    for child in psutil.Process(pool.facts.controller.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "dnb.hub.process.controller" in child.cmdline():
                return child
    return None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_engines_come_and_go_after_the_end_of_the_heart_monitor(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    with open_small_pool(2) as pool:
        run = fit(pool)
        before = monitor_of(pool)
        began = time.monotonic()
        before.send_signal(number)
        until(lambda: (monitor_of(pool) or before).pid != before.pid, what="there is another one")
        assert time.monotonic() - began < 30
        assert pool.add(1) == [2]
        pool.chaos.kill(0)
        until(lambda: pool.client.ids == [1, 2], what="ipyparallel knows who is there")
        wait_for_steps(run, 5)
        run.stop()
        wait(run)
