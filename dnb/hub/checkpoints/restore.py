"""A run's beginning from a checkpoint: parameters, optimizer, scheduler and history as they were after its step."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnb.errors import ArgumentError
from dnb.hub.checkpoints.format import HISTORY_FILE, MODEL_FILE, OPTIMIZER_FILE, Manifest
from dnb.hub.checkpoints.reader import Checkpoint, open_checkpoint
from dnb.hub.guarded_calls import UserCodeError, user_code
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.hub.history.run_files import HistoryRow
from dnb.hub.parameters.master import Master
from dnb.transport.pickling.module_states import LooseStates
from dnb.transport.state_trees import put_together
from dnb.transport.system.failures import describe_error

_OTHERS = "model."  # buffers that no state_dict has lie beside the optimizer's state
# Of Adafactor's state: a row or a column of the parameter.
_FACTORS = frozenset({"row_var", "col_var"})
# Of the states of torch's optimizers: one number each.
_NUMBERS = frozenset({"step", "eta", "mu", "mu_product"})


def restore(folder: Path, master: Master, columns: HistoryColumns, *, digest: str = "") -> Manifest:
    """Give a new master copy the state of a checkpoint, which was verified before and is held against its digests here.

    Nothing in it is relied on: it may come from anybody, and changes no memory but that of the state.

    Args:
        folder: of the checkpoint.
        master: as built from the user's objects.
        columns: the history, still empty.
        digest: of the manifest that was verified, if it is known.

    Raises:
        ArgumentError: model, optimizer or scheduler are not those of the checkpoint, or it is not one.
    """
    try:
        checkpoint = open_checkpoint(folder)
        if digest not in ("", checkpoint.manifest.digest):
            raise ArgumentError(f"{folder} was replaced while the run was handed to the hub: resume once more")
        _restore_model(checkpoint, master)
        master.restore_freezing(checkpoint.manifest.toggled, checkpoint.manifest.frozen_on_engines)
        tensors = checkpoint.read(OPTIMIZER_FILE)
        _restore_optimizer(checkpoint.manifest, master.optimizer, tensors)
        _restore_scheduler(checkpoint.manifest, master.scheduler, tensors)
        _restore_kept(checkpoint.manifest, master, tensors)
        _restore_history(checkpoint, columns)
    except ArgumentError:
        raise
    except Exception as error:  # whatever the state holds that the user's optimizer or scheduler cannot take
        failure = error.failure if isinstance(error, UserCodeError) else describe_error(error)
        raise ArgumentError(f"{folder} is not as dnb writes checkpoints: {failure.kind}: {failure.message}") from error
    return checkpoint.manifest


def rows_of(columns: HistoryColumns, *, time: float) -> list[HistoryRow]:
    """Return the history as rows, in the order in which they were once written; all have one time."""
    num_steps = max((len(values) for values in columns.by_step.values()), default=0)
    rows = [
        HistoryRow(
            kind="step",
            step=step,
            time=time,
            values={name: values[step - 1] for name, values in columns.by_step.items() if step <= len(values)},
        )
        for step in range(1, num_steps + 1)
    ]
    for name, pairs in columns.by_evaluation.items():
        rows += [
            HistoryRow(kind="evaluation", step=int(step), time=time, values={name: value})
            for step, value in zip(pairs[::2], pairs[1::2], strict=True)
        ]
    return sorted(rows, key=lambda row: row.step)  # stable: steps come before what was measured after them


def rows_between(columns: HistoryColumns, first: int, num_steps: int, *, started: float) -> list[HistoryRow]:
    """Return the history of some steps as rows, without the samples that each engine had.

    Args:
        columns: the whole history.
        first: step.
        num_steps: at most.
        started: when the run did, in seconds since the epoch; a step's time is told by its "seconds".
    """
    last = min(first + num_steps - 1, max((len(values) for values in columns.by_step.values()), default=0))
    rows: list[HistoryRow] = []
    for step in range(first, last + 1):
        values = {name: column[step - 1] for name, column in columns.by_step.items() if step <= len(column)}
        rows.append(HistoryRow(kind="step", step=step, time=started + values.get("seconds", 0.0), values=values))
    times = {row.step: row.time for row in rows}
    for name, pairs in columns.by_evaluation.items():
        rows += [
            HistoryRow(kind="evaluation", step=int(step), time=times[int(step)], values={name: value})
            for step, value in zip(pairs[::2], pairs[1::2], strict=True)
            if first <= step <= last
        ]
    return sorted(rows, key=lambda row: row.step)  # stable: steps come before what was measured after them


def _restore_model(checkpoint: Checkpoint, master: Master) -> None:
    parameters, buffers = dict(master.model.named_parameters()), dict(master.model.named_buffers())
    difference = checkpoint.difference(parameters, buffers)
    if difference:
        raise ArgumentError(f"{checkpoint.folder} is of another model: {difference}")
    found = checkpoint.read(MODEL_FILE)
    kept = checkpoint.read(OPTIMIZER_FILE)
    beside = {name.removeprefix(_OTHERS): tensor for name, tensor in kept.items() if name.startswith(_OTHERS)}
    tensors = {**found, **beside}
    states = _loose_states(checkpoint.manifest, tensors, kept)
    master.states.check(states)
    for name, own in (parameters | buffers).items():
        if name not in states.buffers:
            _check_alike(name, tensors[name], own.shape, dtype=own.dtype)  # else it would be broadcast, or converted
    if states:
        master.states.restore(states)
    master.restore(tensors)


def _loose_states(
    manifest: Manifest, tensors: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
) -> LooseStates:
    buffers = {name: None if name in manifest.empty else tensors[name] for name in manifest.loose}
    extra = {} if manifest.extra is None else put_together(manifest.extra, kept)
    return LooseStates(extra=extra, buffers=buffers, transient=set(manifest.transient))


def _check_alike(name: str, tensor: torch.Tensor, shape: Sequence[int], *, dtype: torch.dtype | None = None) -> None:
    if tuple(tensor.shape) != tuple(shape) or dtype not in (None, tensor.dtype):
        raise ValueError(f"{name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, not of shape {tuple(shape)}")


def _restore_optimizer(manifest: Manifest, optimizer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    _check_kind("optimizer", manifest.optimizer.kind, optimizer)
    state = put_together(manifest.optimizer.tree, tensors)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check_optimizer_state(optimizer, parameters, state["state"])
    try:
        with user_code("in the optimizer's load_state_dict"):
            optimizer.load_state_dict(state)
    except UserCodeError as error:
        raise ArgumentError(f"the optimizer is not that of the checkpoint: {error.failure.message}") from error
    # load_state_dict makes every tensor of the parameter's dtype, also those that were kept in a wider one.
    for index, values in state["state"].items():
        own = optimizer.state[parameters[index]]
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.dtype != own[key].dtype:
                own[key] = value


def _check_optimizer_state(
    optimizer: Any, parameters: Sequence[torch.nn.Parameter], states: Mapping[int, Mapping[str, Any]]
) -> None:
    """Hold tensors of torch's own optimizers against the parameters: their kernels do not, and would leave the memory.

    Raises:
        ValueError: one has another shape.
    """
    if not type(optimizer).__module__.startswith("torch.optim."):
        return
    for index, values in states.items():
        if not 0 <= index < len(parameters):
            raise ValueError(f"there is a state of parameter {index} of {len(parameters)}")
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and key not in _FACTORS:
                expected = () if key in _NUMBERS else parameters[index].shape
                _check_alike(f"{key} of parameter {index}", value, expected)


def _restore_scheduler(manifest: Manifest, scheduler: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    facts = manifest.scheduler
    if facts is None and scheduler is None:
        return
    if facts is None or scheduler is None:
        there, here = ("a", "none") if scheduler is None else ("no", "one")
        raise ArgumentError(f"the checkpoint has {there} scheduler, and the run {here}")
    _check_kind("scheduler", facts.kind, scheduler)
    state = put_together(facts.tree, tensors)
    for key in state:
        # Schedulers take their whole state for attributes: none may stand before a method, or the optimizer.
        if key == "optimizer" or callable(getattr(type(scheduler), key, None)):
            raise ValueError(f"the scheduler's state has {key!r}, which is no number of a {facts.kind}")
    with user_code("in the scheduler's load_state_dict"):
        scheduler.load_state_dict(state)


def _restore_kept(manifest: Manifest, master: Master, tensors: Mapping[str, torch.Tensor]) -> None:
    if manifest.kept is None:
        return
    left = master.functions.give(put_together(manifest.kept, tensors))
    if left:
        raise ArgumentError(
            f"after_step is not that of the checkpoint, which keeps {', '.join(sorted(left)[:3])}: give one that keeps "
            "the same under the same names"
        )


def _check_kind(what: str, kind: str, found: Any) -> None:
    if type(found).__name__ != kind:
        raise ArgumentError(f"the checkpoint's {what} is a {kind}, not a {type(found).__name__}")


def _restore_history(checkpoint: Checkpoint, columns: HistoryColumns) -> None:
    step = checkpoint.manifest.step
    for path, values in checkpoint.read(HISTORY_FILE).items():
        by, _, name = path.partition("/")
        width = {"step": 1, "evaluation": 2}.get(by)
        if width is None or not name or values.dtype != torch.float64 or values.dim() != width:
            raise ValueError(f"{path!r} is no column of a history")
        numbers = values.reshape(-1)
        if by == "step":
            is_plausible = len(numbers) <= step
            target = columns.by_step
        else:
            steps = values[:, 0]
            is_plausible = values.shape[1] == 2 and bool(
                ((steps >= 0) & (steps <= step) & (steps == steps.floor())).all()
            )
            target = columns.by_evaluation
        if not is_plausible:
            raise ValueError(f"the column {path!r} has steps beyond {step}, of which the checkpoint is")
        target.setdefault(name, array("d")).extend(numbers.tolist())
