"""Checks that notebook and engines agree: one loss for the same samples, one hash for the same parameters."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dnb.protocol.engine_messages import WorkReport
from dnb.protocol.memory import Layout

# Hashing costs what reading does: a large model is looked at every so many steps, a small one more often.
DIGEST_EVERY = 100
DIGEST_SMALL_EVERY = 10
DIGEST_SMALL_BYTES = 1 << 20
# Other processors round otherwise, in half precision more so.
PROBE_TOLERANCE = 1e-4
HALF_PROBE_TOLERANCE = 1e-2
NOTEBOOK = "in the notebook"
HALVES = frozenset({"bfloat16", "float16"})


class ConsistencyChecks:
    """Memory of what was found in the notebook or on the first engine, and in the hub, against which others are held.

    Args:
        layout: of the parameters, in the order of the digests.
        num_steps: of the run; the last one is always hashed.
        precision: of the forward.
        probe: the loss that the notebook has found for the first samples; None: it has not.
    """

    def __init__(self, layout: Layout, *, num_steps: int, precision: str, probe: float | None = None) -> None:
        is_half = precision in HALVES or any(slot.dtype in HALVES for slot in layout.slots)
        self._tolerance = HALF_PROBE_TOLERANCE if is_half else PROBE_TOLERANCE
        self._names = [slot.name for slot in layout.slots]
        self._num_steps = num_steps
        self._every = DIGEST_SMALL_EVERY if layout.num_bytes < DIGEST_SMALL_BYTES else DIGEST_EVERY
        self._probe: tuple[str, float] | None = None if probe is None else (NOTEBOOK, probe)
        self._digest_step = 0
        self._digests: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)
        self._copy_fault = ""
        self.disagreement = ""  # engines have found other losses for the same samples, in words

    def is_digest_due(self, step: int) -> bool:
        """Return True if the parameters are hashed after this step."""
        return step > 0 and (step % self._every == 0 or step == self._num_steps)

    def keep(self, step: int, digests: bytes) -> None:
        """Keep the hub's hashes after a step, uint32 for each tensor."""
        self._digest_step, self._digests = step, np.frombuffer(digests, dtype=np.uint32)

    def check(self, engine: int, report: WorkReport) -> bool:
        """Hold a report against the hub and the other engines; return whether the engine's own copies differ."""
        if report.probe is not None:
            self.disagreement = self.disagreement or self.fault_of_probe(engine, report.probe)
        fault = self.fault_of_copy(engine, report.step - 1, report.digests) if report.digests else ""
        self._copy_fault = fault or self._copy_fault
        return bool(fault)

    def take_copy_fault(self) -> str:
        """Return, once, in which copies an engine differs from the hub; "" if none does."""
        fault, self._copy_fault = self._copy_fault, ""
        return fault

    def fault_of_copy(self, engine: int, step: int, digests: bytes) -> str:
        """Describe the fault in an engine's own copies, as they were after a step; "" if there is none.

        Args:
            engine: whose they are.
            step: after which they were taken.
            digests: uint32 for each tensor; 0 for those that the engine reads from the hub's memory.
        """
        theirs = np.frombuffer(digests, dtype=np.uint32)
        if step != self._digest_step or len(theirs) != len(self._digests):
            return ""
        differing = np.flatnonzero((theirs != self._digests) & (theirs != 0))
        if not len(differing):
            return ""
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        name = self._names[int(differing[0])]
        return (
            f"engine {engine}'s copy of {name!r}{more} is not the hub's after step {step}: if forward or step "
            "writes it, after_step=callable(model) is the place for that"
        )

    def fault_of_probe(self, engine: int, loss: float) -> str:
        """Compare an engine's loss of the first samples with that of notebook and others; "" if they agree."""
        if self._probe is None:
            self._probe = (f"on engine {engine}", loss)
            return ""
        other, expected = self._probe
        if math.isclose(loss, expected, rel_tol=self._tolerance, abs_tol=self._tolerance):
            return ""
        if math.isnan(loss) and math.isnan(expected):
            return ""
        found = [f"{expected:.6g} {other}", f"{loss:.6g} on engine {engine}"]
        both = " and ".join(reversed(found) if other == NOTEBOOK else found)
        return (
            f"engines disagree: for the same samples the loss is {both}. Code, forward and data must not depend on the "
            "process, its host, a file that differs, or random numbers that torch does not draw; nothing was trained"
        )
