"""The coordinator under random schedules: everything that may happen to a run, in any order.

`make soak` runs many more of them.
"""

from __future__ import annotations

import os
import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dnb.hub.scheduling.coordinator import Coordinator
from dnb.hub.scheduling.events import (
    Action,
    Asked,
    Assign,
    Commit,
    CommitDeferred,
    CommitRefused,
    Committed,
    End,
    EngineBusy,
    EngineEnding,
    EngineHeard,
    EngineJoined,
    EngineLoaded,
    EngineLost,
    EngineSilent,
    Event,
    LeaseDeclined,
    LoadEngine,
    Release,
    RetireEngine,
    Tick,
    UserCodeFailed,
    WorkDone,
)
from dnb.protocol.measurements import WorkKind
from dnb.protocol.run import Failure

NUM_STEPS = 5
NUM_SHARDS = 7
EVALUATE_EVERY = 2
MOST_ENGINES = 5
FAILURES = [Failure(kind="ValueError", message=text, traceback=f"Traceback: {text}") for text in ("one", "two")]


@dataclass
class Engine:
    """One living process: it computes one lease after the other, and its answers arrive in order."""

    is_loaded: bool = False
    is_left_out: bool = False  # it could not load the run
    is_stopped: bool = False
    is_away: bool = False  # it has not joined the hub that was started again
    work: Assign | None = None  # being computed
    answers: deque[WorkDone | UserCodeFailed] = field(default_factory=deque)  # on their way

    @property
    def may_load(self) -> bool:
        return not (self.is_loaded or self.is_left_out or self.is_stopped or self.is_away)

    @property
    def has_unanswered(self) -> bool:
        return self.work is not None or bool(self.answers)


