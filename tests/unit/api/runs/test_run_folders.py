"""Names of runs and their folders: each is one kernel's, and what can bear no name or folder is said in a sentence."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dnb.api.runs.run_folders import (
    MOST_LETTERS,
    RUNS_FOLDER,
    check_name,
    check_place,
    clean_name,
    find_folder,
    is_folder,
    reserved_folder,
)
from dnb.errors import ArgumentError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ("digits", "digits"),
        ("my run #2", "my-run-2"),
        ("", "run"),
        ("...", "run"),
        ("../../../evil", "evil"),
        ("/etc/passwd", "etc-passwd"),
        ("-rf", "rf"),
        ("é<b>&\x00\n", "b"),
        ("\u202edlrow", "dlrow"),
        ("a" * 400, "a" * MOST_LETTERS),
    ],
)
def test_a_folders_name_is_of_plain_letters_whatever_is_wished(wish, name):
    assert clean_name(wish) == name


def test_a_name_that_is_too_long_for_files_is_refused_with_the_figures():
    with pytest.raises(ArgumentError) as caught:
        check_name("x" * 300)
    told = f"a run's name has at most {MOST_LETTERS} letters, as files bear it, and this one has 300: name="
    assert str(caught.value) == f"{told}'{'x' * 20}...'"


@pytest.mark.parametrize("name", [3, b"digits", ["a"], Path("a")], ids=repr)
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(ArgumentError, match=r"name must be a text, not .*: name='digits'"):
        check_name(name)


def test_no_name_is_left_to_others():
    assert (check_name(None), check_name("")) == (None, "")


# folders --------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_gets_a_number_behind_it():
    made = []
    for _ in range(3):
        with reserved_folder("digits") as folder:
            made.append(folder.name)
    assert made == ["digits", "digits-2", "digits-3"]
    (RUNS_FOLDER / "digits-4").write_text("a file, not a folder")
    with reserved_folder("digits") as folder:
        assert folder == (RUNS_FOLDER / "digits-5").absolute()


def test_what_was_made_for_a_run_that_is_refused_is_gone_again(here):
    with pytest.raises(ZeroDivisionError), reserved_folder("digits"):
        raise ZeroDivisionError
    assert list(here.iterdir()) == []


def test_what_others_have_made_stays_when_a_run_is_refused():
    with reserved_folder("other"):
        pass
    with pytest.raises(ZeroDivisionError), reserved_folder("digits"):
        raise ZeroDivisionError
    assert [path.name for path in RUNS_FOLDER.iterdir()] == ["other"]


def test_a_folder_in_which_something_was_written_stays_when_nobody_knows_whether_the_run_began():
    def begin_and_fail():
        with reserved_folder("digits") as folder:
            (folder / "history.jsonl").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        begin_and_fail()
    assert (RUNS_FOLDER / "digits" / "history.jsonl").exists()


def test_threads_that_want_one_name_get_one_each():
    taken, barrier = [], threading.Barrier(8)

    def reserve():
        barrier.wait()
        for _ in range(20):
            with reserved_folder("digits") as folder:
                taken.append(folder.name)

    threads = [threading.Thread(target=reserve, name=f"reserve-{number}") for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) == len(set(taken)) == 160


RACER = """
import sys
from dnb.api.runs.run_folders import reserved_folder
sys.stdin.readline()
for number in range(50):
    try:
        with reserved_folder("digits") as folder:
            if number % 3 == 2:
                raise KeyError
            print(folder.name)
    except KeyError:
        pass
"""


def test_processes_that_want_one_name_get_one_each_also_while_others_give_theirs_back():
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    taken = [name for racer in racers for name in racer.communicate(timeout=60)[0].split()]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert len(taken) == len(set(taken)) == 4 * 34
    assert sorted(taken) == sorted(path.name for path in RUNS_FOLDER.iterdir())


# places ---------------------------------------------------------------------------------------------------


def test_a_place_where_nothing_stands_in_the_way_is_not_touched(here):
    check_place()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", [".dnb", ".dnb/runs"])
def test_a_file_in_the_place_of_the_folder_is_named(here, name):
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text("")
    for attempt in (check_place, lambda: reserved_folder("digits").__enter__()):
        with pytest.raises(ArgumentError) as caught:
            attempt()
        assert str(caught.value) == (
            f"a run is kept in .dnb/runs of the working folder, {here}, and none can be made there (a file is in its "
            "place): os.chdir to a folder that you can write, and call it again"
        )


@pytest.fixture
def read_only(here):
    folder = here / "read-only"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_working_folder_that_cannot_be_written_is_named(read_only, monkeypatch):
    monkeypatch.chdir(read_only)
    for attempt in (check_place, lambda: reserved_folder("digits").__enter__()):
        with pytest.raises(ArgumentError, match=r"read-only, and none can be made there \(Read-only file system\)"):
            attempt()


def test_a_working_folder_that_was_removed_is_told(here, monkeypatch):
    gone = here / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ArgumentError, match=r"the working folder, which was removed, and none can be made there"):
        check_place()
    os.chdir(here)


# finding --------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_path_and_by_its_name(here):
    (RUNS_FOLDER / "digits").mkdir(parents=True)
    assert find_folder("digits") == RUNS_FOLDER / "digits"
    assert find_folder(here / ".dnb/runs/digits") == here / ".dnb/runs/digits"


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"], ids=["long", "zero"])
def test_a_name_that_no_file_can_have_is_no_folder(name):
    assert not is_folder(Path(name))
    assert find_folder(name) == RUNS_FOLDER / name


@pytest.mark.parametrize("name", ["модель", "modèle-2", "模型"])
def test_a_name_whose_letters_would_be_lost_is_refused(name: str):
    with pytest.raises(ArgumentError, match=r"has letters that its folder and shared memory cannot bear.*use a to z"):
        check_name(name)
