from dnb.planning.utilisation import Utilisation
from dnb.protocol.measurements import UsageRow


def row(end: float, **compute: float) -> UsageRow:
    """A span of a second in which engines compute for so long and are idle for the rest."""
    engines = tuple(int(name.removeprefix("e")) for name in compute)
    busy = tuple(compute.values())
    none = (0.0,) * len(engines)
    return UsageRow(
        begin_seconds=end - 1,
        end_seconds=end,
        step=1,
        engines=engines,
        compute=busy,
        wait=none,
        data=none,
        idle=tuple(1 - seconds for seconds in busy),
    )


def test_the_last_engines_are_those_of_the_last_span():
    assert Utilisation([row(1, e0=0.5, e1=0.5), row(2, e1=0.5, e2=0.5)]).last_engines == (1, 2)


def test_an_engine_that_only_stood_by_is_none_of_the_last():
    assert Utilisation([row(1, e0=0.5, e1=0.0), row(2, e0=0.0, e1=0.0)]).last_engines == (0,)


def test_it_says_how_much_it_holds():
    held = Utilisation([row(1, e0=0.5, e1=0.5), row(2.5, e0=0.5)])
    assert repr(held) == "<dnb.Utilisation: 2 engines over 2.5 s, in 2 spans>"
    assert repr(Utilisation()) == "<dnb.Utilisation: 0 engines over 0.0 s, in 0 spans>"


def test_without_spans_there_are_no_last_engines():
    assert Utilisation().last_engines == ()
