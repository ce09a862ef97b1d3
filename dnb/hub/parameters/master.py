"""The master copy: adds up the engines' slabs, steps the one optimizer, in memory that everybody reads."""

from __future__ import annotations

import cmath
import math
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dnb.errors import ArgumentError, SpaceError
from dnb.hub.guarded_calls import UserCodeError, user_code
from dnb.hub.parameters.buffer_rules import default_rule, differing_text
from dnb.hub.parameters.durability import MasterState, OptimizerUpdate, UpdateLog, begin_keeping
from dnb.hub.parameters.freezing import Freezing
from dnb.hub.parameters.loose_states import HubStates
from dnb.hub.parameters.optimizers import Stepper, build_optimizer, build_scheduler, check_setting
from dnb.hub.parameters.scheduler_pacing import SchedulerPace
from dnb.hub.parameters.thread_team import ThreadTeam, usable_threads
from dnb.hub.parameters.user_functions import OwnFunctions
from dnb.job import Job
from dnb.protocol.measurements import Sums
from dnb.protocol.memory import SegmentRef
from dnb.protocol.run import RunSpec, TransportKind
from dnb.transport.layout import plan_gradients, plan_layout, region_views, slot_views
from dnb.transport.pickling.module_states import LooseStates
from dnb.transport.segments import Segment, create_segment, open_segment
from dnb.transport.sockets.wires import Flat
from dnb.user_code.gradient_samples import positions, take

# Elements that are added and checked at a time, so that the check finds them in the cache.
CHUNK_ELEMENTS = 1 << 18

NOWHERE = SegmentRef(path="", num_bytes=0)


@dataclass(frozen=True, slots=True)
class Contribution:
    """One engine's contribution to a step: one slab, or the shards that were added to one."""

    engine: int
    slab: int
    shard: int  # the first one; contributions count in this order
    sums: Sums
    is_sum: bool
    unused: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """A committed step."""

    loss: float
    metrics: dict[str, float]
    lr: float
    samples: dict[int, int]  # that each engine brought
    values: dict[str, float]  # as they go into the history
    grad_norm: float = math.nan  # 2-norm of the gradient of all parameters, before it is clipped
    sample: torch.Tensor | None = None  # some elements of all gradients, before they are clipped

    @property
    def num_samples(self) -> int:
        """The number of samples of all engines."""
        return sum(self.samples.values())


class NotFinite(Exception):  # noqa: N818 - a verdict, not a fault
    """A loss or gradient is NaN or infinite: nothing was applied.

    Args:
        text: what is not finite.
        engine: whose it is.
        slab: in which of its slabs.
    """

    def __init__(self, text: str, *, engine: int, slab: int) -> None:
        super().__init__(text)
        self.engine = engine
        self.slab = slab


class HubSlab:
    """One flat gradient with buffers behind it, as the hub sees it: shared with its engine, or filled over a wire."""

    def __init__(self, memory: mmap.mmap, master: Master, *, segment: Segment | None, is_shared: bool = True) -> None:
        self.segment = segment
        self._is_shared = is_shared
        self.flat = Flat(memoryview(memory))
        self.regions = region_views(master.gradient_layout, memory)
        self.gradients = list(slot_views(master.gradient_layout, memory).values())
        self.buffers = slot_views(master.buffer_layout, memory)

    @property
    def ref(self) -> SegmentRef:
        """The segment by which the engine maps it."""
        return self.segment.ref if self.segment is not None and self._is_shared else NOWHERE


