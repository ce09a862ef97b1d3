"""Facts of a coordinator's notes in words; teams by their names."""

from typing import get_args

import pytest

from dnb.hub.scheduling.events import Note, Reason
from dnb.hub.scheduling.note_words import _SENTENCES, text_of, traceback_of
from dnb.protocol.run import Failure

NAMES = {1 << 20: "the pipeline of engines 0, 1", (1 << 20) + 1: "the pipeline of engines 2, 3"}
TARGET = Failure(kind="IndexError", message="Target 12 is out of bounds.", traceback="line 7", place="shard 3")


def test_there_is_a_sentence_for_every_reason():
    assert set(_SENTENCES) == set(get_args(Reason))


def test_a_note_in_its_own_words_is_told_as_it_is():
    assert text_of(Note("memory", "{braces} stay", 3)) == "{braces} stay"


def test_a_team_is_called_by_its_name():
    note = Note("reassigned", engine=1 << 20, reason="lost", count=3)
    assert text_of(note, NAMES) == "3 shards of the pipeline of engines 0, 1 go to others"
    assert text_of(note) == "3 shards of engine 1048576 go to others"


def test_several_teams_that_failed_are_called_by_their_names():
    failures = tuple((team, TARGET) for team in NAMES)
    note = Note("paused", reason="step failed", step=2, failures=failures)
    assert (
        "paused at step 2: IndexError: Target 12 is out of bounds. "
        "(the pipeline of engines 0, 1: shard 3; the pipeline of engines 2, 3: shard 3); nothing of this step"
    ) in text_of(note, NAMES)


def test_tracebacks_of_several_causes_name_the_teams():
    other = Failure(kind="ValueError", message="no", traceback="line 9")
    failures = (((1 << 20), TARGET), ((1 << 20) + 1, other))
    note = Note("paused", reason="step failed", failures=failures)
    assert traceback_of(note, NAMES) == (
        "On the pipeline of engines 0, 1:\nline 7\nOn the pipeline of engines 2, 3:\nline 9"
    )


@pytest.mark.parametrize(
    ("failures", "text"),
    [
        (((0, TARGET), (2, TARGET)), "loading on engines 0, 2: IndexError: Target 12 is out of bounds."),
        (
            ((0, TARGET), (1, Failure(kind="OSError", message="gone", traceback=""))),
            "loading: IndexError: Target 12 is out of bounds. (engine 0: shard 3); OSError: gone (engine 1)",
        ),
    ],
)
def test_a_run_that_nobody_could_load_says_why(failures, text):
    assert text_of(Note("failed", reason="nobody could load", failures=failures)) == text


def test_the_last_loss_is_the_cause_of_a_run_that_failed():
    cause = Note("died", "has lost a connection", 1 << 20, "found")
    note = Note("failed", reason="nobody is left", step=4, cause=cause)
    assert text_of(note, NAMES) == "no engine is left at step 4: the pipeline of engines 0, 1 has lost a connection"
