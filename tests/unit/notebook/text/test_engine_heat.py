import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dnb.notebook.text import engine_heat
from dnb.notebook.text.engine_text import Fact, facts_of, heard_words, hung_engines, rounded, worker_words
from tests.fake_runs import FakeEvent, FakeRun, FakeWorker

WHOLE = FakeWorker(
    engine=1,
    host="node-a",
    device="cpu",
    cores=2,
    cpu_percent=181.3,
    rss_bytes=512_000_000,
    peak_rss_bytes=600_000_000,
    start_rss_bytes=400_000_000,
    memory_bytes=8_000_000_000,
    heartbeat_age_seconds=0.08,
    shards=(2, 3),
    samples=12_812,
    steps=200,
)
EVIL = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><b>', "&lt;", "$x$"]


class Reader(HTMLParser):
    """Tags and text of HTML, with a complaint about what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self._texts: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self._texts.append(data)


def crowd(number: int, **changes: FakeWorker) -> list[FakeWorker]:
    """Engines that compute more and more."""
    return [replace(FakeWorker(engine=i, compute=i / number, wait=1 - i / number)) for i in range(number)]


def cell_of(html: str, engine: int) -> str:
    """The cell at its place in the table."""
    first = engine // 10 * 10
    row = re.search(rf'<th scope="row">{first} to {first + 9}</th>(.*?)</tr>', html)
    assert row is not None
    return re.findall(r"<td.*?</td>", row[1])[engine % 10]


def test_a_cell_has_the_share_of_its_engine_as_a_figure_and_as_a_shade():
    html = engine_heat.heat_map(crowd(64))
    assert cell_of(html, 0) == '<td class="s0">0</td>'
    assert cell_of(html, 48) == '<td class="s3">75</td>'
    assert cell_of(html, 63) == '<td class="s4">98</td>'


@pytest.mark.parametrize(("state", "mark"), [("dead", "✕"), ("spare", "◇"), ("left", "←")])
def test_a_cell_of_an_engine_that_takes_no_part_has_a_mark(state, mark):
    workers = crowd(64)
    workers[17] = replace(workers[17], state=state)
    assert cell_of(engine_heat.heat_map(workers), 17) == f'<td class="x" aria-label="{state}">{mark}</td>'


def test_a_cell_of_a_hung_engine_has_a_mark():
    assert cell_of(engine_heat.heat_map(crowd(64), hung={33}), 33) == '<td class="h" aria-label="hung">▲</td>'


def test_a_cell_without_known_shares_is_not_zero():
    workers = crowd(64)
    workers[5] = FakeWorker(engine=5, compute=0.0, wait=0.0, data=0.0, idle=0.0)
    assert cell_of(engine_heat.heat_map(workers), 5) == '<td class="x" aria-label="not known">?</td>'


def test_a_heat_map_tells_in_words_what_stands_out():
    workers = crowd(20)
    workers[3], workers[4] = replace(workers[3], state="dead"), replace(workers[4], state="dead")
    assert engine_heat.heat_words(workers, hung={9}) == [
        "median 55 %, lowest 0 % (engine 0), highest 95 % (engine 19)",
        "✕ dead: engines 3 and 4",
        "▲ hung: engine 9",
    ]


def test_a_heat_map_has_headers_for_rows_and_columns():
    html = engine_heat.heat_map(crowd(64))
    assert html.count('scope="row"') == 7
    assert html.count('scope="col"') == 11
    assert "<caption>64 engines: share of its time, in %, that each computes</caption>" in html


def test_a_heat_map_has_no_rows_of_engines_that_never_were():
    workers = [replace(worker, engine=worker.engine + 1000 * (worker.engine > 9)) for worker in crowd(20)]
    assert re.findall(r'scope="row">([^<]*)', engine_heat.heat_map(workers)) == ["0 to 9", "1010 to 1019"]


def test_a_heat_map_of_64_engines_is_less_than_3_kilobytes():
    assert len(engine_heat.heat_map(crowd(64)).encode()) < 3000


def test_a_heat_map_is_well_formed():
    Reader(engine_heat.heat_map(crowd(64), hung={3}))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "now"),
        (0.49, "now"),
        (0.5, "0.5 s ago"),
        (0.97, "0.5 s ago"),
        (3.9, "3 s ago"),
        (45, "30 s ago"),
        (60, "1 min ago"),
        (3700, "61 min ago"),
        (None, ""),
    ],
)
def test_the_age_of_a_heartbeat_is_told_in_steps(seconds, words):
    assert heard_words(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (12_849, "12.8 k"), (999_600, "1 M"), (2_500_000_000, "2.5 G")],
)
def test_growing_numbers_have_three_digits(count, words):
    assert rounded(count) == words


def test_an_engine_that_the_hub_calls_hung_is_hung_until_it_is_heard_again():
    run = FakeRun(workers=[FakeWorker(engine=1, heartbeat_age_seconds=0.1)])
    run.events = [FakeEvent(kind="hung", engine=1)]
    assert hung_engines(run) == {1}
    run.events.append(FakeEvent(kind="recovered", engine=1))
    assert hung_engines(run) == frozenset()


def test_an_engine_with_an_old_heartbeat_is_hung_without_an_event():
    assert hung_engines(FakeRun(workers=[FakeWorker(engine=2, heartbeat_age_seconds=1.2)])) == {2}


def test_a_dead_engine_is_not_hung():
    run = FakeRun(workers=[FakeWorker(engine=1, state="dead")], events=[FakeEvent(kind="hung", engine=1)])
    assert hung_engines(run) == frozenset()


def test_nobody_is_hung_when_the_run_has_ended():
    assert hung_engines(FakeRun(status="finished", workers=[FakeWorker(heartbeat_age_seconds=9.0)])) == frozenset()


def test_facts_of_a_dead_engine_leave_out_what_cannot_be_known():
    assert [fact.name for fact in facts_of(FakeWorker(state="dead"))] == ["peak", "samples"]


@pytest.mark.parametrize(
    ("state", "words"), [("busy", "by its team in 1.5 k steps"), ("left", "by its team in 1,504 steps")]
)
def test_a_stage_whose_samples_another_counts_does_not_look_idle(state, words):
    stage = replace(WHOLE, samples=0, steps=1504, state=state)
    assert Fact("samples", words) in facts_of(stage)
    assert f"; samples {words}" in worker_words(stage)