class Master:
    """Parameters, buffers and optimizer of one run.

    Args:
        job: as unpacked; its model's tensors are moved into shared memory.
        folders: where segments may lie.
        prefix: of the segments' file names.
        clip_norm: largest global norm of the aggregated gradient; None does not clip.
        parameters: where they lie already, with their values; None moves the job's there.
        num_threads: that share the work; None: as many as are of use.
        spec: of the run: when its scheduler is stepped, and its seed; None: after every step, and 0.
    """

    def __init__(
        self,
        job: Job,
        *,
        folders: Sequence[Path],
        prefix: str,
        clip_norm: float | None,
        parameters: SegmentRef | None = None,
        num_threads: int | None = None,
        spec: RunSpec | None = None,
    ) -> None:
        # One of OpenMP's, and no more: a second one spins for a core that an engine has, and shows in the last bits of
        # norms. What is worth sharing is shared by the thread team.
        torch.set_num_threads(1)
        self._thread_team = ThreadTeam(num_threads or usable_threads())
        self.model = job.model
        self.notes: list[str] = []
        self._folders = folders
        self._prefix = prefix
        self._clip_norm = clip_norm
        # First, as user code may raise here, when there is no memory yet to give back.
        with user_code("where the optimizer is made"):
            self.optimizer = build_optimizer(job.optimizer, job.model.parameters(), lr=job.lr)
        every, has_val = ("step", False) if spec is None else (spec.scheduler_every, spec.num_val_samples > 0)
        with user_code("where the scheduler is made"):
            self.scheduler = build_scheduler(job.scheduler, self.optimizer, every=every, has_val=has_val)
        self._pace = SchedulerPace(
            self.scheduler, every=every, steps_per_epoch=1 if spec is None else spec.steps_per_epoch
        )
        self.functions = OwnFunctions(job, self.optimizer, seed=0 if spec is None else spec.seed)
        self._step = 0  # committed
        self._stepper = Stepper(self.optimizer, self._thread_team)
        named = dict(job.model.named_parameters())
        buffers = dict(job.model.named_buffers())
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        frozen = {name: p for name, p in named.items() if not p.requires_grad}
        tensors = {**trainable, **buffers, **frozen}
        self.parameter_layout = plan_layout(tensors.items())
        self._parameters = named
        self._tensors = tensors
        self._buffers = buffers
        self.freezing = Freezing(named)
        self._lay_out()
        if parameters is None:
            self._segment = self._create("parameters", self.parameter_layout.num_bytes)
        else:
            self._segment = open_segment(parameters)
        views = slot_views(self.parameter_layout, self._segment.memory)
        for name, tensor in tensors.items():
            if parameters is None:
                views[name].copy_(tensor.detach())
            tensor.data = views[name]
        self.functions.bind(tensors)
        self.buffer_rules: Mapping[str, str] = {}  # by name; see `dnb.hub.parameters.buffer_rules`
        self.states = HubStates(job.model, folders=folders, prefix=prefix)
        self._noticed: set[str] = set()
        self._differing: list[str] = []  # that are not reported yet
        self._bound: tuple[tuple[int, int], frozenset[int]] | None = None  # whose slab the gradients are views of
        self._is_disturbed = False  # a hook has taken a gradient away
        self._slabs: dict[tuple[int, int], HubSlab] = {}
        self._update_log: UpdateLog | None = None

    def _lay_out(self) -> None:
        """Plan slabs, in which gradients lie before buffers, and tell which bytes of the parameters change."""
        placed = self.freezing.placed
        trained = {name: parameter for name, parameter in self._parameters.items() if name in placed}
        self.gradient_layout = plan_gradients(trained.items())
        self.buffer_layout = plan_layout(self._buffers.items(), start_bytes=self.gradient_layout.num_bytes)
        self.changing = _merged(
            (slot.offset_bytes, slot.offset_bytes + self._tensors[slot.name].nbytes)
            for slot in self.parameter_layout.slots
            # Functions of the user's may write anything.
            if slot.name in trained or slot.name in self._buffers or self.functions.are_there
        )
        self._trainable = [trained[slot.name] for slot in self.gradient_layout.slots]
        self._sampled: list[torch.Tensor] | None = None  # elements of each gradient

    # which parameters train

    @property
    def thawed_here(self) -> tuple[str, ...]:
        """Parameters that functions of the user's have thawed in the hub, and that are to get a place by `thaw`."""
        return self.freezing.unplaced if self.functions.are_there else ()

    def thaw(self, names: Iterable[str]) -> None:
        """Let parameters train that were frozen, from the next step on; all slabs are given up."""
        self.finish_deferred()
        self.drop_slabs()
        self.freezing.thaw(names)
        self._lay_out()
        self._stepper.forget()
        if self._update_log is not None:
            self._update_log.go_on_with(self.held)

    def freeze_on_engines(self, names: Iterable[str]) -> None:
        """Take down which parameters engines have frozen, before a step is applied that they have not trained in."""
        self.finish_deferred()
        self.freezing.on_engines = frozenset(names)
        if self._update_log is not None:
            self._update_log.keep_freezing()

    def restore_freezing(self, toggled: Sequence[str], on_engines: Sequence[str]) -> None:
        """Let parameters be frozen, or not, as the hub before had it; before slabs are added.

        Args:
            toggled: as `Freezing.toggled` gave them.
            on_engines: names of those that engines had frozen.

        Raises:
            ValueError: there is no such parameter.
        """
        if toggled or on_engines:
            self.freezing.restore(toggled, on_engines)
            self._lay_out()

    # what the next hub goes on from

    def keep_journal(self, *, step: int, evaluated: int) -> None:
        """Write down every step from here on; before slabs are added. Without room for it the run goes on without.

        Args:
            step: that the state as it is now was committed by.
            evaluated: last step after which an evaluation was committed.
        """
        self._step = step
        try:
            self._update_log = begin_keeping(self.held, clip_norm=self._clip_norm, step=step, evaluated=evaluated)
            self.states.keep(step=step)
        except (SpaceError, TypeError) as error:
            self.notes.append(f"if the hub dies, the run goes on from its last checkpoint: {error}")
        except UserCodeError as error:
            cause = f"{error.failure.kind}: {error.failure.message} ({error.place})"
            self.notes.append(f"if the hub dies, the run goes on from its last checkpoint: {cause}")

    def go_on_with(self, update_log: UpdateLog) -> None:
        """Write on in the journal that this state was recovered from."""
        self._update_log = update_log
        self._step = update_log.step
        self.states.recover(step=update_log.step)
        self._stepper.forget()

    @property
    def journal_ref(self) -> SegmentRef | None:
        """From which `recovery.recover_master` makes this master copy anew; None: there is no journal."""
        return None if self._update_log is None else self._update_log.journal.ref

    @property
    def segments(self) -> list[Segment]:
        """The segments that outlive the process, but for slabs."""
        kept = [] if self._update_log is None else self._update_log.segments
        return [self._segment, *kept, *self.states.segments]

    @property
    def held(self) -> MasterState:
        """The state for which an update log is kept."""
        return MasterState(
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            pace=self._pace,
            functions=self.functions,
            stepper=self._stepper,
            thread_team=self._thread_team,
            parameters=self._segment,
            changing=self.changing,
            trainable=self._trainable,
            freezing=self.freezing,
            gradient_layout=self.gradient_layout,
            buffers=self._buffers,
            folders=self._folders,
            prefix=self._prefix,
        )

    def finish_deferred(self) -> None:
        """Write down what a commit left for later; to be called while engines compute."""
        if self._update_log is not None:
            self._update_log.finish_deferred()

    def commit_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Commit an evaluation after a step: nothing changes but a scheduler that looks for a plateau.

        Raises:
            UserCodeError: the scheduler has failed.
        """
        is_stepped = self._pace.take_evaluation(step, values)
        if self._update_log is not None:
            self._update_log.evaluate(step, values, is_changed=is_stepped)

    # what engines see

    @property
    def parameters_ref(self) -> SegmentRef:
        """The segment in which engines map the parameters."""
        return self._segment.ref

    @property
    def parameters_flat(self) -> Flat:
        """The parameters, to be sent over a wire."""
        return Flat(memoryview(self._segment.memory))

    def slabs_of(self, engine: int) -> list[HubSlab]:
        """Return the slabs of an engine, in the order of their numbers."""
        return [slab for (owner, _), slab in sorted(self._slabs.items()) if owner == engine]

    def add_slabs(self, engine: int, number: int, *, kind: TransportKind) -> list[HubSlab]:
        """Reserve slabs until the engine has so many; those that are new.

        Raises:
            SpaceError: no room for one.
        """
        added: list[HubSlab] = []
        for index in range(len(self.slabs_of(engine)), number):
            added.append(self._slabs.setdefault((engine, index), self._make_slab(engine, index, kind)))
        return added

    def drop_slabs_of(self, engine: int) -> None:
        """Give back the slabs of an engine that is gone."""
        for key in [key for key in self._slabs if key[0] == engine]:
            self._drop(key)

    def commit(
        self,
        contributions: Sequence[Contribution],
        *,
        describe: Callable[[StepResult], dict[str, float]] | None = None,
        sample: bool = False,
        states: LooseStates | None = None,
    ) -> StepResult:
        """Add up the slabs in the order of their shards and apply one optimizer step.

        Args:
            contributions: of the engines.
            describe: called once before the update; what the history, and so the journal, is to say of the step.
            sample: whether to keep some elements of the gradients.
            states: loose ones that have changed.

        Raises:
            NotFinite: a loss or gradient is NaN or infinite; nothing was changed.
        """
        contributions = sorted(contributions, key=lambda c: c.shard)
        loss, metrics = mean_of([c.sums for c in contributions])
        if not math.isfinite(loss):
            raise _culprit_of(loss, contributions)
        keys = list(dict.fromkeys((c.engine, c.slab) for c in contributions))
        self.functions.begin(self._step + 1)
        square = self._reduce(keys, contributions)
        if self.functions.has_gradient_hooks:
            square = self._adjust_gradients()
        seen = self._sample() if sample else None
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._trainable, self._clip_norm)
        lr = float(self.optimizer.param_groups[0]["lr"])
        samples: dict[int, int] = {}
        for part in contributions:
            samples[part.engine] = samples.get(part.engine, 0) + part.sums.num_samples
        result = StepResult(loss, metrics, lr, samples, {}, math.sqrt(square), seen)
        result.values.update({"loss": loss, "lr": lr, **metrics} if describe is None else describe(result))
        if states is not None:
            self._take_states(states)
        self._apply(keys, contributions, result)
        self._step += 1
        return result

    def _adjust_gradients(self) -> float:
        """Let hooks see the gradient of the whole batch; the sum of the squares of what they leave."""
        self.functions.adjust_gradients()
        gradients = self._gradients
        assert self._bound is not None
        # A hook may take one away, as those do that step a parameter themselves; for this step alone.
        self._is_disturbed = len(gradients) + len(self._bound[1]) < len(self._trainable)
        return _square_of(gradients)

    @property
    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._trainable if parameter.grad is not None]

    def _take_states(self, states: LooseStates) -> None:
        """Adopt the new states before the step counts, as they are written down with its number."""
        try:
            self.states.update(states, step=0 if self._update_log is None else self._update_log.step + 1)
        except SpaceError as error:
            if self._update_log is not None:
                self._update_log.give_up(error)

    def _apply(
        self, keys: Sequence[tuple[int, int]], contributions: Sequence[Contribution], result: StepResult
    ) -> None:
        mix = partial(self._mixed_buffers, keys, contributions)
        if self._update_log is not None:
            assert self._bound is not None
            slab = self._slabs[keys[0]].segment
            ref = None if slab is None else slab.ref
            self._update_log.commit(
                OptimizerUpdate(slab=ref, unused=self._bound[1], mix=mix, values=result.values, samples=result.samples)
            )
            return
        for name, value in mix():
            self._buffers[name].copy_(value)
        self._stepper.step()
        self.functions.after_update()
        self._pace.take_step(self._step + 1)

    def set(self, options: Mapping[str, float | None]) -> None:
        """Change clip_norm, or numbers of every parameter group such as lr and weight_decay.

        Raises:
            ArgumentError: an unknown name or a value that is none; nothing is changed.
        """
        groups = self.optimizer.param_groups
        numbers = [name for name, value in groups[0].items() if name != "lr" and type(value) in (int, float)]
        for name, value in options.items():
            check_setting(name, value, known=["lr", "clip_norm", *numbers])
        before = self._clip_norm, [{name: group[name] for name in options.keys() & group.keys()} for group in groups]
        for name, value in options.items():
            if name == "clip_norm":
                self._clip_norm = value
            else:
                for group in groups:
                    group[name] = value
        try:
            if self._update_log is not None:
                self._update_log.change(clip_norm=self._clip_norm)
        except UserCodeError as error:
            self._clip_norm, numbers_before = before
            for group, values in zip(groups, numbers_before, strict=True):
                group.update(values)
            failure = error.failure
            raise ArgumentError(
                f"nothing was set, as {failure.kind} was raised {error.place}: {failure.message}"
            ) from error

    def take_news(self) -> str:
        """Return a note on the last steps for the user, once; mostly empty."""
        if not self._differing:
            return ""
        names, self._differing = self._differing, []
        return differing_text(names)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over parameters and buffers by name; the optimizer's state may have been replaced too."""
        for name, tensor in self._tensors.items():
            if not self.states.is_loose(name):
                tensor.data.copy_(tensors[name])
        self._stepper.forget()

    def digests(self) -> tuple[int, bytes]:
        """Return the CRC-32 (ISO 3309) of all parameters and buffers, and those of each, as uint32."""
        each = [_digest(self._tensors[slot.name]) for slot in self.parameter_layout.slots]
        packed = np.array(each, dtype=np.uint32).tobytes()
        return zlib.crc32(packed), packed

    def drop_slabs(self) -> None:
        """Give the slabs' memory back, as no step will follow."""
        for key in list(self._slabs):
            self._drop(key)

    def close(self) -> None:
        """Unlink parameters and journal; the memory goes when the last process lets go of it."""
        self._thread_team.close()
        for segment in self.segments:
            segment.unlink()

    def _drop(self, key: tuple[int, int]) -> None:
        slab = self._slabs.pop(key)
        if self._bound is not None and self._bound[0] == key:
            for parameter in self._trainable:
                parameter.grad = None
            self._bound = None
        if slab.segment is not None:
            slab.segment.unlink()

    def _create(self, name: str, num_bytes: int) -> Segment:
        segment = create_segment(f"{self._prefix}-{name}", num_bytes, folders=self._folders)
        if segment.note:
            self.notes.append(segment.note)
        return segment

    def _make_slab(self, engine: int, index: int, kind: TransportKind) -> HubSlab:
        num_bytes = self.buffer_layout.num_bytes
        is_shared = kind != "socket"
        if not is_shared and self._update_log is None:
            return HubSlab(mmap.mmap(-1, max(num_bytes, 1)), self, segment=None)
        # Also one that is filled over a wire may hold the sum of all, which the next hub needs to finish a step.
        try:
            segment = self._create(f"slab-{engine}-{index}", num_bytes)
        except SpaceError:
            if is_shared:
                raise
            return HubSlab(mmap.mmap(-1, max(num_bytes, 1)), self, segment=None)
        return HubSlab(segment.memory, self, segment=segment, is_shared=is_shared)

    def _reduce(self, keys: Sequence[tuple[int, int]], contributions: Sequence[Contribution]) -> float:
        """Make the first slab the mean; the sum of its squares."""
        first, *others = (self._slabs[key] for key in keys)
        divisor = self._divisor(contributions) if any(c.is_sum for c in contributions) else None
        square = 0.0
        for index, target in enumerate(first.regions):
            square += sum_regions(
                target, [slab.regions[index] for slab in others], divisor=divisor, thread_team=self._thread_team
            )
            if math.isnan(square):
                raise self._find_culprit(keys)
        unused = frozenset.intersection(*(frozenset(c.unused) for c in contributions))
        frozen: set[int] = set()
        if self.functions.are_there:  # which may freeze what engines go on computing gradients of
            frozen = {number for number, parameter in enumerate(self._trainable) if not parameter.requires_grad}
            unused |= frozen
        if self._bound != (keys[0], unused) or self._is_disturbed:
            for number, (parameter, gradient) in enumerate(zip(self._trainable, first.gradients, strict=True)):
                parameter.grad = None if number in unused else gradient
            self._bound = keys[0], unused
            self._stepper.forget()
            if self._update_log is not None:
                self._update_log.forget()
        return _square_of(self._gradients) if frozen else square

    def _divisor(self, contributions: Sequence[Contribution]) -> float | None:
        """Give all slabs of totals one unit; what their sum is then to be divided by, None if by nothing."""
        units = {(c.engine, c.slab): c.sums.unit for c in contributions if c.is_sum}
        weight = sum([c.sums.loss_weight for c in contributions])
        common = next(iter(units.values()))
        for key, unit in units.items():
            if unit != common:
                for region in self._slabs[key].regions:
                    region.mul_(unit / common)
        return None if weight == common else weight / common

    def _sample(self) -> torch.Tensor:
        if self._sampled is None:
            self._sampled = positions([parameter.numel() for parameter in self._trainable])
        return take([parameter.grad for parameter in self._trainable], self._sampled)

    def _find_culprit(self, keys: Sequence[tuple[int, int]]) -> NotFinite:
        """Find the slab whose gradient is not finite; the first slab holds the sum by now, so it is checked last."""
        for engine, slab in [*keys[1:], keys[0]]:
            for slot, gradient in zip(self.gradient_layout.slots, self._slabs[engine, slab].gradients, strict=True):
                if not torch.isfinite(gradient).all():
                    return NotFinite(f"the gradient of {slot.name!r} is not finite", engine=engine, slab=slab)
        return NotFinite("the gradient is not finite", engine=keys[0][0], slab=keys[0][1])

    def _mixed_buffers(
        self, keys: Sequence[tuple[int, int]], contributions: Sequence[Contribution]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Compute the buffers that change: by the rule that was given for each, else by `default_rule`."""
        if not self._buffers:
            return
        weights = dict.fromkeys(keys, 0)
        for contribution in contributions:
            weights[contribution.engine, contribution.slab] += contribution.sums.num_samples
        total = sum(weights.values())
        counted = [key for key in keys if weights[key] or not total]
        for name, master in self._buffers.items():
            if self.states.is_loose(name):
                continue
            seen = [self._slabs[key].buffers[name] for key in counted]
            if all(torch.equal(buffer, master) for buffer in seen):
                continue  # a constant must not drift by rounding
            rule = self.buffer_rules.get(name) or default_rule(name, master)
            if rule == "sum":
                yield name, _summed(master, seen)
            elif rule == "mean" and len(seen) > 1:
                yield name, _averaged(seen, [weights[key] / total if total else 1 / len(seen) for key in counted])
            else:
                yield name, seen[0]
                self._notice(name, seen)

    def _notice(self, name: str, seen: Sequence[torch.Tensor]) -> None:
        """Remember, once, that a buffer for which no rule was given depends on who computed what."""
        if name in self.buffer_rules or name in self._noticed or all(torch.equal(seen[0], other) for other in seen[1:]):
            return
        self._noticed.add(name)
        self._differing.append(name)


def _summed(master: torch.Tensor, seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum a buffer and what each part has added to it."""
    wide = _wide(master)
    total = master.to(wide).clone()
    for buffer in seen:
        total += buffer.to(wide) - master.to(wide)
    return total


def _averaged(seen: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    mixed = torch.zeros_like(seen[0], dtype=_wide(seen[0]))
    for buffer, share in zip(seen, shares, strict=True):
        mixed += buffer.to(mixed.dtype) * share
    return mixed


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which buffers are added up."""
    if tensor.is_complex():
        return torch.complex128
    return torch.float64 if tensor.is_floating_point() else tensor.dtype


def sum_regions(
    target: torch.Tensor, others: Sequence[torch.Tensor], *, divisor: float | None = None, thread_team: ThreadTeam
) -> float:
    """Add flat tensors into the first, in order, chunk by chunk.

    Args:
        target: flat, becomes the sum.
        others: of the same size.
        divisor: the sum is divided by it.
        thread_team: does it.

    Returns:
        The sum of the squares of the sum's elements; NaN if one of them is not finite.
    """
    parts = thread_team.cut(len(target))
    if len(parts) == 1:
        return _sum_part(target, others, divisor)
    return sum(
        thread_team.share(
            [
                partial(_sum_part, target[begin:end], [other[begin:end] for other in others], divisor)
                for begin, end in parts
            ]
        )
    )


def _sum_part(target: torch.Tensor, others: Sequence[torch.Tensor], divisor: float | None) -> float:
    squares = 0.0
    for chunk, *rest in _chunks([target, *others]):
        for other in rest:
            chunk.add_(other)
        if divisor is not None:
            chunk.div_(divisor)
        # One pass while the chunk is in the cache: a square that is not finite comes from such an element, or from
        # one that is too large to be squared, which is looked at again.
        square = torch.vdot(chunk, chunk).item()
        if not cmath.isfinite(square):
            square = chunk.abs().double().square().sum().item() if torch.isfinite(chunk).all() else math.nan
        squares += square.real
    return squares


def mean_of(sums: Sequence[Sums]) -> tuple[float, dict[str, float]]:
    """Return the mean loss and mean metrics of several parts."""
    weight = sum(part.loss_weight for part in sums)
    loss = sum(part.loss_total for part in sums) / weight if weight else math.nan
    names = sorted({name for part in sums for name in part.metric_totals})
    metrics = {name: _mean_metric(name, sums) for name in names}
    return loss, metrics


def _mean_metric(name: str, sums: Sequence[Sums]) -> float:
    weight = sum(part.metric_weights.get(name, 0.0) for part in sums)
    return sum(part.metric_totals.get(name, 0.0) for part in sums) / weight if weight else math.nan


def _square_of(gradients: Sequence[torch.Tensor]) -> float:
    """Sum the squares of all elements."""
    return sum(gradient.abs().double().square().sum().item() for gradient in gradients)


def _culprit_of(loss: float, contributions: Sequence[Contribution]) -> NotFinite:
    culprits = [c for c in contributions if not math.isfinite(c.sums.loss_total)] or list(contributions)
    return NotFinite(f"the loss is {loss}", engine=culprits[0].engine, slab=culprits[0].slab)


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    if len(tensors[0]) <= CHUNK_ELEMENTS:
        yield tuple(tensors)
        return
    yield from zip(*(tensor.split(CHUNK_ELEMENTS) for tensor in tensors), strict=True)


def _merged(ranges: Iterator[tuple[int, int]] | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge neighbouring ranges; the padding between two slots travels with them."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first - merged[-1][1] < mmap.PAGESIZE:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _digest(tensor: torch.Tensor) -> int:
    flat = tensor.detach().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
