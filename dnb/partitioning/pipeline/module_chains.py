"""A pipeline of the user's own modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from dnb.errors import USER_ERRORS, PlanError
from dnb.partitioning.pipeline.dry_run import DryRun
from dnb.partitioning.pipeline.stage_module import StagePart, described
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.planning.shards import split_evenly
from dnb.protocol.run import Partition


class Chain(nn.Module):
    """Modules one after the other; a tuple becomes several inputs."""

    def __init__(self, modules: Sequence[nn.Module], *, is_last: bool) -> None:
        super().__init__()
        self.links = nn.ModuleList(modules)
        self._is_last = is_last

    def forward(self, *values: Any) -> Any:
        """Run them."""
        output: Any = values
        for link in self.links:
            output = link(*as_tuple(output))
        return output if self._is_last else as_tuple(output)


def as_tuple(output: Any) -> tuple[Any, ...]:
    """Return a module's output as the arguments of the next one."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def divide_chain(
    modules: Sequence[nn.Module], partition: Partition, inputs: Inputs, dry_run: DryRun
) -> list[StagePart]:
    """Build stages of modules that hand tensors to each other; without names of their parameters yet.

    Raises:
        PlanError: what they hand on cannot cross a cut.
    """
    if inputs.has_loss:
        raise PlanError("stages= needs batches of inputs and target: a dictionary has no order to hand on")
    if partition.num_stages > len(modules):
        raise PlanError(
            f"{partition.num_stages} pipeline stages need as many modules, and stages= has {len(modules)}: ask for "
            f"{len(modules)} or fewer"
        )
    bounds = split_evenly(len(modules), num_parts=partition.num_stages)
    chains = [
        Chain(modules[first:last], is_last=stage == len(bounds) - 1) for stage, (first, last) in enumerate(bounds)
    ]
    try:
        crossing = _rehearse_chains(chains, inputs, dry_run)
    except (PlanError, KeyboardInterrupt):
        raise
    except USER_ERRORS:  # such as a stage that looks at values
        dry_run.use_data()
        crossing = _rehearse_chains(chains, inputs, dry_run)
    edges = [(), *crossing, ()]
    everything = tuple(range(len(inputs.values)))
    return [
        StagePart(chain, everything if stage == 0 else (), receives, sends, {}, {}, f"stages[{bounds[stage][0]}]")
        for stage, (chain, (receives, sends)) in enumerate(zip(chains, pairwise(edges), strict=True))
    ]


def _rehearse_chains(chains: Sequence[Chain], inputs: Inputs, dry_run: DryRun) -> list[tuple[torch.Tensor, ...]]:
    """Run the chains without data and return the tensors that cross every cut."""
    values: tuple[Any, ...] = tuple(dry_run.convert(value) for value in inputs.values)
    crossing: list[tuple[torch.Tensor, ...]] = []
    with dry_run.running():
        for stage, chain in enumerate(chains):
            versions = [value._version for value in values if isinstance(value, torch.Tensor)] if stage else []
            output = chain(*values)
            if stage and versions != [value._version for value in values]:
                raise PlanError(
                    f"stage {stage} changes its input in place: set inplace=False in its first layer, or let the "
                    "stage before it end with that layer"
                )
            if chain is not chains[-1]:
                for value in output:
                    if not isinstance(value, torch.Tensor):
                        raise PlanError(
                            f"stage {stage} hands on a {type(value).__name__}: only tensors and tuples of tensors can"
                        )
                crossing.append(tuple(described(value) for value in output))
                values = output
    return crossing
