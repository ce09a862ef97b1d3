"""Ctrl-C while a notebook waits: it reaches every process of the terminal, and ends nothing but the waiting."""

import pytest

from dnb.api import pools
from tests.faults.kernels import Kernel
from tests.faults.test_deaths import START_AND_TRAIN

pytestmark = [pytest.mark.engines, pytest.mark.faults]

INTERRUPTED = f"""
import logging, os, signal
os.setpgrp()  # a terminal of its own
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.basicConfig(stream=sys.stdout, format="%(message)s")
{START_AND_TRAIN}
waiting, moved = threading.Event(), threading.Event()
run.add_wait_hook(lambda _: waiting.set())

def interrupt():
    waiting.wait(120)
    os.killpg(0, signal.SIGINT)

for rung in range(2):  # the second time as the first
    waiting.clear()
    threading.Thread(target=interrupt, daemon=True).start()
    assert run.wait() is run
    say("prompt", run.status)
at = run.step
run.add_listener(lambda run: moved.set() if run.step > at + 3 else None)
assert moved.wait(120)
say("trains with", len(pool.engines))
"""


def test_a_ctrl_c_gives_the_prompt_back_says_how_to_stop_and_training_goes_on(folder):
    kernel = Kernel(INTERRUPTED, folder=folder)
    told = "run 'orphan' goes on; %dtrain stop ends it, %dtrain wait waits again"
    lines = kernel.wait_until_ready()
    kernel.kill()
    pools.attach()  # so that the pool is shut down with the test
    assert lines == [told, "prompt running"] * 2 + ["trains with 1"]
