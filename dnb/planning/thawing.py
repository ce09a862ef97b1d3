"""Parameters that are frozen when a run begins and thawed in mid-run, in words."""

from __future__ import annotations


def thawed_text(name: str) -> str:
    """Say why a thawed parameter cannot train where engines compute together, and what can be done."""
    return (
        f"parameter {name!r} was frozen when the run began and has been thawed since, and engines that compute "
        "together (pipeline, tensor parallelism, synchronized BatchNorm) have no place for its gradient: fit with "
        "strategy='data', or let it be trainable at fit and freeze it in forward or step until it is to train"
    )
