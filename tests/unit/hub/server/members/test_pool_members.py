"""Engines of a pool join, return, rest, leave and die; what the hub remembers of them has no I/O."""

from __future__ import annotations

from typing import Any

import pytest

from dnb.errors import ArgumentError
from dnb.hub.handover import PoolHandover
from dnb.hub.server.members.membership import Membership
from dnb.protocol.pool import EngineFacts, Process
from dnb.transport.system.processes import Activity


def process_of(number: int, *, pid: int | None = None) -> Process:
    return Process(host="here", pid=pid or 1000 + number, create_time=1.0)


def facts_of(number: int, *, pid: int | None = None, cores: int = 2) -> EngineFacts:
    return EngineFacts(
        engine=number,
        process=process_of(number, pid=pid),
        device="cpu",
        cores=cores,
        memory_bytes=1 << 30,
        torch_version="2",
    )


def nobody(process: Process) -> Activity | None:
    return None


def join(members: Membership, number: int, *, now: float = 0.0, num_wires: int = 0, **facts: Any) -> bool:
    return members.join(facts_of(number, **facts), b"engine-%d" % number, num_wires=num_wires, now=now)


def pool(*numbers: int, wanted_spares: int = 0) -> Membership:
    members = Membership(poll=nobody)
    members.wanted_spares = wanted_spares
    for number in numbers:
        join(members, number)
    members.changed = members.has_other_engines = False
    return members


def taken_over(*numbers: int, spares: tuple[int, ...] = (), leaving: tuple[int, ...] = ()) -> Membership:
    """The members of a pool whose hub has died."""
    members = Membership(poll=nobody)
    members.restore(
        PoolHandover(
            owner=None,
            kernels={},
            engines=tuple(facts_of(number) for number in numbers),
            spares=spares,
            leaving=leaving,
            wanted_spares=len(spares),
            restart="never",
            dead=(),
            num_killed=0,
            stopped=(),
            helpers=(),
        )
    )
    return members


def test_an_engine_that_joins_works():
    assert pool(0).workers == (0,)


def test_an_engine_that_joins_is_news_for_other_kernels_and_for_the_next_hub():
    members = pool()
    join(members, 0)
    assert (members.changed, members.has_other_engines) == (True, True)


def test_an_engine_that_joins_while_spares_are_missing_rests():
    members = pool(0, 1, wanted_spares=1)
    assert (members.workers, members.spares) == ((0,), (1,))


def test_an_engine_that_asks_twice_has_joined():
    members = pool(0)
    assert members.has_joined(facts_of(0), num_wires=0)


def test_an_engine_that_has_lost_its_wire_has_not_joined():
    members = pool(0)
    assert not members.has_joined(facts_of(0), num_wires=1)


def test_another_process_of_an_engines_number_has_not_joined():
    members = pool(0)
    assert not members.has_joined(facts_of(0, pid=7), num_wires=0)


def test_an_engine_is_found_by_its_socket():
    members = pool(0, 1)
    assert members.find(b"engine-1") == 1
    assert members.find(b"engine-2") is None


def test_a_spare_returns_as_a_spare():
    members = taken_over(0, 1, spares=(1,))
    join(members, 1)
    join(members, 0)
    assert (members.workers, members.spares) == ((0,), (1,))


def test_an_engine_that_was_asked_to_leave_leaves_when_it_returns():
    members = taken_over(0, 1, leaving=(1,))
    assert join(members, 1)
    assert not join(members, 0)


def test_an_engine_that_returns_is_expected_no_more():
    members = taken_over(0, 1)
    join(members, 0)
    assert list(members.returning) == [1]


def test_a_worker_that_does_not_return_leaves_its_place_to_a_spare():
    members = taken_over(0, 1, spares=(1,))
    assert members.miss(0)
    assert members.dead == {0}


def test_a_spare_that_does_not_return_leaves_no_place():
    assert not taken_over(0, 1, spares=(1,)).miss(1)


