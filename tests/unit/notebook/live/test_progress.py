from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, repeat
from types import SimpleNamespace

import pytest

from dnb import progress
from dnb.notebook.live.progress import Waiting, ever_longer, steady, watch
from dnb.progress import long_work, watching


class Work:
    """Work that takes as long as the test says: each `tick` is a pause that passes before it is over."""

    def __init__(self, *, what: str = "starting 4 engines", show: Callable[[str], None] | None = None) -> None:
        self.lines: list[str] = []
        self.now = 0.0
        self._pauses: list[float] = []
        self._tick = threading.Semaphore(0)
        self._asked = threading.Semaphore(0)
        self._is_over = False
        self.waiting = Waiting(
            what, show=show or self.lines.append, pauses=self._told(), clock=lambda: self.now, wait=self._wait
        )

    def _told(self) -> Iterator[float]:
        yield from steady()

    def _wait(self, pause: float) -> bool:
        self._pauses.append(pause)
        self._asked.release()
        assert self._tick.acquire(timeout=30)
        return self._is_over

    def pass_pause(self) -> None:
        """Let the pause under way pass, and return when what follows is shown."""
        assert self._asked.acquire(timeout=30)
        self.now += self._pauses[-1]
        self._tick.release()
        assert self._asked.acquire(timeout=30)
        self._asked.release()

    def finish(self) -> None:
        self._is_over = True
        self._tick.release()


def test_what_is_quick_shows_nothing():
    work = Work()
    with work.waiting:
        work.finish()
    assert work.lines == []


def test_nothing_is_shown_before_two_seconds():
    assert next(steady()) == 2.0


def test_after_two_seconds_it_is_shown_how_far_it_is():
    work = Work()
    with work.waiting as waiting:
        waiting.report("2 of 4 are there")
        work.pass_pause()
        assert work.lines == ["starting 4 engines: 2 of 4 are there, 2 s"]
        work.finish()


def test_then_twice_a_second_what_is_known_now():
    work = Work()
    there = [2]
    with work.waiting as waiting:
        waiting.report(lambda: f"{there[0]} of 4 are there")
        work.pass_pause()
        there[0] = 3
        work.pass_pause()
        assert work.lines[1] == "starting 4 engines: 3 of 4 are there, 2 s"
        assert work.now == 2.5
        work.finish()


def test_at_the_end_one_quiet_line_stays():
    work = Work()
    with work.waiting:
        work.pass_pause()
        work.now = 5.25
        work.finish()
    assert work.lines[-1] == "starting 4 engines took 5.2 s"


def test_of_work_that_fails_the_line_says_so():
    work = Work()

    def fail() -> None:
        with work.waiting:
            work.pass_pause()
            work.finish()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert work.lines[-1] == "starting 4 engines failed after 2.0 s"


def test_quick_work_that_fails_shows_nothing_of_itself():
    work = Work()
    work.finish()
    with pytest.raises(ZeroDivisionError), work.waiting:
        raise ZeroDivisionError
    assert work.lines == []


def test_a_figure_that_cannot_be_had_ends_the_showing_and_not_the_work(caplog):
    work = Work()
    with work.waiting as waiting:
        waiting.report(lambda: str(1 / 0))
        assert work._asked.acquire(timeout=30)
        work._tick.release()
        waiting._thread.join(30)
    assert ("could not be shown" in caplog.text, work.lines) == (True, ["starting 4 engines took 0.0 s"])


def test_text_of_others_stays_on_its_line():
    work = Work(what="shipping a\nb\x1b")
    with work.waiting:
        work.pass_pause()
        work.finish()
    assert work.lines[0] == "shipping a b, 2 s"


def test_it_is_shown_in_the_context_of_the_cell():
    cell = contextvars.ContextVar("cell", default="none")
    cell.set("first")
    seen = []
    work = Work(show=lambda _: seen.append(cell.get()))
    with work.waiting:
        work.pass_pause()
        work.finish()
    assert seen == ["first", "first"]


def test_no_thread_is_left():
    work = Work()
    with work.waiting as waiting:
        work.finish()
    assert not waiting._thread.is_alive()


def test_lines_that_cannot_be_taken_back_come_ever_less_often():
    assert list(islice(ever_longer(), 4)) == [2.0, 4.0, 8.0, 16.0]


# where it is shown


class Shell:
    """IPython's shell in a kernel, in the middle of a message."""

    user_ns: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, msg_type: str = "execute_request") -> None:
        self.kernel = SimpleNamespace(_allow_stdin=False)
        self.display_pub = SimpleNamespace(parent_header={"msg_type": msg_type})


