from __future__ import annotations

import math
import threading
from functools import partial

import pytest
import torch

from dnb.hub.parameters.master import sum_regions
from dnb.hub.parameters.optimizers import Stepper
from dnb.hub.parameters.thread_team import LEAST_ELEMENTS, MOST_THREADS, PART_ELEMENTS, ThreadTeam, usable_threads

pytestmark = pytest.mark.numeric


@pytest.fixture
def thread_team():
    thread_team = ThreadTeam(3)
    yield thread_team
    thread_team.close()


def test_there_are_no_more_threads_than_cores_and_than_memory_feeds():
    assert 1 <= usable_threads() <= MOST_THREADS


def test_what_is_small_is_not_cut(thread_team: ThreadTeam):
    assert thread_team.cut(2 * LEAST_ELEMENTS - 1) == [(0, 2 * LEAST_ELEMENTS - 1)]


def test_nothing_is_one_part(thread_team: ThreadTeam):
    assert thread_team.cut(0) == [(0, 0)]


@pytest.mark.parametrize("extra", [0, 1, PART_ELEMENTS - 1, 5 * PART_ELEMENTS + 3])
def test_parts_follow_each_other_and_end_where_vectors_do(thread_team: ThreadTeam, extra: int):
    num_elements = 3 * LEAST_ELEMENTS + extra
    parts = thread_team.cut(num_elements)
    assert 2 <= len(parts) <= 3
    assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == num_elements
    assert [end % PART_ELEMENTS for _, end in parts[:-1]] == [0] * (len(parts) - 1)


def test_tasks_run_side_by_side_and_answer_in_order(thread_team: ThreadTeam):
    rendezvous = threading.Barrier(3, timeout=30)

    def task(number: int) -> int:
        rendezvous.wait()
        return number

    assert thread_team.share([partial(task, number) for number in range(3)]) == [0, 1, 2]


def test_a_single_task_needs_no_thread(thread_team: ThreadTeam):
    assert thread_team.share([threading.get_ident]) == [threading.get_ident()]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_an_error_is_raised_when_all_have_ended(thread_team: ThreadTeam, culprit: int):
    ended = []

    def task(number: int) -> None:
        if number == culprit:
            raise MemoryError(f"task {number}")
        ended.append(number)

    with pytest.raises(MemoryError, match=f"task {culprit}"):
        thread_team.share([partial(task, number) for number in range(3)])
    assert sorted(ended) == [number for number in range(3) if number != culprit]


def test_closing_ends_the_threads():
    thread_team = ThreadTeam(2)
    names = {thread.name for thread in thread_team.share([threading.current_thread, threading.current_thread])}
    thread_team.close()
    assert any(name.startswith("dnb-thread-team") for name in names)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dnb-thread-team")]


@pytest.mark.parametrize("divisor", [None, 3.0])
def test_a_sum_has_the_same_bits_however_many_add_it_up(thread_team: ThreadTeam, divisor: float | None):
    generator = torch.Generator().manual_seed(0)
    slabs = [torch.randn(3 * LEAST_ELEMENTS + 17, generator=generator) for _ in range(3)]
    alone, shared = slabs[0].clone(), slabs[0].clone()
    sum_regions(alone, slabs[1:], divisor=divisor, thread_team=ThreadTeam(1))
    sum_regions(shared, slabs[1:], divisor=divisor, thread_team=thread_team)
    assert torch.equal(alone, shared)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_squares_of_the_sum_are_those_of_all_parts(num_threads: int):
    thread_team = ThreadTeam(num_threads)
    generator = torch.Generator().manual_seed(0)
    size = 3 * LEAST_ELEMENTS + 17
    slabs = [torch.randint(-2, 3, (size,), generator=generator).float() for _ in range(3)]  # so that nothing is rounded
    wanted = sum(slabs).double().square().sum().item() / 16
    assert sum_regions(slabs[0], slabs[1:], divisor=4.0, thread_team=thread_team) == wanted
    thread_team.close()


def test_squares_of_values_too_large_for_float32_are_added_up(thread_team: ThreadTeam):
    assert sum_regions(torch.full((4,), 1e30), [], thread_team=thread_team) == pytest.approx(4e60)


def test_squares_of_complex_values_are_of_their_lengths(thread_team: ThreadTeam):
    assert sum_regions(torch.full((4,), 3 + 4j), [], thread_team=thread_team) == pytest.approx(100.0)


@pytest.mark.parametrize("place", [0, 2 * LEAST_ELEMENTS, -1])
def test_every_part_is_looked_at_for_nan(thread_team: ThreadTeam, place: int):
    target = torch.zeros(3 * LEAST_ELEMENTS + 17)
    target[place] = torch.nan
    assert math.isnan(sum_regions(target, [torch.zeros_like(target)], thread_team=thread_team))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_shared_update_has_the_bits_of_one_by_the_optimizer_itself(
    thread_team: ThreadTeam, kind: type[torch.optim.Optimizer], amsgrad: bool
):
    sizes = [(1500, 1100), (7,), (3,), (2 * LEAST_ELEMENTS + 5,)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator) for size in sizes]
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    weights[0], gradients[0] = weights[0].t(), gradients[0].t()  # cannot be cut
    plain = [torch.nn.Parameter(weight.clone()) for weight in weights]
    shared = [torch.nn.Parameter(weight.clone()) for weight in weights]
    of_plain, of_shared = (kind(p, lr=0.01, amsgrad=amsgrad, fused=True) for p in (plain, shared))
    stepper = Stepper(of_shared, thread_team)
    for number in range(3):
        for parameters in (plain, shared):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient * (number + 1) if parameter.grad is None else parameter.grad.mul_(2)
        of_plain.step()
        stepper.step()
    assert [torch.equal(a, b) for a, b in zip(plain, shared, strict=True)] == [True] * 4
    for a, b in zip(plain, shared, strict=True):
        assert all(torch.equal(value, of_shared.state[b][name]) for name, value in of_plain.state[a].items())
