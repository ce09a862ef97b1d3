"""A model's forward, followed once, for all the ways in which it might be cut into stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dnb.errors import USER_ERRORS
from dnb.partitioning.pipeline.cut_points import follow, points_of
from dnb.partitioning.pipeline.dry_run import PREFIX, DryRun, no_autocast
from dnb.partitioning.pipeline.flop_counts import weigh_and_log
from dnb.partitioning.pipeline.graph_split import users_of_parameters
from dnb.partitioning.pipeline.stage_builder import check_begun, exported, untraceable
from dnb.partitioning.pipeline.symbol_tracer import trace_by_symbols
from dnb.partitioning.pipeline.tracing import Inputs, ModelCall, ModelTrace, NotTraceable


@dataclass(frozen=True, slots=True)
class Followed:
    """A traced forward with the places where the model can be cut, and the weights between them.

    Args:
        model: its tensors are named, never copied.
        trace: of its forward.
        points: modules at which a stage can begin, in the order in which they run.
        weights: of the pieces between them, one more than there are points.
    """

    model: nn.Module
    trace: ModelTrace
    points: Sequence[str]
    weights: Sequence[float]

    def users(self, cuts: Sequence[str]) -> dict[str, set[int]]:
        """Return the stages that use each trainable parameter, if the model is cut so.

        Args:
            cuts: names of modules.

        Raises:
            PlanError: it cannot be cut so.
        """
        inner = [PREFIX + cut for cut in cuts]
        check_begun(self.trace.begun(inner), inner)
        names = {id(parameter): name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        aliases = {
            PREFIX + alias: names[id(parameter)]
            for alias, parameter in self.model.named_parameters(remove_duplicate=False)
            if id(parameter) in names
        }
        found: dict[str, set[int]] = {}
        for alias, stages in users_of_parameters(self.trace, inner).items():
            if alias in aliases:
                found.setdefault(aliases[alias], set()).update(stages)
        return found


def follow_once(model: nn.Module, inputs: Inputs) -> Followed:
    """Follow a model's forward without data: by symbols, and by torch.export where these do not tell all.

    Args:
        model: in the mode in which it is; stays as it was.
        inputs: an example.

    Raises:
        PlanError: it cannot be followed.
    """
    call = ModelCall(model, inputs)
    dry_run = DryRun(model, no_autocast)
    found = follow(model, inputs, dry_run)
    points = [] if found is None else points_of(model, found[0])
    try:
        weights, operations = weigh_and_log(call, inputs, points, dry_run)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # such as a model that looks at values
        return _follow_with_data(call, inputs, dry_run)
    if found is not None and found[1] == operations:
        return Followed(model, found[0], points, weights)
    trace = exported(call, inputs, dry_run, refusal=_refusal(call, inputs, dry_run) if found is None else None)
    points = points_of(model, trace)
    return Followed(model, trace, points, weigh_and_log(call, inputs, points, dry_run)[0])


def _refusal(call: ModelCall, inputs: Inputs, dry_run: DryRun) -> NotTraceable | None:
    """Trace the model's own forward alone, and return the error that stops the trace, if there is one."""
    try:
        trace_by_symbols(call, inputs, (), dry_run)
    except NotTraceable as error:
        return error
    return None


def _follow_with_data(call: ModelCall, inputs: Inputs, dry_run: DryRun) -> Followed:
    """Trace a model that looks at values, which torch.export cannot follow."""
    dry_run.use_data()
    operations = weigh_and_log(call, inputs, (), dry_run)[1]
    found = follow(call.model, inputs, dry_run)
    if found is None:
        raise untraceable(
            call, _refusal(call, inputs, dry_run) or NotTraceable("it looks at values", operator="", line="")
        )
    if found[1] != operations:
        return Followed(call.model, exported(call, inputs, dry_run), (), (1.0,))
    points = points_of(call.model, found[0])
    return Followed(call.model, found[0], points, [1.0] * (len(points) + 1))
