"""A few samples of a run, computed on copies of what the user gave."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from dnb.api.rehearsal.attributes import Attributes
from dnb.api.rehearsal.trial_copies import (
    MOST_SAMPLES,
    digest_of_first,
    free_tensors,
    own_buffers,
    shallow,
    without_optimizer,
)
from dnb.api.rehearsal.undisturbed import undisturbed
from dnb.api.rehearsal.watching import WriteWatch
from dnb.engine.replicas.outcome import part_seed
from dnb.errors import USER_ERRORS
from dnb.job import Data, Job, Sum
from dnb.protocol.run import Reduction
from dnb.transport.pickling.copies import close_files, copy_together
from dnb.transport.pickling.generators import OwnGenerators
from dnb.user_code.loader import fetch_batch
from dnb.user_code.loss_judge import Kind
from dnb.user_code.model_call import arguments_of
from dnb.user_code.module_modes import Modes
from dnb.user_code.return_values import read_loss, read_step

# A large model, of which each takes its time, is computed with the fewest that have parts. A loss that takes the model
# is judged with three, as of two a median is the mean; and with four if that leaves a doubt, as a part has one alone.
LOSS_SAMPLES = (3, 4)
SMALL_MODEL = 1_000_000  # parameters
# Engines are held against the notebook by so many; of a large model, whose forwards are dear, by so many.
PROBE_SAMPLES = 8
PROBE_SAMPLES_OF_LARGE = 2
# A model whose probe takes longer is never tried with more than the fewest.
SLOW_SECONDS = 1.0
FEWEST_SAMPLES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The other numbers of a run that matter to its rehearsal.

    Args:
        seed: of the run.
        precision: likewise.
        loss_over: what the user says of the loss, if he does.
        cuts_batches: whether parts of a batch are made by themselves: engines that compute one together, as those of a
            pipeline, make it whole.
    """

    seed: int = 0
    precision: str = "float32"
    loss_over: str | None = None
    cuts_batches: bool = True


