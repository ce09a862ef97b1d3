"""The user's own objects as a checkpoint keeps them, and those that are given in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import msgspec
import torch

from dnb.api.arguments.checks import check_model
from dnb.api.arguments.data_sources import Source
from dnb.api.arguments.losses import are_objects, read_loss, read_metrics
from dnb.api.run_specs import OBJECTS
from dnb.api.submission import NOTHING, Upload, upload
from dnb.errors import USER_ERRORS, ArgumentError, summary_of
from dnb.hub.checkpoints.format import Manifest
from dnb.hub.checkpoints.reader import Checkpoint, DamagedError
from dnb.hub.checkpoints.user_objects import REPLACED_FUNCTIONS_FILE
from dnb.job import Data, Job
from dnb.planning.sample_order import BatchOrder, count_batches
from dnb.pool.engine_pool import EnginePool
from dnb.progress import long_work
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import PlainJob, RunSpec
from dnb.transport.pickling.payloads import unpack
from dnb.transport.segments import Segment, create_segment


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenObjects:
    """Objects that a user gives in place of those that a checkpoint holds; None leaves these."""

    model: Any
    train: Any
    val: Any
    loss: Any
    step: Any
    optimizer: Any
    scheduler: Any
    metrics: Any
    after_step: Any
    val_step: Any

    @property
    def names(self) -> set[str]:
        """The arguments that count as given."""
        found = {field.name for field in fields(self) if getattr(self, field.name) is not None}
        return found | {"loss", "step"} if found & {"loss", "step"} else found  # one takes the other's place


def wanted_files(manifest: Manifest, *, given: GivenObjects) -> list[str]:
    """Return the files of pickles without which the run cannot go on.

    Raises:
        ArgumentError: the checkpoint does not hold one.
    """
    wanted: list[str] = []
    for kind, payload in (("job", manifest.spec.job), ("data", manifest.spec.data)):
        if _needs(kind, manifest, given):
            names = [f"{kind}.pickle", *([f"{kind}.buffers"] if payload.segment is not None else [])]
            if any(name not in manifest.files for name in names):
                raise ArgumentError(
                    f"the checkpoint of step {manifest.step} holds no {kind}, as it was taken when its run had ended: "
                    f"give {'model=... and train=...' if kind == 'job' else 'train=...'}"
                )
            wanted += names
    if has_replaced_functions(manifest, given):
        wanted.append(REPLACED_FUNCTIONS_FILE)
    return wanted


def has_replaced_functions(manifest: Manifest, given: GivenObjects) -> bool:
    """Tell whether functions that were replaced in mid-run count: not if others are given now."""
    return REPLACED_FUNCTIONS_FILE in manifest.files and given.loss is None and given.step is None


def _needs(kind: str, manifest: Manifest, given: GivenObjects) -> bool:
    if kind == "data":
        return given.train is None or (given.val is None and manifest.spec.num_val_samples > 0)
    plain = manifest.spec.plain
    return plain is None or given.model is None or bool(set(plain.others) - given.names)


def needed_pickles(manifest: Manifest, given: GivenObjects) -> list[str]:
    """Return the arguments of `resume` without which pickles have to be read; empty if none has to be."""
    needed: list[str] = []
    if _needs("job", manifest, given):
        plain = manifest.spec.plain
        others = set(OBJECTS) - {"val_step", "val"} if plain is None else set(plain.others)
        needed += ["model"] if given.model is None else []
        needed += [name for name in OBJECTS if name in others - given.names]
    if _needs("data", manifest, given):
        needed += ["train"] if given.train is None and "train" not in needed else []
        has_val = manifest.spec.num_val_samples > 0
        needed += ["val"] if given.val is None and has_val and "val" not in needed else []
    if has_replaced_functions(manifest, given) and not {"loss", "step"} & set(needed):
        needed.append("loss")  # or step: they were replaced in mid-run
    return needed


def job_of(checkpoint: Checkpoint, given: GivenObjects, sources: dict[str, Source]) -> tuple[Job, Upload]:
    """Return the job, and how it is sent: as it was kept, unless something in it was given."""
    manifest = checkpoint.manifest
    order = sources["train"].order if "train" in sources else None
    if given.model is not None:
        check_model(given.model)
    if not _needs("job", manifest, given):
        kept = _plain_job(manifest.spec, given)
        if order is None and count_batches(kept.order) != manifest.spec.steps_per_epoch:
            raise ArgumentError(
                f"{checkpoint.folder} is not as dnb writes checkpoints: steps_per_epoch is "
                f"{manifest.spec.steps_per_epoch}, and its order has {count_batches(kept.order)}"
            )
    else:
        kept = _unpickle(checkpoint, "job", manifest.spec.job)
        keeps_val = "val" not in sources or sources["val"].order is kept.val_order is None
        if order is None and keeps_val and not given.names - {"train", "val"}:
            return kept, partial(_ship_kept, checkpoint, "job", manifest.spec.job)
    job = _replaced(kept, given, order)
    if "val" in sources:
        job = replace(job, val_order=sources["val"].order)
    return job, partial(upload, job)


def _replaced(kept: Job, given: GivenObjects, order: BatchOrder | None) -> Job:
    changes: dict[str, Any] = {}
    if given.loss is not None or given.step is not None:
        changes |= {"loss": read_loss(given.loss, step=given.step), "step": given.step}
    if given.metrics is not None:
        changes["metrics"] = read_metrics(given.metrics)
    if order is not None:
        changes["order"] = order
    changes |= {
        name: getattr(given, name)
        for name in ("model", "optimizer", "scheduler", "after_step", "val_step")
        if getattr(given, name) is not None
    }
    if given.model is not None and given.optimizer is None and isinstance(kept.optimizer, torch.optim.Optimizer):
        _move_optimizer(kept.optimizer, kept.model, given.model)
    return replace(kept, **changes)


def _move_optimizer(optimizer: torch.optim.Optimizer, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Let an optimizer that was kept with its model step the parameters of the one that was given."""
    named = dict(new.named_parameters())
    successors = {id(parameter): named.get(name) for name, parameter in old.named_parameters()}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = [successors.get(id(parameter)) for parameter in group["params"]]
        if any(parameter is None for parameter in group["params"]):
            raise ArgumentError("the optimizer that was kept steps parameters that the model does not have: give one")


