"""Pools that grow and shrink, in mid-run and between runs; spares, and the replacement of the dead."""

import os
import signal
import statistics
import sys
import threading
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnb.errors import ArgumentError, PoolError
from dnb.hub.history.run_files import read_history
from dnb.transport.system.processes import children_of, is_alive
from tests.engines.pools import open_small_pool, until, wait, wait_until
from tests.models import cross_entropy_step, digits, dropout_net, largest_gap, mlp, plain_losses, twice

pytestmark = pytest.mark.engines

BATCH_SIZE = 64


def numbered():
    """Pixels, targets, and the number of each sample."""
    pixels, targets = digits()
    return TensorDataset(pixels, targets, torch.arange(len(targets)))


def numbers_of_batches():
    loader = DataLoader(numbered(), BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(0))
    return [batch[2].tolist() for batch in loader]


class Gates:
    """At some samples the engine that has them says so, and waits until it may go on; each once.

    Args:
        at: number of the sample, by the name of the gate.
        folder: of the pipes.
    """

    def __init__(self, at, *, folder):
        self.at = at
        self.folder = folder
        for name in at:
            os.mkfifo(folder / f"reached-{name}")
            os.mkfifo(folder / f"open-{name}")

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        *samples, numbers = batch
        for name, number in self.at.items():
            if number in numbers.tolist() and self._is_first(name):
                (self.folder / f"reached-{name}").write_text("")
                (self.folder / f"open-{name}").read_text()
        return cross_entropy_step(model, samples)

    def wait(self, name):
        (self.folder / f"reached-{name}").read_text()

    def open(self, name):
        (self.folder / f"open-{name}").write_text("")

    def _is_first(self, name):
        try:
            (self.folder / f"passed-{name}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """The shared pool, with one engine."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(1)
    shared.calm()


def kill(pool, engine):
    pid = next(each.pid for each in pool.engines if each.id == engine)
    os.kill(pid, signal.SIGKILL)


def wait_for_step(run, step):
    wait_until(run, lambda run: run.step >= step, what=f"step {step}")


def told(run, *kinds):
    return [(event.kind, event.engine) for event in run.events if event.kind in kinds and event.step]


def samples_by_engine(run):
    return {worker.engine: worker.samples for worker in run.workers}


def grow_and_shrink(pool, folder, model, *, num_steps, **options):
    """Train a model while one engine joins in step 10 and leaves in step 25; the run, and who it was."""
    batches = numbers_of_batches()
    gates = Gates({"grow": batches[9][0], "shrink": batches[24][-1]}, folder=folder)
    run = pool.fit(model, numbered(), step=gates, lr=1e-3, batch_size=BATCH_SIZE, steps=num_steps, **options)
    gates.wait("grow")
    (newcomer,) = pool.add(1)
    wait_until(run, lambda run: ("joined", newcomer) in told(run, "joined"), what=f"engine {newcomer} takes part")
    gates.open("grow")
    gates.wait("shrink")  # the newcomer is in the middle of its shards
    leaving = threading.Thread(target=pool.remove, args=([newcomer],), name="leaving")
    leaving.start()
    until(lambda: newcomer in pool._members().leaving, what=f"engine {newcomer} is asked to leave")
    gates.open("shrink")
    leaving.join(60)
    wait(run)
    return run, newcomer


def test_a_run_whose_pool_grows_and_shrinks_has_the_loss_of_a_plain_loop(pool, tmp_path):
    run, newcomer = grow_and_shrink(pool, tmp_path, mlp(), num_steps=50)
    plain = plain_losses(mlp(), digits(), num_steps=50, batch_size=BATCH_SIZE)
    assert largest_gap(run.history["loss"], plain) <= 1e-10
    assert told(run, "joined", "left", "died") == [("joined", newcomer), ("left", newcomer)]
    assert samples_by_engine(run)[newcomer] > 10 * BATCH_SIZE // 4
    assert sum(samples_by_engine(run).values()) == 1797 + BATCH_SIZE * (50 - 29)
    assert [worker.state for worker in run.workers] == ["ready", "left"]


def test_an_exact_run_whose_pool_grows_and_shrinks_comes_to_the_same_bits(pool, tmp_path):
    model, still = twice(dropout_net)
    run, newcomer = grow_and_shrink(pool, tmp_path, model, num_steps=28, exact=True)
    alone = wait(pool.fit(still, digits(), loss="cross_entropy", lr=1e-3, batch_size=BATCH_SIZE, steps=28, exact=True))
    assert samples_by_engine(run)[newcomer] > 0
    assert run.history["loss"] == alone.history["loss"]
    assert run.history["digest"][-1] == alone.history["digest"][-1]


def test_an_engine_that_was_removed_leaves_no_process_and_no_trace_in_the_pool(pool):
    (newcomer,) = pool.add(1)
    process = next(status.facts.process for status in pool.statuses if status.facts.engine == newcomer)
    processes = [process, *children_of([process])]
    assert len(processes) >= 2  # ipyparallel's nanny is one
    pool.remove(newcomer)
    assert [each for each in processes if is_alive(each)] == []
    assert newcomer not in [engine.id for engine in pool.engines]
    assert newcomer not in pool.client.ids


def test_the_memory_of_an_engine_that_left_is_given_back_while_the_run_goes_on(pool):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", transport="memory", epochs=100_000)
    (newcomer,) = pool.add(1)
    wait_until(run, lambda run: samples_by_engine(run).get(newcomer, 0) > 0, what="the newcomer works")

    def slabs():
        return [path for folder in pool.segment_folders for path in folder.glob(f"*slab-{newcomer}-*")]

    assert len(slabs()) == 1
    pool.remove(newcomer)
    until(lambda: slabs() == [], what="its slab is gone")
    assert run.status == "running"


def test_engines_that_were_added_before_a_run_all_take_part_in_it(pool):
    threads = [engine.cores for engine in pool.engines]
    new = pool.add(2)
    assert [engine.cores for engine in pool.engines] == threads * 3
    run = wait(pool.fit(mlp(), digits(), loss="cross_entropy", steps=20))
    assert set(samples_by_engine(run)) > set(new)
    assert all(samples_by_engine(run).values())


def test_the_others_keep_committing_while_an_engine_is_started_and_joins(pool, capsys):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000)
    wait_for_step(run, 100)
    before = run.step
    (newcomer,) = pool.add(1)
    wait_until(run, lambda run: ("joined", newcomer) in told(run, "joined"), what="the newcomer takes part")
    joined = next(event for event in run.events if event.kind == "joined" and event.engine == newcomer)
    wait_for_step(run, joined.step + 500)
    run.stop()
    wait(run)
    assert joined.step > before + 100
    times = [row.time for row in read_history(run.folder) if row.kind == "step"]
    gaps = [late - early for early, late in pairwise(times)]
    starting, joining = gaps[before : joined.step - 2], gaps[joined.step - 2 : joined.step + 20]
    median = statistics.median(gaps[:before])
    with capsys.disabled():
        sys.stdout.write(
            f"\na step takes {1e3 * median:.2f} ms; {joined.step - before} steps while the engine was started, the "
            f"longest {max(starting) / median:.1f} medians; the longest about its joining {max(joining) / median:.1f}\n"
        )


