"""The cost model: what a stage, a pipeline and a step take in seconds and bytes, by a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dnb.planning.search.profiles import Exchange, Profile, Site, value_at
from dnb.protocol.run import ScheduleName

# Relative to AdamW, which was measured: bytes that an optimizer reads and writes per parameter.
UPDATE_SHARES = {"sgd": 0.5, "adam": 1.0, "adamw": 1.0}


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage on one engine, per micro-batch, and what the engine holds at most."""

    forward_seconds: float  # fixed cost included
    backward_seconds: float
    link_seconds: float  # over the cut before it, one way
    link_back_seconds: float
    memory_bytes: float

    @property
    def path_seconds(self) -> float:
        """The seconds that this stage and its link add to a micro-batch's way through the pipeline and back."""
        return self.forward_seconds + self.backward_seconds + self.link_seconds + self.link_back_seconds


class Workload:
    """A profile at one size of micro-batch, with sums over its layers."""

    def __init__(self, profile: Profile, num_samples: float) -> None:
        self.profile = profile
        self.num_samples = num_samples
        layers, sizes = profile.layers, profile.sizes
        self.num_layers = len(layers)
        self._forward = _sums([value_at(layer.forward_seconds, sizes, num_samples) for layer in layers])
        self._backward = _sums([value_at(layer.backward_seconds, sizes, num_samples) for layer in layers])
        self._kept = _sums([value_at(layer.kept_bytes, sizes, num_samples) for layer in layers])
        self._state = _sums([layer.parameter_bytes + layer.gradient_bytes for layer in layers])
        self.cut_bytes = [value_at(layer.cut_bytes, sizes, num_samples) for layer in layers]
        self.cut_gradient_bytes = [value_at(layer.cut_gradient_bytes, sizes, num_samples) for layer in layers]

    def forward_seconds(self, first: int, last: int) -> float:
        """Return the forward seconds of layers first to last - 1, on the engine that was profiled."""
        return self._forward[last] - self._forward[first]

    def backward_seconds(self, first: int, last: int) -> float:
        """Return the backward seconds of layers first to last - 1, on the engine that was profiled."""
        return self._backward[last] - self._backward[first]

    def state_bytes(self, first: int, last: int) -> float:
        """Return the bytes of parameters and gradients, those included that an earlier stage has, too."""
        again = sum(
            shared.parameter_bytes + shared.gradient_bytes
            for shared in self.profile.shared
            if shared.layers[0] < first and any(first <= layer < last for layer in shared.layers)
        )
        return self._state[last] - self._state[first] + again

    def memory_bytes(self, first: int, last: int, *, num_in_flight: int) -> float:
        """Return the bytes of state, and of inputs and activations of micro-batches that wait for their backward."""
        coming_back = self.cut_gradient_bytes[last] if last < self.num_layers else 0.0
        return self.state_bytes(first, last) + num_in_flight * self.activation_bytes(first, last) + coming_back

    def activation_bytes(self, first: int, last: int) -> float:
        """Return the bytes that these layers keep for one micro-batch's backward, input over the cut included."""
        return self._kept[last] - self._kept[first] + self.cut_bytes[first]


def _sums(values: Sequence[float]) -> list[float]:
    return [0.0, *accumulate(values)]


def num_in_flight(schedule: ScheduleName, *, num_behind: int, num_micro_batches: int) -> int:
    """Count the micro-batches whose activations a stage holds at once.

    Args:
        schedule: of the pipeline.
        num_behind: stages after this one.
        num_micro_batches: of a step.
    """
    return num_micro_batches if schedule == "gpipe" else min(num_micro_batches, num_behind + 1)


def stage_cost(
    load: Workload,
    first: int,
    last: int,
    *,
    speed: float,
    exchange: Exchange,
    schedule: ScheduleName,
    num_behind: int,
    num_micro_batches: int,
) -> StageCost:
    """Return the cost of layers first to last - 1 as one stage."""
    there = back = 0.0
    if first > 0:
        there = exchange.latency_seconds + load.cut_bytes[first] / exchange.bytes_per_second
        back = exchange.latency_seconds + load.cut_gradient_bytes[first] / exchange.bytes_per_second
    held = num_in_flight(schedule, num_behind=num_behind, num_micro_batches=num_micro_batches)
    return StageCost(
        forward_seconds=load.forward_seconds(first, last) / speed + exchange.action_seconds,
        backward_seconds=load.backward_seconds(first, last) / speed + exchange.action_seconds,
        link_seconds=there,
        link_back_seconds=back,
        memory_bytes=load.memory_bytes(first, last, num_in_flight=held),
    )


def paces(cost: StageCost, schedule: ScheduleName) -> tuple[float, float]:
    """Return the seconds that each further micro-batch takes at a stage or at the link before it, for each phase.

    GPipe ends all forwards before the first backward, so that each phase has a slowest stage of its own.
    """
    if schedule == "gpipe":
        forward = max(cost.forward_seconds, cost.link_seconds)
        return forward, max(cost.backward_seconds, cost.link_back_seconds)
    both = cost.forward_seconds + cost.backward_seconds
    return max(both, cost.link_seconds + cost.link_back_seconds), 0.0


def pipeline_seconds(costs: Sequence[StageCost], *, schedule: ScheduleName, num_micro_batches: int) -> float:
    """Forward and backward of all micro-batches on engines with cores of their own.

    The first micro-batch takes the whole way; each further one comes behind it as fast as the slowest stage lets it
    (makespan of a flow shop with equal jobs). With equal stages that is a bubble of (p - 1) / (m + p - 1).
    """
    rates = [paces(cost, schedule) for cost in costs]
    slowest = max(first for first, _ in rates) + max(second for _, second in rates)
    return sum(cost.path_seconds for cost in costs) + (num_micro_batches - 1) * slowest


def hub_seconds(profile: Profile, exchange: Exchange, *, num_slabs: int, num_engines: int, optimizer: str) -> float:
    """Predict the seconds that a step takes after the last gradient is in its slab: messages, sum, update."""
    num_bytes = profile.gradient_bytes
    sums = num_slabs * num_bytes * exchange.sum_seconds_per_byte
    update = num_bytes * exchange.update_seconds_per_byte * UPDATE_SHARES.get(optimizer, 1.0)
    return exchange.hub_seconds + num_engines * exchange.message_seconds + sums + update


def crowding(site: Site, engines: Sequence[int]) -> dict[int, float]:
    """Return the factors, by engine index, by which engines slow down when all compute on hosts with too few cores."""
    threads: dict[str, int] = {}
    for index in engines:
        engine = site.engines[index]
        threads[engine.host] = threads.get(engine.host, 0) + engine.threads
    factors = {host: max(1.0, wanted / site.cores.get(host, wanted)) for host, wanted in threads.items()}
    return {index: factors[site.engines[index].host] for index in engines}
