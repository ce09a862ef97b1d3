"""An exception in the hub costs what SIGKILL of it costs; user code in it fails its run, and ends nothing else."""

import ctypes
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
import zmq
from torch.utils.data import DataLoader, Sampler, TensorDataset

from dnb.engine.process.worker import engine_facts
from dnb.errors import DnbError, HubError, RunError
from dnb.pool import startup
from dnb.protocol.client_messages import (
    Control,
    Done,
    GetCheckpoint,
    GetMembers,
    GetPool,
    GetRun,
    GetState,
    Hello,
    InjectFault,
    KeepRestart,
    KeepSpares,
    Members,
    PoolState,
    ReplaceFunctions,
    Retire,
    RunState,
    SetOptions,
    StateTree,
    Submit,
    TakeCheckpoint,
)
from dnb.protocol.engine_messages import HubMessage, Join, Load, WorkReport
from dnb.protocol.pool import Address
from dnb.transport.sockets.channels import connect_dealer, encode
from dnb.transport.sockets.wire_connections import connect_wire
from dnb.transport.system.processes import this_process
from tests.engines.pools import open_small_pool, until, wait, wait_until
from tests.faults.throwing import FOLDER_VARIABLE
from tests.models import digits, largest_gap, largest_relative_gap, mlp, plain_run, twice

pytestmark = [pytest.mark.engines, pytest.mark.faults]

ROOT = Path(__file__).parents[2]
# In the order in which they are thrown, one after the other. "kill" ones are met by a hub that begins.
IN_A_STEP = [
    "engine.WorkReport.before",
    "engine.WorkReport.after",
    "coordinator.WorkDone.before",
    "coordinator.WorkDone.after",
    "run_commit.before",
    "run_commit.after",
    "coordinator.Committed.before",
    "coordinator.Committed.after",
    "run_assign.before",
    "run_assign.after",
    "reduce.before",
    "reduce.after",
    "settle.before",
    "publish.before",
    "publish.after",
    "run_do_chores.before",
    "run_do_chores.after",
    "run_prepare.before",
    "run_record.before",
    "run_record.after",
    "run_take_digest.after",
    "run_tick.before",
    "coordinator.Tick.after",
    "tick.before",
    "tick.after",
    "beat.before",
    "beat.after",
]
ROLLED_FORWARD = [
    "roll_forward.before",
    "intent.before",
    "intent.after",
    "raise_steps.after",
    "update.before",
    "update.after",
    "roll_forward.after",
]
ROLLED_BACK = [
    "roll_back.before",
    "copy_aside.before",
    "copy_aside.after",
    "state.before",
    "state.after",
    "roll_back.after",
]
AT_A_BEGINNING = [
    "take_over.before",
    "take_over.after",
    "recover.before",
    "recover.after",
    "run_start.after",
    "run_note.before",
    "join.before",
    "join.after",
    "accept.before",
    "accept.after",
    "attach.before",
    "attach.after",
    "engine.Loaded.before",
    "engine.Loaded.after",
    "coordinator.EngineJoined.after",
    "coordinator.EngineLoaded.after",
    "pool_file.after",
    "memos.after",
]


# More than any machine does while one place throws after the other.
MANY_STEPS = 1_000_000


@pytest.fixture(scope="module")
def throwing_pool(tmp_path_factory):
    """A pool of two engines whose hub throws where it is told to, and the folder in which it is told."""
    folder = tmp_path_factory.mktemp("throws")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "tests.faults.throwing", "controller"]
        patch.setattr(startup, "CONTROLLER_COMMAND", command)
        with open_small_pool(2) as pool:
            yield pool, folder


@pytest.fixture
def throws(throwing_pool):
    """The folder in which places are armed; none is at the beginning, nor at the end."""
    _, folder = throwing_pool
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture
def throwing(throwing_pool, throws, tmp_path, monkeypatch):
    """Its pool, with two engines and without an active run."""
    pool, _ = throwing_pool
    monkeypatch.chdir(tmp_path)
    if len(pool.engines) < 2:
        pool.add(2 - len(pool.engines))
    yield pool
    if pool.run is not None and pool.run.is_active:
        pool.run.stop()
        pool.run.wait(timeout_seconds=60)


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """The shared pool, of which nothing may die, and which still trains after the test."""
    monkeypatch.chdir(tmp_path)
    pool = shared.of(2)
    pids = [engine.pid for engine in pool.engines]
    yield pool
    shared.calm()
    assert [engine.pid for engine in pool.engines] == pids
    trains_still(pool)


