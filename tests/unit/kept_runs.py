"""A run without service or engines whose state is kept: a master copy, its history and its checkpointer."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from dnb.hub.checkpoints.format import MANIFEST_FILE, Disk, step_folder
from dnb.hub.checkpoints.reader import Checkpoint, open_checkpoint
from dnb.hub.checkpoints.signing import Signer
from dnb.hub.checkpoints.state_copy import RunProgress
from dnb.hub.checkpoints.writer import Checkpointer
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.job import Data, DataSource, Job
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import CheckpointPolicy, RunSpec
from dnb.transport.pickling.payloads import pickle_payload
from tests.unit.hub.parameters.test_master import Pool

NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)
SPEC = RunSpec(
    id="0",
    name="digits",
    folder="/nowhere",
    num_samples=8,
    num_val_samples=0,
    num_steps=100,
    steps_per_epoch=2,
    batch_size=4,
    num_shards=2,
    seed=7,
    clip_norm=None,
    exact=True,
    transport={},
    telemetry=False,
    micro_batch=None,
    precision="float32",
    linger_seconds=1.0,
    notes=(),
    sys_path=(),
    job=NOTHING,
    data=NOTHING,
)


def job_of(model: nn.Module, *, optimizer: Any = "adamw", scheduler: Any = None) -> Job:
    return Job(
        model=model,
        loss=nn.functional.mse_loss,
        step=None,
        metrics={},
        optimizer=optimizer,
        lr=1e-2 if isinstance(optimizer, str) else None,
        scheduler=scheduler,
        order=BatchOrder(num_samples=8, batch_size=4),
    )


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], files: Mapping[str, bytes] | None = None) -> None:
    """Change a checkpoint as a stranger can: with digests that fit, and without the secret that signs."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    for name, data in (files or {}).items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)
        manifest["files"][name] = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    manifest["digest"] = "0" * 64
    text = json.dumps(manifest, indent=2)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))


class KeptRun:
    """Takes steps with made-up gradients, and writes checkpoints into `folder / "run"`.

    Args:
        folder: of everything.
        job: trained here.
        disk: where checkpoints are written.
        policy: of the run.
        signer: of the checkpoints.
        numbers: of the run, in place of the usual ones.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        *,
        disk: Disk | None = None,
        policy: CheckpointPolicy | None = None,
        signer: Signer | None = None,
        **numbers: Any,
    ) -> None:
        self.run_folder = folder / "run"
        data = Data(train=DataSource(samples=(torch.arange(8.0),), collate=None), val=None)
        uploaded = [
            pickle_payload(obj, name=name, folders=[folder / "shm"]) for name, obj in (("job", job), ("data", data))
        ]
        self.spec = msgspec.structs.replace(
            SPEC,
            folder=str(self.run_folder),
            job=uploaded[0][1],
            data=uploaded[1][1],
            checkpoints=policy,
            **numbers,
        )
        self.pool = Pool(folder / "shm", job)
        self.master = self.pool.master
        self.columns = HistoryColumns()
        self.step = 0
        self.evaluated = 0
        self.events: list[tuple[str, str, int]] = []
        self.checkpoints = Checkpointer(
            self.spec,
            [b"spec", uploaded[0][0], uploaded[1][0], b"signature"],
            self.master,
            self.columns,
            place=lambda: RunProgress(self.step, self.evaluated, 1.5),
            tell=lambda kind, text, step: self.events.append((kind, text, step)),
            disk=disk,
            signer=signer,
        )

    def train(self, num_steps: int = 1, *, owes_evaluation: bool = False) -> KeptRun:
        """Steps whose gradients depend on the step alone."""
        for _ in range(num_steps):
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            shapes = {slot.name: slot.shape for slot in self.master.gradient_layout.slots}
            gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            result = self.pool.bring(0, gradients).commit()
            self.columns.add_step({"loss": 1 / self.step, "lr": result.lr})
            values = {"loss": 1 / self.step}
            if self.checkpoints.is_due("step", self.step, values, owes_evaluation=owes_evaluation):
                self.checkpoints.take()
        return self

    def evaluate(self, **values: float) -> KeptRun:
        """An evaluation after the last step."""
        self.evaluated = self.step
        self.columns.add_evaluation(self.step, values)
        if self.checkpoints.is_due("evaluation", self.step, values, owes_evaluation=False):
            self.checkpoints.take()
        return self

    def keep(self, path: Path | None = None) -> Checkpoint:
        """A checkpoint of the state as it is, once it is durable."""
        state = self.settle(self.checkpoints.ask(path).ticket)
        assert state.state == "durable", state.message
        return open_checkpoint(Path(state.path))

    def settle(self, ticket: int) -> Any:
        """How a wish ended."""
        self.until(lambda: self.checkpoints.state_of(ticket).state in ("durable", "failed"), what="it is settled")
        return self.checkpoints.state_of(ticket)

    def wait(self) -> KeptRun:
        """Until nothing is being written."""
        self.until(lambda: not self.checkpoints._thread.is_busy, what="nothing is being written")
        return self

    def wait_for_end(self) -> KeptRun:
        """Until nothing holds back the end of a run that has taken its last step."""
        self.until(lambda: not self.checkpoints.is_finishing, what="the end is not held back")
        return self

    def until(self, holds: Callable[[], bool], *, what: str) -> None:
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline, f"not within 30 s: {what}"
            self.checkpoints.tick(is_still=True)
            time.sleep(0.001)

    def folder_of(self, step: int) -> Path:
        return step_folder(self.run_folder, step)

    @property
    def kept_steps(self) -> list[int]:
        """Steps whose checkpoints are there."""
        folders = (self.run_folder / "checkpoints").glob("step-*")
        return sorted(int(folder.name.removeprefix("step-")) for folder in folders)

    @property
    def hidden(self) -> list[str]:
        """What was begun and is not whole."""
        return [path.name for path in (self.run_folder / "checkpoints").glob(".*")]

    def close(self) -> None:
        self.checkpoints.close()
        self.master.drop_slabs()
        self.master.close()
