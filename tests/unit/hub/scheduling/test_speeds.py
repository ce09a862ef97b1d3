"""Who is given how much of a task."""

from dnb.hub.scheduling.leases import Leases
from dnb.hub.scheduling.speeds import FIRST_RATIO, Speeds


def timed(num_shards, seconds):
    speeds = Speeds(num_shards)
    for engine, each in seconds.items():
        speeds.add(engine, seconds=each, num_shards=num_shards // len(seconds), num_samples=None)
    return speeds


def test_whoever_has_not_answered_yet_counts_as_slower_in_its_first_task():
    costs = timed(48, {0: 0.096, 1: 0.096}).plan([0, 1, 2])
    assert costs is not None
    assert costs[0] == costs[1] == 0.004
    assert costs[2] == FIRST_RATIO * 0.004


def test_whoever_has_answered_once_gets_an_equal_share():
    speeds = timed(48, {0: 0.096, 1: 0.096})
    speeds.plan([0, 1, 2])
    for engine in range(3):
        speeds.add(engine, seconds=0.064, num_shards=16, num_samples=None)
    assert speeds.plan([0, 1, 2]) is None


def test_nobody_counts_as_slower_when_all_begin_at_once():
    assert Speeds(48).plan([0, 1, 2]) is None


def test_a_joiner_gets_half_a_share_of_its_first_step_and_every_shard_is_dealt_once():
    leases = Leases(50)
    for engine in (0, 1):
        leases.issue(engine, "step", 1, tuple(range(25 * engine, 25 * engine + 25)), fresh=True)
    leases.now = 0.1
    for lease in list(leases.by_engine.values()):
        leases.close(lease, num_samples=None)
    parts = leases.deal("step", [0, 1, 2])
    assert [len(part) for part in parts.values()] == [20, 20, 10]
    assert [shard for part in parts.values() for shard in part] == list(range(50))
