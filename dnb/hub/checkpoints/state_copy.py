"""The state of a run between two steps, copied for a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec

from dnb.hub.checkpoints.contents import extra_file_of, extra_of, history_of, in_json, named_tensors, state_of, versions
from dnb.hub.checkpoints.format import FORMAT, HISTORY_FILE, MODEL_FILE, OPTIMIZER_FILE, Manifest, facts_of
from dnb.hub.checkpoints.tensor_files import TensorBuffer
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.hub.parameters.master import Master
from dnb.protocol.run import RunSpec
from dnb.transport.state_trees import take_apart
from dnb.transport.system.process_settings import without_variables


@dataclass(frozen=True, slots=True)
class RunProgress:
    """The progress of a run."""

    step: int
    evaluated: int
    elapsed_seconds: float


class StateCopier:
    """Copies what a checkpoint holds: nothing in the copy changes while the run goes on.

    Args:
        master: whose state is kept.
        columns: the history.
    """

    def __init__(self, master: Master, columns: HistoryColumns) -> None:
        self._master = master
        self._columns = columns
        self._tensors = named_tensors(master)

    def copy(self, spec: RunSpec, place: RunProgress, buffers: dict[str, TensorBuffer]) -> tuple[Manifest, bytes]:
        """Fill the buffers; return the manifest, and the extra states."""
        states = self._master.states
        own, tied, others = named_tensors(self._master) if states.version else self._tensors
        extra, extra_tensors = extra_of(self._master)
        optimizer, optimizer_tensors, _ = state_of(self._master.optimizer, "optimizer", is_strict=True)
        scheduler, scheduler_tensors, left_out = state_of(self._master.scheduler, "scheduler", is_strict=False)
        kept, kept_tensors = take_apart(self._master.functions.read(), root="kept")
        history, num_rows = history_of(self._columns)
        buffers[MODEL_FILE].fill(own, tied)
        in_optimizer = {**optimizer_tensors, **scheduler_tensors, **kept_tensors, **others, **extra_tensors}
        buffers[OPTIMIZER_FILE].fill(in_optimizer, {})
        buffers[HISTORY_FILE].fill(history, {})
        assert optimizer is not None
        manifest = Manifest(
            digest="",
            format=FORMAT,
            name=spec.name,
            step=place.step,
            num_steps=spec.num_steps,
            evaluated=place.evaluated,
            num_history_rows=num_rows,
            time=time.time(),
            elapsed_seconds=place.elapsed_seconds,
            versions=versions(),
            metrics=in_json(self._measured(place.step)),
            parameters=facts_of(dict(self._master.model.named_parameters())),
            buffers=facts_of(dict(self._master.model.named_buffers())),
            tied=tied,
            optimizer=optimizer,
            scheduler=scheduler,
            left_out=left_out,
            spec=msgspec.structs.replace(spec, settings=without_variables(spec.settings)),
            files={},
            kept=kept or None,
            extra=extra,
            loose=tuple(states.now.buffers),
            empty=tuple(name for name, value in states.now.buffers.items() if value is None),
            transient=tuple(sorted(states.now.transient)),
            toggled=self._master.freezing.toggled,
            frozen_on_engines=tuple(sorted(self._master.freezing.on_engines)),
        )
        return manifest, extra_file_of(self._master)

    def _measured(self, step: int) -> dict[str, float]:
        measured = {name: values[-1] for name, values in self._columns.by_step.items() if values}
        for name, pairs in self._columns.by_evaluation.items():
            if pairs and pairs[-2] == step and name != "digest":
                measured[name] = pairs[-1]
        return measured