def _plain_job(spec: RunSpec, given: GivenObjects) -> Job:
    """Return a job of which nothing has to be unpickled."""
    plain = spec.plain
    assert plain is not None
    return Job(
        model=given.model,
        loss=read_loss(plain.loss, step=None),
        step=None,
        metrics=read_metrics(list(plain.metrics)),
        optimizer=plain.optimizer,
        lr=plain.lr,
        scheduler=None,
        after_step=given.after_step,
        val_step=given.val_step,
        order=BatchOrder(
            num_samples=spec.num_samples,
            batch_size=spec.batch_size,
            shuffle=plain.shuffle,
            drop_last=plain.drop_last,
            seed=spec.seed,
        ),
    )


def plain_now(plain: PlainJob | None, given: GivenObjects, job: Job) -> PlainJob | None:
    """Return the part of the new job that is words and numbers."""
    if plain is None:
        return None
    others, order = set(plain.others) - given.names, job.order
    words: dict[str, Any] = {"loss": given.loss, "optimizer": given.optimizer}
    changes: dict[str, Any] = {}
    for name in given.names & {"loss", "step", "optimizer", "scheduler", "metrics", "after_step", "val_step"}:
        value = getattr(given, name)
        is_word = isinstance(value, str) and name in words
        if name in words:
            changes[name] = value if is_word else None
        if name == "metrics" and not are_objects(value):
            changes["metrics"] = tuple(read_metrics(value))
        elif value is not None and not is_word:
            others.add(name)
    if not (order.sampler is None and order.batch_sampler is None and order.generator is None):
        others.add("train")
    if job.val_order is not None:
        others.add("val")
    changes |= {"shuffle": order.shuffle, "drop_last": order.drop_last, "others": tuple(sorted(others))}
    return msgspec.structs.replace(plain, **changes)


