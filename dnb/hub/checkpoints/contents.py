"""The contents of a checkpoint of a run: its tensors by name, and its states without pickle."""

from __future__ import annotations

import io
import math
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from dnb.hub.checkpoints.format import StateFacts
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.hub.parameters.master import Master
from dnb.transport.state_trees import put_together, take_apart, take_items_apart

Tensors = dict[str, torch.Tensor]


def named_tensors(master: Master) -> tuple[Tensors, dict[str, str], Tensors]:
    """Tensors of the state_dict, names of those that are tied, and tensors that no state_dict has."""
    own: Tensors = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    named: Tensors = {**dict(master.model.named_parameters()), **dict(master.model.named_buffers())}
    for name, tensor in master.model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue  # a module's extra state
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            own[name] = tensor
    others = {f"model.{name}": tensor for name, tensor in named.items() if own.get(name) is not tensor}
    return own, tied, others


def extra_of(master: Master) -> tuple[Any, Tensors]:
    """Return the extra states of modules without their tensors, and these; None if there are none."""
    extra = master.states.now.extra
    return take_apart(extra, root="extra") if extra else (None, {})


def extra_file_of(master: Master) -> bytes:
    """Return the extra states as `torch.load` reads them with weights_only; empty if there are none."""
    extra = master.states.now.extra
    if not extra:
        return b""
    file = io.BytesIO()
    torch.save(put_together(*take_apart(extra, root="extra")), file)  # plain containers, whatever they were
    return file.getvalue()


def state_of(owner: Any, root: str, *, is_strict: bool) -> tuple[StateFacts | None, Tensors, tuple[str, ...]]:
    """Return the state of an optimizer or scheduler, its tensors, and the names that had to be left out."""
    if owner is None:
        return None, {}, ()
    state = owner.state_dict()
    tree, tensors, left_out = take_items_apart(state, root=root)
    if left_out and is_strict:
        take_apart(state[left_out[0]], root=f"{root}.{left_out[0]}")  # says what and where
    return StateFacts(kind=type(owner).__name__, tree=tree), tensors, left_out


def history_of(columns: HistoryColumns) -> tuple[Tensors, int]:
    """Columns by name, and the most rows that one has."""
    tensors = {f"step/{name}": torch.from_numpy(np.array(values)) for name, values in columns.by_step.items()}
    for name, pairs in columns.by_evaluation.items():
        tensors[f"evaluation/{name}"] = torch.from_numpy(np.array(pairs).reshape(-1, 2))
    return tensors, max((len(values) for values in columns.by_step.values()), default=0)


def in_json(values: Mapping[str, float]) -> dict[str, float | str]:
    """Write NaN and infinity as words, since JSON has neither."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


@cache
def versions() -> dict[str, str]:
    """Return the versions of the software that writes a checkpoint."""
    return {"dnb": version("dnb"), "torch": str(torch.__version__), "python": platform.python_version()}
