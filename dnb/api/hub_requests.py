"""Requests that a run makes of its hub: a checkpoint, other functions, the gradients of its first steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnb import errors
from dnb.api.proof.proving import ObservedGradients
from dnb.errors import USER_ERRORS, ArgumentError, DnbError, HubError
from dnb.progress import long_work
from dnb.protocol.client_messages import (
    CheckpointState,
    Done,
    GetCheckpoint,
    GetGradients,
    GradientRows,
    ReplaceFunctions,
    TakeCheckpoint,
)
from dnb.protocol.measurements import RunEvent
from dnb.transport.pickling.payloads import explain_unpicklable, sign
from dnb.transport.pickling.user_modules import dumps
from dnb.transport.sockets.channels import HubClient

log = logging.getLogger(__name__)

# How often the hub is asked whether a checkpoint is durable.
CHECKPOINT_LOOK_SECONDS = 0.02


def take_checkpoint(hub: HubClient, run: str, path: str | Path | None, *, timeout_seconds: float) -> Path:
    """Have a checkpoint written after the step under way; return its folder once it is durable.

    Raises:
        ArgumentError: the folder holds something else, or cannot be written.
        SpaceError: the disk is full.
        HubError: the hub does not hold the run any more, or the time is up.
    """
    target = None if path is None else str(Path(path).expanduser().absolute())
    deadline = time.monotonic() + timeout_seconds
    state, _ = hub.ask(TakeCheckpoint(run=run, path=target), CheckpointState)
    with long_work(f"checkpoint of run {run!r}") as report:
        while state.state in ("waiting", "writing"):
            report("waiting for the step under way" if state.state == "waiting" else "writing")
            if time.monotonic() > deadline:
                raise HubError(
                    f"the checkpoint of run {run!r} is not durable after {timeout_seconds:g} s (it is "
                    f"{state.state}); it may still become so: run.events says when"
                )
            threading.Event().wait(CHECKPOINT_LOOK_SECONDS)
            try:
                state, _ = hub.ask(GetCheckpoint(run=run, ticket=state.ticket), CheckpointState)
            except ArgumentError as error:  # the hub that was asked has died
                log.info("the checkpoint is asked for again: %s", error)
                state, _ = hub.ask(TakeCheckpoint(run=run, path=target), CheckpointState)
    if state.state == "failed":
        kind: type[DnbError] = getattr(errors, state.error, HubError)
        raise kind(state.message)
    return Path(state.path)


def read_options(options: Mapping[str, Any]) -> dict[str, float | None]:
    """Read numbers that are to be changed in a run.

    Raises:
        ArgumentError: there is none, or something else.
    """
    if not options:
        raise ArgumentError("set what? run.set(lr=1e-4), run.set(clip_norm=1.0)")
    for name, value in options.items():
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ArgumentError(f"{name} must be a number, not {value!r}: run.set({name}=1e-3)")
    return {name: None if value is None else float(value) for name, value in options.items()}


def replace_functions(
    hub: HubClient, run: str, *, step: Callable[..., Any] | None, loss: Callable[..., Any] | None, key: bytes
) -> None:
    """Give a paused run another step function or loss.

    Raises:
        ArgumentError: the run is not paused.
        ShippingError: the function cannot be pickled.
    """
    functions = {"step": step, "loss": loss}
    try:
        pickled = dumps(functions)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:
        raise explain_unpicklable(functions, name="what is mended") or error from error
    hub.ask(ReplaceFunctions(run=run), Done, frames=[pickled, sign(key, [pickled])])


def seen_gradients(
    hub: HubClient, run: str, number: int, *, events: Callable[[], Sequence[RunEvent]]
) -> tuple[ObservedGradients, list[str]]:
    """Return the gradients of the first steps, and sentences on those that are not there or not comparable.

    Args:
        hub: that holds the run.
        run: its name.
        number: so many first steps.
        events: of the run, as they are known once the hub has answered.

    Raises:
        ArgumentError: there is none.
        HubError: the hub does not hold the run any more.
    """
    reply, frames = hub.ask(GetGradients(run=run), GradientRows)
    rows = np.frombuffer(frames[0], dtype=np.float64).reshape(len(reply.steps), -1)
    changes = [event for event in events() if event.kind in ("set", "mended", "thawed")]
    last = min([number, *(event.step for event in changes)])
    notes = []
    if last < number:
        first = next(event for event in changes if event.step == last)
        notes.append(f"only up to step {last}, after which the run was changed ({first.text})")
    seen = {step: row for step, row in zip(reply.steps, rows, strict=True) if step <= last}
    if len(seen) < last:
        notes.append(
            f"{len(seen)} of these steps were looked at; fit(prove={number}) looks at as many as are asked for"
        )
    if not seen:
        raise ArgumentError(f"no step of run {run!r} can be proved: it has done none that was looked at")
    return ObservedGradients(reply.names, seen), notes
