"""Runs that checkpoints speak of, held against what `fit` accepts: a checkpoint may come from anybody."""

from __future__ import annotations

from pathlib import Path

from dnb.api.arguments.checks import PRECISIONS, check_choice, check_number, check_positive, read_checkpoint_policy
from dnb.errors import ArgumentError, DnbError
from dnb.hub.checkpoints.reader import LARGEST_NUMBER
from dnb.hub.parameters.optimizers import check_optimizer
from dnb.protocol.run import PlainJob, RunSpec

# Arguments of `fit` that may be objects, which only pickle can keep: see `PlainJob.others`.
OBJECTS = ("loss", "step", "optimizer", "scheduler", "metrics", "after_step", "val_step", "train", "val")
LARGEST_SEED = 1 << 63


def check_kept_spec(spec: RunSpec, folder: Path) -> None:
    """Refuse a run that no `fit` has started.

    Args:
        spec: as a checkpoint has it.
        folder: of the checkpoint.

    Raises:
        ArgumentError: says which of its numbers or words is none.
    """
    try:
        _check_sizes(spec)
        _check_choices(spec)
        if spec.plain is not None:
            _check_plain(spec.plain)
    except (DnbError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{folder} is not as dnb writes checkpoints: {error}") from error


def _check_sizes(spec: RunSpec) -> None:
    sizes: dict[str, int | None] = {
        name: getattr(spec, name)
        for name in ("num_samples", "steps_per_epoch", "batch_size", "num_shards", "micro_batch", "memory_limit")
    }
    sizes |= {"team_size": spec.team_size, "num_val_samples": spec.num_val_samples or None}
    for part in spec.partitions:
        sizes |= {name: getattr(part, name) for name in ("num_engines", "num_stages", "num_micro_batches")}
        _check_each(sizes)
    _check_each(sizes)
    if spec.num_shards > spec.batch_size:
        raise ArgumentError(f"num_shards={spec.num_shards} is more than batch_size={spec.batch_size}")


def _check_each(sizes: dict[str, int | None]) -> None:
    for name, size in sizes.items():
        if size is not None and check_positive(size, name=name) > LARGEST_NUMBER:
            raise ArgumentError(f"{name} is {size}, which is no size of anything")


def _check_choices(spec: RunSpec) -> None:
    if spec.clip_norm is not None:
        check_number(spec.clip_norm, name="clip_norm")
    if not -LARGEST_SEED <= spec.seed < 2 * LARGEST_SEED:
        raise ArgumentError(f"seed must be an integer of 64 bits, not {spec.seed}")
    check_choice(spec.precision, name="precision", known=PRECISIONS, available=PRECISIONS)
    for engine in filter(None, spec.transport):
        int(engine)
    policy = spec.checkpoints
    if policy is not None:
        has_val = spec.num_val_samples > 0
        read_checkpoint_policy(policy.every, keep=policy.keep, best=policy.best, metrics=None, has_val=has_val)


def _check_plain(plain: PlainJob) -> None:
    unknown = sorted(set(plain.others) - set(OBJECTS))
    if unknown:
        raise ArgumentError(f"{unknown[0]!r} is no argument that is kept as an object")
    if plain.lr is not None:
        check_number(plain.lr, name="lr")
    if "optimizer" not in plain.others:
        check_optimizer(plain.optimizer)
