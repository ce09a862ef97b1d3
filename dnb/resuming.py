"""A run continued from a checkpoint, in a new kernel and a new pool if need be."""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.optim.lr_scheduler import LRScheduler

from dnb.data_sources import Source, read_source
from dnb.division import Division
from dnb.errors import USER_ERRORS, ArgumentError, PlanError, summary_of
from dnb.homecoming import OrderFollower
from dnb.hub.checkpoints import Checkpoint, DamagedError, Manifest, find_checkpoint, remove_torn
from dnb.hub.signing import SecretError, is_signed, read_secret
from dnb.hub.sources import MENDED_FILE
from dnb.input_checks import check_model, check_positive
from dnb.input_data import count_val_samples
from dnb.input_losses import accuracy, are_objects, check_metrics_are_computed, read_loss, read_metrics
from dnb.kept_specs import OBJECTS, check_kept_spec
from dnb.planning.sample_order import BatchOrder, count_batches
from dnb.planning.shards import choose_num_shards
from dnb.progress import long_work
from dnb.records import ParcelRef, PlainJob, ResumeFrom, RunSpec
from dnb.rehearsal.metrics import whole_metrics_of
from dnb.run import Run
from dnb.run_folders import RUNS_FOLDER, check_name, check_place, clean_name, is_folder
from dnb.training import (
    NOTHING,
    Pool,
    Ship,
    check_optimizer_fits,
    current_pool,
    own_path,
    refuse_busy_or_empty,
    ship,
    start,
    submit,
)
from dnb.transport.job import Data, Job
from dnb.transport.parcels import unpack
from dnb.transport.process_settings import notebook_settings
from dnb.transport.segments import Segment, create_segment

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What the user gives in place of what the checkpoint holds; None leaves that."""

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
        found = {field.name for field in fields(self) if getattr(self, field.name) is not None}
        return found | {"loss", "step"} if found & {"loss", "step"} else found  # one takes the other's place


def _plain_loss(spec: RunSpec) -> str | None:
    """The name of a kept run's loss, if it was given by one."""
    return None if spec.plain is None else spec.plain.loss


