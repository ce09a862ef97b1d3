"""The parameters that a run trains, the same on all engines: user code may thaw and freeze some on its way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dnb.errors import SpaceError
from dnb.hub.message_checks import PeerError
from dnb.hub.parameters.master import Master
from dnb.hub.run.engine_links import EngineLinks
from dnb.hub.run.execution.pending_reports import TaskReports, half_frozen
from dnb.hub.run.recorder import RunRecorder
from dnb.hub.scheduling.events import CommitDeferred, CommitFailed, CommitRefused, Event, Note
from dnb.planning.thawing import half_frozen_text, thawed_text
from dnb.protocol.measurements import WorkKind
from dnb.protocol.run import Failure, RunSpec
from dnb.transport.system.failures import TRACEBACK_LENGTH, clean_text


class TrainableParameters:
    """Takes over what user code has thawed or frozen, and lets all engines follow.

    Args:
        spec: the run's numbers.
        master: the parameters.
        links: to the engines.
        recorder: of the run.
    """

    def __init__(self, spec: RunSpec, master: Master, links: EngineLinks, recorder: RunRecorder) -> None:
        self._is_divided = bool(spec.partitions)
        self._master = master
        self._links = links
        self._recorder = recorder
        self._evened_step = 0  # computed once more, as engines had frozen different parameters

    def check_thawed(self, names: Sequence[str]) -> None:
        """Refuse names that no parameter of this run has that an engine could have thawed.

        Raises:
            PeerError: says which.
        """
        if self._is_divided:
            raise PeerError("an engine of a team tells of thawed parameters")
        try:
            self._master.freezing.check(names)
        except ValueError as error:
            raise PeerError(clean_text(str(error), length=TRACEBACK_LENGTH)) from error

    def follow(self, kind: WorkKind, step: int, taken: TaskReports) -> Event | None:
        """Take over what engines have thawed or frozen; return an event if the step is not to be applied."""
        if taken.thawed:
            fault = self.thaw(taken.thawed, step)
            return CommitDeferred(step) if fault is None else CommitFailed(step, fault)
        return self._follow_freezing(step, taken) if kind == "step" else None

    def thaw(self, names: Iterable[str], step: int) -> Failure | None:
        """Give parameters that user code has thawed a place in all slabs; return why a step cannot be computed so."""
        names = sorted(names)
        if self._is_divided:
            return Failure(kind="ModelChangedError", message=thawed_text(names[0]), traceback="")
        numbers = self._links.num_slabs
        self._master.thaw(names)
        shown = f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        text = f"parameter {shown} was thawed: trained from step {step} on"
        self._recorder.add_event(Note("thawed", text), step=step - 1)
        try:
            self._links.renew_slabs(numbers)
        except SpaceError as error:
            return Failure(kind="SpaceError", message=str(error), traceback="")
        return None

    def _follow_freezing(self, step: int, taken: TaskReports) -> Event | None:
        """Let what user code has frozen, or thawed again, on one engine be so on all, if they differ in a step."""
        before, slots = self._master.freezing.on_engines, self._master.gradient_layout.slots
        halves = {slots[index].name for index in half_frozen(taken)}
        if halves and self._evened_step == step:
            return CommitRefused(step, half_frozen_text(min(halves)))
        frozen = ({slots[index].name for index in taken.frozen} - halves) | (halves - before)  # what is new counts
        if frozen == before and not halves:
            return None
        self._master.freeze_on_engines(frozen)
        self._links.freeze(frozen, is_new_to_all=bool(halves))
        if not halves:
            return None
        self._evened_step = step
        return CommitDeferred(step)