def trains_still(pool):
    model, plain = twice(mlp)
    run = wait(pool.fit(model, digits(), loss="cross_entropy", lr=1e-3, steps=3, name="afterwards"))
    assert largest_gap(run.history["loss"], plain_run(plain, digits(), num_steps=3).losses) < 1e-10


def fit(pool, **options):
    return pool.fit(mlp(), digits(), **{"loss": "cross_entropy", "lr": 1e-3, **options})


def fit_exactly(pool, **options):
    return fit(pool, exact=True, shards=4, **options)


def bits_of(run):
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}, run.history["loss"]


def are_same(one, other):
    return one[1] == other[1] and all(torch.equal(one[0][name], tensor) for name, tensor in other[0].items())


def throw_one_by_one(pool, run, throws, places, *, is_at_beginning=False):
    """Arm one place after the other, each when the run has got over the one before."""
    for place in places:
        hub = pool.facts.hub.pid
        (throws / place).touch()
        if is_at_beginning:
            os.kill(hub, signal.SIGKILL)
        until(lambda place=place: (throws / f"{place}.thrown").exists() or not run.is_active, what=f"{place} is thrown")
        at = step_now(pool, run)  # the run may know an older one
        wait_until(run, lambda run, at=at: run.step >= at + 3, what=f"steps after {place}")


def assert_same_as_quiet(pool, run, train=fit_exactly):
    """End a run, and hold it against one of as many steps in which nothing happens."""
    run.stop()
    assert wait(run).status == "stopped", run
    assert are_same(bits_of(run), bits_of(wait(train(pool, steps=run.step))))


def step_now(pool, run):
    state, _ = pool.hub.ask(GetRun(run=run.name, seen={}, seen_events=0), RunState)
    return state.step


# the hub's own exceptions


def test_an_exception_at_every_kind_of_event_leaves_the_same_bits(throwing, throws):
    run = fit_exactly(throwing, steps=MANY_STEPS)
    engines = [engine.pid for engine in throwing.engines]
    wait_until(run, lambda run: run.step > 5, what="the run goes on")
    throw_one_by_one(throwing, run, throws, [*IN_A_STEP, *ROLLED_FORWARD])
    assert_same_as_quiet(throwing, run)
    assert [engine.pid for engine in throwing.engines] == engines


def test_an_exception_while_a_hub_begins_leaves_the_same_bits(throwing, throws):
    run = fit_exactly(throwing, steps=MANY_STEPS)
    wait_until(run, lambda run: run.step > 5, what="the run goes on")
    throw_one_by_one(throwing, run, throws, AT_A_BEGINNING, is_at_beginning=True)
    assert_same_as_quiet(throwing, run)


def test_an_exception_in_an_update_that_is_rolled_back_leaves_the_same_bits(throwing, throws):
    def train(pool, *, steps):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return pool.fit(
            model,
            digits(),
            loss="cross_entropy",
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.99),
            exact=True,
            shards=4,
            steps=steps,
        )

    run = train(throwing, steps=MANY_STEPS)
    wait_until(run, lambda run: run.step > 5, what="the run goes on")
    throw_one_by_one(throwing, run, throws, [*ROLLED_BACK, "publish.before", "publish.after", "settle.after"])
    assert_same_as_quiet(throwing, run, train)


