"""One way to divide a model, and what it is predicted to take: data parallel, a pipeline, or both."""

from __future__ import annotations

from collections.abc import Sequence

from dnb.planning.search.costs import (
    StageCost,
    Workload,
    crowding,
    hub_seconds,
    num_in_flight,
    pipeline_seconds,
    stage_cost,
)
from dnb.planning.search.cut_search import EnginePlace, edges_of
from dnb.planning.search.profiles import EngineTraits, Profile, Site
from dnb.planning.search.schedule_simulation import simulate
from dnb.protocol.base import Record
from dnb.protocol.run import ScheduleName

MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)
# Actions of a schedule that are worth playing through; longer ones are judged by the formula.
MOST_ACTIONS = 4000


class Question(Record, frozen=True):
    """The constraints of a plan to search for; a field that is None is free."""

    batch_size: int
    strategy: str = "auto"
    data: int | None = None  # teams
    num_stages: int | None = None
    num_micro_batches: int | None = None
    schedule: ScheduleName | None = None
    optimizer: str = "adamw"


class Mesh(Record, frozen=True):
    """The number of engines along each axis."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    @property
    def num_engines(self) -> int:
        """In all."""
        return self.data * self.pipeline * self.tensor

    def __str__(self) -> str:
        axes = [f"{axis}={getattr(self, axis)}" for axis in ("data", "pipeline", "tensor") if getattr(self, axis) > 1]
        return ",".join(axes) or "one engine"


class Stage(Record, frozen=True):
    """One stage as predicted; data parallel engines have one stage with all layers."""

    first: int  # layer
    last: int  # one behind its last
    engines: tuple[int, ...]  # ids, one per team
    forward_seconds: float  # per micro-batch, fixed cost included
    backward_seconds: float
    parameter_bytes: int
    kept_bytes: int  # of one micro-batch, its input included
    num_in_flight: int
    received_bytes: int  # per micro-batch, from the stage before
    returned_bytes: int  # gradients, back to it
    memory_bytes: int  # parameters, gradients, activations in flight
    memory_limit: int | None  # the smallest of its engines


class Candidate(Record, frozen=True):
    """One way to do it, with what it is predicted to take."""

    data: int  # teams
    num_micro_batches: int
    schedule: ScheduleName
    stages: tuple[Stage, ...]
    step_seconds: float
    compute_seconds: float  # until the last gradient is there
    hub_seconds: float
    bubble: float  # share of the engines' time in which they wait for each other

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline; 1 is none."""
        return len(self.stages)

    @property
    def strategy(self) -> str:
        """In the words of `fit`."""
        if self.num_stages == 1:
            return "data"
        return "pipeline" if self.data == 1 else "hybrid"

    @property
    def fits(self) -> bool:
        """True if every engine has enough memory."""
        return all(stage.memory_limit is None or stage.memory_bytes <= stage.memory_limit for stage in self.stages)

    @property
    def excess_bytes(self) -> int:
        """The bytes that the worst engine lacks; negative if all have enough."""
        spare = [stage.memory_limit - stage.memory_bytes for stage in self.stages if stage.memory_limit is not None]
        return -min(spare, default=0)

    @property
    def mesh(self) -> Mesh:
        """Engines along each axis."""
        return Mesh(data=self.data, pipeline=self.num_stages)


def numbers_of_micro_batches(samples: int, question: Question) -> list[int]:
    """Return the numbers that divide the team's part of the batch, if there are any but 1."""
    if question.num_micro_batches is not None:
        return [question.num_micro_batches]
    possible = [number for number in MICRO_BATCHES if number <= samples]
    even = [number for number in possible if samples % number == 0]
    return even if len(even) > 1 else possible


def ranked(site: Site) -> list[int]:
    """Return the indices of the engines, the fastest and largest first."""
    engines = site.engines
    return sorted(range(len(engines)), key=lambda index: (-engines[index].speed, -(_memory(engines[index]))))


def _memory(engine: EngineTraits) -> float:
    return float("inf") if engine.memory_bytes is None else engine.memory_bytes


