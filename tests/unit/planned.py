"""Profiles and sites for tests of plans, written out or drawn by hypothesis."""

from hypothesis import strategies

from dnb.planning.search.profiles import (
    EngineTraits,
    Exchange,
    LayerProfile,
    ParameterShape,
    Profile,
    SharedParameter,
    Site,
)

FREE = Exchange(  # an exchange that costs nothing
    latency_seconds=0.0,
    bytes_per_second=1e30,
    action_seconds=0.0,
    hub_seconds=0.0,
    message_seconds=0.0,
    sum_seconds_per_byte=0.0,
    update_seconds_per_byte=0.0,
    is_measured=True,
)


def layer(number=0, *, forward=1.0, backward=2.0, parameters=100, kept=10, cut=10, kind="Linear"):
    return LayerProfile(
        name=f"layers.{number}",
        kind=kind,
        parameter_bytes=parameters,
        gradient_bytes=parameters,
        forward_seconds=(forward,),
        backward_seconds=(backward,),
        kept_bytes=(kept,),
        cut_bytes=(cut,),
        cut_gradient_bytes=(cut,),
    )


def profile(*layers, size=1, shared=()):
    return Profile(
        model="Net",
        sizes=(size,),
        layers=tuple(layers),
        shared=tuple(shared),
        parameters=tuple(
            ParameterShape(name=f"{each.name}.weight", shape=(each.parameter_bytes // 4,), dtype="float32")
            for each in layers
        ),
        num_threads=1,
        measuring_seconds=0.5,
    )


def site(num_engines, *, cores=64, exchange=FREE, memory=None, speeds=None):
    return Site(
        engines=tuple(
            EngineTraits(engine=index, host="here", speed=speeds[index] if speeds else 1.0, memory_bytes=memory)
            for index in range(num_engines)
        ),
        cores={"here": cores},
        exchange=exchange,
    )


_seconds = strategies.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 7.0, 0.1, 0.3])
_sizes = strategies.integers(0, 30)


@strategies.composite
def profiles(draw, *, most_layers=7):
    num_layers = draw(strategies.integers(2, most_layers))
    layers = [
        layer(
            number,
            forward=draw(_seconds),
            backward=draw(_seconds),
            parameters=draw(_sizes),
            kept=draw(_sizes),
            cut=draw(_sizes),
        )
        for number in range(num_layers)
    ]
    users = draw(strategies.sets(strategies.integers(0, num_layers - 1), min_size=2, max_size=2))
    tied = SharedParameter(name="tied", parameter_bytes=7, gradient_bytes=7, layers=tuple(sorted(users)))
    return profile(*layers, shared=[tied] if draw(strategies.booleans()) else [])


@strategies.composite
def exchanges(draw):
    return Exchange(
        latency_seconds=draw(strategies.sampled_from([0.0, 0.2, 1.0])),
        bytes_per_second=draw(strategies.sampled_from([5.0, 20.0, 1e9])),
        action_seconds=draw(strategies.sampled_from([0.0, 0.1, 2.0])),
        hub_seconds=0.0,
        message_seconds=0.0,
        sum_seconds_per_byte=0.0,
        update_seconds_per_byte=0.0,
        is_measured=True,
    )