def requests_of(pool, run):
    """Every kind of request that changes nothing of the bits, by its name."""
    engine = pool.engines[0].id
    loss = torch.nn.functional.cross_entropy

    def pause_and_mend():
        run.pause()
        wait_until(run, lambda run: run.status == "paused", what="the pause")
        run.resume(loss=loss)

    return {
        "Hello": lambda: pool.hub.ask(Hello(owner=this_process()), Done),
        "GetPool": lambda: pool.hub.ask(GetPool(), PoolState),
        "GetMembers": lambda: pool.hub.ask(GetMembers(), Members),
        "KeepSpares": lambda: pool.hub.ask(KeepSpares(number=0), Done),
        "KeepRestart": lambda: pool.hub.ask(KeepRestart(policy="never"), Done),
        "InjectFault": lambda: pool.chaos.slow(engine, 1),
        "GetRun": lambda: pool.hub.ask(GetMembers(), Members),  # the run is looked at all the time
        "SetOptions": lambda: run.set(lr=1e-3),
        "GetState": lambda: pool.hub.ask(GetState(run=run.name, optimizer=True), StateTree),
        "TakeCheckpoint": run.checkpoint,
        "GetCheckpoint": run.checkpoint,
        "ReplaceFunctions": pause_and_mend,
        "Control": pause_and_mend,
        "Retire": lambda: pool.remove(engine),
    }


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_exception_in_every_kind_of_request_leaves_the_same_bits(throwing, throws, moment):
    run = fit_exactly(throwing, steps=MANY_STEPS)
    wait_until(run, lambda run: run.step > 5, what="the run goes on")
    told = {}
    for kind, ask in requests_of(throwing, run).items():
        place = f"request.{kind}.{moment}"
        (throws / place).touch()
        try:
            ask()
        except HubError as error:  # what must not be asked twice by itself
            told[kind] = str(error)
        until(lambda place=place: (throws / f"{place}.thrown").exists(), what=f"{place} is thrown")
        at = step_now(throwing, run)
        wait_until(run, lambda run, at=at: run.step >= at + 3, what=f"steps after {place}")
    assert_same_as_quiet(throwing, run)
    assert list(told) == ["InjectFault"]
    assert f"(ThrownError: thrown at request.InjectFault.{moment} (in " in told["InjectFault"]
    assert "look whether that was done" in told["InjectFault"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_a_hub_was_given_and_died_of_is_begun_once_by_the_next_one(throwing, throws, moment):
    quiet = bits_of(wait(fit_exactly(throwing, steps=30)))
    (throws / f"request.Submit.{moment}").touch()
    run = wait(fit_exactly(throwing, steps=30))
    assert (throws / f"request.Submit.{moment}.thrown").exists()
    assert are_same(bits_of(run), quiet)
    assert (run.status, run.name) == ("finished", "sequential-2")  # not a third one


def test_the_reason_stays_with_the_pool_and_its_run(throwing, throws):
    run = fit(throwing, steps=MANY_STEPS)
    wait_until(run, lambda run: run.step > 5, what="the run goes on")
    throw_one_by_one(throwing, run, throws, ["tick.before"])
    run.stop()
    wait(run)
    reason = "ThrownError: thrown at tick.before (in throw_if_asked (throwing.py:"
    told = next(event.text for event in run.events if event.kind == "recovered")
    assert reason in told
    restart = throwing.restarts[-1]
    assert restart.reason.startswith(reason)
    assert "in _tick" in restart.traceback or "wrapped" in restart.traceback
    kept = (throwing._security_dir / f"dnb-pool-{throwing.cluster_id}.json").read_text()
    assert "thrown at tick.before" in kept


def test_a_hub_that_dies_of_one_cause_in_one_step_fails_the_run_and_keeps_pool_and_weights(throwing, throws):
    engines = [engine.pid for engine in throwing.engines]
    run = fit(throwing, steps=MANY_STEPS)
    wait_until(run, lambda run: run.step > 20, what="the run goes on")
    (throws / "reduce.before").write_text("always")
    with pytest.raises(RunError, match=r"(?s)the hub died 3 times in step \d+, .*thrown at reduce\.before.*Traceback"):
        wait(run)
    (throws / "reduce.before").unlink()
    assert (run.status, throwing.facts.run_status) == ("failed", "failed")
    assert len(run.history["loss"]) == run.step > 20
    plain_model = mlp()
    plain_run(plain_model, digits(), num_steps=run.step)
    assert largest_relative_gap(run.model, plain_model) < 1e-10
    assert [engine.pid for engine in throwing.engines] == engines
    trains_still(throwing)


def test_a_run_that_no_hub_can_take_over_is_left_alone_and_says_why(throwing, throws):
    run = fit(throwing, steps=MANY_STEPS)
    wait_until(run, lambda run: run.step > 20, what="the run goes on")
    (throws / "recover.before").write_text("always")
    os.kill(throwing.facts.hub.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"(?s)the hub died .*thrown at recover\.before.*Traceback"):
        wait(run)
    assert run.status == "failed"
    assert len(run.history["loss"]) >= 20
    assert "failed" in [event.kind for event in run.events]
    (throws / "recover.before").unlink()
    os.kill(throwing.facts.hub.pid, signal.SIGKILL)  # the next one knows it, too
    until(lambda: throwing.facts.run_status == "failed", what="another hub says so")
    trains_still(throwing)


# user code in the hub


class Faulty(Sampler):
    """Yields every index once, but for one, in the place of which it raises or yields something else."""

    def __init__(self, wrong, *, at=130) -> None:
        self.wrong = wrong
        self.at = at

    def __len__(self):
        return 256

    def __iter__(self):
        for index in range(256):
            if index == self.at and isinstance(self.wrong, type):
                raise self.wrong("no more of this class")
            yield self.wrong if index == self.at else index


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (RuntimeError, "RuntimeError: no more of this class"),
        (SystemExit, "SystemExit: no more of this class"),
        (KeyboardInterrupt, "KeyboardInterrupt: no more of this class"),
        (MemoryError, "MemoryError: no more of this class"),
        (GeneratorExit, "GeneratorExit: no more of this class"),
        ("cat", "the sampler Faulty yielded 'cat'"),
        (256, "the sampler Faulty yielded 256"),
        ((3, 4), r"the sampler Faulty yielded \(3, 4\)"),
        (2.5, r"the sampler Faulty yielded 2\.5"),
    ],
    ids=str,
)
def test_a_sampler_that_fails_fails_the_run_after_all_steps_before(pool, wrong, told):
    hub = pool.facts.hub.pid
    inputs, targets = digits(256)
    data = TensorDataset(inputs, targets)
    run = pool.fit(mlp(), DataLoader(data, batch_size=32, sampler=Faulty(wrong)), loss="cross_entropy", lr=1e-3)
    with pytest.raises(RunError, match=rf"(?s)step 5: .*{told}.*\(in the sampler\).*Traceback"):
        wait(run)
    whole = plain_run(mlp(), (inputs, targets), num_steps=4, batch_size=32, shuffle=False)
    assert largest_gap(run.history["loss"], whole.losses) < 1e-10
    assert (run.status, run.step, pool.facts.hub.pid) == ("failed", 4, hub)


