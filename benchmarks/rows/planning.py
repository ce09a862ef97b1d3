"""How far chosen cuts are from the best of all, by the cost model, and how long choosing takes after profiling."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import product

import msgspec

from benchmarks.exhaustive import divisions
from benchmarks.models import CASES, Case
from benchmarks.pairs import spread
from benchmarks.settings import Settings
from benchmarks.table import Row
from dnb.engine.profiling.profiler import ProfileInput, profile_trial
from dnb.planning.search.costs import Workload
from dnb.planning.search.plan_search import candidates
from dnb.planning.search.plans import draw_up
from dnb.planning.search.prediction import Question, candidate, place_groups, places_of
from dnb.planning.search.profiles import USUAL_EXCHANGE, EngineTraits, Profile, Site
from dnb.protocol.run import ScheduleName

NAMES = ("mlp-17m", "gpt-3m", "cnn")
BATCH_SIZE = 64
NUMBERS_OF_STAGES = (2, 3, 4)
NUMBERS_OF_MICRO_BATCHES = (2, 8)
SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "gpipe")
NUMBERS_OF_ENGINES = (2, 4, 8, 64)
REACH, REACH_SECONDS = 1.05, 2.0
# Of what one engine would need: so much is each one's limit where memory is short.
SHORT = 0.5


def rows(settings: Settings) -> Iterator[Row]:
    """Per model, the worst of all configurations, and the slowest planning."""
    del settings  # nothing here swings but the profile, which is the same for both sides
    for name in NAMES:
        profile = _profile(CASES[name])
        yield _cuts_row(name, profile)
        yield _seconds_row(name, profile)


def _profile(case: Case) -> Profile:
    inputs, targets = case.data()
    trial = ProfileInput(model=case.make_model(), batch=(inputs[:BATCH_SIZE], targets[:BATCH_SIZE]), loss=case.loss)
    return profile_trial(trial, num_threads=1)


def _cuts_row(name: str, profile: Profile) -> Row:
    ratios = {}
    for num_stages, number, schedule in product(NUMBERS_OF_STAGES, NUMBERS_OF_MICRO_BATCHES, SCHEDULES):
        for text, site in _sites(profile, num_stages):
            ratio = _ratio(profile, site, num_stages=num_stages, number=number, schedule=schedule)
            if ratio is not None:
                ratios[f"{num_stages} stages, {number} micro-batches, {schedule}, {text}"] = ratio
    worst = max(ratios, key=lambda configuration: ratios[configuration])
    num_best = sum(ratio < 1 + 1e-9 for ratio in ratios.values())
    return Row(
        name=f"cuts {name}",
        unit="times the best",
        ours=spread(list(ratios.values())),
        figure=ratios[worst],
        reach=REACH,
        note=f"{num_best} of {len(ratios)} configurations got the best cuts there are; worst: {worst}",
        details=ratios,
    )


def _sites(profile: Profile, num_engines: int) -> list[tuple[str, Site]]:
    whole = Workload(profile, BATCH_SIZE)
    limit = round(SHORT * whole.memory_bytes(0, whole.num_layers, num_in_flight=1))
    return [
        ("a core each", _site(num_engines, cores=num_engines)),
        ("2 cores for all", _site(num_engines, cores=2)),
        ("one half as fast", _site(num_engines, cores=num_engines, speeds=[0.5])),
        ("half the memory", _site(num_engines, cores=num_engines, memory=limit)),
    ]


def _site(num_engines: int, *, cores: int, speeds: Sequence[float] = (), memory: int | None = None) -> Site:
    all_speeds = [*speeds, *[1.0] * (num_engines - len(speeds))]
    engines = [
        EngineTraits(engine=number, host="host", speed=speed, memory_bytes=memory)
        for number, speed in enumerate(all_speeds)
    ]
    return Site(engines=tuple(engines), cores={"host": cores}, exchange=USUAL_EXCHANGE)


def _ratio(profile: Profile, site: Site, *, num_stages: int, number: int, schedule: ScheduleName) -> float | None:
    """Predicted seconds of the chosen cuts to those of the best; None where none fit."""
    question = Question(
        batch_size=BATCH_SIZE, data=1, num_stages=num_stages, num_micro_batches=number, schedule=schedule
    )
    load = Workload(profile, BATCH_SIZE / number)
    groups = place_groups(site, data=1)
    best = min(
        (
            candidate(
                load,
                site,
                question,
                data=1,
                cuts=cuts,
                places=chosen,
                groups=groups,
                schedule=schedule,
                num_micro_batches=number,
            ).step_seconds
            for _, cuts, chosen in divisions(
                load,
                places=places_of(site, groups),
                num_stages=num_stages,
                schedule=schedule,
                num_micro_batches=number,
                exchange=site.exchange,
            )
        ),
        default=None,
    )
    chosen = candidates(profile, site, question)[0]
    if best is None:
        assert not chosen.fits
        return None
    return chosen.step_seconds / best


def _seconds_row(name: str, profile: Profile) -> Row:
    seconds = {}
    for num_engines, is_short in product(NUMBERS_OF_ENGINES, (False, True)):
        if is_short and num_engines < 4:
            continue  # half the memory each leaves two engines no room for what they receive
        limit = round(SHORT * Workload(profile, BATCH_SIZE).memory_bytes(0, len(profile.layers), num_in_flight=1))
        site = _site(num_engines, cores=num_engines, memory=limit if is_short else None)
        began = time.perf_counter()
        draw_up(profile, site, Question(batch_size=BATCH_SIZE * 4))
        seconds[f"{num_engines} engines{', memory short' if is_short else ''}"] = time.perf_counter() - began
    long = _repeated(profile, times=8)
    began = time.perf_counter()
    draw_up(long, _site(64, cores=64), Question(batch_size=BATCH_SIZE * 4))
    seconds[f"64 engines, {len(long.layers)} layers"] = time.perf_counter() - began
    slowest = max(seconds, key=lambda configuration: seconds[configuration])
    return Row(
        name=f"planning {name}",
        unit="s",
        ours=spread(list(seconds.values())),
        figure=seconds[slowest],
        reach=REACH_SECONDS,
        note=f"after profiling; the figure is the slowest: {slowest}",
        details=seconds,
    )


def _repeated(profile: Profile, *, times: int) -> Profile:
    """The same layers again and again: a deep model."""
    layers = [
        msgspec.structs.replace(layer, name=f"{turn}.{layer.name}") for turn in range(times) for layer in profile.layers
    ]
    return msgspec.structs.replace(profile, layers=tuple(layers), shared=())