def data_of(checkpoint: Checkpoint, given: GivenObjects, sources: dict[str, Source]) -> Upload:
    """Return how the data are sent: as they were kept, unless some were given."""
    manifest = checkpoint.manifest
    if not sources:
        return partial(_ship_kept, checkpoint, "data", manifest.spec.data)
    changes: dict[str, Any] = {name: source.data for name, source in sources.items()}
    if _needs("data", manifest, given):
        kept: Data = _unpickle(checkpoint, "data", manifest.spec.data)
        return partial(upload, replace(kept, **changes))
    return partial(upload, Data(**{"val": None, **changes}))


def _unpickle(checkpoint: Checkpoint, kind: str, payload: PayloadRef) -> Any:
    """Unpickle what was kept. It runs code of whoever wrote the checkpoint: that it may was decided before."""
    path = checkpoint.folder / f"{kind}.pickle"
    with _damage_refused():
        pickled = bytes(checkpoint.load(path.name))
        memory = None if payload.segment is None else memoryview(checkpoint.load(f"{kind}.buffers"))
    try:
        found = unpack(pickled, payload, memory=memory)
        if not isinstance(found, Job if kind == "job" else Data):
            raise TypeError(f"it holds a {type(found).__name__}")
        return found
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:  # unpickling runs user code
        python = checkpoint.manifest.versions.get("python", "?")
        way = "model=..., and loss or step, optimizer, scheduler" if kind == "job" else "train=... (and val=...)"
        raise ArgumentError(
            f"{path}, written under Python {python}, cannot be read here: {summary_of(error)}. "
            f"Make importable what it names, or give {way}"
        ) from error


def read_replaced_functions(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return step and loss function with which the run went on; like `_unpickle`, it runs code of who wrote them."""
    path = checkpoint.folder / REPLACED_FUNCTIONS_FILE
    with _damage_refused():
        pickled = bytes(checkpoint.load(REPLACED_FUNCTIONS_FILE))
    try:
        functions: dict[str, Any] = unpack(pickled, NOTHING)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:  # unpickling runs user code
        raise ArgumentError(
            f"{path}, functions that were mended in mid-run, cannot be read here: {summary_of(error)}. "
            "Make importable what it names, or give loss or step"
        ) from error
    return functions


def _ship_kept(
    checkpoint: Checkpoint, kind: str, payload: PayloadRef, name: str, pool: EnginePool, segments: list[Segment]
) -> tuple[bytes, PayloadRef]:
    """Send a payload as it was kept; its memory is laid out anew, and hub and engines unpickle it."""
    with _damage_refused():
        pickled = bytes(checkpoint.load(f"{kind}.pickle"))
        if payload.segment is None:
            return pickled, payload
        buffers = f"{kind}.buffers"
        num_bytes = checkpoint.manifest.files[buffers].num_bytes
        segment = create_segment(name, num_bytes, folders=pool.segment_folders)
        segments.append(segment)
        with long_work(f"shipping {name}") as report:
            checkpoint.load_into(
                memoryview(segment.memory)[:num_bytes],
                buffers,
                report=lambda done: report(f"{done / 1e6:,.0f} of {num_bytes / 1e6:,.0f} MB"),
            )
    return pickled, msgspec.structs.replace(payload, segment=segment.ref)


@contextlib.contextmanager
def _damage_refused() -> Iterator[None]:
    """Refuse a file that changes after it was verified like one that was changed before."""
    try:
        yield
    except DamagedError as error:
        raise ArgumentError(f"{error}: it was changed while the run began") from error
