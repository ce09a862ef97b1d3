"""Engines that join, leave, are killed and stand still at random: an exact run comes to the bits of a quiet one.

Two schedules here, all 20 of them with `make soak`.
"""

import os
import random
import time

import pytest
import torch

from tests.engines.pools import until, wait, wait_until
from tests.models import digits, dropout_net, twice

pytestmark = [pytest.mark.engines, pytest.mark.faults, pytest.mark.float32]

NUM_STEPS = 150
NUM_ACTS = 4
IS_SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"


def paced(output, target):
    """Slow enough for an engine to join in mid-run."""
    time.sleep(0.01)
    return torch.nn.functional.cross_entropy(output, target)


def train(pool, **options):
    model, _ = twice(dropout_net)
    run = pool.fit(model, digits(27 * 28), loss=paced, batch_size=27, steps=NUM_STEPS, exact=True, **options)
    return model, run


@pytest.fixture(scope="module")
def quiet(shared, tmp_path_factory):
    """The model and history of a run that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("quiet"))
        model, run = train(shared.of(2))
        wait(run)
    return model, run.history


def act(pool, chance):
    """Harm or help the pool, but leave at least one engine; what was done."""
    engines = [engine.id for engine in pool.engines]
    verbs = ["stop"] + ["join"] * (len(engines) < 3) + ["leave", "kill"] * (len(engines) > 1)
    verb, engine = chance.choice(verbs), chance.choice(engines)
    match verb:
        case "join":
            (engine,) = pool.add(1)
        case "leave":
            pool.remove(engine)
        case "kill":
            pool.chaos.kill(engine)
            until(lambda: engine not in [each.id for each in pool.engines], what=f"the death of {engine} is seen")
        case "stop":
            pool.chaos.stop(engine, chance.uniform(0.1, 1.5))
    return f"{verb} {engine}"


@pytest.mark.parametrize("seed", range(20 if IS_SOAK else 2))
def test_an_exact_run_under_a_random_schedule_comes_to_the_bits_of_a_quiet_one(pool, quiet, seed):
    chance = random.Random(seed)
    model, run = train(pool, name=f"schedule-{seed}")
    acts = []
    for step in sorted(chance.sample(range(1, NUM_STEPS - 50), NUM_ACTS)):
        wait_until(run, lambda run, step=step: run.step >= step, what=f"step {step}, after {acts}")
        acts.append(act(pool, chance))
    wait(run)
    ours, theirs = model.state_dict(), quiet[0].state_dict()
    assert run.history["loss"] == quiet[1]["loss"], acts
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == [], acts
