import numpy as np
import pytest

from dnb.notebook.text.diagnosis import diagnosis, findings
from dnb.planning.step_timeline import Timeline
from dnb.planning.utilisation import Utilisation
from tests.fake_runs import FakeEvent, FakeHistory, FakeRun, FakeWorker, usage_rows
from tests.timelines import gpipe_of_two, step_timeline


def engine(number: int, **changes) -> FakeWorker:
    """An engine whose time is what is named; the rest of it is idle."""
    shares = {"compute": 0.0, "wait": 0.0, "data": 0.0, **changes}
    idle = max(1.0 - sum(shares[name] for name in ("compute", "wait", "data")), 0.0)
    return FakeWorker(engine=number, **{"idle": idle, **shares})


def running(*workers: FakeWorker, **changes) -> FakeRun:
    return FakeRun(**{"step": 100, "workers": list(workers), **changes})


def silent(number: int, **changes) -> FakeWorker:
    return engine(number, compute=0.9, heartbeat_age_seconds=3.4, **changes)


def unknown(number: int, **changes) -> FakeWorker:
    return FakeWorker(engine=number, compute=0.0, wait=0.0, data=0.0, idle=0.0, **changes)


def short_steps(seconds: float) -> FakeHistory:
    return FakeHistory(seconds=[seconds * step for step in range(100)])