def place_groups(site: Site, *, data: int) -> list[tuple[int, ...]]:
    """Group engines that have the same stage in different teams: neighbours in speed, so that no team waits."""
    order = ranked(site)
    return [tuple(order[begin : begin + data]) for begin in range(0, len(order) - data + 1, data)]


def places_of(site: Site, groups: Sequence[tuple[int, ...]]) -> list[EnginePlace]:
    """Describe each group by its slowest and its smallest engine."""
    return [
        EnginePlace(min(site.engines[index].speed for index in group), _least_memory(site, group)) for group in groups
    ]


# data parallel


def data_parallel(profile: Profile, site: Site, question: Question, *, data: int) -> Candidate:
    """Predict data parallelism: each engine has the whole model, and a part of the batch by its speed."""
    chosen = ranked(site)[:data]
    slower = crowding(site, chosen)
    rates = {index: site.engines[index].speed / slower[index] for index in chosen}
    all_rates = sum(rates.values())
    parts = {index: question.batch_size * rate / all_rates for index, rate in rates.items()}
    limit = _least_memory(site, chosen)
    num_pieces = _num_pieces(profile, max(parts.values()), question=question, limit=limit)
    loads = {index: Workload(profile, parts[index] / num_pieces) for index in chosen}
    num_layers = len(profile.layers)
    seconds = {
        index: num_pieces * (load.forward_seconds(0, num_layers) + load.backward_seconds(0, num_layers)) / rates[index]
        for index, load in loads.items()
    }
    slowest = max(chosen, key=lambda index: seconds[index])
    hub = hub_seconds(profile, site.exchange, num_slabs=data, num_engines=data, optimizer=question.optimizer)
    largest = Workload(profile, max(parts.values()) / num_pieces)
    factor = 1.0 / rates[slowest]
    stage = Stage(
        first=0,
        last=num_layers,
        engines=tuple(site.engines[index].engine for index in chosen),
        forward_seconds=loads[slowest].forward_seconds(0, num_layers) * factor,
        backward_seconds=loads[slowest].backward_seconds(0, num_layers) * factor,
        parameter_bytes=profile.parameter_bytes,
        kept_bytes=round(largest.memory_bytes(0, num_layers, num_in_flight=1) - largest.state_bytes(0, num_layers)),
        num_in_flight=1,
        received_bytes=0,
        returned_bytes=0,
        memory_bytes=round(largest.memory_bytes(0, num_layers, num_in_flight=1)),
        memory_limit=limit,
    )
    return Candidate(
        data=data,
        num_micro_batches=num_pieces,
        schedule="gpipe",
        stages=(stage,),
        step_seconds=seconds[slowest] + hub,
        compute_seconds=seconds[slowest],
        hub_seconds=hub,
        bubble=1.0 - sum(seconds.values()) / (len(chosen) * seconds[slowest]),
    )


def _num_pieces(profile: Profile, samples: float, *, question: Question, limit: int | None) -> int:
    """Return the fewest micro-batches, one after the other, that fit; what is asked for if it is, and 1 if none fit."""
    if question.num_micro_batches is not None:
        return question.num_micro_batches
    if limit is None:
        return 1
    num_layers = len(profile.layers)
    for number in (number for number in MICRO_BATCHES if number <= max(1.0, samples)):
        load = Workload(profile, samples / number)
        if load.memory_bytes(0, num_layers, num_in_flight=1) <= limit:
            return number
    return 1


def _least_memory(site: Site, engines: Sequence[int]) -> int | None:
    limits = [site.engines[index].memory_bytes for index in engines]
    return min((limit for limit in limits if limit is not None), default=None)


# pipelines


