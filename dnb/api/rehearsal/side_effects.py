"""Side effects of a forward or a step function beside its loss: gradients, parameters, attributes."""

from __future__ import annotations

from collections.abc import Sequence

from dnb.api.rehearsal.trial import Trial
from dnb.errors import ArgumentError
from dnb.protocol.run import Finding
from dnb.user_code.return_values import OWN_LOOP

MOST_SHOWN = 3


def refuse_own_loop(trial: Trial) -> Sequence[Finding]:
    """Refuse a step function that does what a training loop does around it.

    Raises:
        ArgumentError: there were gradients before backward was to begin.
    """
    names = trial.computed.accumulated
    if not names:
        return ()
    who = "step" if trial.job.step is not None else "the model's forward or the loss"
    raise ArgumentError(f"{who} {OWN_LOOP}, and give optimizer= to fit ({_listed(names)} had a gradient already)")


def refuse_written_parameters(trial: Trial) -> Sequence[Finding]:
    """Refuse a forward or step function that writes parameters, which each engine would do for itself.

    Raises:
        ArgumentError: it does.
    """
    written = trial.computed.written
    if not written:
        return ()
    who = "step" if trial.job.step is not None else "forward"
    name, operation = next(iter(written.items()))
    if not trial.compute().written:
        way = "once, at the first batch: run one batch through the model before fit"
    else:
        way = (
            "which every engine would do for itself, and none for the hub: do it with after_step=callable(model), once "
            f"after each update, or make {name.rpartition('.')[2]!r} a buffer if nothing trains it"
        )
    more = f" and {len(written) - 1} more" if len(written) > 1 else ""
    raise ArgumentError(f"{who} writes parameter {name!r}{more} in place ({operation}), {way}")


def tell_changed_attributes(trial: Trial) -> Sequence[Finding]:
    """Report attributes that a forward or step function changes and that no engine brings home."""
    found: list[Finding] = []
    inside = [name for name in trial.changed if not name.startswith("step's ")]
    if inside:
        are, do = ("which are no buffers", "they do") if len(inside) > 1 else ("not a buffer", "it does")
        text = f"forward changes {_listed(inside)}, {are}: {do} not come home; register_buffer makes one of a tensor"
        found.append(Finding(kind="state", text=text))
    outside = [name for name in trial.changed if name.startswith("step's ")]
    if outside:
        text = f"{_listed(outside)} changed while it was called: what it puts there stays on the engines"
        found.append(Finding(kind="state", text=text))
    return found


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name if name.startswith("step's ") else repr(name) for name in names[:MOST_SHOWN])
    return f"{shown} and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else shown