FAST, SLOW = engine(3, compute=0.56, wait=0.41), engine(1, compute=0.95, wait=0.03, shards=(6, 7))
CASES = {
    "one waits for another": (
        running(FAST, SLOW),
        "engine 3 waits 41 % of the time: engine 1 is the slowest; its share of the batch is 25 %",
    ),
    "it waited": (running(FAST, SLOW, status="finished"), "engine 3 waited 41 % of the time: engine 1 was the slowest"),
    "shards are not known": (
        running(FAST, engine(1, compute=0.95)),
        "engine 3 waits 41 % of the time: engine 1 is the slowest",
    ),
    "many wait for one": (
        running(SLOW, *(engine(i, compute=0.5, wait=0.5) for i in range(2, 6))),
        "4 engines wait 50 % of the time: engine 1 is the slowest; its share of the batch is 25 %",
    ),
    "the slowest loads data": (
        running(FAST, engine(1, compute=0.3, data=0.65, shards=(1,))),
        "engine 3 waits 41 % of the time: engine 1 is the slowest, as it loads data 65 % of the time; "
        "its share of the batch is 12 %",
    ),
    "two are equally slow": (
        running(FAST, SLOW, engine(2, compute=0.95, wait=0.04)),
        "engines compute 82 % of the time",
    ),
    "one alone is never the slowest": (
        running(engine(0, compute=0.55, wait=0.2)),
        "engine 0 computes 55 % of the time, is idle 25 % and waits 20 %",
    ),
    "an idle one is not the slowest": (
        running(engine(0, compute=0.7, wait=0.3), engine(1, compute=0.1, wait=0.0)),
        "engines are idle 45 % of the time, compute 40 % and wait 15 %",
    ),
    "a spare is not waited for": (
        running(engine(0, compute=0.6, wait=0.2, data=0.2), engine(1, state="spare")),
        "engine 0 computes 60 % of the time, waits 20 % and loads data 20 %",
    ),
    "data": (
        running(*(engine(i, compute=0.6, data=0.38) for i in range(2))),
        "engines load data 38 % of the time: try a dataset that does less for each sample, or holds ready tensors",
    ),
    "data of one": (
        running(engine(0, compute=0.6, data=0.38), status="stopped"),
        "engine 0 loaded data 38 % of the time: try a dataset that does less for each sample, or holds ready tensors",
    ),
    "all compute": (running(*(engine(i, compute=0.93) for i in range(4))), "engines compute 93 % of the time"),
    "one computes": (running(engine(0, compute=0.93)), "engine 0 computes 93 % of the time"),
    "all computed": (
        running(*(engine(i, compute=0.93) for i in range(4)), status="finished"),
        "engines computed 93 % of the time",
    ),
    "short steps": (
        running(*(engine(i, compute=0.6, wait=0.35) for i in range(2)), history=short_steps(0.003)),
        "35 % of the time is overhead, as steps are short (3 ms); larger batches help",
    ),
    "a slow hub": (
        running(engine(0, compute=0.6, wait=0.35), history=short_steps(0.3)),
        "35 % of the time is overhead: waiting for the hub; larger batches help",
    ),
    "waiting in turn": (
        running(*(engine(i, compute=0.6, wait=0.35) for i in range(2)), history=short_steps(0.3)),
        "35 % of the time is overhead: waiting for the hub, or for each other; larger batches help",
    ),
    "mixed": (
        running(*(engine(i, compute=0.7, wait=0.2, data=0.1) for i in range(2))),
        "engines compute 70 % of the time, wait 20 % and load data 10 %",
    ),
    "idle": (
        running(engine(0, compute=0.3)),
        "engine 0 is idle 70 % of the time: the run has no work for it then",
    ),
    "no shards": (
        running(engine(0, compute=0.9, shards=(0, 1)), engine(1, shards=())),
        "engine 1 has no work: all of each batch goes to engine 0",
    ),
    "silent": (
        running(SLOW, silent(2, shards=(0,))),
        "engine 2 is silent (last heard 3 s ago); its share of the batch is 12 %",
    ),
    "silent ones": (
        running(SLOW, *(silent(i) for i in range(4, 10))),
        "engines 4, 5, 6, 7 and 2 more are silent",
    ),
    "dead": (
        running(
            SLOW,
            engine(2, state="dead"),
            elapsed_seconds=60.0,
            events=[FakeEvent(kind="died", engine=2, step=90, time=1_000_050.0)],
        ),
        "engine 2 died after step 90: 1 engine is left",
    ),
    "long dead": (
        running(
            engine(1, compute=0.9),
            engine(2, state="dead"),
            elapsed_seconds=60.0,
            events=[FakeEvent(kind="died", engine=2, step=20, time=1_000_010.0)],
        ),
        "engine 1 computes 90 % of the time",
    ),
    "all dead": (
        running(engine(1, state="dead"), engine(2, state="left")),
        "no engine is left, so nothing is computed",
    ),
    "a died engine did its part": (
        running(engine(0, compute=0.9), engine(1, compute=0.9, state="dead"), status="finished"),
        "engines computed 90 % of the time",
    ),
    "starting": (
        FakeRun(status="starting", workers=[unknown(0), unknown(1)]),
        "2 engines are getting ready for the first step",
    ),
    "nobody": (FakeRun(status="starting"), "no engine takes part yet, so nothing is computed"),
    "failed at start": (FakeRun(status="failed"), "nothing was trained: the run failed before its first step"),
    "paused": (
        running(FAST, SLOW, status="paused"),
        "nothing is computed while the run is paused; Resume, or run.resume(), goes on",
    ),
    "paused by a fault": (
        running(FAST, SLOW, status="paused", error="the loss is nan; run.set(lr=...) and run.resume() try it again"),
        "stopped: nothing is computed until run.resume() or run.stop()",
    ),
    "paused by an error in a loss": (
        running(
            FAST, SLOW, status="paused", error="step 9: ValueError: no. Fix it, then run.resume(loss=fixed) or ..."
        ),
        "stopped by an error in your code: fix it, then run.resume(loss=fixed), or run.stop()",
    ),
    "paused before the first step": (
        FakeRun(status="paused", error="step 1: ValueError: no", workers=[unknown(0)]),
        "stopped by an error before the first step: fix it, and fit again",
    ),
    "overloaded": (
        running(*(engine(i, compute=0.5, wait=0.5, device="cpu", cpu_percent=15.0) for i in range(2))),
        "this machine is overloaded: engines have a core for only 30 % of the time that they compute; others use it",
    ),
    "one alone is slow to compute": (
        running(
            engine(0, compute=0.9, device="cpu", cpu_percent=20.0),
            engine(1, compute=0.9, device="cpu", cpu_percent=95.0),
        ),
        "engines compute 90 % of the time",
    ),
    "an accelerator needs no core": (
        running(engine(0, compute=0.9, device="cuda:0", cpu_percent=5.0)),
        "engine 0 computes 90 % of the time",
    ),
    "nothing known": (running(unknown(0)), "nothing is known yet of how the engines spend their time"),
    "nothing known at the end": (
        running(status="finished"),
        "nothing is known of how the engines spent their time",
    ),
    "nan": (
        running(SLOW, history=FakeHistory(loss=[0.5, 0.4, float("nan"), float("nan")], lr=[0.1] * 4)),
        "the loss is not a finite number since step 3: try a smaller learning rate (now 0.1), or clip_norm",
    ),
    "only nan": (
        running(SLOW, status="failed", history=FakeHistory(loss=[float("nan")])),
        "the loss was not a finite number from the first step on: try a smaller learning rate, or clip_norm",
    ),
}


@pytest.mark.parametrize(("run", "sentence"), CASES.values(), ids=CASES.keys())
def test_the_sentence_is_what_the_numbers_support(run, sentence):
    assert diagnosis(run).text == sentence


def told(run: FakeRun) -> list[str]:
    return [finding.text for finding in findings(run)]


