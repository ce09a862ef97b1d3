import time

from dnb.engine.runtime.telemetry import Stopwatch


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def measured(stopwatch: Stopwatch, activity: str) -> float:
    with stopwatch.measure(activity):
        spin(0.02)
    telemetry = stopwatch.collect()
    return telemetry.compute_seconds if activity == "compute" else telemetry.data_seconds


def test_a_slowed_engine_computes_so_many_times_as_long_and_says_so():
    stopwatch = Stopwatch()
    stopwatch.slowness = 4.0
    begin = time.perf_counter()
    assert measured(stopwatch, "compute") >= 4 * 0.02
    assert time.perf_counter() - begin >= 4 * 0.02


def test_an_engine_that_is_not_slowed_sleeps_nothing(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    stopwatch = Stopwatch()
    measured(stopwatch, "compute")
    stopwatch.slowness = 4.0
    measured(stopwatch, "data")  # only computing is slowed
    assert slept == []