def candidate(
    load: Workload,
    site: Site,
    question: Question,
    *,
    data: int,
    cuts: Sequence[int],
    places: Sequence[int],
    groups: Sequence[tuple[int, ...]],
    schedule: ScheduleName,
    num_micro_batches: int,
) -> Candidate:
    """Predict a division on these engines and their hosts' cores.

    Args:
        load: at the size of one micro-batch.
        site: where.
        question: what was asked.
        data: teams.
        cuts: first layers of all stages but the first.
        places: for each stage, which of the groups.
        groups: indices of engines that have the same stage in different teams.
        schedule: of each pipeline.
        num_micro_batches: of each pipeline.
    """
    edges = edges_of(cuts, load.num_layers)
    num_stages = len(edges)
    teams = [[groups[place][team] for place in places] for team in range(data)]
    costs = [
        stage_cost(
            load,
            *edges[rank],
            speed=min(site.engines[index].speed for index in groups[places[rank]]),
            exchange=site.exchange,
            schedule=schedule,
            num_behind=num_stages - rank - 1,
            num_micro_batches=num_micro_batches,
        )
        for rank in range(num_stages)
    ]
    seconds, busy = _pipeline(costs, site, teams, schedule=schedule, num_micro_batches=num_micro_batches)
    hub = hub_seconds(
        load.profile,
        site.exchange,
        num_slabs=data,
        num_engines=data * num_stages,
        optimizer=question.optimizer,
    )
    return Candidate(
        data=data,
        num_micro_batches=num_micro_batches,
        schedule=schedule,
        stages=tuple(
            _stage(load, site, cost, *edges[rank], groups[places[rank]],
                   held=num_in_flight(schedule, num_behind=num_stages - rank - 1, num_micro_batches=num_micro_batches))
            for rank, cost in enumerate(costs)
        ),
        step_seconds=seconds + hub,
        compute_seconds=seconds,
        hub_seconds=hub,
        bubble=max(0.0, 1.0 - busy / (num_stages * seconds)),
    )  # fmt: skip


def _stage(
    load: Workload, site: Site, cost: StageCost, first: int, last: int, group: tuple[int, ...], *, held: int
) -> Stage:
    one = load.memory_bytes(first, last, num_in_flight=1) - load.memory_bytes(first, last, num_in_flight=0)
    layers = load.profile.layers
    again = sum(
        shared.parameter_bytes
        for shared in load.profile.shared
        if shared.layers[0] < first and any(first <= layer < last for layer in shared.layers)
    )
    return Stage(
        first=first,
        last=last,
        engines=tuple(site.engines[index].engine for index in group),
        forward_seconds=cost.forward_seconds,
        backward_seconds=cost.backward_seconds,
        parameter_bytes=sum(layer.parameter_bytes for layer in layers[first:last]) + again,
        kept_bytes=round(one),
        num_in_flight=held,
        received_bytes=round(load.cut_bytes[first]) if first else 0,
        returned_bytes=round(load.cut_gradient_bytes[first]) if first else 0,
        memory_bytes=round(cost.memory_bytes),
        memory_limit=_least_memory(site, group),
    )


def _pipeline(
    costs: Sequence[StageCost],
    site: Site,
    teams: Sequence[Sequence[int]],
    *,
    schedule: ScheduleName,
    num_micro_batches: int,
) -> tuple[float, float]:
    """Return the seconds of a step's forwards and backwards, and the busy seconds of one pipeline's stages."""
    hosts = [[site.engines[index].host for index in team] for team in teams]
    slots = {}
    for host, cores in site.cores.items():
        members = [site.engines[index] for team in teams for index in team if site.engines[index].host == host]
        if sum(engine.threads for engine in members) > cores:
            slots[host] = max(1, cores // max(engine.threads for engine in members))
    if not slots:
        hosts = hosts[:1]  # they do not meet
    busy = num_micro_batches * sum(cost.forward_seconds + cost.backward_seconds for cost in costs)
    if 2 * num_micro_batches * len(costs) * len(hosts) <= MOST_ACTIONS:
        simulated = simulate(costs, schedule=schedule, num_micro_batches=num_micro_batches, hosts=hosts, slots=slots)
        return simulated.seconds, simulated.busy_seconds
    formula = pipeline_seconds(costs, schedule=schedule, num_micro_batches=num_micro_batches)
    work = dict.fromkeys(slots, 0.0)
    for team in hosts:
        for host, cost in zip(team, costs, strict=True):
            if host in work:
                work[host] += num_micro_batches * (cost.forward_seconds + cost.backward_seconds)
    return max([formula, *(seconds / slots[host] for host, seconds in work.items())]), busy
