"""Measurements on which a plan rests: a model layer by layer, and the site where it is to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import msgspec

from dnb.protocol.base import Record


class LayerProfile(Record, frozen=True):
    """One layer, a part of the model before which it can be cut; sequences have an entry per size of the profile."""

    name: str  # of the module at which it begins
    kind: str  # its class
    parameter_bytes: int  # of parameters that no earlier layer uses
    gradient_bytes: int  # of those that are trained
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    kept_bytes: tuple[int, ...]  # made here and kept for backward, by whichever layer
    cut_bytes: tuple[int, ...]  # that go over a cut before this layer; of the first layer: the model's inputs
    cut_gradient_bytes: tuple[int, ...]  # that come back over it


class SharedParameter(Record, frozen=True):
    """A parameter that several layers use: every stage that has one of them holds it."""

    name: str
    parameter_bytes: int
    gradient_bytes: int
    layers: tuple[int, ...]  # in order; the first one counts it among its own


class ParameterShape(Record, frozen=True):
    """By this a model is known again."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Profile(Record, frozen=True):
    """One micro-batch through a model, measured at several sizes on an engine while others are as busy."""

    model: str  # its class
    sizes: tuple[int, ...]  # samples, ascending
    layers: tuple[LayerProfile, ...]
    shared: tuple[SharedParameter, ...]
    parameters: tuple[ParameterShape, ...]
    num_threads: int
    measuring_seconds: float

    @property
    def parameter_bytes(self) -> int:
        """The bytes of the whole model's parameters."""
        return sum(layer.parameter_bytes for layer in self.layers)

    @property
    def gradient_bytes(self) -> int:
        """The bytes of the whole model's gradients."""
        return sum(layer.gradient_bytes for layer in self.layers)


class Exchange(Record, frozen=True):
    """The costs of passing tensors on and of taking a step, on some machine."""

    latency_seconds: float  # of a small tensor between two engines
    bytes_per_second: float
    action_seconds: float  # fixed cost of a forward or backward of one micro-batch in one stage
    hub_seconds: float  # fixed cost of a step
    message_seconds: float  # per engine and step
    sum_seconds_per_byte: float  # of one gradient slab
    update_seconds_per_byte: float  # of parameters: the optimizer, AdamW
    is_measured: bool


# As seen on a virtual machine with 2 cores; used where there is no pool to probe.
USUAL_EXCHANGE = Exchange(
    latency_seconds=2e-4,
    bytes_per_second=1e9,
    action_seconds=9e-4,
    hub_seconds=3e-4,
    message_seconds=3e-4,
    sum_seconds_per_byte=1.0e-10,
    update_seconds_per_byte=4e-10,
    is_measured=False,
)


class EngineTraits(Record, frozen=True):
    """One engine as a plan sees it."""

    engine: int
    host: str
    threads: int = 1
    speed: float = 1.0  # times that of the engine which was profiled
    memory_bytes: int | None = None  # for parameters, gradients, activations and input together


class Site(Record, frozen=True):
    """The engines, hosts and exchange costs with which a plan is to run."""

    engines: tuple[EngineTraits, ...]
    cores: dict[str, int]  # by host
    exchange: Exchange = USUAL_EXCHANGE


def mean_profile(profiles: Sequence[Profile]) -> Profile:
    """Average the profiles of engines that measured at the same time, over the sizes that all of them measured."""
    number = min(len(profile.sizes) for profile in profiles)
    profiles = [_first_sizes(profile, number) for profile in profiles]
    first = profiles[0]
    layers = zip(*(profile.layers for profile in profiles), strict=True)
    return msgspec.structs.replace(
        first,
        layers=tuple(
            msgspec.structs.replace(
                same[0],
                forward_seconds=_means([layer.forward_seconds for layer in same]),
                backward_seconds=_means([layer.backward_seconds for layer in same]),
            )
            for same in layers
        ),
        measuring_seconds=max(profile.measuring_seconds for profile in profiles),
    )


def _first_sizes(profile: Profile, number: int) -> Profile:
    """Return a profile of the smallest sizes only."""
    return msgspec.structs.replace(
        profile,
        sizes=profile.sizes[:number],
        layers=tuple(
            msgspec.structs.replace(
                layer,
                forward_seconds=layer.forward_seconds[:number],
                backward_seconds=layer.backward_seconds[:number],
                kept_bytes=layer.kept_bytes[:number],
                cut_bytes=layer.cut_bytes[:number],
                cut_gradient_bytes=layer.cut_gradient_bytes[:number],
            )
            for layer in profile.layers
        ),
    )


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(fmean(column) for column in zip(*rows, strict=True))


def value_at(values: Sequence[float], sizes: Sequence[int], num_samples: float) -> float:
    """Interpolate a quantity at another size, on straight lines between those that were measured.

    It never falls as samples are added, and never faster than in proportion as they are taken away: what looks like
    that is noise.
    """
    if len(sizes) == 1:
        return values[0] * num_samples / sizes[0]
    place = next((index for index, size in enumerate(sizes[1:-1], 1) if num_samples <= size), len(sizes) - 1)
    low, high = sizes[place - 1], sizes[place]
    slope = max(0.0, (values[place] - values[place - 1]) / (high - low))
    value = values[place - 1] + slope * (num_samples - low)
    return max(value, values[0] * num_samples / sizes[0]) if num_samples < low else value
