"""What engines have reported of the task under way."""

import pytest
import torch

from dnb.hub.parameters.master import Contribution
from dnb.hub.run.execution.pending_reports import PendingReports, describe_mixed_sums
from dnb.protocol.engine_messages import WorkReport
from dnb.protocol.measurements import StageTrace, Sums
from dnb.transport.pickling.module_states import LooseStates


def sums(loss, *, num_samples=2):
    return Sums(loss_total=loss, loss_weight=2.0, metric_totals={}, metric_weights={}, num_samples=num_samples)


def report(shards, *losses, trace=None):
    parts = tuple(sums(loss) for loss in losses)
    return WorkReport(
        run="digits",
        lease=1,
        kind="step",
        step=1,
        shards=shards,
        parts=parts,
        is_sum=False,
        unused=(),
        telemetry=None,
        trace=trace,
    )


def trace():
    return StageTrace(begin=0.0, end=1.0, cpu_seconds=1.0, num_micro_batches=2, actions=(), traffic=())


def states(**tensors):
    return LooseStates(buffers={name: torch.tensor([value]) for name, value in tensors.items()})


def reported(engine, shards, *losses, owner=None, slabs=(0,), is_divided=False):
    pending = PendingReports(is_divided=is_divided)
    pending.expect(engine, shards, owner=engine if owner is None else owner, slabs=slabs)
    pending.add(engine, report(shards, *losses), None)
    return pending


def places(contributions):
    return [(c.engine, c.slab, c.shard, c.sums.loss_total) for c in contributions]


def test_one_part_of_several_shards_is_one_contribution():
    taken = reported(3, (4, 5), 1.5).take([(3, (4, 5))])
    assert places(taken.contributions) == [(3, 0, 4, 1.5)]


def test_parts_in_slabs_of_their_own_are_contributions_of_their_shards():
    taken = reported(3, (4, 5), 1.5, 2.5, slabs=(7, 8)).take([(3, (4, 5))])
    assert places(taken.contributions) == [(3, 7, 4, 1.5), (3, 8, 5, 2.5)]


def test_a_member_of_a_team_contributes_to_the_slabs_of_their_owner():
    taken = reported(0, (4, 5), 1.5, owner=1, slabs=(0, 1), is_divided=True).take([(0, (4, 5))])
    assert places(taken.contributions) == [(1, 0, 4, 1.5), (1, 1, 4, 0.0)]


def test_slabs_are_counted_for_what_is_expected():
    pending = PendingReports(is_divided=False)
    pending.expect(3, (4, 5), owner=3, slabs=(7, 8))
    assert pending.num_slabs(3, (4, 5)) == 2


def test_shards_that_went_into_one_slab_are_found_by_it():
    pending = PendingReports(is_divided=False)
    for shards in ((0, 1), (4,)):
        pending.expect(3, shards, owner=3, slabs=(0,))
        pending.add(3, report(shards, 1.0), None)
    pending.take([(3, (0, 1)), (3, (4,))])
    assert [pending.shards_in(3, 0), pending.shards_in(3, 1)] == [(0, 1, 4), ()]


def test_a_task_that_was_taken_is_forgotten():
    pending = reported(3, (4,), 1.5)
    pending.take([(3, (4,))])
    with pytest.raises(KeyError):
        pending.num_slabs(3, (4,))


def test_of_states_that_several_engines_bring_the_first_engine_s_count():
    pending = PendingReports(is_divided=False)
    for engine, brought in ((0, states(a=1)), (1, states(a=2, b=3))):
        pending.expect(engine, (engine,), owner=engine, slabs=(0,))
        pending.add(engine, report((engine,), 1.0), brought)
    merged = pending.take([(0, (0,)), (1, (1,))]).states
    assert {name: int(value) for name, value in merged.buffers.items()} == {"a": 1, "b": 3}


def test_states_that_came_with_outputs_count_with_the_step():
    pending = PendingReports(is_divided=False)
    pending.expect(0, (0,), owner=0, slabs=(0,))
    pending.add(0, report((0,), 1.0), states(a=1))
    pending.go_on_with_step()
    pending.expect(0, (0,), owner=0, slabs=(0,))
    pending.add(0, report((0,), 1.0), None)
    assert int(pending.take([(0, (0,))]).states.buffers["a"]) == 1


@pytest.mark.parametrize(("last", "found"), [(trace(), [0, 1]), (None, [])])
def test_traces_are_those_of_all_engines_or_none(last, found):
    pending = PendingReports(is_divided=True)
    for engine, its in ((0, trace()), (1, last)):
        pending.expect(engine, (0,), owner=1, slabs=(0,))
        pending.add(engine, report((0,), 1.0, trace=its), None)
    assert list(pending.take([(0, (0,)), (1, (0,))]).traces) == found


def test_means_and_sums_do_not_mix_and_both_engines_are_named():
    mixed = [Contribution(0, 0, 0, sums(1.0), True), Contribution(2, 0, 1, sums(1.0), False)]
    assert describe_mixed_sums(mixed).endswith("it did on engine 0, and not on engine 2")


def test_a_part_without_samples_is_neither_a_mean_nor_a_sum():
    parts = [Contribution(0, 0, 0, sums(1.0), True), Contribution(2, 0, 1, sums(0.0, num_samples=0), False)]
    assert describe_mixed_sums(parts) == ""
