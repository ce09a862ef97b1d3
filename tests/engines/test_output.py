"""Output of user code comes back: the first of each kind with engine and step, floods with a count."""

import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from tqdm import tqdm

from dnb.api.runs.run import Run
from dnb.notebook.text.summary import summary
from tests.engines.pools import PATIENCE_SECONDS, open_small_pool, wait_until

pytestmark = pytest.mark.engines

say = print
LOGGER = "tests.of_output"


def data(num_samples=128):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_samples, 6, generator=generator), torch.randint(0, 3, (num_samples,), generator=generator)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def fit(pool, step, **options):
    return pool.fit(nn.Linear(6, 3), data(), step=step, batch_size=32, **options)


def events_of(run, kind):
    return [event for event in run.events if event.kind == kind]


def flooding_step(model, batch):
    for number in range(50_000):
        say("weight", number)
    say("the flood is over")
    return loss_of(model, batch)


def test_a_flood_is_cut_and_counted_and_hides_no_other_line(pool):
    run = fit(pool, flooding_step, steps=2).wait(PATIENCE_SECONDS)
    assert [event.text for event in events_of(run, "output")] == ["weight 0", "the flood is over"]
    (count,) = events_of(run, "counted")
    number = int(re.fullmatch(r"([\d,]+) more like weight 0", count.text)[1].replace(",", ""))
    shown = sum("weight" in line for line in run.output if line.startswith("engine"))
    assert number + shown >= 2 * 2 * 50_000
    assert (number + shown) % 50_000 == 0
    assert f"({count.text})" in run.output
    assert sum("more like weight 0)" in line for line in (run.folder / "output.log").read_text().splitlines()) == 2
    assert f"{number + shown - 1:,} more like it" in summary(run)


def test_the_first_of_each_kind_has_its_engine_and_step_also_when_read_from_the_folder(pool):
    run = fit(pool, flooding_step, steps=1).wait(PATIENCE_SECONDS)
    for each in (run, Run.open(run.folder)):
        first = events_of(each, "output")[0]
        assert (first.text, first.step) == ("weight 0", 0)
        assert first.engine in {engine.id for engine in pool.engines}


def varied_step(model, batch):
    warnings.warn("careful", UserWarning, stacklevel=1)
    logging.getLogger(LOGGER).warning("logged %d", len(batch[0]))
    for _ in tqdm(range(20), desc="batches", mininterval=0):
        pass
    say(b"caf\xe9".decode("utf-8", "surrogateescape"), "\x1b[31mred\x1b[0m")
    sys.stdout.write("unfinished")
    return loss_of(model, batch)


def configure_logger():
    logging.getLogger(LOGGER).addHandler(logging.StreamHandler())


def test_warnings_logged_lines_bars_odd_text_and_unfinished_lines_come_back(pool):
    pool.client[:].apply_sync(configure_logger)
    with warnings.catch_warnings():
        warnings.simplefilter("once")
        run = fit(pool, varied_step, steps=3).wait(PATIENCE_SECONDS)
    firsts = [event.text for event in events_of(run, "output")]
    assert any(re.search(r"test_output.py:\d+: UserWarning: careful\n +warnings.warn", text) for text in firsts)
    assert any(re.fullmatch(r"logged \d+", text) for text in firsts)
    assert any(text.startswith("batches: 100%|") and "20/20" in text for text in firsts)
    assert "caf\\udce9 red" in firsts
    assert "unfinished" in firsts
    assert sum("UserWarning: careful" in line for line in run.output) == 2  # once on each engine


def raising_step(model, batch):
    say("before the error")
    raise ValueError("on purpose")


def test_what_is_printed_before_an_error_comes_before_it(pool):
    run = fit(pool, raising_step, steps=3)
    wait_until(run, lambda run: run.status == "paused", what="the step has failed")
    kinds = [event.kind for event in run.events]
    assert "before the error" in [event.text for event in events_of(run, "output")]
    assert kinds.index("output") < kinds.index("paused")
    run.stop()


def numbered_step(model, batch):
    number = numbered_step.__dict__["number"] = numbered_step.__dict__.get("number", 0) + 1
    say(f"begins {'x' * number}")
    if number == 4 and os.path.exists(f"victim-{os.getpid()}"):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss_of(model, batch)


