from __future__ import annotations

import logging
import threading

import pytest

from dnb.errors import HubError, PoolError
from dnb.pool.replacement import EngineReplacer, ReplacementPolicy, RestartPolicy
from dnb.protocol.client_messages import Members


def members(*workers: int, spares=(), wanted_spares=0, num_died=0, num_killed=0, num_owed=0) -> Members:
    return Members(
        workers=workers,
        spares=spares,
        leaving=(),
        wanted_spares=wanted_spares,
        num_died=num_died,
        num_killed=num_killed,
        num_owed=num_owed,
    )


def test_who_died_before_is_not_replaced():
    replacements = ReplacementPolicy("always", members(0, num_died=3))
    assert replacements.count(members(0, num_died=3), now=0) == 0


def test_the_dead_are_owed_until_others_have_started():
    replacements = ReplacementPolicy("always", members(0, 1))
    assert [replacements.count(members(0, num_died=1), now=now) for now in (0, 1)] == [1, 1]
    replacements.started(1)
    assert replacements.count(members(0, 2, num_died=1), now=2) == 0


def test_without_a_restart_the_dead_stay_dead():
    assert ReplacementPolicy("never", members(0, 1)).count(members(0, num_died=1), now=0) == 0


@pytest.mark.parametrize("restart", ["never", "always"])
def test_what_a_run_s_work_has_ended_is_replaced_once_whatever_the_policy(restart):
    replacements = ReplacementPolicy(restart, members(0, 1))
    assert replacements.count(members(num_died=2, num_owed=2), now=0) == 2
    replacements.started(2)
    assert replacements.count(members(2, 3, num_died=2), now=1) == 0


@pytest.mark.parametrize("restart", ["never", "always"])
def test_a_missing_spare_is_owed_whatever_the_policy(restart):
    replacements = ReplacementPolicy(restart, members(0, spares=(1,), wanted_spares=1))
    assert replacements.count(members(1, wanted_spares=1, num_died=1), now=0) == 1


def test_a_spare_is_not_owed_to_a_pool_without_workers():
    assert ReplacementPolicy("never", members(wanted_spares=1)).count(members(wanted_spares=1), now=0) == 0


def test_an_engine_that_comes_back_is_not_owed_any_more():
    replacements = ReplacementPolicy("always", members(0, 1))
    assert replacements.count(members(0, num_died=1), now=0) == 1
    assert replacements.count(members(0, 1), now=1) == 0


def test_five_deaths_within_30_seconds_are_no_crash_loop_and_six_are():
    replacements = ReplacementPolicy("always", members(0))
    for died in range(1, 6):
        replacements.count(members(0, num_died=died), now=died)
    assert not replacements.is_crash_loop(now=6)
    replacements.count(members(0, num_died=6), now=6)
    assert replacements.is_crash_loop(now=6)


def test_deaths_of_long_ago_are_no_crash_loop():
    replacements = ReplacementPolicy("always", members(0))
    for died in range(1, 12):
        replacements.count(members(0, num_died=died), now=6.5 * died)
    assert not replacements.is_crash_loop(now=72)


def test_what_chaos_killed_is_replaced_and_is_no_crash():
    replacements = ReplacementPolicy("always", members(0))
    assert replacements.count(members(0, num_died=9, num_killed=9), now=0) == 9
    assert not replacements.is_crash_loop(now=0)


def test_starts_that_fail_count_like_deaths():
    replacements = ReplacementPolicy("always", members(0))
    for now in range(6):
        replacements.failed(now=now)
    assert replacements.is_crash_loop(now=6)


class Pool:
    """A hub that says who is there, and what starts engines; tells when it has been asked often enough."""

    def __init__(self, *answers: Members, error: Exception | None = None) -> None:
        self.answers = list(answers)
        self.error = error
        self.started: list[int] = []
        self.has_started = threading.Event()

    def look(self) -> Members:
        if not self.answers:
            raise HubError("the hub has died")
        return self.answers.pop(0)

    def start(self, number: int) -> None:
        self.started.append(number)
        self.has_started.set()
        if self.error is not None:
            raise self.error


def keep(pool: Pool, restart: RestartPolicy = "always") -> EngineReplacer:
    replacer = EngineReplacer(restart, poll=pool.look, start=pool.start, size_lock=threading.Lock())
    replacer.start()
    return replacer


def test_the_keeper_starts_as_many_as_died_and_ends_with_the_hub():
    pool = Pool(members(0, 1, 2), members(0, num_died=2), members(0, 3, 4, num_died=2))
    keep(pool).join(10)
    assert pool.started == [2]


def test_a_keeper_that_has_nothing_to_keep_any_more_ends():
    pool = Pool(members(), members(num_died=2, num_owed=2), members(2, 3, num_died=2), members())
    keep(pool, "never").join(10)
    assert pool.started == [2]
    assert len(pool.answers) == 1


def test_the_keeper_tries_again_what_failed(caplog):
    pool = Pool(members(0), *[members(num_died=1)] * 2, error=PoolError("no memory"))
    keep(pool).join(10)
    assert pool.started == [1, 1]
    assert "an engine could not be replaced: no memory" in caplog.text


def test_a_crash_loop_ends_the_keeper_which_says_so_once_with_the_way_out(caplog):
    pool = Pool(members(0), *[members(0, num_died=6)] * 9)
    with caplog.at_level(logging.WARNING):
        replacer = keep(pool)
        replacer.join(10)
    assert pool.started == []
    assert replacer.trouble == (
        "more than 5 engines died within 30 s, and are not replaced any more: "
        'find out why, then %dtrain add N, or pool.restart = "always" to go on replacing'
    )
    assert [record.message for record in caplog.records] == [replacer.trouble]


def test_a_keeper_that_is_stopped_ends_and_starts_nothing_more():
    pool = Pool(*[members(0)] * 1000)
    replacer = keep(pool)
    replacer.stop()
    replacer.join(10)
    assert not replacer.is_alive()
    assert pool.started == []