def resume(
    path: str | Path,
    *,
    model: torch.nn.Module | None = None,
    train: Any = None,
    val: Any = None,
    loss: str | Callable[..., Any] | None = None,
    step: Callable[..., Any] | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    metrics: str | Mapping[str, Callable[..., Any]] | None = None,
    after_step: Callable[..., Any] | None = None,
    val_step: Callable[..., Any] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    name: str | None = None,
    trust: bool = False,
    pool: Pool | None = None,
) -> Run:
    """Continue a run from a checkpoint with the very next step; returns at once, as `fit` does.

    The new run has a folder of its own, and a history that begins with the old one's. Its losses are those of the
    run that had not ended; with `exact`, so are all bits, whatever the number of engines.

    A checkpoint holds the user's own objects as pickles, which run code when they are read. What is given here is not
    read from it: with `model` and `train`, and names instead of functions for the rest, nothing is unpickled, wherever
    it comes from. Otherwise it must be one that a hub of this same user has written and signed, or be trusted.

    Args:
        path: a checkpoint's folder; or that of a run, or its name: then the newest checkpoint that is whole. One that
            is damaged is passed over for the one before it in the same run, with a warning.
        model: gets the trained state; if left out, `run.model` is the one that was kept.
        train: the same samples, if not those that were kept.
        val: likewise.
        loss: instead of the one that was kept, as for `fit`; likewise `step`, `metrics`.
        step: see loss.
        optimizer: of the same kind; gets the state that was kept. Likewise `scheduler`.
        scheduler: see optimizer.
        metrics: see loss.
        after_step: see loss; what the one that was kept had kept itself goes on.
        val_step: see loss.
        epochs: passes over the data in all, if more or fewer than were planned.
        steps: optimizer steps in all, instead of epochs.
        name: of the new run; made from the old one's if left out.
        trust: whether pickles are read though this user's hub did not sign the checkpoint, or it was changed: they
            may do anything that this user may.
        pool: where to train; the kernel's own if left out, started if there is none.

    Raises:
        ArgumentError: no checkpoint there is whole, it is of another model or a newer dnb, pickles would have to be
            read of somebody who is not trusted, or a run is active; nothing was started.
    """
    settings = notebook_settings()
    pool = pool or current_pool()
    if pool is not None:
        refuse_busy_or_empty(pool)
    given = _Given(
        model=model,
        train=train,
        val=val,
        loss=loss,
        step=step,
        optimizer=optimizer,
        scheduler=scheduler,
        metrics=metrics,
        after_step=after_step,
        val_step=val_step,
    )
    place = _locate(path)
    with long_work(f"verifying the checkpoint in {place}"):
        checkpoint, damages = find_checkpoint(place, wants=partial(_wants, given=given))
    for damage in damages:
        log.warning(damage)
    remove_torn(checkpoint.folder.parent)
    old = checkpoint.manifest.spec
    check_kept_spec(old, checkpoint.folder)
    pickles = _needed_pickles(checkpoint.manifest, given)
    if pickles and not trust:
        _refuse_strangers(checkpoint, pickles)
    num_steps = _num_steps(checkpoint, epochs=epochs, steps=steps)
    if _has_mended(checkpoint.manifest, given):
        given = replace(given, **_read_mended(checkpoint))
    sources = _read_sources(given, old)
    with long_work(f"reading the objects that {checkpoint.folder} keeps"):
        job, ship_job = _job_of(checkpoint, given, sources)
        ship_data = _data_of(checkpoint, given, sources)
    own_model = model if model is not None else job.model
    if model is not None and any(part.num_stages > 1 and not part.cuts for part in old.partitions):
        raise PlanError(
            "the stages of this run were modules of its own model: resume without model=, and use run.model"
        )
    _check_same_model(checkpoint, own_model)
    if optimizer is not None:
        check_optimizer_fits(optimizer, own_model, lr=None)
    wish = check_name(name) or _base_name(clean_name(old.name))
    check_place()
    pool = pool or start()
    refuse_busy_or_empty(pool)
    spec = msgspec.structs.replace(
        old,
        id=uuid.uuid4().hex,
        name=wish,
        folder="",
        num_steps=num_steps,
        num_val_samples=count_val_samples(sources["val"]) if "val" in sources else old.num_val_samples,
        num_shards=_num_shards(old, pool),
        linger_seconds=pool.linger_seconds,
        notes=(),
        # Code is imported from where the checkpoint says only if code of it is read anyway.
        sys_path=tuple(dict.fromkeys([*own_path(), *(old.sys_path if pickles else ())])),
        job=NOTHING,
        data=NOTHING,
        findings=(),
        **_metrics_now(checkpoint.manifest, given, job),
        is_loss_new=given.loss is not None and not (isinstance(given.loss, str) and _plain_loss(old) == given.loss),
        probe=None,  # the notebook's was of the parameters with which the first run began
        plain=_plain_now(old.plain, given, job),
        settings=settings,
        resumed=_resumed(checkpoint, damages),
    )
    spec = submit(pool, spec, ship_job, ship_data)
    own_order = sources["train"].order if "train" in sources else None
    run = Run(
        spec.name,
        pool.hub,
        folder=Path(spec.folder),
        model=own_model,
        optimizer=optimizer if isinstance(optimizer, torch.optim.Optimizer) else None,
        scheduler=scheduler if isinstance(scheduler, LRScheduler) else None,
        order=None if own_order is None else OrderFollower(own_order, steps_per_epoch=spec.steps_per_epoch),
        after_step=after_step,
        key=pool.key,
    )
    run.num_steps, run.steps_per_epoch = spec.num_steps, spec.steps_per_epoch
    run.step = run.first_step = checkpoint.manifest.step
    return pool.follow(run)


# what is needed ------------------------------------------------------------------------------


def _locate(path: str | Path) -> Path:
    """A path, or the name of a run."""
    place = Path(path).expanduser()
    named = RUNS_FOLDER / place
    try:
        return named if not place.exists() and len(place.parts) == 1 and is_folder(named) else place
    except (OSError, ValueError) as error:  # no file can be called so
        raise ArgumentError(f"no checkpoint at {str(place)[:60]!r}: {error}") from error


def _wants(manifest: Manifest, *, given: _Given) -> list[str]:
    """The files of pickles without which the run cannot go on.

    Raises:
        ArgumentError: the checkpoint does not hold one.
    """
    wanted: list[str] = []
    for kind, parcel in (("job", manifest.spec.job), ("data", manifest.spec.data)):
        if _needs(kind, manifest, given):
            names = [f"{kind}.pickle", *([f"{kind}.buffers"] if parcel.segment is not None else [])]
            if any(name not in manifest.files for name in names):
                raise ArgumentError(
                    f"the checkpoint of step {manifest.step} holds no {kind}, as it was taken when its run had ended: "
                    f"give {'model=... and train=...' if kind == 'job' else 'train=...'}"
                )
            wanted += names
    if _has_mended(manifest, given):
        wanted.append(MENDED_FILE)
    return wanted