class Schedule(RuleBasedStateMachine):
    """A hub with its engines, as the real service behaves, in any order of events.

    A slab is known by the shards that were added to it since it was last zeroed, or is torn: while it is written, and
    for good if its engine dies or fails then. So each commit is checked against what really lies in the slabs.
    """

    gathers = False  # whether outputs are gathered before each step; they lie in no slab

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.engines: dict[int, Engine] = {}
        self.silent: set[int] = set()  # as the hub was told
        self.busy: set[int] = set()  # likewise
        self.holds_the_lock: random.Random | None = None  # if so, every call to the end is silent until it is answered
        self.retiring: set[int] = set()
        self.slabs: dict[tuple[int, bool], list[int] | None] = {}  # by engine and whether it is the other; None is torn
        self.counted: dict[tuple[int, tuple[int, ...]], bool] = {}  # engine and shards: in which slab
        self.sent: list[WorkDone | UserCodeFailed] = []
        self.apart_of: dict[int, bool] = {}  # by lease
        self.generation = 0  # of the hub
        self.next_engine = 0
        self.has_room = True  # for another slab
        self.commit: Commit | None = None
        self.committed: list[int] = []
        self.evaluated: list[int] = []
        self.ended: End | None = None
        self.gathered = 0  # the step whose outputs were gathered last
        self.holders: dict[int, set[int]] = {}  # of these outputs
        for _ in range(3):
            self._new_engine()
        self.coordinator = Coordinator(
            num_steps=NUM_STEPS,
            num_shards=NUM_SHARDS,
            evaluate_every=EVALUATE_EVERY,
            engines=list(self.engines),
            gathers=self.gathers,
        )
        self._perform(self.coordinator.start())

    def _new_engine(self) -> int:
        engine = self.next_engine
        self.next_engine += 1
        self.engines[engine] = Engine()
        return engine

    def _tell(self, event: Event) -> None:
        self._perform(self.coordinator.handle(event, now=self.now))

    def _perform(self, actions: list[Action]) -> None:
        declined: list[LeaseDeclined] = []
        for action in actions:
            assert self.ended is None or isinstance(action, Release), f"{action} after {self.ended}"
            match action:
                case LoadEngine(engine):
                    assert engine in self.engines
                case Assign():
                    declined += self._assign(action)
                case Commit():
                    assert self.commit is None
                    self._check_slabs(action)
                    self.commit = action
                case Release(engine):
                    self._end_engine(engine)
                    self._tell(EngineLost(engine, "died"))
                case End():
                    self.ended = action
        for event in declined:
            self._tell(event)

    def _assign(self, action: Assign) -> list[LeaseDeclined]:
        engine = self.engines[action.engine]
        assert engine.is_loaded
        assert not engine.has_unanswered, f"{action}, but {engine}"
        assert action.engine not in self.silent | self.retiring
        assert action.lease not in self.apart_of
        assert action.shards == tuple(sorted(set(action.shards)))
        assert set(action.shards) <= set(range(NUM_SHARDS))
        if action.kind == "outputs":
            self.gathered = 0  # a step that was given up begins anew
        # As a step begins: whoever gets something has computed it before, or it is all that is left.
        held = self.holders.get(action.engine)
        assert held is None or set(action.shards) >= held, f"{action}, but it has computed {held}"
        self.apart_of[action.lease] = action.in_extra_slab
        if action.in_extra_slab and not self.has_room:
            return [LeaseDeclined(action.engine, action.lease)]
        engine.work = action
        return []

    def _end_engine(self, number: int) -> None:
        engine = self.engines.pop(number)
        if engine.work is not None and engine.work.kind != "outputs":
            self.slabs[number, engine.work.in_extra_slab] = None
        self.sent += engine.answers  # they may come yet, as a stranger's
        self.silent.discard(number)
        self.busy.discard(number)
        self.retiring.discard(number)

    def _check_slabs(self, commit: Commit) -> None:
        """What lies in the slabs that count is every shard of the task, once, and nobody is writing there."""
        assert sorted(shard for _, shards in commit.reports for shard in shards) == list(range(NUM_SHARDS))
        assert (commit.kind, commit.step) == self._due()
        if commit.kind == "outputs":
            return
        in_slabs: dict[tuple[int, bool], list[int]] = {}
        for number, shards in commit.reports:
            in_slabs.setdefault((number, self.counted[number, shards]), []).extend(shards)
        for (number, in_extra_slab), shards in in_slabs.items():
            slab = self.slabs[number, in_extra_slab]
            assert slab is not None, f"the slab of engine {number} is torn"
            assert sorted(slab) == sorted(shards)
            work = self.engines[number].work if number in self.engines else None
            assert work is None or work.in_extra_slab != in_extra_slab, f"engine {number} is writing"

    def _due(self) -> tuple[WorkKind, int]:
        step = len(self.committed)
        owes = step > 0 and (step % EVALUATE_EVERY == 0 or step == NUM_STEPS) and step not in self.evaluated
        if owes:
            return "evaluation", step
        return ("outputs" if self.gathers and self.gathered != step + 1 else "step"), step + 1

    def _compute(self, number: int) -> None:
        engine = self.engines[number]
        work, engine.work = engine.work, None
        assert work is not None
        if work.kind == "outputs":
            engine.answers.append(WorkDone(number, work.lease, work.kind, work.step, work.shards, len(work.shards)))
            return
        key = number, work.in_extra_slab
        before = [] if work.fresh else self.slabs[key]
        assert before is not None
        self.slabs[key] = [*before, *work.shards]
        engine.answers.append(WorkDone(number, work.lease, work.kind, work.step, work.shards, len(work.shards)))

    def _deliver(self, number: int) -> None:
        engine = self.engines[number]
        answer = engine.answers.popleft()
        self.sent.append(answer)
        if isinstance(answer, WorkDone) and self.coordinator.expects(answer):
            self.counted[number, answer.shards] = self.apart_of[answer.lease]
        self._tell(answer)

    def _answer_commit(self) -> None:
        commit, self.commit = self.commit, None
        assert commit is not None
        if self.ended is None and commit.kind != "outputs":
            (self.committed if commit.kind == "step" else self.evaluated).append(commit.step)
        self.gathered = commit.step if commit.kind == "outputs" else 0
        self.holders = {number: set() for number, _ in commit.reports} if self.gathered else {}
        for number, shards in commit.reports if self.gathered else ():
            self.holders[number].update(shards)
        self._tell(Committed(commit.kind, commit.step))
        self.holders = {}

    def _numbers(self, *, computing: bool = False, answering: bool = False, loading: bool = False) -> list[int]:
        return [
            number
            for number, engine in self.engines.items()
            if (computing and engine.work is not None and not engine.is_stopped)
            or (answering and engine.answers)
            or (loading and engine.may_load)
        ]

    def _steady(self) -> set[int]:
        """Engines that are in the run to stay."""
        return {number for number, engine in self.engines.items() if not engine.is_left_out} - self.retiring

    def _known(self) -> set[int]:
        """Engines that the hub knows."""
        return {number for number, engine in self.engines.items() if not engine.is_away}

    def _draw(self, data: st.DataObject, numbers: list[int] | set[int]) -> int:
        return data.draw(st.sampled_from(sorted(numbers)))

    # engines that come and go

    @initialize(num_loaded=st.sampled_from([3, 3, 3, 1, 0]))
    def begin(self, num_loaded: int) -> None:
        for number in range(num_loaded):
            self._load(number)

    @initialize(seed=st.none() | st.integers(0, 1000))
    def hold_the_lock_at_the_end(self, seed: int | None) -> None:
        """How engines behave when the run is served to its end: see `teardown`."""
        self.holds_the_lock = None if seed is None else random.Random(seed)

    @precondition(lambda self: len(self.engines) < MOST_ENGINES)
    @rule()
    def join(self) -> None:
        self._tell(EngineJoined(self._new_engine()))

    @precondition(lambda self: len(self.engines) < min(MOST_ENGINES, self.next_engine))
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """A new process under an engine's old id, which finds the old slab as it was left."""
        number = self._draw(data, set(range(self.next_engine)) - set(self.engines))
        self.engines[number] = Engine()
        self._tell(EngineJoined(number))

    def _load(self, number: int) -> None:
        self.engines[number].is_loaded = True
        self._tell(EngineLoaded(number))

    @precondition(lambda self: self._numbers(loading=True))
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        self._load(self._draw(data, self._numbers(loading=True)))

    @precondition(lambda self: self._numbers(loading=True) and len(self._steady()) > 1)
    @rule(data=st.data(), failure=st.sampled_from(FAILURES))
    def fail_to_load(self, data: st.DataObject, failure: Failure) -> None:
        number = self._draw(data, self._numbers(loading=True))
        self.engines[number].is_left_out = True
        self._tell(UserCodeFailed(number, 0, failure))

    def _lose(self, number: int, *, is_suspect: bool = False) -> None:
        self._end_engine(number)
        self._tell(EngineLost(number, "died", is_suspect=is_suspect, is_crash=is_suspect))

    @precondition(lambda self: len(self._steady()) > 1)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        number = self._draw(data, set(self.engines))
        if self._steady() != {number}:
            self._lose(number)

    @precondition(lambda self: len(self._steady()) > 1)
    @rule(data=st.data())
    def lose_one_that_had_reported_before(self, data: st.DataObject) -> None:
        again = [number for number, engine in self.engines.items() if engine.work and not engine.work.fresh]
        if again:
            self._lose(self._draw(data, again))

    @precondition(lambda self: self._numbers(computing=True) and len(self._steady()) > 1)
    @rule(data=st.data())
    def end_by_its_work(self, data: st.DataObject) -> None:
        """Twice at the same shards, and the run pauses."""
        number = self._draw(data, self._numbers(computing=True))
        if self._steady() != {number}:
            self._lose(number, is_suspect=True)

    @precondition(lambda self: len(self._steady()) > 2)
    @rule(data=st.data())
    def lose_two_together(self, data: st.DataObject) -> None:
        first = self._draw(data, set(self.engines))
        second = self._draw(data, set(self.engines) - {first})
        if self._steady() - {first, second}:
            self._tell(EngineEnding(second))
            self._lose(first, is_suspect=True)
            self._lose(second, is_suspect=True)

    @precondition(lambda self: len(self._steady()) > 1)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        number = self._draw(data, set(self.engines))
        if self._steady() != {number} and number in self._known():
            self.retiring.add(number)
            self._tell(RetireEngine(number))

    # engines that hang, and are slow

    @precondition(lambda self: self._known() - self.silent)
    @rule(data=st.data(), is_false_alarm=st.booleans())
    def hang(self, data: st.DataObject, is_false_alarm: bool) -> None:
        number = self._draw(data, self._known() - self.silent)
        self.engines[number].is_stopped = not is_false_alarm
        if not self.engines[number].is_left_out:
            self.silent.add(number)
        self._tell(EngineSilent(number, "was stopped"))

    @precondition(lambda self: self._known() - self.silent)
    @rule(data=st.data(), is_asleep=st.booleans())
    def hold_the_lock(self, data: st.DataObject, is_asleep: bool) -> None:
        """A call that lets no other thread run: the engine computes on, and is seen to do so, or not."""
        number = self._draw(data, self._known() - self.silent)
        self._hold_the_lock(number, is_asleep=is_asleep)

    def _hold_the_lock(self, number: int, *, is_asleep: bool) -> None:
        if not self.engines[number].is_left_out:
            (self.silent if is_asleep else self.busy).add(number)
        silent = EngineSilent(number, "was not heard", is_asleep=True)
        self._tell(silent if is_asleep else EngineBusy(number))

    def _recover(self, number: int) -> None:
        self.engines[number].is_stopped = False
        self.silent.discard(number)
        self.busy.discard(number)
        self._tell(EngineHeard(number))

    @precondition(lambda self: self.silent | self.busy)
    @rule(data=st.data())
    def recover(self, data: st.DataObject) -> None:
        self._recover(self._draw(data, self.silent | self.busy))

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.3, 1.0, 10.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self._tell(Tick())

    @precondition(lambda self: {engine.has_unanswered for engine in self._heard()} == {True, False})
    @rule()
    def be_late(self) -> None:
        """Somebody idles while another takes far longer than anything took before."""
        self.now = 4 * self.now + 1
        self._tell(Tick())

    def _heard(self) -> list[Engine]:
        return [e for n, e in self.engines.items() if e.is_loaded and n not in self.silent | self.retiring]

    @rule()
    def run_out_of_room(self) -> None:
        self.has_room = not self.has_room

    # a hub that dies

    @precondition(lambda self: self.ended is None)
    @rule(is_applied=st.booleans())
    def restart_the_hub(self, is_applied: bool) -> None:
        """Leases, answers and silence are forgotten; a commit under way has been made, or it has not."""
        self.gathered = 0
        if self.commit is not None and is_applied and self.commit.kind != "outputs":
            (self.committed if self.commit.kind == "step" else self.evaluated).append(self.commit.step)
        self.commit = None
        for engine in self.engines.values():
            self.sent += engine.answers
            engine.answers.clear()
            engine.work = None
            engine.is_loaded = engine.is_left_out = False
            engine.is_away = True
        self.slabs.clear()
        self.counted.clear()
        self.silent.clear()
        self.busy.clear()
        self.generation += 1
        old = self.coordinator
        self.coordinator = Coordinator(
            num_steps=NUM_STEPS,
            num_shards=NUM_SHARDS,
            evaluate_every=EVALUATE_EVERY,
            engines=(),
            returning=list(self.engines),
            step=len(self.committed),
            evaluated=max(self.evaluated, default=0),
            status="paused" if old.status == "paused" else "starting",
            error=old.error,
            traceback=old.traceback,
            generation=self.generation,
            gathers=self.gathers,
        )
        self._perform(self.coordinator.start())

    def _return(self, number: int) -> None:
        self.engines[number].is_away = self.engines[number].is_stopped = False
        self._tell(EngineJoined(number))
        if number in self.retiring:
            self._tell(RetireEngine(number))

    @precondition(lambda self: len(self._known()) < len(self.engines))
    @rule(data=st.data())
    def return_to_the_hub(self, data: st.DataObject) -> None:
        self._return(self._draw(data, set(self.engines) - self._known()))

    @precondition(lambda self: len(self._known()) < len(self.engines))
    @rule()
    def all_return_and_load(self) -> None:
        for number in sorted(set(self.engines) - self._known()):
            self._return(number)
        for number in self._numbers(loading=True):
            self._load(number)

    # work

    @precondition(lambda self: self._numbers(computing=True))
    @rule(data=st.data(), num_parts=st.integers(1, 3), seconds=st.sampled_from([0.0, 0.01, 0.1]))
    def compute_and_deliver(self, data: st.DataObject, num_parts: int, seconds: float) -> None:
        for _ in range(num_parts):
            if busy := self._numbers(computing=True):
                number = self._draw(data, busy)
                self.now += seconds
                self._compute(number)
                while number in self.engines and self.engines[number].answers:
                    self._deliver(number)

    @precondition(lambda self: self._numbers(computing=True))
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        self._compute(self._draw(data, self._numbers(computing=True)))

    @precondition(lambda self: self._numbers(computing=True))
    @rule(data=st.data(), failure=st.sampled_from(FAILURES))
    def fail(self, data: st.DataObject, failure: Failure) -> None:
        number = self._draw(data, self._numbers(computing=True))
        engine = self.engines[number]
        work, engine.work = engine.work, None
        assert work is not None
        if work.kind != "outputs":
            self.slabs[number, work.in_extra_slab] = None
        engine.answers.append(UserCodeFailed(number, work.step, failure, work.lease))

    @precondition(lambda self: self._numbers(answering=True))
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self._deliver(self._draw(data, self._numbers(answering=True)))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        before = self.coordinator.working
        answer = data.draw(st.sampled_from(self.sent))
        assert self.coordinator.handle(answer, now=self.now) == []
        assert self.coordinator.working == before

    @rule(
        engine=st.integers(-1, MOST_ENGINES),
        lease=st.integers(-1, 40),
        step=st.integers(0, NUM_STEPS + 1),
        shards=st.lists(st.integers(-1, NUM_SHARDS), max_size=NUM_SHARDS).map(tuple),
    )
    def deliver_nonsense(self, engine: int, lease: int, step: int, shards: tuple[int, ...]) -> None:
        number = engine if engine in self.engines else 99
        work = self.engines[number].work if number in self.engines else None
        nonsense = WorkDone(number, lease, "step", step, shards)
        if work is None or (work.lease, work.shards) != (lease, shards):
            before = self.coordinator.working
            assert self.coordinator.handle(nonsense, now=self.now) == [] or self.engines[number].answers
            assert self.coordinator.working == before or self.engines[number].answers

    @precondition(lambda self: self.commit is not None)
    @rule(verdict=st.sampled_from(["committed", "committed", "committed", "refused", "deferred"]))
    def answer_commit(self, verdict: str) -> None:
        if verdict != "committed" and self.commit is not None and self.commit.kind == "step":
            step, self.commit = self.commit.step, None
            self._tell(CommitRefused(step, "the loss is nan") if verdict == "refused" else CommitDeferred(step))
        else:
            self._answer_commit()

    # the user

    @rule(verb=st.sampled_from(["pause", "resume", "resume"]))
    def ask(self, verb: str) -> None:
        self._tell(Asked(verb))

    @precondition(lambda self: self.coordinator.status == "paused")
    @rule()
    def resume(self) -> None:
        self._tell(Asked("resume"))

    @precondition(lambda self: len(self.committed) >= 2)
    @rule()
    def stop(self) -> None:
        self._tell(Asked("stop"))

    # claims

    @invariant()
    def a_running_run_with_an_engine_that_is_heard_has_work_under_way(self) -> None:
        if self.coordinator.status == "running" and self._heard() and self.commit is None:
            assert any(engine.has_unanswered for n, engine in self.engines.items() if n not in self.silent)

    @invariant()
    def steps_follow_each_other_without_gap(self) -> None:
        assert self.committed == list(range(1, len(self.committed) + 1))
        assert self.coordinator.step == len(self.committed)

    @invariant()
    def evaluations_are_those_due_and_none_twice(self) -> None:
        due = [step for step in range(1, len(self.committed) + 1) if step % EVALUATE_EVERY == 0 or step == NUM_STEPS]
        assert self.evaluated == due[: len(self.evaluated)]
        assert len(due) - len(self.evaluated) <= 1

    @invariant()
    def a_finished_run_has_all_steps_and_evaluations(self) -> None:
        if self.ended is not None and self.ended.status == "finished":
            assert (self.committed[-1], self.evaluated[-1]) == (NUM_STEPS, NUM_STEPS)

    @invariant()
    def a_run_fails_only_without_engines(self) -> None:
        assert self.coordinator.status != "failed"

    @invariant()
    def a_pause_that_nobody_asked_for_says_why(self) -> None:
        if self.coordinator.error:
            assert self.coordinator.status == "paused"
            assert "nothing of this" in self.coordinator.error

    def teardown(self) -> None:
        """From wherever the events led, a run that is resumed and served reaches its end.

        Either every engine is heard from now on, or every call holds its engine's lock, so that nobody is ever heard
        while it computes; who answers next is chance.
        """
        for _ in range(500):
            if self.ended is not None:
                break
            if not self._serve_what_waits():
                if self.holds_the_lock is not None:
                    self._answer_one_in_silence(self.holds_the_lock)
                elif answering := self._numbers(answering=True):
                    self._deliver(answering[0])
                else:
                    self._compute(self._numbers(computing=True)[0])
        assert self.ended is not None
        assert self.ended.status in ("finished", "stopped")
        self.steps_follow_each_other_without_gap()
        self.a_finished_run_has_all_steps_and_evaluations()

    def _serve_what_waits(self) -> bool:
        """Everything but computing; whether there was something."""
        stopped = self.silent if self.holds_the_lock is None else {n for n, e in self.engines.items() if e.is_stopped}
        if stopped:
            self._recover(min(stopped))
        elif away := set(self.engines) - self._known():
            self._return(min(away))
        elif self.coordinator.status == "paused":
            self._tell(Asked("resume"))
        elif loading := self._numbers(loading=True):
            self._recover(loading[0])
            self._load(loading[0])
        elif self.commit is not None:
            self._answer_commit()
        else:
            return False
        return True

    def _answer_one_in_silence(self, chance: random.Random) -> None:
        """All who compute are silent; one of them answers, and is heard again."""
        for number in sorted(n for n, engine in self.engines.items() if engine.has_unanswered):
            if number in self.engines and number not in self.silent and self.engines[number].has_unanswered:
                self._hold_the_lock(number, is_asleep=True)
        if unanswered := sorted(n for n, engine in self.engines.items() if engine.has_unanswered):
            number = chance.choice(unanswered)
            self.now += chance.choice([0.1, 1.0, 8.0])
            if self.engines[number].work is not None:
                self._compute(number)
            is_first_heard = chance.random() < 0.5
            if is_first_heard:
                self._recover(number)
            while number in self.engines and self.engines[number].answers:
                self._deliver(number)
            if not is_first_heard and number in self.engines:
                self._recover(number)
        elif self.silent:  # if it is nobody, those who were to answer have been ended meanwhile
            self._recover(min(self.silent))
        if self.ended is None:
            self._tell(Tick())


class GatheringSchedule(Schedule):
    """The same of a run whose loss looks at the whole batch."""

    gathers = True


TestEveryShardIsCountedOnce = Schedule.TestCase
TestEveryShardOfAGatheredStepIsCountedOnce = GatheringSchedule.TestCase
IS_SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
NUM_SCHEDULES = settings.get_profile("soak").max_examples if IS_SOAK else 600
# Explaining a failure traces every line, which takes minutes here.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
TestEveryShardIsCountedOnce.settings = settings(
    max_examples=NUM_SCHEDULES, stateful_step_count=50, deadline=None, phases=PHASES
)
TestEveryShardOfAGatheredStepIsCountedOnce.settings = settings(
    max_examples=NUM_SCHEDULES // 4, stateful_step_count=50, deadline=None, phases=PHASES
)
