"""A run continued from a checkpoint, in a new kernel and a new pool if need be."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from dnb.api.arguments.checks import check_positive
from dnb.api.arguments.data import count_val_samples
from dnb.api.arguments.data_sources import Source, read_source
from dnb.api.arguments.losses import check_metrics_are_computed
from dnb.api.kept_objects import (
    GivenObjects,
    data_of,
    has_replaced_functions,
    job_of,
    needed_pickles,
    plain_now,
    read_replaced_functions,
    wanted_files,
)
from dnb.api.launching import Pool, end_what_never_began, launch, refuse_busy_or_empty
from dnb.api.pools import current_pool, start
from dnb.api.rehearsal.losses import ignored_by_loss, may_hold
from dnb.api.rehearsal.metrics import whole_metrics_of
from dnb.api.run_request import RunRequest, check_optimizer_fits
from dnb.api.run_specs import check_kept_spec
from dnb.api.runs.run import Run
from dnb.api.runs.run_folders import RUNS_FOLDER, check_name, check_place, clean_name, is_folder
from dnb.api.runs.run_views import check_display, show_new_run
from dnb.api.runs.write_back import NotebookObjects, OrderFollower
from dnb.api.strategy.division import ModelDivision
from dnb.api.submission import NOTHING, own_path
from dnb.errors import ArgumentError, PlanError
from dnb.hub.checkpoints.format import Manifest, remove_torn
from dnb.hub.checkpoints.reader import Checkpoint, find_checkpoint
from dnb.hub.checkpoints.signing import SecretError, is_signed, read_secret
from dnb.job import Job
from dnb.planning.sample_order import count_batches
from dnb.planning.shards import choose_num_shards
from dnb.pool.engine_pool import EnginePool
from dnb.progress import long_work
from dnb.protocol.run import ResumeFrom, RunSpec, Settings
from dnb.transport.system.process_settings import notebook_settings
from dnb.user_code.accuracy import accuracy

log = logging.getLogger(__name__)


def resume(  # noqa: PLR0913 - the user's own words, each a flag of %dtrain
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
    display: str | None = None,
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
        val: data to validate on, instead of those that were kept.
        loss: callable(output, target) or a name, instead of the one that was kept.
        step: callable(model, batch), instead of the one that was kept.
        optimizer: one of the same kind; gets the state that was kept.
        scheduler: one of the same kind; gets the state that was kept.
        metrics: metrics as for `fit`, instead of those that were kept.
        after_step: callable(model), instead of the one that was kept; what that had kept itself goes on.
        val_step: callable(model, batch), instead of the one that was kept.
        epochs: passes over the data in all, if more or fewer than were planned.
        steps: optimizer steps in all, instead of epochs.
        name: name of the new run; made from the old one's if left out.
        trust: read pickles though this user's hub did not sign the checkpoint, or it was changed: they
            may do anything that this user may.
        display: how the run is shown, as for `fit`.
        pool: where to train; the kernel's own if left out, started if there is none.

    Raises:
        ArgumentError: no checkpoint there is whole, it is of another model or a newer dnb, pickles would have to be
            read of somebody who is not trusted, or a run is active; nothing was started.
    """
    check_display(display)
    settings = notebook_settings()
    pool = pool or current_pool()
    if pool is not None:
        end_what_never_began(pool)
        refuse_busy_or_empty(pool)
    given = GivenObjects(
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
    checkpoint, damages = _find(path, given)
    request = _read_request(
        checkpoint, damages, given, epochs=epochs, steps=steps, name=name, trust=trust, settings=settings
    )
    run = launch(request, pool or start())
    show_new_run(run, display=display)
    return run


def _find(path: str | Path, given: GivenObjects) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint that is whole, and the damages of later ones."""
    place = _locate(path)
    with long_work(f"verifying the checkpoint in {place}"):
        checkpoint, damages = find_checkpoint(place, wants=partial(wanted_files, given=given))
    for damage in damages:
        log.warning(damage)
    remove_torn(checkpoint.folder.parent)
    check_kept_spec(checkpoint.manifest.spec, checkpoint.folder)
    return checkpoint, damages


def _read_request(
    checkpoint: Checkpoint,
    damages: list[str],
    given: GivenObjects,
    *,
    epochs: int | None,
    steps: int | None,
    name: str | None,
    trust: bool,
    settings: Settings,
) -> RunRequest:
    """Read what is kept, but for what was given, and check that both go together; nothing is started."""
    manifest = checkpoint.manifest
    old, optimizer = manifest.spec, given.optimizer
    pickles = needed_pickles(manifest, given)
    if pickles and not trust:
        _refuse_strangers(checkpoint, pickles)
    num_steps = _num_steps(checkpoint, epochs=epochs, steps=steps)
    if has_replaced_functions(manifest, given):
        given = replace(given, **read_replaced_functions(checkpoint))
    sources = _read_sources(given, old)
    with long_work(f"reading the objects that {checkpoint.folder} keeps"):
        job, ship_job = job_of(checkpoint, given, sources)
        ship_data = data_of(checkpoint, given, sources)
    model = given.model if given.model is not None else job.model
    if given.model is not None and any(part.num_stages > 1 and not part.cuts for part in old.partitions):
        raise PlanError(
            "the stages of this run were modules of its own model: resume without model=, and use run.model"
        )
    _check_same_model(checkpoint, model)
    if optimizer is not None:
        check_optimizer_fits(optimizer, model, lr=None)
    spec = msgspec.structs.replace(
        old,
        name=check_name(name) or _base_name(clean_name(old.name)),
        folder="",
        num_steps=num_steps,
        num_val_samples=count_val_samples(sources["val"]) if "val" in sources else old.num_val_samples,
        notes=(),
        # Code is imported from where the checkpoint says only if code of it is read anyway.
        sys_path=tuple(dict.fromkeys([*own_path(), *(old.sys_path if pickles else ())])),
        job=NOTHING,
        data=NOTHING,
        findings=(),
        **_metrics_now(manifest, given, job),
        is_loss_new=_is_loss_new(given, old) or _may_leave_out_now(sources, old, job),
        probe=None,  # the notebook's was of the parameters with which the first run began
        plain=plain_now(old.plain, given, job),
        described={name: text for name, text in old.described.items() if name not in given.names},
        settings=settings,
        resumed=_resumed(checkpoint, damages),
    )
    check_place()
    return RunRequest(
        spec=spec,
        settle=_with_shards,
        own=NotebookObjects.of(
            model,
            optimizer=optimizer,
            scheduler=given.scheduler,
            order=_follower(sources, steps_per_epoch=spec.steps_per_epoch),
            after_step=given.after_step,
        ),
        ship_job=ship_job,
        ship_data=ship_data,
        first_step=manifest.step,
    )


def _metrics_now(manifest: Manifest, given: GivenObjects, job: Job) -> dict[str, Any]:
    """Return the metrics of the new run's spec: those that no rehearsal has looked at are computed whole.

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
        ModelDivision(old.partitions, old.ties, None, old.num_shards, old.team_size, None).check_metrics(names)
    elif names:
        return {"whole_metrics": names, "loss_over": "batch", "reduction": "samples"}
    return {"whole_metrics": names}


def _follower(sources: dict[str, Source], *, steps_per_epoch: int) -> OrderFollower | None:
    order = sources["train"].order if "train" in sources else None
    return None if order is None else OrderFollower(order, steps_per_epoch=steps_per_epoch)


def _is_loss_new(given: GivenObjects, old: RunSpec) -> bool:
    """Tell whether a step function is given, or a loss that is not the one by whose name the run was started."""
    named = None if old.plain is None else old.plain.loss
    is_known = isinstance(given.loss, str) and named == given.loss
    return given.step is not None or (given.loss is not None and not is_known)


def _may_leave_out_now(sources: Mapping[str, Source], old: RunSpec, job: Job) -> bool:
    """Tell whether targets that do not count may be in data that were given, where all did in those of before."""
    if not sources or old.reduction != "samples" or old.loss_over != "samples" or old.trusts_loss:
        return False
    marks = {ignored_by_loss(job.loss), ignored_by_loss(None)}
    return any(may_hold(source.data, marks) for source in sources.values())


def _locate(path: str | Path) -> Path:
    """Return the path that is meant: a path itself, or the name of a run."""
    place = Path(path).expanduser()
    named = RUNS_FOLDER / place
    try:
        return named if not place.exists() and len(place.parts) == 1 and is_folder(named) else place
    except (OSError, ValueError) as error:  # no file can be called so
        raise ArgumentError(f"no checkpoint at {str(place)[:60]!r}: {error}") from error


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
    """Say why this user cannot be known to have written a checkpoint; empty if there is no such reason."""
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


def _read_sources(given: GivenObjects, old: RunSpec) -> dict[str, Source]:
    """Read the data that were given.

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


def _with_shards(spec: RunSpec, pool: EnginePool) -> RunSpec:
    """Keep as many shards as before, as they show in the bits of an exact run; but each engine must have one."""
    num_engines = len(pool.statuses)
    if spec.partitions or spec.exact or num_engines <= spec.num_shards:  # of a divided model: one for each team
        return spec
    return msgspec.structs.replace(spec, num_shards=choose_num_shards(num_engines, batch_size=spec.batch_size))


def _base_name(name: str) -> str:
    """Return the name without the number that an earlier resume has put behind it."""
    found = re.fullmatch(r"(.+)-\d+", name)
    return found[1] if found is not None and is_folder(RUNS_FOLDER / found[1]) else name


def _resumed(checkpoint: Checkpoint, damages: list[str]) -> ResumeFrom:
    manifest = checkpoint.manifest
    folder = checkpoint.folder.absolute()
    notes = (*damages, f"goes on after step {manifest.step} of run {manifest.name!r}, from {folder}")
    return ResumeFrom(folder=str(folder), step=manifest.step, notes=notes, digest=manifest.digest)