def _has_mended(manifest: Manifest, given: _Given) -> bool:
    """Whether functions that were mended in mid-run count: not if others are given now."""
    return MENDED_FILE in manifest.files and given.loss is None and given.step is None


def _needs(kind: str, manifest: Manifest, given: _Given) -> bool:
    if kind == "data":
        return given.train is None or (given.val is None and manifest.spec.num_val_samples > 0)
    plain = manifest.spec.plain
    return plain is None or given.model is None or bool(set(plain.others) - given.names)


def _needed_pickles(manifest: Manifest, given: _Given) -> list[str]:
    """Arguments of `resume` without which pickles have to be read; empty if none has to be."""
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
    if _has_mended(manifest, given) and not {"loss", "step"} & set(needed):
        needed.append("loss")  # or step: they were mended in mid-run
    return needed


def _refuse_strangers(checkpoint: Checkpoint, pickles: list[str]) -> None:
    """Let nothing be unpickled that this user has not written.

    Raises:
        ArgumentError: the checkpoint is not signed with this user's secret.
    """
    reason = _why_not_own(checkpoint)
    if not reason:
        return
    way = "" if checkpoint.manifest.spec.plain is None else f"give {', '.join(f'{name}=' for name in pickles)}, or "
    raise ArgumentError(
        f"{checkpoint.folder} keeps {_listed(pickles)} as pickles, which run code when they are read, and {reason}: "
        f"{way}trust=True (--trust) if you trust whoever wrote it"
    )


def _why_not_own(checkpoint: Checkpoint) -> str:
    """Why this user cannot be known to have written a checkpoint; empty if it is so."""
    if not checkpoint.signature:
        return "is not signed"
    try:
        secret = read_secret()
    except SecretError as error:
        return f"its signature cannot be checked, as {error}"
    is_own = is_signed(secret, checkpoint.text, checkpoint.signature)
    return "" if is_own else "was changed, or written by another user or on another host"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _num_steps(checkpoint: Checkpoint, *, epochs: int | None, steps: int | None) -> int:
    manifest = checkpoint.manifest
    num_steps = manifest.num_steps
    if epochs is not None:
        num_steps = check_positive(epochs, name="epochs") * manifest.spec.steps_per_epoch
    if steps is not None:
        num_steps = check_positive(steps, name="steps")
    if num_steps <= manifest.step:
        raise ArgumentError(
            f"{checkpoint.folder} is of step {manifest.step} of {num_steps}, so that nothing is left to do: "
            f"give steps={manifest.step + manifest.spec.steps_per_epoch}, or more epochs"
        )
    return num_steps


