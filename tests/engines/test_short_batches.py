"""Batches with few samples, and rests of micro-batches: no part has one sample where the batch has more."""

import pytest

from tests.engines.pools import wait
from tests.models import batch_norm_net, digits, largest_gap, plain_losses, twice

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("num_samples", [66, 67])
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"shards": 8}, {"strategy": "pipeline"}], ids=str)
def test_batch_norm_trains_on_a_short_last_batch(pool, num_samples, options):
    run = wait(pool.fit(batch_norm_net(), digits(num_samples), loss="cross_entropy", **options))
    assert (run.status, run.step) == ("finished", 2)


def test_a_batch_of_three_samples_gives_batch_norm_the_statistics_of_one_process(pool):
    model, plain = twice(batch_norm_net)
    run = wait(pool.fit(model, digits(3), loss="cross_entropy", epochs=8, batch_size=3))
    assert largest_gap(run.history["loss"], plain_losses(plain, digits(3), num_steps=8, batch_size=3)) < 1e-10


@pytest.mark.parametrize("micro_batch", [31, 3, 2])
def test_a_rest_of_one_sample_goes_with_the_micro_batch_before_it(pool, micro_batch):
    run = wait(pool.fit(batch_norm_net(), digits(66), loss="cross_entropy", micro_batch=micro_batch, shards=2))
    assert (run.status, run.step) == ("finished", 2)
