"""Divides a model into the stages of a pipeline.

`torch.distributed.pipelining.pipeline` is not used for it: what it traces is bound to one shape and to train mode, and
its stages know no gradient of a value that two later stages need. Here such a value is handed on from stage to stage,
so that every stage speaks with its neighbours only, under every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from dnb.errors import USER_ERRORS, PlanError, nearest
from dnb.partitioning.pipeline.cut_points import cut_points, follow
from dnb.partitioning.pipeline.dry_run import PREFIX, DryRun, no_autocast
from dnb.partitioning.pipeline.graph_split import split
from dnb.partitioning.pipeline.module_chains import divide_chain
from dnb.partitioning.pipeline.stage_module import WAY_OUT, StagePart
from dnb.partitioning.pipeline.symbol_tracer import trace_by_symbols
from dnb.partitioning.pipeline.tracing import Inputs, ModelCall, ModelTrace, NotTraceable, containing, trace_by_export
from dnb.protocol.run import Partition

_Way = Callable[[ModelCall, Inputs, Sequence[str], DryRun], tuple[ModelTrace, list[str]]]


class StageBuilder:
    """Divides one model, for one shape of inputs after the other.

    Args:
        model: its tensors are used, never copied; no data is read unless the model looks at values.
        partition: how many stages, and where they begin.
        stages: the user's own, instead of cuts.
        autocast: what surrounds every forward.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        *,
        stages: Sequence[nn.Module] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = no_autocast,
    ) -> None:
        self._model = model
        self._partition = partition
        self._stages = stages
        self._dry_run = DryRun(model, autocast)
        # By mode, once it was seen: how symbols tell all that is called; empty if they cannot.
        self._ways: dict[bool, tuple[_Way, ...]] = {}

    def parts(self, inputs: Inputs) -> tuple[StagePart, ...]:
        """Build the stages, in the mode (train or eval) that the model is in, for inputs of these shapes.

        Args:
            inputs: of one micro-batch.

        Raises:
            PlanError: the model cannot be divided so.
        """
        partition, model = self._partition, self._model
        if self._stages is not None:
            return _named(model, divide_chain(list(self._stages), partition, inputs, self._dry_run))
        call = ModelCall(model, inputs)
        if partition.num_stages == 1 and not partition.cuts:
            return _named(model, [StagePart(call, tuple(range(len(inputs.values))), (), (), {}, {})])
        _check_cuts(model, partition, inputs)
        cuts = [PREFIX + cut for cut in partition.cuts]
        trace = self._trace(call, inputs, cuts)
        check_begun(trace.begun(cuts), cuts)
        begins = ["", *partition.cuts]
        built = split(trace, cuts, inputs)
        return _named(model, [StagePart(*part, {}, {}, begins[stage]) for stage, part in enumerate(built)])

    def _trace(self, call: ModelCall, inputs: Inputs, cuts: Sequence[str]) -> ModelTrace:
        """Trace by symbols if these tell all operations of the model and where stages begin, else by torch.export.

        Where it is not enough to look into the modules in which the cuts lie, as when one that stays whole is given
        something that no symbol can stand for, all are looked into: so the cuts were chosen.
        """
        wanted = None if call.training in self._ways else operations_of(call, inputs, self._dry_run)
        refusal: NotTraceable | None = None
        incomplete: ModelTrace | None = None  # never comes to some cut
        for way in self._ways.get(call.training, (_open_around, _open_all)):
            try:
                trace, operations = way(call, inputs, cuts, self._dry_run)
            except NotTraceable as error:
                refusal = refusal or error
                continue
            if wanted is not None and operations != wanted:
                continue
            if trace.begins.keys() >= set(cuts):
                self._ways[call.training] = (way,)
                return trace
            incomplete = trace
        if incomplete is not None:
            return incomplete
        if refusal is not None and self._dry_run.has_data:  # which torch.export cannot follow, either
            raise untraceable(call, refusal) from refusal
        self._ways[call.training] = ()
        return exported(call, inputs, self._dry_run, refusal=refusal)


def _open_around(call: ModelCall, inputs: Inputs, cuts: Sequence[str], dry_run: DryRun) -> tuple[ModelTrace, list[str]]:
    """Look into the modules in which the cuts lie; all others stay whole."""
    return trace_by_symbols(call, inputs, containing(cuts), dry_run)


def _open_all(call: ModelCall, inputs: Inputs, _cuts: Sequence[str], dry_run: DryRun) -> tuple[ModelTrace, list[str]]:
    """Look into all modules that can be looked into."""
    found = follow(call.model, inputs, dry_run)
    if found is None:
        raise NotTraceable("it cannot be followed", operator="", line="")
    return found


