"""Recovery from a hub's death in the middle of an update: the next hub finishes the update, or undoes it.

Adam and AdamW by their fused kernel are *rolled forward*: gradient, parameters, moments and undo areas of a few MB lie
in shared memory, and the journal says how far the update is. Every other optimizer is *rolled back*: while engines
compute, parameters and the optimizer's tensors are copied aside, if they have at most `SHADOW_BYTES`. A larger one that
dies in its update is `Unrecoverable`, and its last checkpoint holds; between updates it loses nothing either.

A run whose updates call functions of the user's (`dnb.hub.parameters.user_functions`) is rolled back, too; what these
keep is written with every commit.

The scheduler is stepped anew from its last state, if the hub died before that was written down. So a scheduler, and a
user's optimizer, must not depend on anything but their state.
"""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from dnb.errors import SpaceError
from dnb.hub.guarded_calls import user_code
from dnb.hub.parameters.chunked_adam import ChunkedAdam, Copy, bytes_at, undo_bytes
from dnb.hub.parameters.freezing import Freezing
from dnb.hub.parameters.journal import (
    DIRTY,
    SHADOW,
    Intent,
    Journal,
    JournalFull,
    LastCommit,
    State,
    Unrecoverable,
    create_journal,
)
from dnb.hub.parameters.optimizer_state import (
    ADAM_NAMES,
    SharedOptimizerState,
    adam_tensors,
    create_optimizer_state,
    give_groups,
    give_scheduler,
    give_state,
    open_optimizer_state,
    pack_groups,
    pack_scheduler,
    parameters_of,
    tensors_of,
    unpack_optimizer_state,
)
from dnb.hub.parameters.optimizers import Stepper, has_hooks, has_kernel
from dnb.hub.parameters.scheduler_pacing import SchedulerPace
from dnb.hub.parameters.thread_team import ThreadTeam
from dnb.hub.parameters.user_functions import KeptMemory, OwnFunctions, create_kept_memory, open_kept_memory
from dnb.protocol.memory import Layout, SegmentRef
from dnb.transport.layout import ALIGNMENT_BYTES, plan_layout, slot_views
from dnb.transport.segments import Segment, create_segment, open_segment

log = logging.getLogger(__name__)

# Parameters and state of an optimizer that is rolled back. The copy takes memory, and time while engines compute.
SHADOW_BYTES = 64 << 20
# Of a state record, besides what the optimizer's state needs: groups and scheduler may grow.
_SPARE_STATE_BYTES = 64 << 10
# As the files of a run's segments are named.
_KINDS = ("parameters", "optimizer", "undo", "shadow", "journal", "slab", "kept", "states")

Buffers = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterState:
    """The parts of a master copy."""

    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    pace: SchedulerPace
    functions: OwnFunctions
    stepper: Stepper
    thread_team: ThreadTeam
    parameters: Segment
    changing: Sequence[tuple[int, int]]  # bytes of the parameters' segment
    trainable: Sequence[torch.nn.Parameter]  # in the order of a slab
    freezing: Freezing
    gradient_layout: Layout
    buffers: dict[str, torch.Tensor]
    folders: Sequence[Path]
    prefix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerUpdate:
    """One optimizer step: the gradients are summed, clipped and bound."""

    slab: SegmentRef | None  # holds them; None: in this process alone
    unused: frozenset[int]
    mix: Callable[[], Buffers]  # buffers that change
    values: dict[str, float]  # as they go into the history
    samples: dict[int, int]  # of each engine, likewise


@dataclass(slots=True)
class _Undo:
    """Undo areas, the undo area of step counts, and the buffers' new values, in one segment."""

    segment: Segment
    areas: list[Any] = field(default_factory=list)
    steps: Any = None
    staged: dict[str, torch.Tensor] = field(default_factory=dict)


