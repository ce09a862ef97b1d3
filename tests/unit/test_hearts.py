from __future__ import annotations

from dnb.hub.hearts import Hearts


def beating(*engines: int) -> Hearts:
    """Engines that have joined at 0, and a hub that looks every tenth of a second."""
    hearts = Hearts(limit_seconds=0.5)
    for engine in engines:
        hearts.begin(engine, 0.0)
    hearts.tick(0.0)
    return hearts


def test_an_engine_that_was_not_heard_for_the_limit_is_silent():
    hearts = beating(0, 1)
    hearts.beat(0, 0.3)
    hearts.tick(0.3)
    assert hearts.tick(0.6) == [1]
    assert hearts.silent == {1}


def test_silence_is_told_once():
    hearts = beating(0)
    for now in (0.3, 0.6):
        hearts.tick(now)
    assert hearts.tick(0.9) == []


def test_a_beat_of_a_silent_engine_is_news():
    hearts = beating(0)
    hearts.declare_silent(0)
    assert hearts.beat(0, 0.1)
    assert not hearts.beat(0, 0.2)
    assert hearts.silent == frozenset()


def test_silence_counts_from_the_join():
    hearts = beating()
    hearts.tick(0.4)
    hearts.begin(0, 0.7)
    hearts.tick(0.8)
    assert hearts.tick(1.1) == []
    assert hearts.tick(1.3) == [0]


def test_a_hub_that_slept_calls_nobody_silent():
    hearts = beating(0)
    assert hearts.tick(60.0) == []
    assert hearts.tick(60.4) == []
    assert hearts.tick(60.6) == [0]


def test_an_engine_that_is_known_to_hang_is_silent_at_once():
    hearts = beating(0)
    assert hearts.declare_silent(0)
    assert not hearts.declare_silent(0)
    assert hearts.silent == {0}


def test_an_engine_that_is_gone_is_not_silent():
    hearts = beating(0)
    hearts.declare_silent(0)
    hearts.drop(0)
    assert hearts.silent == frozenset()
    assert not hearts.beat(0, 0.1)
    assert not hearts.declare_silent(0)


def test_who_joins_again_is_heard():
    hearts = beating(0)
    hearts.declare_silent(0)
    hearts.begin(0, 0.4)
    assert hearts.silent == frozenset()