def test_a_run_waits_when_its_last_engine_is_removed_by_force_and_goes_on_with_another(pool):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, steps=20_000)
    (last,) = pool.engines
    wait_for_step(run, 3)
    pool.remove(last.id, force=True)
    wait_until(run, lambda run: run.status == "paused", what="the run is paused")
    assert "the last engine left. %dtrain add, then %dtrain resume" in run.events[-1].text
    at = run.step
    (other,) = pool.add(1)
    run.resume()
    wait_for_step(run, at + 50)
    assert samples_by_engine(run)[other] > 0
    plain = plain_losses(mlp(), digits(), num_steps=50, batch_size=64)
    assert largest_gap(run.history["loss"][:50], plain) <= 1e-10


def test_the_last_engine_of_an_active_run_is_not_removed_without_force(pool):
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000, name="keen")
    last = pool.engines[0].id
    with pytest.raises(ArgumentError, match=rf"run 'keen.*' is active.*%dtrain remove {last} --force"):
        pool.remove(last)
    at = run.step
    wait_for_step(run, at + 5)


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        ([977], "no engine 977: there are "),
        ([], "engines are named by their ids"),
        (["1"], "engines are named by their ids, not '1'"),
        ([True], "engines are named by their ids, not True"),
    ],
)
def test_engines_that_are_none_cannot_be_removed(pool, engines, message):
    with pytest.raises(ArgumentError, match=message):
        pool.remove(engines)


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (0, "n must be an integer of at least 1, not 0: %dtrain add 1"),
        ("two", "n must be an integer of at least 1, not 'two'"),
        (100_000, r"100000 more engines need about 30000\.0 GB .* GB is free: %dtrain add \d+ fits"),
    ],
)
def test_a_number_of_engines_that_cannot_be_added_is_refused(pool, n, message):
    before = [engine.id for engine in pool.engines]
    with pytest.raises(ArgumentError, match=message):
        pool.add(n)
    assert [engine.id for engine in pool.engines] == before