class UpdateLog:
    """Writes down every step of a master copy, so that another process can go on from it.

    Args:
        held: the master copy.
        journal: of the run.
        clip_norm: as it is now.
        state: as the journal has it, in a process that goes on; None begins anew.
    """

    def __init__(
        self, held: MasterState, journal: Journal, *, clip_norm: float | None, state: State | None = None
    ) -> None:
        self.journal = journal
        self._held = held
        self._clip_norm = clip_norm
        self._toggled = held.freezing.toggled
        self._is_adam = has_kernel(held.optimizer)
        self._chunked_adam: ChunkedAdam | None = None
        self._is_planned = False
        self._optimizer_state = (
            None if state is None or state.optimizer is None else open_optimizer_state(state.optimizer)
        )
        self._shadow = None if state is None or state.shadow is None else open_segment(state.shadow)
        self._undo = self._open_undo(state)
        self._kept = None if state is None or state.kept is None else open_kept_memory(state.kept)
        self._kept_before: KeptMemory | None = None  # which the last commit still names
        self._copies: list[Copy] | None = None
        self._written = state
        self._is_rolled_back = False  # whether the next update may need the shadow copy
        self._has_grown = False  # whether parameters have got a state since the state was written down
        self._is_off = False
        _mark_as_stepped(held.optimizer)

    @property
    def step(self) -> int:
        """The step that was committed last."""
        return self.journal.step

    def begin(self, *, step: int, evaluated: int) -> None:
        """Move the optimizer's state into shared memory and write down where the run begins.

        Raises:
            SpaceError: no room.
            TypeError: the optimizer's state cannot be written down.
        """
        optimizer = self._held.optimizer
        if self._is_adam and self._optimizer_state is None:
            self._optimizer_state = self._create_optimizer_state(adam_tensors(optimizer))
        self._adopt()
        self._write_state()
        self.journal.publish(step=step, evaluated=evaluated, values={}, samples={})

    def go_on_with(self, held: MasterState) -> None:
        """Go on when other parameters train: they get places for their state, and the journal names them.

        Args:
            held: the master copy as it is now; its optimizer is the same.
        """
        self._held, self._toggled, self._copies = held, held.freezing.toggled, None
        self.forget()
        if self._is_off:
            return
        before = [each.segment for each in (self._optimizer_state, self._undo) if each is not None]
        self.journal.mark(SHADOW, 0)
        try:
            if self._is_adam:
                self._optimizer_state = self._create_optimizer_state(adam_tensors(held.optimizer))
                self._optimizer_state.hold(held.optimizer)
                self._undo = self._open_undo(None)
        except (SpaceError, TypeError) as error:
            self.give_up(error)
            return
        if (outgrown := self._adopt()) is not None:
            before.append(outgrown.segment)
        self._write_state()
        self._try(self.journal.republish)
        kept = {segment.path for segment in self.segments}
        for segment in before:
            if segment.path not in kept:
                segment.unlink()

    def keep_freezing(self) -> None:
        """Record that engines have frozen other parameters than before."""
        if not self._is_off:
            self._write_state()
            self._try(self.journal.republish)

    # a step

    def commit(self, update: OptimizerUpdate) -> None:
        """Apply an update and commit it."""
        self.finish_deferred()
        if self._kept_before is not None:
            self._kept_before.segment.unlink()
            self._kept_before = None
        step = self.step + 1
        if (chunked_adam := self._plan(update)) is not None:
            self._roll_forward(chunked_adam, update, step)
        else:
            self._roll_back(update, step)

    def finish_deferred(self) -> None:
        """Write down what a commit left for later; does nothing if that is done."""
        if self._is_off:
            return
        if self.journal.last.owes_scheduler:
            self._write_state()
            self.journal.republish()
        if self._is_rolled_back and not self.journal.is_marked(SHADOW, self.step + 1):
            self._copy_aside()

    def change(self, *, clip_norm: float | None) -> None:
        """Record that options of the optimizer, or the clipping, were changed between two steps."""
        self._clip_norm = clip_norm
        if not self._is_off:
            self._write_state()
            self._try(self.journal.republish)

    def evaluate(self, step: int, values: dict[str, float], *, is_changed: bool = False) -> None:
        """Commit an evaluation, which may have stepped the scheduler."""
        self.finish_deferred()
        if is_changed and not self._is_off:
            self._write_state()
        self._try(lambda: self.journal.publish(step=step, kind="evaluation", values=values, samples={}, evaluated=step))

    def forget(self) -> None:
        """Drop the plan of updates, as other parameters have gradients now, or these lie elsewhere."""
        self._chunked_adam, self._is_planned = None, False

    @property
    def segments(self) -> list[Segment]:
        """All that another process needs, but for parameters and slabs."""
        found = [self.journal.segment]
        found += [self._undo.segment] if self._undo is not None else []
        found += [self._shadow] if self._shadow is not None else []
        found += [kept.segment for kept in (self._kept, self._kept_before) if kept is not None]
        return found + ([self._optimizer_state.segment] if self._optimizer_state is not None else [])

    def unlink(self) -> None:
        """Remove the segments, as no hub will go on from here."""
        for segment in self.segments:
            segment.unlink()

    # going on

    def recover(self) -> LastCommit:
        """Restore the state after the last committed step, in a new process.

        Raises:
            Torn: the hub died in an update that can be neither finished nor undone.
        """
        held, journal, state = self._held, self.journal, self._written
        assert state is not None
        give_state(held.optimizer, unpack_optimizer_state(state.optimizer_state, self._optimizer_state))
        give_groups(held.optimizer, state.groups)
        give_scheduler(held.scheduler, state.scheduler)
        if self._kept is not None:
            held.functions.give(self._kept.read(state.kept_place))
        if self._optimizer_state is not None:
            self._optimizer_state.hold(held.optimizer)
        if journal.last.owes_scheduler:
            held.pace.take_step(journal.last.step)
            self._write_state()
            journal.republish()
        note = ""
        if (intent := journal.read_intent()) is not None:
            self._finish(intent)
            note = f"step {intent.step} was finished, in which the hub had died"
        elif journal.is_marked(DIRTY, self.step + 1):
            self._undo_update()
            note = f"step {self.step + 1}, in which the hub had died, was undone"
        last = journal.last
        return LastCommit(
            step=last.step,
            evaluated=last.evaluated,
            kind=last.kind,
            values=last.values,
            samples=last.samples,
            time=last.time,
            note=note,
        )

    def _finish(self, intent: Intent) -> None:
        held = self._held
        try:
            slab = open_segment(intent.slab)
        except OSError as error:
            raise Unrecoverable(f"the gradient of step {intent.step} is gone: {error}") from error
        gradients = slot_views(held.gradient_layout, slab.memory).values()
        for number, (parameter, gradient) in enumerate(zip(held.trainable, gradients, strict=True)):
            parameter.grad = None if number in intent.unused else gradient
        self._bind_used()
        chunked_adam = self._make_chunked_adam(held.thread_team)
        try:
            self._finish_update(chunked_adam, intent)
        finally:
            for parameter in held.trainable:
                parameter.grad = None

    def _undo_update(self) -> None:
        if not self.journal.is_marked(SHADOW, self.step + 1) or self._shadow is None:
            raise Unrecoverable(f"the hub died while it applied step {self.step + 1}, of which there is no copy")
        for source, place in self._shadow_copies():
            np.copyto(source, place)
        self._is_rolled_back = True
        self.journal.mark(DIRTY, 0)

    # forward

    def _plan(self, update: OptimizerUpdate) -> ChunkedAdam | None:
        """Return the Adam by which the update can be rolled forward, or None if it cannot be."""
        if not self._is_adam or update.slab is None or self._is_off or has_hooks(self._held.optimizer):
            return None
        if self._held.functions.are_there:
            return None  # nobody can say how far one of them had come
        if not self._is_planned:
            self._is_planned = True
            try:
                self._bind_used()
                self._chunked_adam = self._make_chunked_adam(self._held.thread_team)
            except (ValueError, KeyError) as error:
                log.info("updates are not rolled forward: %s", error)
                self._chunked_adam = None
        return self._chunked_adam

    def _make_chunked_adam(self, thread_team: ThreadTeam) -> ChunkedAdam:
        optimizer_state, undo = self._optimizer_state, self._undo
        if optimizer_state is None or undo is None or not optimizer_state.hold(self._held.optimizer):
            raise ValueError("the state lies elsewhere")
        parameters = np.frombuffer(self._held.parameters.memory, dtype=np.uint8)
        counts = self._step_counts(optimizer_state)
        if len(counts) != len(undo.steps):
            raise ValueError("the state is not laid out as Adam's")
        return ChunkedAdam(
            self._held.optimizer,
            thread_team,
            memories=(parameters, optimizer_state.flat),
            areas=undo.areas,
            steps=(counts, undo.steps),
        )

    def _roll_forward(self, chunked_adam: ChunkedAdam, update: OptimizerUpdate, step: int) -> None:
        assert update.slab is not None
        assert self._undo is not None
        staged = []
        for name, value in update.mix():
            self._undo.staged[name].copy_(value)
            staged.append(name)
        intent = Intent(
            step=step,
            slab=update.slab,
            unused=tuple(update.unused),
            staged=tuple(staged),
            values=update.values,
            samples=update.samples,
            time=time.time(),
        )
        self._try(lambda: self.journal.write_intent(intent))
        self._finish_update(chunked_adam, intent)

    def _finish_update(self, chunked_adam: ChunkedAdam, intent: Intent) -> None:
        """Finish an update, in the process that began it or in the next one."""
        assert self._undo is not None
        for name in intent.staged:
            self._held.buffers[name].copy_(self._undo.staged[name])
        chunked_adam.run(self.journal, intent.step)
        self._held.pace.take_step(intent.step)
        owes = self._held.pace.is_due(intent.step) and not self._has_grown
        if self._has_grown:
            self._write_state()
        self._try(
            lambda: self.journal.publish(
                step=intent.step,
                values=intent.values,
                samples=intent.samples,
                when=intent.time,
                owes_scheduler=owes,
            )
        )

    def _bind_used(self) -> None:
        """Give parameters that get their first gradient the state that Adam would give them: zeros."""
        optimizer, optimizer_state = self._held.optimizer, self._optimizer_state
        assert optimizer_state is not None
        index = -1
        for group in optimizer.param_groups:
            names = ADAM_NAMES if group.get("amsgrad") else ADAM_NAMES[:2]
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None and not optimizer.state.get(parameter):
                    optimizer_state.forget()
                    self._has_grown = True
                    optimizer.state[parameter] = {
                        "step": optimizer_state.find(index, "step"),
                        **{name: optimizer_state.find(index, name) for name in names},
                    }

    def _step_counts(self, optimizer_state: SharedOptimizerState) -> Any:
        counts = [
            optimizer_state.find(index, "step")
            for index, parameter in enumerate(parameters_of(self._held.optimizer))
            if parameter.requires_grad
        ]
        places = [count.data_ptr() for count in counts]
        return bytes_at([optimizer_state.flat], min(places), max(places) + 4)

    # back

    def _roll_back(self, update: OptimizerUpdate, step: int) -> None:
        held = self._held
        if not self._is_rolled_back:
            self._is_rolled_back = True
            self.finish_deferred()
        if not self._is_off:
            self.journal.mark(DIRTY, step)
        for name, value in update.mix():
            held.buffers[name].copy_(value)
        held.stepper.step()
        held.functions.after_update()
        held.pace.take_step(step)
        if self._is_off:
            return
        if held.functions.are_there:
            self._toggled = held.freezing.toggled
        gone = self._adopt()
        if self._is_off:
            return
        self._write_state()
        self._try(lambda: self.journal.publish(step=step, values=update.values, samples=update.samples))
        if gone is not None:
            gone.segment.unlink()

    def _adopt(self) -> SharedOptimizerState | None:
        """Let the optimizer work in shared memory; the place that became too small, if so."""
        optimizer, before = self._held.optimizer, self._optimizer_state
        try:
            if before is not None and before.hold(optimizer):
                if before.has_moved:  # else it would go on with those that were the optimizer's own
                    self._held.stepper.forget()
                return None
            found = tensors_of(optimizer)
            if before is None and not found:
                return None
            self._optimizer_state = self._create_optimizer_state(found.items())
            self._optimizer_state.hold(optimizer)
        except (SpaceError, TypeError) as error:
            if not self.journal.has_begun:
                raise
            self.give_up(error)
            return None
        self._held.stepper.forget()
        self.forget()
        self._copies = None
        return before

    def _copy_aside(self) -> None:
        """Copy what an update changes; in the time in which engines compute."""
        self.journal.mark(SHADOW, 0)
        sizes = [last - first for first, last in self._held.changing]
        total = sum(sizes) + (0 if self._optimizer_state is None else len(self._optimizer_state.flat))
        if total > SHADOW_BYTES:
            return
        if self._shadow is None or len(self._shadow.memory) != max(total, 1):
            before, self._copies = self._shadow, None
            try:
                self._shadow = create_segment(f"{self._held.prefix}-shadow", total, folders=self._held.folders)
            except SpaceError as error:
                log.warning("a hub that dies in an update will lose steps: %s", error)
                self._shadow = None
                return
            self._write_state()
            self._try(self.journal.republish)
            if before is not None:
                before.unlink()
        for source, place in self._shadow_copies():
            np.copyto(place, source)
        self.journal.mark(SHADOW, self.step + 1)

    def _shadow_copies(self) -> list[Copy]:
        assert self._shadow is not None
        if self._copies is None:
            parameters = np.frombuffer(self._held.parameters.memory, dtype=np.uint8)
            shadow = np.frombuffer(self._shadow.memory, dtype=np.uint8)
            sources = [parameters[first:last] for first, last in self._held.changing]
            if self._optimizer_state is not None:
                sources.append(self._optimizer_state.flat)
            self._copies = []
            used = 0
            for source in sources:
                self._copies.append((source, shadow[used : used + len(source)]))
                used += len(source)
        return self._copies

    # writing

    def _write_state(self) -> None:
        with user_code("in the state of the optimizer or the scheduler"):
            groups, scheduler = pack_groups(self._held.optimizer), pack_scheduler(self._held.scheduler)
        place = 1 - self.journal.last.place
        self._write_kept(place)
        state = State(
            parameters=self._held.parameters.ref,
            optimizer=None if self._optimizer_state is None else self._optimizer_state.segment.ref,
            undo=None if self._undo is None else self._undo.segment.ref,
            num_threads=self._held.thread_team.num_threads,
            shadow=None if self._shadow is None else self._shadow.ref,
            clip_norm=self._clip_norm,
            groups=groups,
            scheduler=scheduler,
            optimizer_state=self._describe(),
            kept=None if self._kept is None else self._kept.segment.ref,
            kept_place=0 if self._kept is None else place,
            toggled=self._toggled,
            frozen_on_engines=tuple(sorted(self._held.freezing.on_engines)),
        )
        if state != self._written:
            self._try(lambda: self.journal.write_state(state))
            self._written = state
        self._has_grown = False

    def _write_kept(self, place: int) -> None:
        """Put what functions keep beside what the last commit names."""
        values = self._held.functions.read()
        if not values or self._is_off:
            return
        try:
            if self._kept is not None and self._kept.write(place, values):
                return
            before, name = self._kept, f"{self._held.prefix}-kept"
            self._kept = create_kept_memory(values, name=name, folders=self._held.folders)
            self._kept.write(place, values)
            self._kept_before = self._kept_before or before
        except (SpaceError, TypeError) as error:
            if not self.journal.has_begun:
                raise
            self.give_up(error)

    def _describe(self) -> bytes:
        return b"" if self._optimizer_state is None else self._optimizer_state.describe(self._held.optimizer)

    def _create_optimizer_state(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> SharedOptimizerState:
        return create_optimizer_state(tensors, name=f"{self._held.prefix}-optimizer", folders=self._held.folders)

    def _open_undo(self, state: State | None) -> _Undo | None:
        """Open the undo areas for rolling forward; those of the process before, if there was one."""
        if not self._is_adam:
            return None
        held = self._held
        tensors = [p for p in parameters_of(held.optimizer) if p.requires_grad]
        area_bytes, num_areas = undo_bytes(tensors, held.thread_team.num_threads)
        counts_bytes = ALIGNMENT_BYTES * max(len(tensors), 1)
        staging = plan_layout(held.buffers.items(), start_bytes=area_bytes * num_areas + counts_bytes)
        num_bytes = max(staging.num_bytes, area_bytes * num_areas + counts_bytes)
        segment = None if state is None or state.undo is None else open_segment(state.undo)
        if segment is None or len(segment.memory) < num_bytes:  # a function of the user's has thawed a parameter
            segment = create_segment(f"{held.prefix}-undo", num_bytes, folders=held.folders)
        memory = np.frombuffer(segment.memory, dtype=np.uint8)
        begin = area_bytes * num_areas
        return _Undo(
            segment,
            areas=[memory[place * area_bytes : (place + 1) * area_bytes] for place in range(num_areas)],
            steps=memory[begin : begin + counts_bytes - ALIGNMENT_BYTES + 4],
            staged=slot_views(staging, segment.memory),
        )

    def _try(self, write: Callable[[], None]) -> None:
        if self._is_off:
            return
        try:
            write()
        except JournalFull as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Write nothing more down: if this hub dies, its run goes on from its last checkpoint."""
        log.warning("the run goes on without a journal: %s", error)
        self._is_off = True
        self.journal.give_up()


def begin_keeping(held: MasterState, *, clip_norm: float | None, step: int, evaluated: int) -> UpdateLog:
    """Keep a journal of a run from here on.

    Raises:
        SpaceError: no room for it.
        TypeError: the optimizer's state cannot be written down.
    """
    if type(held.optimizer).state_dict is not torch.optim.Optimizer.state_dict:
        raise TypeError(f"{type(held.optimizer).__name__} has a state_dict of its own")
    state_bytes = _SPARE_STATE_BYTES + 1024 * len(parameters_of(held.optimizer))
    state_bytes += 4 * (len(pack_groups(held.optimizer)) + len(pack_scheduler(held.scheduler)))
    journal = create_journal(f"{held.prefix}-journal", state_bytes=state_bytes, folders=held.folders)
    update_log: UpdateLog | None = None
    try:
        update_log = UpdateLog(held, journal, clip_norm=clip_norm)
        update_log.begin(step=step, evaluated=evaluated)
    except BaseException:
        journal.segment.unlink()
        if update_log is not None:
            update_log.unlink()
        raise
    return update_log


def remove_segments(folders: Sequence[Path], prefix: str, *, but: Iterable[Segment]) -> None:
    """Remove what a dead hub left of a run; processes that have it mapped keep it until they end."""
    kept = {segment.path for segment in but}
    for folder in folders:
        for kind in _KINDS:
            for path in folder.glob(f"{glob.escape(prefix)}-{kind}-*"):
                if path not in kept:
                    path.unlink(missing_ok=True)


def _mark_as_stepped(optimizer: Any) -> None:
    """Mark an optimizer as stepped, as its `step` is not called and the scheduler would warn."""
    optimizer._opt_called = True