def _check_same_model(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    difference = checkpoint.difference(dict(model.named_parameters()), dict(model.named_buffers()))
    if difference:
        raise ArgumentError(f"{checkpoint.folder} is of another model: {difference}")


def _read_sources(given: _Given, old: RunSpec) -> dict[str, Source]:
    """The data that were given.

    Raises:
        ArgumentError: they are not as many samples or batches as there were.
    """
    named = {"train": given.train, "val": given.val}
    found = {name: read_source(value, name=name, seed=old.seed) for name, value in named.items() if value is not None}
    train = found.get("train")
    if train is not None and train.num_samples != old.num_samples:
        raise ArgumentError(
            f"train has {train.num_samples} samples and the run had {old.num_samples}: give the same data, as its "
            "order is continued, or start a new run with dnb.fit"
        )
    if train is not None and train.order is not None and count_batches(train.order) != old.steps_per_epoch:
        raise ArgumentError(
            f"train has {count_batches(train.order)} batches in an epoch and the run had {old.steps_per_epoch}: "
            "give the same loader"
        )
    return found


def _num_shards(old: RunSpec, pool: Pool) -> int:
    """As many as before, as they show in the bits of an exact run; but each engine must have one."""
    num_engines = len(pool.statuses)
    if old.partitions:
        return old.num_shards  # of a divided model: one for each team
    if old.exact or num_engines <= old.num_shards:
        return old.num_shards
    return choose_num_shards(num_engines, batch_size=old.batch_size)


def _base_name(name: str) -> str:
    """The name without the number that an earlier resume has put behind it."""
    found = re.fullmatch(r"(.+)-\d+", name)
    return found[1] if found is not None and is_folder(RUNS_FOLDER / found[1]) else name


def _resumed(checkpoint: Checkpoint, damages: list[str]) -> ResumeFrom:
    manifest = checkpoint.manifest
    folder = checkpoint.folder.absolute()
    notes = (*damages, f"goes on after step {manifest.step} of run {manifest.name!r}, from {folder}")
    return ResumeFrom(folder=str(folder), step=manifest.step, notes=notes, digest=manifest.digest)


# the user's objects --------------------------------------------------------------------------


def _job_of(checkpoint: Checkpoint, given: _Given, sources: dict[str, Source]) -> tuple[Job, Ship]:
    """The job, and how it is sent: as it was kept, unless something in it was given."""
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
    return job, partial(ship, job)


def _replaced(kept: Job, given: _Given, order: BatchOrder | None) -> Job:
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


def _plain_job(spec: RunSpec, given: _Given) -> Job:
    """A job of which nothing has to be unpickled."""
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


def _plain_now(plain: PlainJob | None, given: _Given, job: Job) -> PlainJob | None:
    """What of the new job is words and numbers."""
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


def _metrics_now(manifest: Manifest, given: _Given, job: Job) -> dict[str, Any]:
    """What the spec of the new run says of its metrics: those that no rehearsal has looked at are computed whole.

    Raises:
        ArgumentError: outputs are not known, as the model returns its own loss.
        PlanError: no engine has all outputs.
    """
    old = manifest.spec
    if given.metrics is None:
        return {}
    check_metrics_are_computed(given.metrics, step=job.step)
    are_means = {name.removeprefix("val_") for name in manifest.metrics} - set(old.whole_metrics)
    unknown = [name for name, metric in job.metrics.items() if metric is not accuracy and name not in are_means]
    names = whole_metrics_of(job, unknown)
    if old.partitions:
        Division(old.partitions, old.ties, None, old.num_shards, old.team_size, None).check_metrics(names)
    elif names:
        return {"whole_metrics": names, "loss_over": "batch", "reduction": "samples"}
    return {"whole_metrics": names}


def _data_of(checkpoint: Checkpoint, given: _Given, sources: dict[str, Source]) -> Ship:
    """How the data are sent: as they were kept, unless some were given."""
    manifest = checkpoint.manifest
    if not sources:
        return partial(_ship_kept, checkpoint, "data", manifest.spec.data)
    changes: dict[str, Any] = {name: source.data for name, source in sources.items()}
    if _needs("data", manifest, given):
        kept: Data = _unpickle(checkpoint, "data", manifest.spec.data)
        return partial(ship, replace(kept, **changes))
    return partial(ship, Data(**{"val": None, **changes}))


def _unpickle(checkpoint: Checkpoint, kind: str, parcel: ParcelRef) -> Any:
    """What was kept. It runs code of whoever wrote the checkpoint: that it may was decided before."""
    path = checkpoint.folder / f"{kind}.pickle"
    with _damage_told():
        pickled = bytes(checkpoint.load(path.name))
        memory = None if parcel.segment is None else memoryview(checkpoint.load(f"{kind}.buffers"))
    try:
        found = unpack(pickled, parcel, memory=memory)
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


def _read_mended(checkpoint: Checkpoint) -> dict[str, Any]:
    """Step and loss function with which the run went on; like `_unpickle`, it runs code of who wrote them."""
    path = checkpoint.folder / MENDED_FILE
    with _damage_told():
        pickled = bytes(checkpoint.load(MENDED_FILE))
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
    checkpoint: Checkpoint, kind: str, parcel: ParcelRef, name: str, pool: Pool, segments: list[Segment]
) -> tuple[bytes, ParcelRef]:
    """Send a parcel as it was kept; its memory is laid out anew, and hub and engines unpickle it."""
    with _damage_told():
        pickled = bytes(checkpoint.load(f"{kind}.pickle"))
        if parcel.segment is None:
            return pickled, parcel
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
    return pickled, msgspec.structs.replace(parcel, segment=segment.ref)


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """A file that changes after it was verified is refused like one that was changed before."""
    try:
        yield
    except DamagedError as error:
        raise ArgumentError(f"{error}: it was changed while the run began") from error
