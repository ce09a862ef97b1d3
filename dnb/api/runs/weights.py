"""The trained parameters and buffers of a run, from the hub that holds it, or from its last checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import torch

from dnb.api.runs.write_back import STATE_SECONDS, NotebookObjects
from dnb.errors import USER_ERRORS, ArgumentError, HubError, summary_of
from dnb.hub.checkpoints.format import EXTRA_FILE, MODEL_FILE
from dnb.hub.checkpoints.reader import DamagedError, find_checkpoint
from dnb.progress import long_work
from dnb.protocol.client_messages import GetJob, GetState, JobFrames, StateTree
from dnb.protocol.run import RunSpec
from dnb.transport.pickling.module_states import LooseStates
from dnb.transport.pickling.payloads import unpack, verify
from dnb.transport.sockets.channels import HubClient
from dnb.transport.state_trees import decode_state

log = logging.getLogger(__name__)


def state_dict_of(run: str, hub: HubClient | None, folder: Path) -> dict[str, Any]:
    """Return what `model.state_dict()` of the run's model would, as the hub has it now or the last checkpoint had it.

    Raises:
        ArgumentError: the hub is gone, and there is no checkpoint that is whole.
    """
    if hub is not None:
        try:
            return _ask(run, hub)
        except HubError:
            if hub.is_alive:
                raise
    return _read(run, folder)


def model_of(run: str, hub: HubClient, key: bytes) -> torch.nn.Module | None:
    """Make the model of a run anew of what `fit` has sent, with the weights of now; None if that cannot be read here.

    Classes of the notebook travel by value; a class of a module must be one that can be imported.
    """
    try:
        _, (spec_bytes, *pickles, signature, memory) = hub.ask(
            GetJob(run=run), JobFrames, timeout_seconds=STATE_SECONDS
        )
        verify(key, [spec_bytes, *pickles], signature)
        spec = msgspec.msgpack.decode(spec_bytes, type=RunSpec)
        held = memoryview(bytearray(memory)) if spec.job.segment is not None else None
        model: torch.nn.Module = unpack(pickles[0], spec.job, memory=held).model
        NotebookObjects.of(model).bring_home(hub, run, 0)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:  # unpickling runs user code
        log.warning(
            "the model of run %r cannot be made here (run.state_dict() has its weights): %s", run, summary_of(error)
        )
        return None
    return model


def _ask(run: str, hub: HubClient) -> dict[str, Any]:
    tree, frames = hub.ask(GetState(run=run, optimizer=False), StateTree, timeout_seconds=STATE_SECONDS)
    state = decode_state(tree, frames)
    packed = state["loose"]
    loose = LooseStates() if packed is None else LooseStates.unpack(packed.numpy().tobytes())
    tensors = {**state["parameters"], **state["buffers"], **loose.buffers}
    found: dict[str, Any] = {}
    for name in state["names"]:
        if name in tensors and tensors[name] is not None:
            found[name] = tensors[name]
        elif name in state["tied"]:
            found[name] = found[state["tied"][name]]
    added = {
        name: tensor for name, tensor in loose.buffers.items() if tensor is not None and name not in loose.transient
    }
    return {**found, **added, **loose.extra}


def _read(run: str, folder: Path) -> dict[str, Any]:
    with long_work(f"reading the weights of run {run!r}"):
        try:
            checkpoint, _ = find_checkpoint(folder, wants=lambda manifest: {EXTRA_FILE} & manifest.files.keys())
            found: dict[str, Any] = dict(checkpoint.read(MODEL_FILE))
            if EXTRA_FILE in checkpoint.manifest.files:
                found |= torch.load(checkpoint.folder / EXTRA_FILE, weights_only=True)
        except (ArgumentError, DamagedError) as error:
            raise ArgumentError(
                f"the weights of run {run!r} are nowhere any more: its pool is gone, and {error}; "
                "fit(..., checkpoint_every=N) keeps some"
            ) from error
    return {**found, **{name: found[first] for name, first in checkpoint.manifest.tied.items()}}
