from __future__ import annotations

from dnb.hub.server.members.heartbeats import HeartbeatMonitor
from dnb.transport.system.processes import Activity


class Looks:
    """What is seen of an engine's process: how much it has computed, or None if it is elsewhere."""

    def __init__(self, *, is_here: bool = True) -> None:
        self.is_here = is_here
        self.cpu_seconds = 0.0
        self.waits_for_disk = False
        self.num = 0

    def __call__(self, _engine: int) -> Activity | None:
        self.num += 1
        return Activity(self.cpu_seconds, self.waits_for_disk) if self.is_here else None


def beating(*engines: int, look: Looks | None = None) -> HeartbeatMonitor:
    """Engines that have joined at 0, and a hub that looks every tenth of a second."""
    heartbeat_monitor = HeartbeatMonitor(limit_seconds=0.5, far_limit_seconds=2.0, poll=look or Looks())
    for engine in engines:
        heartbeat_monitor.begin(engine, 0.0)
    heartbeat_monitor.tick(0.0)
    return heartbeat_monitor


def test_an_engine_that_was_not_heard_for_the_limit_is_silent():
    heartbeat_monitor = beating(0, 1)
    heartbeat_monitor.beat(0, 0.3)
    heartbeat_monitor.tick(0.3)
    assert heartbeat_monitor.tick(0.55) == [1]
    assert heartbeat_monitor.silent == {1}


def test_silence_is_told_once():
    heartbeat_monitor = beating(0)
    assert [heartbeat_monitor.tick(now) for now in (0.3, 0.6, 0.9)] == [[], [0], []]


def test_a_beat_of_a_silent_engine_is_news():
    heartbeat_monitor = beating(0)
    heartbeat_monitor.declare_silent(0)
    assert heartbeat_monitor.beat(0, 0.1)
    assert not heartbeat_monitor.beat(0, 0.2)
    assert heartbeat_monitor.silent == frozenset()


def test_silence_counts_from_the_join():
    heartbeat_monitor = beating()
    heartbeat_monitor.tick(0.4)
    heartbeat_monitor.begin(0, 0.7)
    heartbeat_monitor.tick(0.8)
    assert heartbeat_monitor.tick(1.0) == []
    assert heartbeat_monitor.tick(1.3) == [0]


def test_a_hub_that_slept_calls_nobody_silent():
    heartbeat_monitor = beating(0)
    assert heartbeat_monitor.tick(60.0) == []
    assert heartbeat_monitor.tick(60.3) == []
    assert heartbeat_monitor.tick(60.6) == [0]


def test_an_engine_that_is_known_to_hang_is_silent_at_once():
    heartbeat_monitor = beating(0)
    assert heartbeat_monitor.declare_silent(0)
    assert not heartbeat_monitor.declare_silent(0)
    assert heartbeat_monitor.silent == {0}


def test_an_engine_that_is_gone_is_not_silent():
    heartbeat_monitor = beating(0)
    heartbeat_monitor.declare_silent(0)
    heartbeat_monitor.drop(0)
    assert heartbeat_monitor.silent == frozenset()
    assert not heartbeat_monitor.beat(0, 0.1)
    assert not heartbeat_monitor.declare_silent(0)


def test_who_joins_again_is_heard():
    heartbeat_monitor = beating(0)
    heartbeat_monitor.declare_silent(0)
    heartbeat_monitor.begin(0, 0.4)
    assert heartbeat_monitor.silent == frozenset()


# who is at work without a beat -------------------------------------------------------------------------------


def tick_all(
    heartbeat_monitor: HeartbeatMonitor, look: Looks, *, first: int, last: int, share: float
) -> list[list[int]]:
    """Let tenths of a second go by, in which the engine computes that share of the time."""
    told = []
    for tenth in range(first, last + 1):
        look.cpu_seconds += 0.1 * share
        told.append(heartbeat_monitor.tick(tenth / 10))
    return told