def test_a_sampler_that_breaks_its_promise_of_a_length_is_told(pool):
    class Short(Faulty):
        def __iter__(self):
            return iter(range(64))

    data = TensorDataset(*digits(256))
    run = wait(pool.fit(mlp(), DataLoader(data, batch_size=32, sampler=Short(0)), loss="cross_entropy", lr=1e-3))
    told = [event.text for event in run.events if event.kind == "data"]
    assert len(told) == 1
    assert "the sampler Short gave 2 batches in epoch 1, and by its __len__ it has 8" in told[0]


class Raising(torch.optim.SGD):
    """Raises in one step whatever it is told to."""

    def __init__(self, parameters, error) -> None:
        super().__init__(parameters, lr=0.1)
        self.error = error
        self.left = 4

    def step(self, closure=None):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().step(closure)


@pytest.mark.parametrize(
    "error",
    [SystemExit(0), KeyboardInterrupt(), MemoryError(), ValueError("\ud800\0"), ValueError("x" * 10**6)],
    ids=lambda error: type(error).__name__,
)
def test_an_optimizer_that_fails_fails_the_run(pool, error):
    hub = pool.facts.hub.pid
    run = fit(pool, optimizer=partial(Raising, error=error), lr=None, steps=8)
    with pytest.raises(RunError, match=rf"(?s)step 4: {type(error).__name__}.*\(in the optimizer.*\).*Traceback"):
        wait(run)
    assert (run.status, run.step, pool.facts.hub.pid) == ("failed", 3, hub)


def test_a_scheduler_that_exits_fails_the_run(pool):
    def factor(step):
        if step == 3:
            sys.exit("enough")
        return 1.0

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    run = pool.fit(mlp(), digits(), loss="cross_entropy", lr=1e-3, scheduler=scheduler, steps=8)
    with pytest.raises(RunError, match=r"(?s)step 3: SystemExit: enough \(in the scheduler\).*Traceback"):
        wait(run)


def test_an_optimizer_that_cannot_be_made_is_refused_with_its_traceback(pool):
    def make(parameters):
        raise SystemExit("no optimizer today")

    with pytest.raises(RunError, match=r"(?s)SystemExit: no optimizer today \(where the optimizer is made\).*in make"):
        fit(pool, optimizer=make, lr=None, steps=3)


