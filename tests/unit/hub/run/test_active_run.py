"""A run in the hub, with engines that are played: what they are sent, and what becomes of what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from dnb.hub.message_checks import PeerError
from dnb.hub.run.active_run import ActiveRun
from dnb.hub.run.initial_state import new_run
from dnb.hub.run.pool_links import PoolLinks
from dnb.hub.scheduling.events import EngineLost
from dnb.protocol.client_messages import GetRun
from dnb.protocol.engine_messages import (
    AddSlabs,
    Diagnose,
    Diagnosis,
    FunctionsReplaced,
    Load,
    Loaded,
    NoSharedMemory,
    Printed,
    Shipped,
    Unload,
    WireOffer,
    Work,
    WorkFailed,
    WorkReport,
)
from dnb.protocol.measurements import Sums, Telemetry
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import Failure
from dnb.transport.layout import slot_views
from dnb.transport.system.processes import this_process
from tests.unit.kept_runs import SPEC, job_of

OFFER = WireOffer(url="unix://nowhere", token="secret")


class PlayedWire:
    """A wire that leads nowhere."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.slots: list[int] = []  # of what was sent in pieces
        self.receive_buffers: dict[int, Any] = {}
        self.is_closed = False

    def queue(self, record: Any, raw: Any = b"") -> None:
        self.records.append(record)

    def send(self, record: Any, raw: Any = b"") -> None:
        self.records.append(record)

    def queue_pieces(self, slot: int, source: Any, ranges: Any) -> None:
        self.slots.append(slot)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True

    def of(self, kind: type) -> list[Any]:
        """The records of one kind."""
        return [record for record in self.records if type(record) is kind]


class PlayedRun:
    """A run of a linear model with batches of 4 samples in 2 shards, and its engines."""

    def __init__(self, folder: Path, *, num_engines: int = 2, **numbers: Any) -> None:
        torch.manual_seed(0)
        (folder / "shm").mkdir(parents=True)
        job = job_of(nn.Linear(2, 1))
        spec = msgspec.structs.replace(SPEC, folder=str(folder / "run"), exact=False, **numbers)
        self.folder = folder / "run"
        self.sent: list[tuple[int, Any]] = []
        self.released: list[int] = []
        self.condemned: list[int] = []
        self.num_commits = 0
        self.wires: dict[int, PlayedWire] = {}
        self.run = ActiveRun(
            spec,
            [b"spec", b"job", b"data", b"signature"],
            new_run(spec, job, folders=[folder / "shm"]),
            engines=[facts_of(engine) for engine in range(num_engines)],
            pool=PoolLinks(
                send=lambda engine, record, _frames: self.sent.append((engine, record)),
                offer_wire=lambda _engine, _kind, **_: OFFER,
                release=self.released.append,
                evict=self.condemned.append,
                replace=lambda _: None,
                count_commit=self._count,
            ),
        )
        self.run.start()

    def _count(self, _step: int) -> None:
        self.num_commits += 1

    def load(self, *engines: int) -> PlayedRun:
        """Let engines connect their wires, and load the run."""
        for engine in engines:
            self.wires[engine] = PlayedWire()
            self.run.attach(engine, self.wires[engine])
        for engine in engines:
            self.run.take(engine, Loaded(run="0"))
        return self

    def work_of(self, engine: int) -> Work:
        """What an engine was given last."""
        return self.wires[engine].of(Work)[-1]

    def answer(self, engine: int, *, gradient: float = 0.5, **more: Any) -> PlayedRun:
        """Let an engine report what it was given last, with the same number for all of its gradient."""
        work = self.work_of(engine)
        slab = self.run.master.slabs_of(engine)[work.slabs[0]]
        for view in slot_views(self.run.master.gradient_layout, slab.flat.memory).values():
            view.fill_(gradient)
        num_samples = sum(work.shard_sizes)
        report = WorkReport(
            run="0",
            lease=work.lease,
            kind=work.kind,
            step=work.step,
            shards=work.shards,
            parts=(Sums(num_samples * 0.25, float(num_samples), {}, {}, num_samples),),
            is_sum=False,
            unused=(),
            telemetry=None,
        )
        self.run.take(engine, msgspec.structs.replace(report, **more))
        return self

    def step(self, number: int = 1) -> PlayedRun:
        """Steps of all engines."""
        for _ in range(number):
            for engine in self.wires:
                self.answer(engine)
        return self

    def texts(self, kind: str) -> list[str]:
        """The events of one kind."""
        state, _ = self.run.state(GetRun(run="digits", seen={}, seen_events=0), heartbeats={})
        return [event.text for event in state.events if event.kind == kind]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())


