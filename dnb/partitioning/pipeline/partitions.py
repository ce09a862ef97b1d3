"""The partitions of a model over one engine, two, three, ...: for a run that may lose and gain engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from dnb.errors import ArgumentError, PlanError, nearest
from dnb.partitioning.pipeline.flop_counts import balanced_cuts
from dnb.partitioning.pipeline.stage_builder import StageBuilder
from dnb.partitioning.pipeline.traced_forward import follow_once
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.planning.shards import SAMPLES_AT_LEAST
from dnb.protocol.run import Partition, ScheduleName

SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "interleaved", "zero-bubble")
# Stages on each engine, where a schedule gains by more than one.
STAGES_PER_ENGINE: Mapping[ScheduleName, int] = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero-bubble": 2}
# Micro-batches per stage that keep the bubble below a fifth, if the batch has so many.
MICRO_BATCHES_PER_STAGE = 4


def pipelines(
    model: nn.Module,
    inputs: Inputs,
    *,
    most_engines: int,
    num_samples: int,
    micro_batch: int | None,
    schedule: ScheduleName,
    stages: Sequence[nn.Module] | None = None,
    planned: Partition | None = None,
) -> tuple[tuple[Partition, ...], tuple[str, ...]]:
    """Find the partitions over 1, 2, ... engines, and the parameters that several engines use in any of them.

    Args:
        model: what is divided.
        inputs: of one batch.
        most_engines: of one team.
        num_samples: of a team's part of the global batch.
        micro_batch: samples of a micro-batch; None chooses.
        schedule: of all of them.
        stages: the user's own, instead of cuts.
        planned: stands for the one over as many engines.

    Raises:
        PlanError: the model cannot be divided, or not as planned, or the batch not into such micro-batches.
    """
    followed = None if stages is not None else follow_once(model, inputs)
    num_layers = len(stages) if stages is not None else 1 if followed is None else len(followed.points) + 1
    per_engine = STAGES_PER_ENGINE[schedule]
    found: list[Partition] = []
    ties: dict[str, None] = {}
    for num_engines in range(1, most_engines + 1):
        num_stages = 1 if num_engines == 1 else num_engines * per_engine
        if num_stages > num_layers:
            break
        cuts = () if followed is None else balanced_cuts(followed.weights, followed.points, num_stages)
        partition = Partition(
            kind="pipeline",
            num_engines=num_engines,
            num_stages=num_stages,
            cuts=cuts,
            schedule=schedule if num_engines > 1 else "gpipe",
            num_micro_batches=_num_micro_batches(num_samples, micro_batch, num_stages=num_stages),
        )
        if planned is not None and planned.num_engines == num_engines:
            partition = planned
        if num_stages > 1:
            users = (
                _users_of_chain(model, partition, inputs, stages)
                if followed is None
                else followed.users(partition.cuts)
            )
            ties.update(dict.fromkeys(ties_of(users, num_engines)))
        found.append(partition)
    if len(found) < 2 and most_engines > 1:
        # Says why it cannot be cut at all.
        wanted = Partition(kind="pipeline", num_engines=2, num_stages=2 * per_engine)
        StageBuilder(model, wanted, stages=stages).parts(inputs)
    return tuple(found), tuple(ties)


def read_schedule(schedule: str) -> ScheduleName:
    """Return a schedule by its name.

    Raises:
        ArgumentError: there is none of that name.
    """
    for known in SCHEDULES:
        if schedule == known:
            return known
    raise ArgumentError(f"no schedule {schedule!r}: {nearest(schedule, SCHEDULES)}")


def read_stages(model: nn.Module, stages: Sequence[str | nn.Module] | None) -> list[nn.Module] | None:
    """Return the user's own stages as modules.

    Raises:
        ArgumentError: one is neither a module nor the name of one.
    """
    if stages is None:
        return None
    names = dict(model.named_modules())
    found: list[nn.Module] = []
    for stage in stages:
        if isinstance(stage, nn.Module):
            found.append(stage)
        elif stage in names:
            found.append(names[stage])
        else:
            known = [name for name in names if name]
            raise ArgumentError(f"stages: the model has no module {stage!r}: {nearest(str(stage), known)}")
    if not found:
        raise ArgumentError("stages= is empty: give at least two modules, or leave it out")
    return found


def read_mesh(mesh: str | Mapping[str, int] | None) -> dict[str, int]:
    """Parse the engines along each axis, from "data=2,pipeline=2" or a dictionary.

    Raises:
        ArgumentError: an axis or a number is none.
    """
    if mesh is None:
        return {}
    pairs = mesh.items() if isinstance(mesh, Mapping) else [part.partition("=")[::2] for part in mesh.split(",")]
    found: dict[str, int] = {}
    for axis, number in pairs:
        name = str(axis).strip()
        if name not in ("data", "pipeline", "tensor"):
            raise ArgumentError(f"no mesh axis {name!r}: {nearest(name, ('data', 'pipeline', 'tensor'))}")
        try:
            found[name] = int(number)
        except ValueError:
            found[name] = 0
        if found[name] < 1:
            raise ArgumentError(
                f"mesh axis {name!r} must be a positive integer, not {number!r}: mesh='data=2,pipeline=2'"
            )
    return found


def _num_micro_batches(num_samples: int, micro_batch: int | None, *, num_stages: int) -> int:
    if micro_batch is None:
        most = MICRO_BATCHES_PER_STAGE * num_stages if num_stages > 1 else 1
        most = min(most, max(num_samples // SAMPLES_AT_LEAST, 1))
        return max(number for number in range(1, most + 1) if num_samples % number == 0)
    if num_samples % micro_batch:
        fitting = [size for size in range(1, num_samples + 1) if num_samples % size == 0]
        best = min(fitting, key=lambda size: abs(size - micro_batch))
        raise PlanError(
            f"a pipeline cuts {num_samples} samples into equal micro-batches, and {micro_batch} does not divide them: "
            f"micro_batch={best} is the nearest that does"
        )
    return num_samples // micro_batch


def _users_of_chain(
    model: nn.Module, partition: Partition, inputs: Inputs, stages: Sequence[nn.Module] | None
) -> dict[str, set[int]]:
    """Return the stages that use each trainable parameter, where the user gives them."""
    users: dict[str, set[int]] = {}
    for stage, part in enumerate(StageBuilder(model, partition, stages=stages).parts(inputs)):
        for name, parameter in part.parameters.items():
            if parameter.requires_grad:
                users.setdefault(name, set()).add(stage)
    return users


def ties_of(users: Mapping[str, set[int]], num_engines: int) -> list[str]:
    """Return the parameters that more than one engine uses.

    Args:
        users: the stages that use each of them.
        num_engines: over which stages are dealt out.
    """
    return [name for name, stages in users.items() if len({stage % num_engines for stage in stages}) > 1]