@pytest.fixture
def shown(monkeypatch) -> list[tuple[dict[str, str], bool]]:
    found: list[tuple[dict[str, str], bool]] = []
    monkeypatch.setattr("dnb.notebook.live.progress.steady", lambda: repeat(0.001))
    monkeypatch.setattr("dnb.notebook.live.progress.ever_longer", lambda: repeat(0.001))
    monkeypatch.setattr(
        "dnb.notebook.live.progress.display", lambda content, *, update, **_: found.append((content, update))
    )
    return found


def slow(what: str = "work") -> None:
    """Something long enough to be shown, where it can be."""
    seen = threading.Event()

    def figure() -> str:
        seen.set()
        return "half"

    with watch(what) as report:
        report(figure)
        seen.wait(0.2)


def test_in_a_cell_that_nobody_looks_at_a_marked_line_is_printed(monkeypatch, shown, capsys):
    monkeypatch.setattr("dnb.notebook.live.progress.get_ipython", Shell)
    slow()
    lines = capsys.readouterr().out.splitlines()
    assert ("... work: half, 0 s" in lines, all(line.startswith("... work") for line in lines)) == (True, True)


def test_in_a_notebook_one_display_is_replaced(monkeypatch, shown):
    monkeypatch.setattr("dnb.notebook.live.progress.get_ipython", Shell)
    monkeypatch.setenv("DNB_DISPLAY", "widget")
    slow("<b>work</b>")
    assert "<b>work</b>: half, 0 s" in [content["text/plain"] for content, _ in shown]
    assert [is_update for _, is_update in shown] == [False] + [True] * (len(shown) - 1)


def test_text_of_others_is_shown_and_not_run(monkeypatch, shown):
    monkeypatch.setattr("dnb.notebook.live.progress.get_ipython", Shell)
    monkeypatch.setenv("DNB_DISPLAY", "widget")
    slow("<b>work</b>")
    assert "<b>" not in "".join(content["text/html"] for content, _ in shown)


@pytest.mark.parametrize("shell", [None, SimpleNamespace(), Shell("comm_msg"), Shell("apply_request")])
def test_where_no_cell_waits_nothing_is_shown(monkeypatch, shown, capsys, shell):
    monkeypatch.setattr("dnb.notebook.live.progress.get_ipython", lambda: shell)
    slow()
    assert (capsys.readouterr().out, shown) == ("", [])


def test_another_thread_than_the_cells_shows_nothing(monkeypatch, shown, capsys):
    monkeypatch.setattr("dnb.notebook.live.progress.get_ipython", Shell)
    helper = threading.Thread(target=slow)
    helper.start()
    helper.join()
    assert (capsys.readouterr().out, shown) == ("", [])


def test_nothing_is_shown_if_that_is_wished(monkeypatch, shown, capsys):
    monkeypatch.setattr("dnb.notebook.live.progress.get_ipython", Shell)
    monkeypatch.setenv("DNB_DISPLAY", "none")
    slow()
    assert (capsys.readouterr().out, shown) == ("", [])


# who is told


class Told(list[str]):
    @contextmanager
    def __call__(self, what: str) -> Iterator[Callable[[object], None]]:
        self.append(what)
        yield lambda figure: self.append(str(figure))


@pytest.fixture(autouse=True)
def _nobody_listens(monkeypatch):
    monkeypatch.setattr(progress, "_default", [])


def work() -> None:
    with long_work("profiling Net") as report:
        report("1 of 2")


def test_where_nobody_listens_work_goes_on():
    work()


def test_who_listens_is_told_what_is_done_and_how_far_it_is():
    told = Told()
    progress.watch_all(told)
    work()
    assert told == ["profiling Net", "1 of 2"]


def test_in_a_block_another_one_may_listen():
    everyone, own = Told(), Told()
    progress.watch_all(everyone)
    with watching(own):
        work()
    assert (everyone, own) == ([], ["profiling Net", "1 of 2"])


def test_packing_tells_how_many_bytes_are_there(tmp_path):
    import torch

    from dnb.transport.pickling.payloads import pickle_payload

    told = Told()
    with watching(told):
        _, _, segment = pickle_payload(torch.zeros(1_000_000), name="digits-data", folders=[tmp_path])
    segment.unlink()
    assert told == ["shipping digits-data", "pickling", "0 of 4 MB"]


def test_profiling_tells_how_many_sizes_are_timed():
    import torch

    from dnb.engine.profiling.profiler import ProfileInput, profile_trial

    told: list[object] = []
    trial = ProfileInput(model=torch.nn.Linear(2, 2), batch=torch.zeros(4, 2))
    profile_trial(trial, sizes=(2, 4), report=told.append)
    assert told == ["0 of 2 sizes of batch are timed, 1 layers each", "1 of 2 sizes of batch are timed, 1 layers each"]
