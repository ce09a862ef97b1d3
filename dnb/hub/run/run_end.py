"""The end of a run, which is reported once its last checkpoint is whole."""

from __future__ import annotations

from pathlib import Path

from dnb.hub.checkpoints.writer import Checkpointer
from dnb.hub.parameters.master import Master
from dnb.hub.run.engine_links import EngineLinks
from dnb.hub.run.execution.deferred_work import DeferredWork
from dnb.hub.run.execution.run_coordinator import RunCoordinator
from dnb.hub.run.recorder import RunRecorder
from dnb.hub.scheduling.events import Note
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import ENDED, RunSpec

# After this time people are told what the end of a run waits for.
LATE_SECONDS = 2.0


class RunEnd:
    """The last word on a run, held back until its last checkpoint is whole.

    Args:
        spec: the run's numbers; nobody needs its data once the run has ended.
        master: whose slabs are given back.
        coordinator: says whether the run has ended.
        links: to the engines.
        recorder: of the run.
        checkpoints: of the run.
        deferred: what is still to be done after the last commit.
    """

    def __init__(
        self,
        spec: RunSpec,
        master: Master,
        coordinator: RunCoordinator,
        *,
        links: EngineLinks,
        recorder: RunRecorder,
        checkpoints: Checkpointer,
        deferred: DeferredWork,
    ) -> None:
        self._data = spec.data
        self._master = master
        self._coordinator = coordinator
        self._links = links
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._deferred = deferred
        self._last_word: Note | None = None
        self._is_lateness_told = False

    def add_event(self, note: Note) -> None:
        """Write the coordinator's note, but keep that of the run's end until it may be reported."""
        if note.kind in ENDED and not self._recorder.is_over:
            self._last_word = note
        else:
            self._recorder.add_event(note)

    def begin(self) -> None:
        """Let everybody forget the run, and its last checkpoint be written: no step will follow."""
        self._deferred.run()
        self._recorder.clock.end()
        self._recorder.stats.close()
        self._recorder.add_usage()
        self._checkpoints.end()
        self._links.unload(self._recorder.stats.living)
        self._master.drop_slabs()
        self.tell()
        if not self._recorder.is_over:
            self._recorder.write_summary()  # a hub that takes the run over has its last checkpoint written

    def tell(self, *, is_closing: bool = False) -> None:
        """Report the end of the run in events and folder, unless its last checkpoint is still to come."""
        if self._recorder.is_over or self._coordinator.status not in ENDED:
            return
        if self._checkpoints.is_finishing and not is_closing:
            self._tell_lateness()
            return
        self._recorder.is_over = True
        self._recorder.output.tell_counts()
        if shortfall := self._checkpoints.shortfall:
            text = f"{shortfall}: the run ends without it, earlier checkpoints stay"
            self._recorder.add_event(Note("checkpoint", text))
        self._recorder.finish()
        if self._last_word is not None:
            self._recorder.add_event(self._last_word)
        self._recorder.write_summary()
        remove_payload(self._data)  # what makes the model stays, for a hub that takes an ended run over

    def _tell_lateness(self) -> None:
        if not self._is_lateness_told and self._recorder.clock.seconds_since_end > LATE_SECONDS:
            self._is_lateness_told = True
            step = self._coordinator.step
            text = f"the last checkpoint, of step {step}, is being written; then the run ends"
            self._recorder.add_event(Note("checkpoint", text))


def remove_payload(payload: PayloadRef) -> None:
    """Remove what the client has handed over, if it lies in shared memory."""
    if payload.segment is not None:
        Path(payload.segment.path).unlink(missing_ok=True)