def exported(call: ModelCall, inputs: Inputs, dry_run: DryRun, *, refusal: NotTraceable | None = None) -> ModelTrace:
    """Trace a forward by torch.export.

    Args:
        call: the model.
        inputs: an example.
        dry_run: of that model.
        refusal: why symbols cannot follow it, which is raised if torch.export does not know better.

    Raises:
        PlanError: it cannot be traced.
    """
    try:
        return trace_by_export(call, inputs, dry_run)
    except NotTraceable as error:
        raise untraceable(call, refusal if refusal is not None and not error.line else error) from error


def divide(
    model: nn.Module, partition: Partition, inputs: Inputs, *, stages: Sequence[nn.Module] | None = None
) -> tuple[StagePart, ...]:
    """Build the stages of a model, once; see `StageBuilder`."""
    return StageBuilder(model, partition, stages=stages).parts(inputs)


# By cuts --------------------------------------------------------------------------------------------


def _check_cuts(model: nn.Module, partition: Partition, inputs: Inputs) -> None:
    names = dict(model.named_modules())
    for cut in partition.cuts:
        if not cut or cut not in names:
            known = cut_points(model, inputs) or [name for name in names if name]
            raise PlanError(f"no layer {cut!r} to begin a stage at; {nearest(cut, known)}")
    if len(partition.cuts) + 1 == partition.num_stages:
        return
    points = cut_points(model, inputs)
    if partition.num_stages > len(points) + 1:
        raise PlanError(
            f"{partition.num_stages} pipeline stages need as many layers, and this model has {len(points) + 1} that "
            f"can be a stage: ask for {len(points) + 1} or fewer, or {WAY_OUT}"
        )
    raise PlanError(
        f"{partition.num_stages} pipeline stages need {partition.num_stages - 1} cuts, and {len(partition.cuts)} were "
        f"given; the model can be cut at {', '.join(points)}"
    )


def operations_of(call: ModelCall, inputs: Inputs, dry_run: DryRun) -> list[str]:
    """Record the operations that the undivided model calls, for comparison."""
    if not dry_run.has_data:
        try:
            with dry_run.running() as operations:
                call(*[dry_run.convert(value) for value in inputs.values])
        except KeyboardInterrupt:
            raise
        except USER_ERRORS:  # such as a model that looks at values: then with data, and its own error shows
            dry_run.use_data()
        else:
            return operations
    with dry_run.running() as operations:
        call(*[dry_run.convert(value) for value in inputs.values])
    return operations


def untraceable(call: ModelCall, error: NotTraceable) -> PlanError:
    """Compose the refusal of a model that cannot be traced."""
    name = type(call.model).__name__
    after = f" (after the operation {error.operator!r})" if error.operator else ""
    return PlanError(
        f"the forward of {name} cannot be cut, as it cannot be traced: it stops at {error.line or name}{after}: "
        f"{error.reason}; {WAY_OUT}"
    )


def check_begun(begun: Sequence[str], cuts: Sequence[str]) -> None:
    """Refuse cuts at which no stage can begin.

    Raises:
        PlanError: the forward does not call them, or in another order.
    """
    if list(begun) == list(cuts):
        return
    missing = [cut.removeprefix(PREFIX) for cut in cuts if cut not in begun]
    if missing:
        raise PlanError(f"no stage can begin at {missing[0]!r}: the model's forward never calls it as a module")
    order = ", ".join(cut.removeprefix(PREFIX) for cut in begun)
    raise PlanError(f"stages must begin in the order in which the model runs them: {order}")


# Names ----------------------------------------------------------------------------------------------


def _named(model: nn.Module, parts: Sequence[StagePart]) -> tuple[StagePart, ...]:
    """Give stages the model's own names of all tensors that they use."""
    parameters = {id(p): name for name, p in model.named_parameters()}
    buffers = {id(b): name for name, b in model.named_buffers()}
    return tuple(
        StagePart(
            part.module,
            part.inputs,
            part.receives,
            part.sends,
            _names_of(part.module.parameters(), parameters, stage),
            _names_of(part.module.buffers(), buffers, stage, foreign_is_fine=True),
            part.begins,
        )
        for stage, part in enumerate(parts)
    )


def _names_of(
    tensors: Iterable[Any], names: Mapping[int, str], stage: int, *, foreign_is_fine: bool = False
) -> dict[str, Any]:
    found = {}
    for tensor in tensors:
        name = names.get(id(tensor))
        if name is not None:
            found[name] = tensor
        elif not foreign_is_fine:
            raise PlanError(
                f"stage {stage} has a parameter of shape {tuple(tensor.shape)} that is not one of the model's: "
                "stages= must be made of the model's own modules"
            )
    return found
