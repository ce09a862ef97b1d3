import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dnb.notebook.text import engine_cards
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


def text_of(worker: FakeWorker, **options) -> str:
    return Reader(engine_cards.cards([worker], **options)).text


def crowd(number: int, **changes: FakeWorker) -> list[FakeWorker]:
    """Engines that compute more and more."""
    return [replace(FakeWorker(engine=i, compute=i / number, wait=1 - i / number)) for i in range(number)]


def cell_of(html: str, engine: int) -> str:
    """The cell at its place in the table."""
    first = engine // 10 * 10
    row = re.search(rf'<th scope="row">{first} to {first + 9}</th>(.*?)</tr>', html)
    assert row is not None
    return re.findall(r"<td.*?</td>", row[1])[engine % 10]


def test_a_card_tells_everything_that_is_known_of_an_engine():
    assert text_of(WHOLE, num_shards=8) == (
        "engine 1 ● busy node-a , cpu, 2 cores CPU 180 % of 200 % memory 512 MB of 8 GB at most 600 MB "
        "samples 12.8 k in 200 steps shards 2 of 8 heartbeat now"
    )


def test_a_missing_value_looks_missing():
    html = engine_cards.cards([FakeWorker()])
    assert html.count('<span class="dnb-none">not known</span>') == 7


def test_a_missing_value_is_not_zero():
    assert "CPU 0 %" in text_of(replace(WHOLE, cpu_percent=0.0))
    assert "CPU not known" in text_of(replace(WHOLE, cpu_percent=None))


def test_an_engine_without_shards_does_not_look_like_one_whose_shards_are_not_known():
    assert "shards 0 of 8" in text_of(replace(WHOLE, shards=()), num_shards=8)
    assert "shards not known" in text_of(replace(WHOLE, shards=None), num_shards=8)


def test_a_dead_engine_is_called_and_marked_dead():
    html = engine_cards.cards([replace(WHOLE, state="dead")])
    assert '<li class="dnb-dead">' in html
    assert "engine 1 ✕ dead" in Reader(html).text


def test_a_dead_engine_has_no_figures_of_now():
    told = text_of(replace(WHOLE, state="dead"))
    assert told.endswith("at most 600 MB samples 12,812 in 200 steps")


def test_a_silent_engine_is_called_and_marked_hung():
    html = engine_cards.cards([replace(WHOLE, heartbeat_age_seconds=3.4)], hung={1})
    assert '<li class="dnb-hung">' in html
    assert "engine 1 ▲ hung" in Reader(html).text
    assert "heartbeat 3 s ago" in Reader(html).text


@pytest.mark.parametrize(("state", "mark"), [("spare", "◇ spare"), ("left", "← left"), ("ready", "○ ready")])
def test_every_state_is_told_by_word_and_mark(state, mark):
    assert f"engine 1 {mark}" in text_of(replace(WHOLE, state=state))


def test_marks_are_not_read_out_beside_their_words():
    assert '<span aria-hidden="true">✕</span> dead' in engine_cards.cards([replace(WHOLE, state="dead")])


def test_a_run_that_has_ended_has_final_figures_and_no_heartbeat():
    told = text_of(WHOLE, is_over=True)
    assert "samples 12,812 in 200 steps" in told
    assert "heartbeat" not in told


def test_cards_do_not_change_with_every_look():
    later = replace(WHOLE, cpu_percent=180.9, heartbeat_age_seconds=0.31, samples=12_831, rss_bytes=512_090_000)
    assert engine_cards.cards([later]) == engine_cards.cards([WHOLE])


def test_four_cards_are_less_than_3_kilobytes():
    workers = [replace(WHOLE, engine=engine, host="node-0123456789") for engine in range(4)]
    assert len(engine_cards.cards(workers, num_shards=48).encode()) < 3000


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("place", ["host", "device", "state"])
def test_text_from_an_engine_is_shown_and_not_run(place, evil):
    reader = Reader(engine_cards.cards([replace(WHOLE, **{place: evil})]))
    assert set(reader.tags) <= {"ul", "li", "div", "b", "span", "dl", "dt", "dd"}
    assert {name for name, _ in reader.attributes} <= {"class", "role", "aria-label", "aria-hidden"}
    assert evil in reader.text