def test_a_spare_that_is_still_to_come_works_in_the_place_of_one_who_does_not_come():
    members = taken_over(0, 1, 2, spares=(1, 2))
    members.miss(0)
    members.expect_one_spare_less()
    assert members.all_spares == (2,)


def test_a_lost_engine_is_dead():
    members = pool(0, 1)
    lost = members.lose(1)
    assert lost is not None
    assert (lost.facts.engine, members.dead, members.workers) == (1, {1}, (0,))


def test_an_engine_that_was_never_in_is_not_dead():
    members = pool(0)
    assert members.lose(5) is None
    assert members.dead == set()


def test_an_engine_that_comes_back_is_dead_no_more():
    members = pool(0)
    members.lose(0)
    join(members, 0)
    assert members.dead == set()


def test_a_newcomer_takes_the_place_of_an_engine_that_a_run_has_ended():
    members = pool(0, 1)
    members.lose(1)
    members.owe(1)
    join(members, 2)
    assert members.num_owed == 0


def test_an_engine_that_comes_back_takes_nobodys_place():
    members = pool(0, 1)
    members.lose(1)
    members.owe(1)
    join(members, 1)
    assert members.num_owed == 1


def test_no_more_engines_are_owed_than_have_died():
    members = pool(0, 1)
    members.lose(1)
    members.owe(3)
    assert members.num_owed == 1


def test_the_spare_with_the_lowest_number_works_next():
    members = pool(0, 1, 2, wanted_spares=2)
    assert members.choose_spare() == 1
    assert (members.workers, members.spares) == ((0, 1), (2,))


def test_without_a_spare_nobody_works_next():
    assert pool(0).choose_spare() is None


def test_engines_that_are_there_leave_now_and_the_others_when_they_return():
    members = taken_over(0, 1, 2)
    join(members, 0)
    join(members, 1)
    assert members.retire([1, 2], active_run="digits", force=False) == [1]
    assert members.leaving == (2,)


def test_the_last_engine_of_an_active_run_stays():
    with pytest.raises(ArgumentError, match="run 'digits' is active, and nobody would be left"):
        pool(0).retire([0], active_run="digits", force=False)


def test_a_pool_whose_last_worker_leaves_lacks_one():
    members = pool(0, 1, wanted_spares=1)
    assert members.start_leaving([0])
    assert (members.workers, members.spares, members.retiring) == ((), (1,), (0,))


def test_a_pool_in_which_somebody_works_lacks_nobody():
    assert not pool(0, 1).start_leaving([1])


def test_a_released_engine_has_five_seconds_to_end():
    members = pool(0, 1)
    members.release(1, now=100.0)
    assert members.leavers == {process_of(1): 105.0}


def test_a_released_engine_is_not_dead_and_belongs_to_the_pool_until_it_is_gone():
    members = pool(0, 1)
    members.release(1, now=100.0)
    assert (members.dead, members.helpers) == (set(), {process_of(1)})


def test_an_engine_that_is_not_in_is_asked_once_a_second():
    members = pool()
    members.note_asked(0, now=10.0)
    assert not members.may_ask(0, process_of(0), now=10.9)
    assert members.may_ask(0, process_of(0), now=11.0)


def test_an_engine_that_leaves_is_not_asked_to_join_again():
    members = pool(0)
    members.release(0, now=10.0)
    assert not members.may_ask(0, process_of(0), now=20.0)


def test_an_engine_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ArgumentError, match="no engine 7: there are 0, 1"):
        pool(0, 1).check_known(7)


def test_an_engine_that_was_lost_has_no_heartbeat():
    members = pool(0)
    members.lose(0)
    assert members.heartbeats.ages(5.0) == {}


def test_an_engine_is_looked_at_by_its_process():
    seen = []

    def look(process: Process) -> Activity:
        seen.append(process)
        return Activity(0.0)

    members = Membership(poll=look)
    join(members, 3, now=0.0)
    members.heartbeats.tick(0.4)
    assert seen == [process_of(3)]