def facts_of(engine: int, *, host: str | None = None) -> EngineFacts:
    process = this_process()
    process = process if host is None else msgspec.structs.replace(process, host=host)
    return EngineFacts(
        engine=engine, process=process, cores=1, memory_bytes=1 << 30, device="cpu", torch_version=torch.__version__
    )


@pytest.fixture
def play(tmp_path: Path):
    played: list[PlayedRun] = []

    def make(**numbers: Any) -> PlayedRun:
        played.append(PlayedRun(tmp_path / str(len(played)), **numbers))
        return played[-1]

    yield make
    for each in played:
        each.run.close()


def test_every_engine_is_sent_the_run_when_it_starts(play):
    assert [(engine, type(record)) for engine, record in play().sent] == [(0, Load), (1, Load)]


def test_the_work_of_the_first_step_is_given_when_all_have_loaded(play):
    played = play().load(0, 1)
    assert [(played.work_of(e).step, played.work_of(e).shards) for e in (0, 1)] == [(1, (0,)), (1, (1,))]


def test_a_step_that_all_have_reported_is_committed_and_the_next_one_given(play):
    played = play().load(0, 1).step()
    assert (played.run.step, played.num_commits, played.work_of(0).step) == (1, 1, 2)


def test_a_step_is_in_the_history_once_what_was_put_off_is_done(play):
    played = play().load(0, 1).step()
    before = (played.folder / "history.jsonl").read_text()
    played.run.run_deferred()
    rows = [json.loads(line) for line in (played.folder / "history.jsonl").read_text().splitlines()]
    assert (before, [(row["step"], row["values"]["loss"]) for row in rows]) == ("", [(1, 0.25)])


def test_an_engine_without_shared_memory_is_sent_everything_over_its_wire(play):
    played = play(transport={"0": "socket"}).load(0, 1)
    uploaded = [type(record) for record in played.wires[0].records[:2]]
    assert (uploaded, len(played.wires[0].receive_buffers), played.wires[1].slots) == ([AddSlabs, Shipped], 1, [])


def test_parameters_go_over_a_socket_again_after_every_step(play):
    played = play(transport={"0": "socket"}).load(0, 1)
    before = len(played.wires[0].slots)
    played.step(2)
    assert len(played.wires[0].slots) - before == 2


def test_an_engine_on_another_host_gets_a_socket(play):
    played = play(num_engines=1)
    played.run.add_engine(facts_of(7, host="elsewhere"))
    assert [(engine, record.transport) for engine, record in played.sent] == [(0, "memory"), (7, "socket")]


def test_an_engine_that_cannot_map_memory_loads_again_over_a_socket(play):
    played = play()
    played.run.take(1, NoSharedMemory(run="0", reason="no /dev/shm"))
    assert [(engine, record.transport) for engine, record in played.sent[2:]] == [(1, "socket")]
    assert played.texts("memory") == ["engine 1 gets its data over a socket: no /dev/shm"]


def test_a_wire_of_an_engine_that_takes_no_part_is_closed(play):
    wire = PlayedWire()
    play().run.attach(9, wire)
    assert wire.is_closed


def test_a_gradient_that_is_not_finite_is_looked_for_by_its_engine(play):
    played = play().load(0, 1).answer(0).answer(1, gradient=float("nan"))
    asked = played.wires[1].of(Diagnose)
    assert [(each.step, each.shards) for each in asked] == [(1, (1,))]
    assert played.run.status == "running"


def test_the_place_of_what_is_not_finite_is_in_the_refusal(play):
    played = play().load(0, 1).answer(0).answer(1, gradient=float("nan"))
    played.run.take(1, Diagnosis(run="0", step=1, shard=1, parameter="weight", kind="NaN"))
    assert played.run.status == "paused"
    assert "engine 1, shard 1: the gradient of 'weight' is NaN" in played.texts("paused")[0]


def test_the_place_of_another_step_is_not_taken(play):
    played = play().load(0, 1).answer(0).answer(1, gradient=float("nan"))
    played.run.take(1, Diagnosis(run="0", step=7, shard=1, parameter="weight", kind="NaN"))
    assert played.run.status == "running"