def test_a_very_long_name_is_cut():
    assert len(text_of(replace(WHOLE, host="h" * 5000, device="d" * 5000))) < 400


def test_control_characters_are_not_shown():
    worker = replace(WHOLE, host="a\x1b[31m\nb", device="c\u202ed", state="e\x00f")
    assert text_of(worker).startswith("engine 1 ? e f a [31m b , c d, 2 cores")


def test_twelve_engines_have_cards_and_thirteen_a_heat_map():
    assert "<table>" not in engine_cards.engines_html(FakeRun(workers=crowd(12)))
    assert "<table>" in engine_cards.engines_html(FakeRun(workers=crowd(13)))


def test_a_cell_has_the_share_of_its_engine_as_a_figure_and_as_a_shade():
    html = engine_cards.heat_map(crowd(64))
    assert cell_of(html, 0) == '<td class="s0">0</td>'
    assert cell_of(html, 48) == '<td class="s3">75</td>'
    assert cell_of(html, 63) == '<td class="s4">98</td>'


@pytest.mark.parametrize(("state", "mark"), [("dead", "✕"), ("spare", "◇"), ("left", "←")])
def test_a_cell_of_an_engine_that_takes_no_part_has_a_mark(state, mark):
    workers = crowd(64)
    workers[17] = replace(workers[17], state=state)
    assert cell_of(engine_cards.heat_map(workers), 17) == f'<td class="x" aria-label="{state}">{mark}</td>'


def test_a_cell_of_a_hung_engine_has_a_mark():
    assert cell_of(engine_cards.heat_map(crowd(64), hung={33}), 33) == '<td class="h" aria-label="hung">▲</td>'


def test_a_cell_without_known_shares_is_not_zero():
    workers = crowd(64)
    workers[5] = FakeWorker(engine=5, compute=0.0, wait=0.0, data=0.0, idle=0.0)
    assert cell_of(engine_cards.heat_map(workers), 5) == '<td class="x" aria-label="not known">?</td>'


def test_a_heat_map_tells_in_words_what_stands_out():
    workers = crowd(20)
    workers[3], workers[4] = replace(workers[3], state="dead"), replace(workers[4], state="dead")
    assert engine_cards.heat_words(workers, hung={9}) == [
        "median 55 %, lowest 0 % (engine 0), highest 95 % (engine 19)",
        "✕ dead: engines 3 and 4",
        "▲ hung: engine 9",
    ]


def test_a_heat_map_has_headers_for_rows_and_columns():
    html = engine_cards.heat_map(crowd(64))
    assert html.count('scope="row"') == 7
    assert html.count('scope="col"') == 11
    assert "<caption>64 engines: share of its time, in %, that each computes</caption>" in html


def test_a_heat_map_has_no_rows_of_engines_that_never_were():
    workers = [replace(worker, engine=worker.engine + 1000 * (worker.engine > 9)) for worker in crowd(20)]
    assert re.findall(r'scope="row">([^<]*)', engine_cards.heat_map(workers)) == ["0 to 9", "1010 to 1019"]


def test_a_heat_map_of_64_engines_is_less_than_3_kilobytes():
    assert len(engine_cards.heat_map(crowd(64)).encode()) < 3000


def test_a_heat_map_is_well_formed():
    Reader(engine_cards.heat_map(crowd(64), hung={3}))


def test_a_run_without_engines_says_so():
    assert "no engine yet" in engine_cards.engines_html(FakeRun(status="starting"))
    assert "nothing is known of its engines" in engine_cards.engines_html(FakeRun(status="finished"))


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
    assert [fact.name for fact in facts_of(FakeWorker(state="dead"))] == ["at most", "samples"]


@pytest.mark.parametrize(
    ("state", "words"), [("busy", "by its team in 1.5 k steps"), ("left", "by its team in 1,504 steps")]
)
def test_a_stage_whose_samples_another_counts_does_not_look_idle(state, words):
    stage = replace(WHOLE, samples=0, steps=1504, state=state)
    assert Fact("samples", words) in facts_of(stage)
    assert f"; samples {words}" in worker_words(stage)