class OnlyHere:
    """Cannot be unpickled in a hub."""

    def __setstate__(self, state):
        if "hub" in psutil.Process().name():
            raise KeyboardInterrupt("not in a hub")

    def __getstate__(self):
        return {"a": 1}

    def __call__(self, output, target):
        return torch.nn.functional.cross_entropy(output, target)


def test_objects_that_cannot_be_unpickled_are_refused_with_their_traceback(pool):
    with pytest.raises(
        RunError, match=r"(?s)KeyboardInterrupt: not in a hub \(where the run's objects are unpickled\)"
    ):
        fit(pool, loss=OnlyHere(), steps=3)


class Crashing(torch.optim.SGD):
    """Ends its process in the sixth step, however often that is tried: a group is kept over a hub's death."""

    def __init__(self, parameters, kind) -> None:
        super().__init__(parameters, lr=0.1)
        self.kind = kind
        self.param_groups[0]["count"] = 0

    def step(self, closure=None):
        self.param_groups[0]["count"] += 1
        if self.param_groups[0]["count"] == 6:
            self.end()
        return super().step(closure)

    def end(self):
        if self.kind == "native":
            ctypes.string_at(0)
        os._exit(0)


@pytest.mark.parametrize(("kind", "told"), [("native", r"SIGSEGV in string_at.*in end"), ("exit", "ended with code 0")])
def test_an_optimizer_that_ends_its_process_fails_the_run_only(throwing, kind, told):
    engines = [engine.pid for engine in throwing.engines]
    run = fit(throwing, optimizer=partial(Crashing, kind=kind), lr=None, steps=8)
    with pytest.raises(RunError, match=rf"(?s)the hub died 3 times in step 6, .*{told}"):
        wait(run)
    assert run.step == 5
    assert [engine.pid for engine in throwing.engines] == engines
    trains_still(throwing)


# who asks in the second after a hub's death


@pytest.mark.parametrize("num_deaths", [1, 2])
def test_a_fit_just_after_a_hub_s_death_waits_for_the_engines(pool, num_deaths):
    for _ in range(num_deaths):
        before = psutil.Process(pool._supervisor.pid).children()
        hub = next(child for child in before if child.name() == "dnb-hub")
        hub.kill()
        hub.wait(10)
        until(
            lambda: any(child.name() == "dnb-hub" for child in psutil.Process(pool._supervisor.pid).children()),
            what="another hub is started",
        )
    run = fit(pool, steps=20)
    assert wait(run).status == "finished"
    assert {worker.engine for worker in run.workers} == {engine.id for engine in pool.engines}


def test_just_after_a_hub_s_death_engines_are_counted_and_named_as_before(pool):
    engines = [engine.id for engine in pool.engines]
    os.kill(pool.facts.hub.pid, signal.SIGKILL)
    assert [engine.id for engine in pool.engines] == engines
    os.kill(pool.facts.hub.pid, signal.SIGKILL)
    pool.chaos.slow(engines[1], 1)


def test_a_run_is_steered_just_after_a_hub_s_death(pool):
    run = fit(pool, steps=MANY_STEPS)
    wait_until(run, lambda run: run.step > 5, what="the run goes on")

    def kill():
        os.kill(pool.facts.hub.pid, signal.SIGKILL)

    kill()
    run.set(lr=2e-3)
    kill()
    run.pause()
    wait_until(run, lambda run: run.status == "paused", what="the pause")
    kill()
    run.resume()
    wait_until(run, lambda run: run.step > 10, what="the run goes on")
    kill()
    run.checkpoint()
    run.stop()
    assert wait(run).status == "stopped"


# peers who say what makes no sense


def garbage():
    yield []
    yield [b""]
    yield [b"\x83\xa4type\xa6Attach\xa6engine\x00\xa5proof\xa3\xff\xfe\xfd"]
    yield [b"\x81\xa4type\xa2\xff\xfe"]
    yield [b"\x91" * 100_000]
    yield [b"\xdd\xff\xff\xff\xff"]
    yield [msgspec.msgpack.encode({"type": "Heartbeat", "engine": 2**63, "process": None})]
    yield [
        msgspec.msgpack.encode(
            {"type": "Heartbeat", "engine": 0, "process": {"host": "h", "pid": 2**40, "create_time": 1.0}}
        )
    ]
    yield [os.urandom(300)] * 5


