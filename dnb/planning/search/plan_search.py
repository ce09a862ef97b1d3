"""The search for strategy, mesh, cuts and number of micro-batches: all the small numbers are tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import inf, isinf

from dnb.planning.search.costs import Workload
from dnb.planning.search.cut_search import CutSearch, EnginePlace, StageCuts
from dnb.planning.search.prediction import (
    Candidate,
    Question,
    candidate,
    data_parallel,
    numbers_of_micro_batches,
    place_groups,
    places_of,
)
from dnb.planning.search.profiles import Profile, Site
from dnb.protocol.run import ScheduleName

# Up to so many engines every mesh is tried, beyond only those that divide their number, and powers of two.
ALL_MESHES = 8
# So many meshes are worked out to the end, whether or not they may still be the best: they are shown, too.
LEAST_WORKED_OUT = 8
# No more are worked out than this: bounds are loose where stages differ, and planning must end.
MOST_WORKED_OUT = 24
# Cuts of up to so many stages are moved by up to so many layers, to see whether a schedule played through gets shorter.
MOST_MOVED = 8
MOVES = 4
MOST_MOVED_AND_EXCHANGED = 4
# Moving was seen to gain up to 15 %: what is farther behind stays behind.
WORTH_MOVING = 1.2


@dataclass(frozen=True, slots=True)
class _Option:
    """A mesh and number of micro-batches that are not worked out yet."""

    bound: float  # seconds of a step that no cuts can beat
    data: int
    num_stages: int
    num_micro_batches: int
    load: Workload
    divider: CutSearch
    groups: Sequence[tuple[int, ...]]
    schedule: ScheduleName


def candidates(profile: Profile, site: Site, question: Question) -> list[Candidate]:
    """Work out the best of the promising meshes, the fastest first, and those that fit before all others.

    Pipelines are worked out in the order of a bound that none can beat, until nothing better can come.
    """
    found: dict[tuple[int, int], Candidate] = {}
    options: list[_Option] = []
    for data in _numbers_of_teams(len(site.engines), question):
        if question.strategy in ("auto", "data") and question.num_stages in (None, 1):
            found[data, 1] = data_parallel(profile, site, question, data=data)
        if question.strategy != "data" and question.num_stages != 1:
            options += _options(profile, site, question, data=data)
    num_worked_out = 0
    for option in sorted(options, key=_promise):
        best = min((each.step_seconds for each in found.values() if each.fits), default=inf)
        mesh = option.data, option.num_stages
        if mesh not in found and len(found) >= LEAST_WORKED_OUT and option.bound >= best:
            continue
        if mesh in found and option.bound >= found[mesh].step_seconds:
            continue
        if num_worked_out == MOST_WORKED_OUT:
            break
        num_worked_out += 1
        made = _work_out(option, site, question, worth_seconds=WORTH_MOVING * best)
        if mesh not in found or _order(made) < _order(found[mesh]):
            found[mesh] = made
    return sorted(found.values(), key=_order)


def _promise(option: _Option) -> tuple[float, int, int]:
    """Return the sort key of an option: best bound first; of those that do not fit, the one that lacks least."""
    return option.bound, option.num_stages, -option.num_micro_batches if isinf(option.bound) else 0


def _order(one: Candidate) -> tuple[bool, float]:
    return not one.fits, one.step_seconds if one.fits else one.excess_bytes


def _numbers_of_teams(num_engines: int, question: Question) -> list[int]:
    if question.data is not None:
        return [question.data]
    if question.strategy == "pipeline":
        return [1]
    least = 2 if question.strategy == "hybrid" else 1
    numbers = range(least, min(num_engines, question.batch_size) + 1)
    if num_engines <= ALL_MESHES:
        return list(numbers)
    return [number for number in numbers if num_engines % number == 0 or number & (number - 1) == 0]


def _options(profile: Profile, site: Site, question: Question, *, data: int) -> list[_Option]:
    """Return every number of stages and micro-batches, each with its bound."""
    groups = place_groups(site, data=data)
    most = min(len(groups), len(profile.layers))
    wanted = range(2, most + 1) if question.num_stages is None else [question.num_stages]
    if not wanted or max(wanted) > most:
        return []
    samples = max(1, question.batch_size // data)
    # By the model GPipe is never faster than 1F1B and never holds less: it is only taken when asked for.
    schedule: ScheduleName = question.schedule or "1f1b"
    made = []
    for number in numbers_of_micro_batches(samples, question):
        load = Workload(profile, samples / number)
        divider = CutSearch(
            load,
            places=places_of(site, groups),
            schedule=schedule,
            num_micro_batches=number,
            exchange=site.exchange,
        )
        bounds = divider.bounds(max(wanted))
        made += [
            _Option(bounds[num_stages - 1], data, num_stages, number, load, divider, groups, schedule)
            for num_stages in wanted
        ]
    return made


def _work_out(option: _Option, site: Site, question: Question, *, worth_seconds: float) -> Candidate:
    """Choose cuts and predict; where nothing fits, the best without limits, to say what is lacking."""
    division = option.divider.divide(option.num_stages)
    if division is None:
        roomy = [EnginePlace(place.speed, None) for place in places_of(site, option.groups)]
        division = CutSearch(
            option.load,
            places=roomy,
            schedule=option.schedule,
            num_micro_batches=option.num_micro_batches,
            exchange=site.exchange,
        ).divide(option.num_stages)
        assert division is not None
    made = _predict(option, site, question, division.cuts, division.places)
    if made.fits and option.num_stages <= MOST_MOVED and made.step_seconds <= worth_seconds:
        return min(
            (_improve(option, site, question, *start) for start in _starts(option, site, question, made, division)),
            key=_order,
        )
    return made


def _starts(
    option: _Option, site: Site, question: Question, made: Candidate, division: StageCuts
) -> Iterator[tuple[Candidate, StageCuts]]:
    """Yield the divisions to improve: the best by 1F1B's formula, and by GPipe's, to which a short 1F1B comes near."""
    yield made, division
    if option.schedule == "1f1b" and 1 < option.num_micro_batches <= 2 * option.num_stages:
        phased = CutSearch(
            option.load,
            places=places_of(site, option.groups),
            schedule="gpipe",
            num_micro_batches=option.num_micro_batches,
            exchange=site.exchange,
        ).divide(option.num_stages)
        if phased is not None and phased.cuts != division.cuts:
            yield _predict(option, site, question, phased.cuts, phased.places), phased


def _improve(option: _Option, site: Site, question: Question, made: Candidate, division: StageCuts) -> Candidate:
    """Move cuts and exchange engines as long as the schedule, played through, gets shorter.

    The cuts are exact for the formula, which does not know how forwards and backwards of unlike stages hinder each
    other, nor which stages meet on too few cores.
    """
    cuts, places = division.cuts, division.places
    while True:
        tried = [
            (_predict(option, site, question, *neighbour), neighbour)
            for neighbour in _neighbours(cuts, places, option.load.num_layers, site, option.groups)
        ]
        fitting = [(one, neighbour) for one, neighbour in tried if one.fits and one.step_seconds < made.step_seconds]
        if not fitting:
            return made
        made, (cuts, places) = min(fitting, key=lambda pair: pair[0].step_seconds)


def _neighbours(
    cuts: tuple[int, ...],
    places: tuple[int, ...],
    num_layers: int,
    site: Site,
    groups: Sequence[tuple[int, ...]],
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield divisions with one cut moved, or two unlike engines exchanged; of few stages, both at once."""
    moved = list(_moved(cuts, num_layers))
    exchanged = list(_exchanged(places, places_of(site, groups)))
    yield from ((each, places) for each in moved)
    yield from ((cuts, each) for each in exchanged)
    if len(places) <= MOST_MOVED_AND_EXCHANGED:
        yield from product(moved, exchanged)


def _moved(cuts: tuple[int, ...], num_layers: int) -> Iterator[tuple[int, ...]]:
    edges = [0, *cuts, num_layers]
    for index, cut in enumerate(cuts):
        for place in range(max(edges[index] + 1, cut - MOVES), min(edges[index + 2], cut + MOVES + 1)):
            if place != cut:
                yield (*cuts[:index], place, *cuts[index + 1 :])


def _exchanged(places: tuple[int, ...], kinds: Sequence[EnginePlace]) -> Iterator[tuple[int, ...]]:
    for first, second in combinations(range(len(places)), 2):
        if kinds[places[first]] != kinds[places[second]]:
            exchanged = list(places)
            exchanged[first], exchanged[second] = places[second], places[first]
            yield tuple(exchanged)


def _predict(
    option: _Option, site: Site, question: Question, cuts: tuple[int, ...], places: tuple[int, ...]
) -> Candidate:
    return candidate(
        option.load,
        site,
        question,
        data=option.data,
        cuts=cuts,
        places=places,
        groups=option.groups,
        schedule=option.schedule,
        num_micro_batches=option.num_micro_batches,
    )
