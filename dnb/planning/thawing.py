"""Parameters that user code thaws or freezes in mid-run where that cannot be followed, in words."""

from __future__ import annotations


def thawed_text(name: str) -> str:
    """Say why a thawed parameter cannot train where engines compute together, and what can be done."""
    return (
        f"parameter {name!r} was frozen when the run began and has been thawed since, and engines that compute "
        "together (pipeline, tensor parallelism, synchronized BatchNorm) have no place for its gradient: fit with "
        "strategy='data', or let it be trainable at fit and freeze it in forward or step until it is to train"
    )


def half_frozen_text(name: str) -> str:
    """Say why a step is not applied of which parts are trained with a parameter, and parts without."""
    return (
        f"parameter {name!r} is frozen for a part of the batch and trained for another: let requires_grad depend on "
        "what is the same for all parts, or set it in after_step=callable(model), which runs once after each update"
    )
