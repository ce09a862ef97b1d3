"""What the pool of a dead kernel goes on with when another kernel steers it."""

import os
import signal

import pytest

from dnb.api import pools
from tests.engines.pools import until
from tests.faults.kernels import Kernel
from tests.faults.test_deaths import START_AND_TRAIN

pytestmark = [pytest.mark.engines, pytest.mark.faults]


def test_the_next_kernel_that_steers_replaces_engines_that_die_if_the_one_before_did(folder):
    kernel = Kernel(START_AND_TRAIN + 'pool.restart = "always"\n', folder=folder)
    kernel.wait_until_ready()
    kernel.kill()
    pools.attach()
    pool = pools.current_pool()
    assert pool.restart == "always"
    (victim,) = pool.engines
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: any(engine.id != victim.id for engine in pool.engines), what="another engine is there")