def test_of_a_killed_engine_only_the_step_in_flight_is_lost(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = shared.of(2)
    victim = pool.engines[0]
    (tmp_path / f"victim-{victim.pid}").touch()
    run = fit(pool, numbered_step, steps=1_000_000)
    moved = threading.Event()
    run.add_listener(lambda run: moved.set() if run.step > 8 else None)
    assert moved.wait(PATIENCE_SECONDS)
    run.stop()
    lines = [line for line in run.output if line.startswith(f"engine {victim.id}:")]
    assert lines == [f"engine {victim.id}: begins {'x' * number}" for number in (1, 2, 3)]
    shared.calm()


def talking_scheduler(optimizer):
    def rate(step):
        say(f"the rate at step {step}")
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def talking_after_step(model):
    logging.getLogger(LOGGER).warning("norm %.3f", sum(each.norm() for each in model.parameters()))
    warnings.warn("careful in the hub", UserWarning, stacklevel=1)


def test_what_functions_of_the_user_print_in_the_hub_comes_back_by_its_name(pool):
    run = fit(pool, loss_of, scheduler=talking_scheduler, after_step=talking_after_step, steps=3)
    run.wait(PATIENCE_SECONDS)
    assert {event.engine for event in events_of(run, "output")} == {None}
    assert next(line for line in run.output if "norm" in line).startswith("hub: norm ")
    assert sum("the rate at step" in line for line in run.output) >= 3
    assert sum("UserWarning: careful in the hub" in line for line in run.output) == 1
    assert " hub step 1: norm " in (run.folder / "output.log").read_text()


def failing_after_step(model):
    say("before the hub's error")
    raise ValueError("on purpose")


def test_what_is_printed_in_the_hub_before_an_error_comes_before_it(pool):
    run = fit(pool, loss_of, after_step=failing_after_step, steps=3)
    wait_until(run, lambda run: not run.is_active or run.status == "paused", what="the update has failed")
    texts = [event.text for event in run.events]
    assert texts.index("before the hub's error") < min(i for i, text in enumerate(texts) if "on purpose" in text)


def test_a_second_run_begins_to_count_anew(pool):
    for _ in range(2):
        run = fit(pool, loss_of, scheduler=talking_scheduler, steps=2).wait(PATIENCE_SECONDS)
        assert run.output[0] == "hub: the rate at step 0"
        assert events_of(run, "counted") == []


class Talking(torch.utils.data.Dataset):
    """A data set that says something where it is unpickled, and fails on engines."""

    def __init__(self):
        self.owner = os.getpid()

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.zeros(6), torch.tensor(0)

    def __setstate__(self, state):
        self.__dict__.update(state)
        say("unpickled")
        if self.owner != os.getpid():
            raise ValueError("on purpose")


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_what_is_printed_while_a_run_is_loaded_comes_back_also_if_that_fails(pool, transport):
    run = pool.fit(nn.Linear(6, 3), Talking(), loss="cross_entropy", batch_size=32, steps=3, transport=transport)
    wait_until(run, lambda run: not run.is_active, what="nobody could load it")
    assert "on purpose" in run.error
    wait_until(run, lambda run: "unpickled" in [event.text for event in events_of(run, "output")], what="it is told")


def writing_step(model, batch):
    os.write(1, b"of descriptor 1\n")
    os.write(2, b"of descriptor 2\n")
    ctypes.CDLL(None).puts(b"of C's own buffer")
    subprocess.run(["echo", "of a child"], check=True)
    return loss_of(model, batch)


def test_what_c_code_and_children_write_on_engines_comes_back_and_is_in_their_log(leftovers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # where it is, ipykernel does not put its pipes before the log
    pool = open_small_pool(1, profile_dir=tmp_path / "profile")
    try:
        run = fit(pool, writing_step, steps=30).wait(PATIENCE_SECONDS)
        lines = {line.partition(": ")[2] for line in run.output}
        assert lines >= {"of descriptor 1", "of descriptor 2", "of C's own buffer", "of a child"}
        (log,) = (tmp_path / "profile").rglob("ipengine-*.log")
        assert "of a child" in log.read_text()
    finally:
        pool.shutdown()
