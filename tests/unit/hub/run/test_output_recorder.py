import itertools
import string
import sys

from dnb.hub.history.backlog import Backlog
from dnb.hub.history.line_file import LineFile
from dnb.hub.history.output_log import OutputLog
from dnb.hub.run.output_recorder import MOST_KINDS, MOST_NEWS, MOST_REPEATED, OutputRecorder
from dnb.protocol.measurements import RunEvent
from dnb.user_code.captured_output import LINES_OF_A_KIND, CapturedOutput


class Recording:
    """A recorder, its events and its log."""

    def __init__(self, path, events=(), own=None):
        self.notes = []
        self._path = path / "output.log"
        log = OutputLog(LineFile(self._path, Backlog((), "kept-output")))
        self.recorder = OutputRecorder(log, add_event=self.notes.append, step=lambda: 4, events=events, own=own)

    @property
    def events(self):
        return [(note.kind, note.detail, note.engine) for note in self.notes]

    @property
    def log(self):
        return [line.split(" ", 2)[2] for line in self._path.read_text().splitlines()]


def words(number):
    letters = itertools.product(string.ascii_lowercase, repeat=3)
    return ["".join(each) for each in itertools.islice(letters, number)]


def test_the_first_of_a_kind_is_an_event_of_its_own_in_the_order_of_lines(tmp_path):
    recording = Recording(tmp_path)
    recording.recorder.add(2, ["loss 1", "loss 2", "careful", "loss 3"])
    recording.recorder.add(0, ["loss 4"])
    assert recording.events == [
        ("output", "loss 1", 2),
        ("repeated", "loss 2", 2),
        ("output", "careful", 2),
        ("repeated", "loss 3", 2),
        ("repeated", "loss 4", 0),
    ]


def test_counts_are_one_event_and_a_line_of_each_engine_in_the_log(tmp_path):
    recording = Recording(tmp_path)
    recording.recorder.add(2, ["loss 1"])
    recording.recorder.count(2, {"loss0": 1000, "": 3})
    recording.recorder.count(0, {"loss0": 234})
    recording.recorder.tell_counts()
    assert recording.events[1:] == [("counted", "1,234 more like loss 1\n3 more lines of other kinds", None)]
    assert recording.log == [
        "engine 2 step 4: loss 1",
        "engine 2 step 4: (1,000 more like loss 1)",
        "engine 2 step 4: (3 more lines of other kinds)",
        "engine 0 step 4: (234 more like loss 1)",
    ]


def test_a_count_is_told_once(tmp_path):
    recording = Recording(tmp_path)
    recording.recorder.count(2, {"loss0": 1000})
    recording.recorder.tell_counts()
    recording.recorder.tell_counts()
    assert len(recording.events) == 1


def test_kinds_beyond_a_number_are_in_the_log_and_counted(tmp_path):
    recording = Recording(tmp_path)
    recording.recorder.add(0, words(MOST_KINDS + 5))
    recording.recorder.tell_counts()
    assert [kind for kind, _, _ in recording.events] == ["output"] * MOST_KINDS + ["counted"]
    assert recording.events[-1][1] == "5 more lines of other kinds"
    assert len(recording.log) == MOST_KINDS + 5


def test_beyond_a_number_of_lines_first_ones_are_still_events(tmp_path):
    recording = Recording(tmp_path)
    recording.recorder.add(0, ["loss 1"] * (MOST_REPEATED + 8))
    recording.recorder.add(1, ["careful"])
    recording.recorder.tell_counts()
    assert recording.events[1][1].count("loss") == MOST_REPEATED
    assert recording.events[2:] == [("output", "careful", 1), ("counted", "7 more like loss 1", None)]


def test_the_next_hub_knows_the_kinds_of_the_one_before(tmp_path):
    before = [RunEvent(kind="output", text="loss 1", step=1, time=0.0, engine=0)]
    recording = Recording(tmp_path, before)
    recording.recorder.add(0, ["loss 2"])
    assert recording.events == [("repeated", "loss 2", 0)]


def test_what_engines_tell_of_their_files_ends_at_a_number_of_lines(tmp_path):
    recording = Recording(tmp_path)
    for _ in range(3):
        recording.recorder.add_news(0, ["line"] * MOST_NEWS, kind="data")
    assert [kind for kind, _, _ in recording.events] == ["data"]


def test_what_is_printed_in_the_hub_has_no_engine(tmp_path, capsys):
    own = CapturedOutput(of_all_threads=True)
    recording = Recording(tmp_path, own=own)
    sys.stdout.write("norm 1\n" * (LINES_OF_A_KIND + 7))
    recording.recorder.tell_counts()
    recording.recorder.close()
    sys.stdout.write("after")
    assert [kind for kind, _, _ in recording.events] == ["output", "repeated", "counted"]
    assert recording.events[0] == ("output", "norm 1", None)
    assert recording.log[0] == "hub step 4: norm 1"
    assert recording.log[-1] == "hub step 4: (7 more like norm 1)"
    assert capsys.readouterr().out == "after"