def test_a_step_is_refused_without_a_place_if_the_engine_that_looks_for_it_dies(play):
    played = play().load(0, 1).answer(0).answer(1, gradient=float("nan"))
    played.run.lose_engine(EngineLost(1, "died"))
    assert played.run.status == "paused"
    assert "(engine 1)" in played.texts("paused")[0]


def test_the_first_line_of_a_kind_is_an_event_and_the_end_counts_those_that_were_not_sent(play):
    played = play(num_engines=1).load(0)
    played.run.take(0, Printed(run="0", lines=("loss 1", "loss 2"), more={"loss0": 5}))
    played.run.take(0, Printed(run="0", lines=("loss 3",), more={"loss0": 1_000}))
    played.run.ask("stop")
    played.answer(0)
    assert (played.texts("output"), played.texts("repeated")) == (["loss 1"], ["loss 2", "loss 3"])
    assert played.texts("counted") == ["1,005 more like loss 1"]


def test_memory_beyond_the_limit_is_told_once(play):
    played = play(memory_limit=1 << 20).load(0, 1)
    telemetry = Telemetry(
        compute_seconds=0.1,
        data_seconds=0.0,
        rss_bytes=9 << 20,
        cpu_percent=None,
        start_rss_bytes=1 << 20,
        peak_rss_bytes=9 << 20,
    )
    for _ in range(2):
        played.answer(0, telemetry=telemetry).answer(1)
    told = played.texts("memory")
    assert len(told) == 1
    assert told[0].startswith("engine 0 holds ")


def test_a_failure_that_was_cut_is_whole_in_a_file_of_the_run(play):
    played = play(num_engines=1).load(0)
    work = played.work_of(0)
    failure = Failure(kind="ValueError", message="too long", traceback="cut", whole="all of it")
    played.run.take(0, WorkFailed(run="0", lease=work.lease, kind="step", step=1, shards=work.shards, failure=failure))
    assert (played.folder / "errors" / "step-000001-engine-0.txt").read_text() == "all of it"


def test_other_functions_reach_engines_that_are_there_and_those_that_come(play):
    played = play().load(0)
    played.run.replace_functions(b"pickle", b"signature")
    played.load(1)
    assert [len(played.wires[engine].of(FunctionsReplaced)) for engine in (0, 1)] == [1, 1]


def test_an_engine_that_leaves_answers_first_and_is_released_then(play):
    played = play().load(0, 1)
    played.run.retire_engine(1)
    before = list(played.released)
    played.answer(1)
    assert (before, played.released) == ([], [1])


def test_an_engine_that_owes_nothing_is_released_at_once(play):
    played = play()
    played.run.retire_engine(9)
    assert played.released == [9]


def test_the_slabs_of_an_engine_that_died_go_once_the_task_is_committed(play):
    played = play().load(0, 1)
    played.run.lose_engine(EngineLost(1, "died"))
    before = len(played.run.master.slabs_of(1))
    del played.wires[1]
    played.answer(0).answer(0)
    played.run.run_deferred()
    assert (before, len(played.run.master.slabs_of(1))) == (1, 0)


def test_a_clip_norm_that_is_changed_is_in_the_summary_and_in_what_the_next_hub_finds(play):
    played = play(clip_norm=1.0).load(0, 1)
    played.run.set({"clip_norm": 2.5})
    played.run.ask("stop")
    played.step()
    assert (played.summary["options"]["clip_norm"], played.run.handover.clip_norm) == (2.5, 2.5)


def test_a_run_that_ends_is_unloaded_and_says_so_in_its_folder(play):
    played = play(num_steps=2).load(0, 1).step(2)
    assert [(engine, type(record)) for engine, record in played.sent[2:]] == [(0, Unload), (1, Unload)]
    assert (played.run.is_over, played.summary["status"]) == (True, "finished")


def test_a_report_of_more_samples_than_the_batch_has_changes_nothing(play):
    played = play(num_engines=1).load(0)
    with pytest.raises(PeerError, match="5 samples of 4"):
        played.answer(0, parts=(Sums(1.0, 5.0, {}, {}, 5),))
    assert played.run.step == 0


def test_what_an_engine_says_that_takes_no_part_is_not_taken(play):
    played = play()
    played.run.take(9, Printed(run="0", lines=("hello",)))
    assert played.texts("output") == []