def test_engines_that_do_not_come_up_in_time_are_ended_and_the_limit_is_named(pool, leftovers):
    before = set(leftovers.find())
    with pytest.raises(PoolError, match=r"2 of 2 engines did not come up, .*the limit of 0\.2 s is over"):
        pool.add(2, timeout_seconds=0.2)
    until(lambda: set(leftovers.find()) <= before, what="nothing is left")
    assert len(pool.engines) == 1


# A thread of ipyparallel waits for the process, and may have been stopped before it has seen the end.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_an_engine_that_ends_at_once_is_told_with_what_it_said(pool, monkeypatch):
    command = [sys.executable, "-c", "raise SystemExit('no luck today')"]
    monkeypatch.setitem(pool._starter._cluster.config["EngineLauncher"], "engine_cmd", command)
    with pytest.raises(PoolError, match=r"(?s)1 of 1 engines did not come up.*an engine ended at once.*no luck today"):
        pool.add(1)


def test_a_spare_holds_the_run_and_does_nothing_until_an_engine_dies(pool):
    pool.spares = 1
    (worker,), (spare,) = pool._members().workers, pool._members().spares
    run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, epochs=100_000)
    wait_for_step(run, 20)
    assert [(engine.id, engine.state) for engine in pool.engines if engine.id == spare] == [(spare, "spare")]
    assert samples_by_engine(run)[spare] == 0
    pool._stop_keeping()  # so that none can be started
    kill(pool, worker)
    wait_until(run, lambda run: samples_by_engine(run)[spare] > 0, what="the spare works")
    wait_for_step(run, run.step + 20)
    assert told(run, "died", "joined", "reassigned", "paused") in (
        [("joined", spare), ("died", worker), ("reassigned", worker)],
        [("joined", spare), ("died", worker)],  # between two steps
    )
    plain = plain_losses(mlp(), digits(), num_steps=50, batch_size=64)
    wait_for_step(run, 50)
    assert largest_gap(run.history["loss"][:50], plain) <= 1e-10


def test_a_spare_that_has_taken_over_is_replaced_and_the_next_one_has_the_run(pool):
    pool.spares = 1
    (worker,), (spare,) = pool._members().workers, pool._members().spares
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000)
    wait_for_step(run, 20)
    kill(pool, worker)
    until(lambda: pool._members().workers == (spare,) and len(pool._members().spares) == 1, what="a new spare")
    (following,) = pool._members().spares
    wait_until(run, lambda run: ("spare", following) in told(run, "spare"), what="it has loaded the run")
    assert samples_by_engine(run)[following] == 0


def test_spares_that_are_too_many_are_ended(pool):
    pool.keep_spares(1)
    pool.keep_spares(0)
    assert [engine.state for engine in pool.engines] == ["ready"]
    assert pool.spares == 0


@pytest.mark.parametrize("n", [-1, 1.5, True, "one"])
def test_a_number_of_spares_that_is_none_is_refused(pool, n):
    with pytest.raises(ArgumentError, match="the number of spares must be 0 or more"):
        pool.keep_spares(n)


def test_an_engine_that_dies_is_replaced_if_that_is_asked_for(pool):
    (second,) = pool.add(1)
    pool.restart = "always"
    run = pool.fit(mlp(), digits(), loss="cross_entropy", epochs=100_000)
    wait_for_step(run, 20)
    kill(pool, second)
    until(lambda: pool._members().workers[-1] > second, what="a new engine")
    newcomer = pool._members().workers[-1]
    wait_until(run, lambda run: samples_by_engine(run).get(newcomer, 0) > 0, what="the new engine works")
    assert told(run, "died") == [("died", second)]


def test_another_policy_of_replacement_is_refused(pool):
    with pytest.raises(ArgumentError, match="restart must be 'never' or 'always', not 'sometimes'"):
        pool.restart = "sometimes"


def test_a_pool_that_is_shut_down_ends_what_it_was_starting(leftovers):
    before = set(leftovers.find())
    pool = open_small_pool(1)
    pool.restart = "always"
    until(lambda: len(pool.client.ids) == 1, what="one engine")
    kill(pool, pool.engines[0].id)
    until(lambda: not pool._members().workers, what="its death is seen")
    until(pool._size_lock.locked, what="another is being started")
    pool.shutdown()
    until(lambda: set(leftovers.find()) <= before, what="nothing is left")
