"""News of checkpoints: each fault is reported once, until one is written again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from dnb.hub.checkpoints.writer_thread import WriteResult
from dnb.transport.segments import megabytes

log = logging.getLogger(__name__)

Tell = Callable[[Literal["checkpoint", "disk"], str, int], None]  # kind, text, step


class CheckpointNews:
    """Events of a run that concern its checkpoints.

    Args:
        tell: adds an event to the run.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._faults: set[str] = set()  # that were reported
        self._is_unsigned_told = False

    def tell_written(self, result: WriteResult, *, signer_fault: str) -> None:
        """Tell of a checkpoint that is whole; of the first one also why it is not signed."""
        checkpoint = result.checkpoint
        step = checkpoint.manifest.step
        self._faults.clear()
        size = megabytes(result.num_bytes)
        self._tell("checkpoint", f"step {step} is in {checkpoint.target} ({size} in {result.seconds:.2g} s)", step)
        if signer_fault and not self._is_unsigned_told:
            self._is_unsigned_told = True
            text = f"checkpoints are not signed: {signer_fault}; dnb.resume needs trust=True for their pickles"
            log.warning(text)
            self._tell("checkpoint", text, step)

    def tell_left_out(self, step: int) -> None:
        """Tell of a checkpoint that was not written, as another one was."""
        text = f"the checkpoint of step {step} was left out, as the one before was still being written"
        log.info(text)
        self._tell_once("slow", "checkpoint", text, step)

    def tell_failure(
        self, step: int, kind: Literal["checkpoint", "disk"], reason: str, error: BaseException, *, is_last: bool
    ) -> str:
        """Tell of a checkpoint that could not be written; return the sentence.

        Args:
            step: of the run.
            kind: of the event.
            reason: in words.
            error: the same for errors that are reported once.
            is_last: the run has ended.
        """
        cause = f"{type(error).__name__} {error.errno if isinstance(error, OSError) else reason}"
        goes_on = "" if is_last else "the run goes on, and "
        text = f"no checkpoint of step {step}: {reason}; {goes_on}earlier checkpoints stay"
        if is_last:
            self._faults.discard(cause)  # that the last one is missing is reported in any case
        if cause not in self._faults:
            log.warning(text)
        self._tell_once(cause, kind, text, step)
        return text

    def _tell_once(self, cause: str, kind: Literal["checkpoint", "disk"], text: str, step: int) -> None:
        if cause not in self._faults:
            self._faults.add(cause)
            self._tell(kind, text, step)