def test_an_engine_that_computes_is_busy_and_not_silent_however_long_it_is_not_heard():
    look = Looks()
    heartbeat_monitor = beating(0, look=look)
    assert tick_all(heartbeat_monitor, look, first=1, last=100, share=1.0) == [[]] * 100
    assert (heartbeat_monitor.busy, heartbeat_monitor.silent) == ({0}, frozenset())


def test_an_engine_that_a_full_host_gives_a_tenth_of_a_core_is_busy():
    look = Looks()
    heartbeat_monitor = beating(0, look=look)
    tick_all(heartbeat_monitor, look, first=1, last=50, share=0.1)
    assert (heartbeat_monitor.busy, heartbeat_monitor.silent) == ({0}, frozenset())


def test_an_engine_that_waits_for_a_disk_is_busy():
    look = Looks()
    look.waits_for_disk = True
    heartbeat_monitor = beating(0, look=look)
    tick_all(heartbeat_monitor, look, first=1, last=50, share=0.0)
    assert (heartbeat_monitor.busy, heartbeat_monitor.silent) == ({0}, frozenset())


def test_threads_that_wait_for_the_interpreter_are_no_work():
    look = Looks()
    heartbeat_monitor = beating(0, look=look)
    tick_all(heartbeat_monitor, look, first=1, last=7, share=0.02)
    assert (heartbeat_monitor.busy, heartbeat_monitor.silent) == (frozenset(), {0})


def test_a_busy_engine_that_computes_no_more_is_silent_soon():
    look = Looks()
    heartbeat_monitor = beating(0, look=look)
    tick_all(heartbeat_monitor, look, first=1, last=50, share=1.0)
    told = tick_all(heartbeat_monitor, look, first=51, last=70, share=0.0)
    assert [tenth for tenth, silent in enumerate(told, 51) if silent] in ([59], [60], [61])
    assert heartbeat_monitor.busy == frozenset()


def test_a_beat_ends_that_an_engine_is_busy():
    look = Looks()
    heartbeat_monitor = beating(0, look=look)
    tick_all(heartbeat_monitor, look, first=1, last=20, share=1.0)
    assert heartbeat_monitor.beat(0, 2.05)
    assert heartbeat_monitor.busy == frozenset()
    assert not heartbeat_monitor.beat(0, 2.15)


def test_a_busy_engine_has_given_a_sign_of_life_just_now():
    look = Looks()
    heartbeat_monitor = beating(0, look=look)
    tick_all(heartbeat_monitor, look, first=1, last=20, share=1.0)
    assert heartbeat_monitor.ages(2.1)[0] < 0.2


def test_engines_that_beat_are_never_looked_at():
    look = Looks()
    heartbeat_monitor = beating(0, look=look)
    for tenth in range(1, 50):
        heartbeat_monitor.beat(0, tenth / 10)
        heartbeat_monitor.tick(tenth / 10 + 0.05)
    assert look.num == 0


def test_an_engine_of_another_host_is_busy_if_its_watcher_says_so():
    heartbeat_monitor = beating(0, look=Looks(is_here=False))
    told = []
    for tenth in range(1, 100):
        if tenth % 5 == 0:
            heartbeat_monitor.see_at_work(0, tenth / 10)
        told += heartbeat_monitor.tick(tenth / 10)
    assert (told, heartbeat_monitor.busy) == ([], {0})
    for tenth in range(100, 118):
        told += heartbeat_monitor.tick(tenth / 10)
    assert (told, heartbeat_monitor.busy) == ([0], frozenset())


def test_an_engine_of_another_host_may_be_silent_for_longer():
    heartbeat_monitor = beating(0, look=Looks(is_here=False))
    told = [heartbeat_monitor.tick(tenth / 10) for tenth in range(1, 22)]
    assert [tenth for tenth, silent in enumerate(told, 1) if silent] == [21]