@pytest.fixture
def address_of(pool):
    """The hub's address for a role, with its keys, as connection files have it."""

    def find(role):
        file = pool._security_dir / f"ipcontroller-{pool.cluster_id}-{role}.json"
        return msgspec.convert(json.loads(file.read_text())["dnb"]["address"], Address)

    return find


@pytest.mark.parametrize("role", ["engine", "client"])
def test_garbage_from_whoever_has_the_keys_changes_nothing(pool, address_of, role):
    hub = pool.facts.hub.pid
    run = fit(pool, steps=300)
    context = zmq.Context()
    dealer = connect_dealer(context, address_of(role), identity=b"engine-77" if role == "engine" else b"client-x")
    for number, frames in enumerate(garbage()):
        if role == "client":
            dealer.send_multipart([b"%d" % number, *frames])
        if frames:
            dealer.send_multipart(frames)
    dealer.close(linger=2000)
    context.term()
    assert wait(run).status == "finished"
    assert (pool.facts.hub.pid, len(pool.engines)) == (hub, 2)


def test_requests_that_make_no_sense_are_each_refused_by_the_same_hub(pool):
    hub = pool.facts.hub.pid
    run = fit(pool, steps=600)
    name = run.name
    senseless = [
        Retire(engines=(-1,), force=True),
        Retire(engines=(10**9,), force=False),
        KeepSpares(number=-5),
        KeepSpares(number=10**9),
        InjectFault(verb="kill", engine=99),
        InjectFault(verb="stop", engine=pool.engines[0].id, amount=float("inf")),
        InjectFault(verb="slow", engine=pool.engines[0].id, amount=float("nan")),
        Submit(),
        SetOptions(run=name, options={"lr": float("nan")}),
        SetOptions(run=name, options={"lr": float("inf"), "params": 1.0}),
        SetOptions(run=name, options={}),
        ReplaceFunctions(run=name),
        TakeCheckpoint(run=name, path="\0"),
        TakeCheckpoint(run=name, path="/proc/nowhere/" + "x" * 5000),
        GetCheckpoint(run=name, ticket=-3),
        GetRun(run=name, seen={"loss": -5}, seen_events=0),
        GetRun(run=name, seen={}, seen_events=-1),
        GetRun(run="nobody", seen={}, seen_events=0),
        Control(run="nobody", verb="stop"),
        GetState(run="nobody", optimizer=True),
    ]
    for request in senseless:
        with pytest.raises(DnbError):
            pool.hub.ask(request, Done)
    for request, frames in [(Submit(), [b"x"] * 4), (Submit(), [b"x"] * 3), (ReplaceFunctions(run=name), [b"x"] * 2)]:
        with pytest.raises(DnbError):
            pool.hub.ask(request, Done, frames=frames)
    assert wait(run).status == "finished"
    assert pool.facts.hub.pid == hub


def test_a_report_that_makes_no_sense_costs_its_engine_its_wire_and_nobody_else(pool, address_of):
    hub = pool.facts.hub.pid
    run = fit(pool, steps=MANY_STEPS)
    wait_until(run, lambda run: run.step > 5, what="the run goes on")
    context = zmq.Context()
    dealer = connect_dealer(context, address_of("engine"), identity=b"engine-77")
    dealer.send_multipart(encode(Join(facts=engine_facts(77, num_threads=1))))
    load = None
    while load is None:
        assert dealer.poll(10_000), "the hub does not take the engine in"
        message = msgspec.msgpack.decode(dealer.recv_multipart()[0], type=HubMessage)
        load = message if isinstance(message, Load) else None
    wire = connect_wire(load.wire, engine=77, timeout_seconds=10)
    wire.send(
        WorkReport(
            run=load.run,
            lease=1,
            kind="step",
            step=1,
            shards=(0,),
            parts=(),
            is_sum=False,
            unused=(99999,),
            telemetry=None,
            digests=b"7 bytes",
        )
    )
    wait_until(run, lambda run: any("was cut off" in event.text for event in run.events), what="it is cut off")
    until(lambda: [wire.receive(), wire.is_closed][1], what="its wire is closed")
    at = run.step
    wait_until(run, lambda run: run.step > at + 3, what="the run goes on")
    dealer.close(linger=0)
    context.term()
    told = next(event for event in run.events if "was cut off" in event.text)
    assert (told.engine, pool.facts.hub.pid) == (77, hub)
    assert "(99999,) are said to be unused" in told.text
    run.stop()
    wait(run)