@dataclass(slots=True, kw_only=True)
class Computed:
    """The result of one forward, and of backward, as far as they came.

    Args:
        output: what the model returned; None where a step function called it.
        target: what the loss compared it with; None where the model or a step function has the loss.
        returned: by loss, step function, or the model that has its own loss.
        loss: read from that.
        error: what was raised.
        phase: in which it was raised: "forward" is the model's or the step function's.
        written: parameters that were written, and by which operation.
        accumulated: parameters whose gradient came before backward was to begin.
        warnings: texts of those that were given.
    """

    output: Any = None
    target: Any = None
    returned: Any = None
    loss: torch.Tensor | Sum | None = None
    error: BaseException | None = None
    phase: Literal["data", "forward", "loss", "backward", ""] = ""
    written: Mapping[str, str] = field(default_factory=dict)
    accumulated: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Trial:
    """The first samples of a run, and copies of its objects, which checks may compute with.

    Args:
        given: the job as the user gave it: only to be read; `job` is the copy.
        given_data: likewise.
        job: copied as an engine gets it; its model may be changed, as nothing of it comes home.
        data: likewise.
        options: of the run.
        indices: of the samples.
        modes: switches the copy between training and evaluation.
        generators: of random numbers, in the copies.
        is_whole: whether data were copied as a whole: those that would have taken long were not.
        is_shared: whether some tensors are the user's own memory, as there are many: nothing may write parameters.
        batch: of these, as collate_fn made it; None if it could not be had.
        computed: by the model, in training mode, on the batch, with backward.
        probed: loss of the samples that engines are probed with.
        written: parameters that the last probe wrote, and by which operation.
        changed: attributes and the like that the first forward changed.
        loss_over: what a check has found of the loss; see `Rehearsed`.
        reduction: likewise.
        val_reduction: likewise.
        whole_metrics: likewise.
        target_metrics: likewise.
        step_metrics: how metrics that step returns are put together, by the rules of `judge_step`.
        fingerprint: of everything that findings come from, except for values that training changes; None: unknown.
        probe_shapes: shapes and dtypes of the batch that was last probed.
        is_slow: whether the first probe took long.
    """

    given: Job
    given_data: Data
    job: Job
    data: Data
    options: Options
    indices: torch.Tensor
    modes: Modes
    generators: OwnGenerators
    is_whole: bool
    is_shared: bool
    batch: Any = None
    computed: Computed = field(default_factory=Computed)
    changed: tuple[str, ...] = ()
    probed: float | None = None
    written: Mapping[str, str] = field(default_factory=dict)
    loss_over: Literal["samples", "batch"] = "samples"
    reduction: Reduction = "targets"
    val_reduction: Reduction = "targets"
    whole_metrics: tuple[str, ...] = ()
    target_metrics: tuple[str, ...] = ()
    step_metrics: Mapping[str, Kind] = field(default_factory=dict)
    fingerprint: bytes | None = None
    probe_shapes: tuple[Any, ...] = ()
    is_slow: bool = False

    @classmethod
    def of(cls, job: Job, data: Data, options: Options) -> Trial:
        """Copy a run's objects, fetch its first samples, and compute them.

        Raises:
            Exception: what cannot be copied.
        """
        trial = cls.copied(job, data, options)
        trial.run()
        return trial

    @classmethod
    def copied(cls, job: Job, data: Data, options: Options) -> Trial:
        """Copy a run's objects, and compute nothing yet.

        Raises:
            Exception: what cannot be copied.
        """
        num_samples = job.order.num_samples
        copies = copy_together(without_optimizer(job), data, free=free_tensors(job, data))
        copied_job, copied_data = copies.small, copies.large if copies.is_whole else shallow(data)
        trial = cls(
            given=job,
            given_data=data,
            job=copied_job,
            data=copied_data,
            options=options,
            indices=torch.arange(min(_samples_for(job.model), num_samples)),
            generators=copies.generators,
            is_whole=copies.is_whole,
            is_shared=copies.shared > 0,
            modes=Modes([copied_job.model, *(copied_job.stages or ())]),
            fingerprint=None if copies.fingerprint is None else copies.fingerprint + digest_of_first(data),
        )
        if copies.shared:
            own_buffers(copied_job.model)
        return trial

    def run(self) -> None:
        """Fetch the first samples, and compute them."""
        self.fetch()
        if self.computed.error is None:
            attributes = Attributes(self.job.model, self.job.step)
            began = time.perf_counter()
            self.probed = self.probe()  # before anything has changed what forward depends on
            self.is_slow = time.perf_counter() - began > SLOW_SECONDS
            if self.is_slow and len(self.indices) > FEWEST_SAMPLES:
                self.indices = self.indices[:FEWEST_SAMPLES]
                self.fetch()
            early = self.written
            self.compute()
            self.computed.written = {**early, **self.computed.written}
            self.changed = attributes.changed()

    @property
    def probe_samples(self) -> int:
        """Number of samples by which engines are held against the notebook."""
        return PROBE_SAMPLES if _is_small(self.given.model) else PROBE_SAMPLES_OF_LARGE

    def fetch(self) -> None:
        """Fetch the batch of the first samples."""
        with undisturbed():
            self.seed()
            try:
                self.batch = fetch_batch(self.data.train, self.indices)
            except KeyboardInterrupt:
                raise
            except USER_ERRORS as error:
                self.computed = Computed(error=error, phase="data")

    def widen(self, number: int) -> bool:
        """Have a batch of more samples, if there are as many and the model is not slow; nothing is computed."""
        if self.is_slow or not len(self.indices) < number <= self.given.order.num_samples:
            return False
        before = self.indices, self.batch, self.computed
        self.indices = torch.arange(number)
        self.fetch()
        if self.computed.error is None:
            return True
        self.indices, self.batch, self.computed = before
        return False

    def compute(self) -> Computed:
        """Run forward, loss and backward as a step does."""
        with undisturbed() as caught:
            self.seed()
            self.modes.set_training(mode=True)
            before = _buffers_of(self.job.model)
            self.computed = _compute(self.job, self.batch, self.autocast(), is_shared=self.is_shared)
            for module, key, buffer, value in before:  # engines are probed with those of the beginning
                buffer.data = value
                module._buffers[key] = buffer
        self.computed.warnings = tuple(str(each.message) for each in caught)
        return self.computed

    def probe(self) -> float | None:
        """Return the loss in evaluation mode, as engines compute it for comparison; None if there is none."""
        if self.computed.phase == "data" or not self.is_whole:
            return None  # their own random numbers would be others
        watch = _watch(self.job.model, is_shared=self.is_shared)
        with undisturbed():
            self.modes.set_training(mode=False)
            self.seed()
            try:
                indices = torch.arange(min(self.probe_samples, self.given.order.num_samples))
                batch = fetch_batch(self.data.train, indices)
                self.probe_shapes = _shapes_of(batch)
                with watch, torch.no_grad(), self.autocast():
                    loss = _loss(self.job, batch, Computed(), needs_gradient=False)
                if isinstance(loss, Sum):
                    return loss.total.item() / loss.weight if loss.weight else None
                return loss.item()
            except KeyboardInterrupt:
                raise
            except USER_ERRORS:
                return None
            finally:
                self.written = watch.written

    def fetched(self, begin: int, end: int) -> Any:
        """Return the batch of some of the samples, by their places among these."""
        return fetch_batch(self.data.train, self.indices[begin:end])

    def loss_and_metrics_of(self, batch: Any) -> tuple[torch.Tensor | Sum, Mapping[str, Any]]:
        """Compute the loss of some samples, with its graph, and the metrics that a step function returns with it."""
        computed = Computed()
        with torch.enable_grad(), self.autocast():
            loss = _loss(self.job, batch, computed, needs_gradient=False)
        return loss, {} if self.job.step is None else read_step(computed.returned, needs_gradient=False)[1]

    def release(self) -> None:
        """Let the copies go; a file that a data set has opened is closed without a warning."""
        with undisturbed():
            self.batch = None
            self.computed = Computed()
            close_files(self.data.train.samples, self.given_data.train.samples)
            self.data, self.job = self.given_data, self.given

    def seed(self) -> None:
        """Draw the numbers that an engine draws for its probe."""
        seed = part_seed(self.options.seed, 0, 0)
        torch.default_generator.manual_seed(seed)
        self.generators.seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast around forward, as on engines."""
        if self.options.precision == "float32":
            return nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)


def outputs_to_judge(trial: Trial) -> tuple[Any, Any, int]:
    """Have output and target of a trial, of so many samples that no part has one alone.

    Returns:
        Both, and the number of samples; of two the second comes three times, so that no part has the same as the whole.
    """
    pair, number = (trial.computed.output, trial.computed.target), len(trial.indices)
    if number != FEWEST_SAMPLES:
        return *pair, number
    rows = torch.tensor([0, 1, 1, 1])

    def repeated(leaf: Any) -> Any:
        has_rows = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and len(leaf) == number
        return leaf.index_select(0, rows) if has_rows else leaf

    output, target = torch.utils._pytree.tree_map(repeated, pair)
    return output, target, len(rows)


def _buffers_of(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]]:
    """List every buffer, where it is, and a copy of its value."""
    return [
        (module, key, buffer, buffer.detach().clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]


def _samples_for(model: torch.nn.Module) -> int:
    return MOST_SAMPLES if _is_small(model) else FEWEST_SAMPLES


def _is_small(model: torch.nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) <= SMALL_MODEL


def _shapes_of(batch: Any) -> tuple[Any, ...]:
    leaves, spec = torch.utils._pytree.tree_flatten(batch)
    return str(spec), *((type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None)) for leaf in leaves)


def _watch(model: torch.nn.Module, *, is_shared: bool) -> WriteWatch:
    named = dict(model.named_parameters())
    return WriteWatch(named, shared=frozenset(named) if is_shared else frozenset())


def _compute(job: Job, batch: Any, autocast: AbstractContextManager[Any], *, is_shared: bool) -> Computed:
    computed = Computed(phase="forward")
    named = dict(job.model.named_parameters())
    accumulated: list[str] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: accumulated.append(name))
        for name, parameter in named.items()
        if parameter.requires_grad and parameter.is_leaf
    ]
    watch = _watch(job.model, is_shared=is_shared)
    for parameter in named.values():
        parameter.grad = None
    try:
        with watch:
            with autocast, torch.enable_grad():
                loss = computed.loss = _loss(job, batch, computed, needs_gradient=True)
            computed.accumulated = tuple(dict.fromkeys(accumulated))
            computed.phase = "backward"
            total = loss.total if isinstance(loss, Sum) else loss
            total.backward()
        computed.phase = ""
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:
        computed.error = error
        if computed.phase != "backward":
            computed.accumulated = tuple(dict.fromkeys(accumulated))
    finally:
        for hook in hooks:
            hook.remove()
    computed.written = watch.written
    return computed


def _loss(job: Job, batch: Any, computed: Computed, *, needs_gradient: bool) -> torch.Tensor | Sum:
    """Loss of a batch; what it was computed from is noted on the way."""
    model = job.model
    if job.step is not None:
        computed.returned = job.step(model, batch)
        return read_step(computed.returned, needs_gradient=needs_gradient)[0]
    given = arguments_of(model, batch, has_target=job.loss is not None)
    computed.target = given.target
    computed.output = model(*given.positional, **given.keywords)
    if job.loss is None:
        computed.returned = computed.output
        return read_step(computed.returned, needs_gradient=needs_gradient, by="model")[0]
    computed.phase = "loss"
    computed.returned = job.loss(computed.output, computed.target)
    return read_loss(computed.returned, needs_gradient=needs_gradient)