def test_a_loss_that_stands_still_is_told():
    losses = [0.5] * 100 + [0.25] * 50 + [0.26] * 250
    run = running(SLOW, step=400, history=FakeHistory(loss=losses))
    assert told(run)[0] == "the loss has not improved since about step 150: on average 0.2500 then, 0.2600 now"


def test_a_loss_that_falls_is_not_blamed():
    run = running(SLOW, step=400, history=FakeHistory(loss=np.linspace(1.0, 0.2, 400).tolist()))
    assert not any("improve" in text for text in told(run))


def test_a_loss_of_few_steps_is_not_judged():
    run = running(SLOW, step=100, history=FakeHistory(loss=[0.1] + [0.5] * 99))
    assert not any("improve" in text for text in told(run))


def test_a_validation_loss_that_has_turned_is_told():
    run = running(SLOW)
    run.history.set("val_loss", [0.5, 0.3, 0.4, 0.41, 0.42], steps=[20, 40, 60, 80, 100])
    assert told(run)[0] == (
        "overfitting: the validation loss was best at step 40 (0.3000) and has been worse in all 3 evaluations since"
    )


def test_of_an_overloaded_machine_overfitting_and_a_loss_that_stands_still_the_first_comes_first():
    run = running(engine(0, compute=0.5, device="cpu", cpu_percent=15.0), step=400)
    run.history = FakeHistory(loss=[0.5] * 100 + [0.25] * 50 + [0.26] * 250)
    run.history.set("val_loss", [0.5, 0.3, 0.4, 0.41, 0.42], steps=[20, 40, 60, 80, 100])
    assert [text.split()[0] for text in told(run)[:3]] == ["this", "overfitting:", "the"]


def test_a_validation_loss_that_is_hardly_worse_is_not_blamed():
    run = running(SLOW)
    run.history.set("val_loss", [0.5, 0.3, 0.301, 0.41, 0.42], steps=[20, 40, 60, 80, 100])
    assert not any("validation" in text for text in told(run))


def test_a_negative_validation_loss_is_judged_by_its_size():
    run = running(SLOW)
    run.history.set("val_loss", [-1.0, -0.999, -0.999, -0.999], steps=[1, 2, 3, 4])
    assert not any("validation" in text for text in told(run))


def test_a_bubble_as_large_as_its_formula_asks_for_more_micro_batches():
    run = running(SLOW, timeline=Timeline(gpipe_of_two(num_micro_batches=2, median_bubble=1 / 3)))
    assert told(run) == [
        "the pipeline's engines stand still for 33 % of a step (formula: 33 %): more micro-batches would make that less"
    ]


def test_a_small_bubble_is_not_told():
    run = running(engine(0, compute=0.9), timeline=Timeline(gpipe_of_two(num_micro_batches=16, median_bubble=0.06)))
    assert told(run) == ["engine 0 computes 90 % of the time"]


def test_unequal_stages_are_told():
    record = gpipe_of_two(num_micro_batches=2, median_bubble=0.5)
    first, last = record.engines
    longer = tuple(action._replace(begin=4 * action.begin, end=4 * action.end) for action in last.actions)
    slow = step_timeline(
        [first, type(last)(engine=1, team=0, rank=1, cpu_seconds=99.0, actions=longer, traffic=())],
        num_micro_batches=2,
        median_bubble=0.5,
    )
    run = running(SLOW, timeline=Timeline(slow))
    assert told(run) == [
        "the pipeline's engines stand still for 50 % of a step (formula: 33 %): "
        "engine 1 computes 60 % longer than the mean"
    ]


def test_a_run_from_its_folder_is_judged_by_what_was_counted_of_its_time():
    run = FakeRun(status="finished", step=100, utilisation=Utilisation(usage_rows(9)))
    assert told(run)[0].startswith("50 % of the time was overhead")


def test_only_one_sentence_is_about_time():
    run = running(engine(0, compute=0.2, data=0.4, wait=0.4), engine(1, compute=0.3, data=0.65, wait=0.05))
    assert len(findings(run)) == 1


def test_a_kind_stays_while_only_figures_change():
    before = running(FAST, SLOW)
    after = running(engine(3, compute=0.5, wait=0.46), SLOW)
    assert diagnosis(before).kind == diagnosis(after).kind
    assert diagnosis(before).text != diagnosis(after).text


def test_a_sentence_holds_no_text_from_outside():
    evil = "<script>alert(1)</script>"
    run = running(
        *(engine(i, compute=0.9, state="dead", host=evil, device=evil) for i in range(2)),
        name=evil,
        error=evil,
        elapsed_seconds=1.0,
        events=[FakeEvent(kind="died", text=evil, engine=1, step=3, time=1_000_000.0)],
    )
    assert "<" not in "".join(told(run))
