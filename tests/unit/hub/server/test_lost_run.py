"""A run that hubs have died of is what its folder says, and says why it has failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from dnb.hub.history.run_files import HistoryRow, read_events, read_summary, summarize
from dnb.hub.history.run_folder import RunFolder
from dnb.hub.server.lost_run import LostRun, lose
from dnb.protocol.client_messages import GetRun
from dnb.protocol.measurements import RunEvent
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import RunSpec

NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)
ERROR = "the hub died 3 times in step 3"


def spec_of(folder: Path) -> RunSpec:
    return RunSpec(
        id="0",
        name="digits",
        folder=str(folder),
        num_samples=100,
        num_val_samples=0,
        num_steps=6,
        steps_per_epoch=3,
        batch_size=32,
        num_shards=12,
        seed=7,
        clip_norm=None,
        exact=False,
        transport={},
        telemetry=True,
        micro_batch=None,
        precision="float32",
        linger_seconds=1.0,
        notes=(),
        sys_path=(),
        job=NOTHING,
        data=NOTHING,
    )


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    """Of a run that was going on, after two steps."""
    spec = spec_of(tmp_path)
    begin(spec)
    return spec


def begin(spec: RunSpec, **changes: Any) -> None:
    state = {
        "status": "running",
        "error": "",
        "remote_traceback": "",
        "started": 5.0,
        "elapsed_seconds": 2.0,
        "step": 0,
    }
    with RunFolder(Path(spec.folder)) as files:
        files.write_summary(summarize(spec, **{**state, **changes}))
        for step in (1, 2):
            files.append_row(HistoryRow(kind="step", step=step, time=step, values={"loss": 1 / step}))
        files.append_event(RunEvent(kind="running", text="2 engines", step=0, time=1.0))


def lost(spec: RunSpec) -> LostRun:
    return lose(spec, error=ERROR, remote_traceback="Traceback: here")


def look(run: LostRun, **seen: Any) -> Any:
    return run.state(GetRun(run="digits", **{"seen": {}, "seen_events": 0, **seen}))


def test_its_viewers_hear_that_it_has_failed_and_why(spec: RunSpec):
    state, frames = look(lost(spec))
    assert (state.status, state.error, state.remote_traceback) == ("failed", ERROR, "Traceback: here")
    assert (state.step, state.num_steps, state.started) == (2, 6, 5.0)
    assert np.frombuffer(frames[0]).tolist() == [1.0, 0.5]
    assert [event.kind for event in state.events] == ["running", "failed"]


def test_they_get_what_they_have_not_seen_yet(spec: RunSpec):
    state, frames = look(lost(spec), seen={"loss": 1}, seen_events=1)
    assert np.frombuffer(frames[0]).tolist() == [0.5]
    assert [event.text for event in state.events] == [ERROR]


def test_its_folder_says_so_too(spec: RunSpec):
    lost(spec)
    summary = read_summary(Path(spec.folder))
    assert (summary.status, summary.error, summary.step) == ("failed", ERROR, 2)
    assert read_events(Path(spec.folder))[-1].kind == "failed"


def test_one_that_had_ended_before_stays_as_it_was(tmp_path: Path):
    spec = spec_of(tmp_path)
    begin(spec, status="finished", step=6)
    state, _ = look(lost(spec))
    assert (state.status, state.error, state.step) == ("finished", "", 6)


def test_without_its_folder_it_has_failed_all_the_same(tmp_path: Path):
    state, frames = look(lost(spec_of(tmp_path / "gone")))
    assert (state.status, state.error, frames) == ("failed", ERROR, [])


def test_it_can_be_left_to_the_next_hub(spec: RunSpec):
    run = lost(spec)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(run), type=LostRun) == run
