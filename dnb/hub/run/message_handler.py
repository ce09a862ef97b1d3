"""The engines' messages about a run: checked, and handed to the parts that they concern."""

from __future__ import annotations

from dataclasses import replace

from dnb.hub.message_checks import Rules, check_message
from dnb.hub.parameters.master import Master
from dnb.hub.run.engine_links import EngineLinks
from dnb.hub.run.execution.dispatcher import Dispatcher
from dnb.hub.run.execution.run_coordinator import RunCoordinator
from dnb.hub.run.execution.task_executor import TaskExecutor
from dnb.hub.run.recorder import RunRecorder
from dnb.hub.scheduling.events import EngineLoaded, PeerWasLost, UserCodeFailed
from dnb.protocol.engine_messages import (
    PEER_LOST,
    Diagnosis,
    EngineMessage,
    Loaded,
    LoadFailed,
    NoSharedMemory,
    OutputPiece,
    Printed,
    WorkFailed,
    WorkReport,
)
from dnb.protocol.run import Failure, RunSpec


class MessageHandler:
    """The table of an engine's messages about one run.

    Args:
        spec: the run's numbers.
        master: whose layouts say what an engine can mean.
        coordinator: knows the engines' assignments.
        dispatcher: takes the events that messages become.
        tasks: takes reports of shards.
        links: to the engines.
        recorder: of the run.
    """

    def __init__(
        self,
        spec: RunSpec,
        master: Master,
        coordinator: RunCoordinator,
        *,
        dispatcher: Dispatcher,
        tasks: TaskExecutor,
        links: EngineLinks,
        recorder: RunRecorder,
    ) -> None:
        self._is_divided = bool(spec.partitions)
        self._coordinator = coordinator
        self._dispatcher = dispatcher
        self._tasks = tasks
        self._links = links
        self._recorder = recorder
        self._master = master
        self._rules = Rules(
            num_gradients=len(master.gradient_layout.slots),
            num_parameters=len(master.parameter_layout.slots),
            num_shards=spec.num_shards,
            num_stages=max((partition.num_stages for partition in spec.partitions), default=0),
        )

    def take(  # noqa: C901 - the table of messages
        self, engine: int, message: EngineMessage, raw: memoryview
    ) -> None:
        """Take an engine's message.

        Raises:
            PeerError: it makes no sense; nothing has changed.
        """
        if engine not in self._links:
            return
        message = check_message(message, self._current_rules())
        match message:
            case WorkReport():
                if message.more_output:
                    self._recorder.output.count(engine, message.more_output)
                self._dispatcher.dispatch(self._tasks.take_report(engine, message, raw))
            case OutputPiece(lease=lease):
                self._tasks.take_outputs(engine, lease, raw)
            case Printed(kind="output"):
                self._recorder.output.add(engine, message.lines)
                self._recorder.output.count(engine, message.more)
            case Printed(lines=lines, kind=kind):
                self._recorder.output.add_news(engine, lines, kind=kind)
            case NoSharedMemory(reason=reason):
                if not self._links[engine].has_loaded:  # else what lies in its slabs may count already
                    self._dispatcher.change_to_socket(engine, reason)
            case Loaded(team=team):
                self._links[engine].has_loaded = True
                assignment = self._coordinator.assignment_of(engine)
                if assignment is None or assignment[0] == team:  # else it had joined before it got another assignment
                    self._recorder.stats.begin(engine)
                    self._dispatcher.dispatch(EngineLoaded(engine))
            case LoadFailed():
                self._take_load_failure(engine, message)
            case WorkFailed():
                self._take_failure(engine, message)
            case Diagnosis():
                if refused := self._tasks.search.finish(engine, message):
                    self._dispatcher.dispatch(refused)

    def _current_rules(self) -> Rules:
        """Return what an engine can say now; parameters that are thawed get gradients."""
        num_gradients = len(self._master.gradient_layout.slots)
        if self._rules.num_gradients != num_gradients:
            self._rules = replace(self._rules, num_gradients=num_gradients)
        return self._rules

    def _take_load_failure(self, engine: int, message: LoadFailed) -> None:
        failure, team = message.failure, message.team
        if failure.kind == PEER_LOST and team is not None:
            assignment = self._coordinator.assignment_of(engine)
            if assignment is not None and assignment[0] == team:
                self._dispatcher.dispatch(PeerWasLost(engine, None))
        else:
            self._dispatcher.dispatch(UserCodeFailed(engine, 0, self._keep_whole(failure, 0, engine)))

    def _take_failure(self, engine: int, message: WorkFailed) -> None:
        failure, step, lease = message.failure, message.step, message.lease
        if lease == 0:
            self._dispatcher.end_search(engine)
        elif failure.kind == PEER_LOST and self._is_divided:
            self._dispatcher.dispatch(PeerWasLost(engine, lease))
        else:
            self._links[engine].is_written |= failure.kind == "ParameterWrittenError"
            failure = self._keep_whole(failure, step, engine)
            self._dispatcher.dispatch(UserCodeFailed(engine, step, failure, lease))

    def _keep_whole(self, failure: Failure, step: int, engine: int) -> Failure:
        return self._recorder.keep_whole(failure, step, f"engine-{engine}")
