"""The sanitize rules for nbval: what two machines print becomes the same, and what differs in kind does not."""

import re

import pytest
from nbval.plugin import get_sanitize_patterns

from dnb.cli import RULES

PATTERNS = get_sanitize_patterns(RULES.read_text())

START = """\
... starting 2 engines: the controller is on its way, 2 s
... starting 2 engines took 6.9 s
engine  host  pid    state  threads  memory         device
0       vm    17211  ready  1        0.27 of 25 GB  cpu
1       vm    17221  {state}  1        0.27 of 25 GB  cpu
next: %dtrain fit model train --loss cross_entropy    train on these engines
"""
QUICK_START = """\
engine  host      pid      state  threads  memory          device
0       node-17   1834211  ready  4        0.31 of 8.2 GB  cuda:0
1       node-17   1834217  {state}  4        0.31 of 8.2 GB  cuda:1
next: %dtrain fit model train --loss cross_entropy    train on these engines
"""


def sanitize(text: str) -> str:
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return text


def lines(text: str) -> list[str]:
    return [re.sub(" +", " ", line) for line in sanitize(text).splitlines()]


def test_a_start_on_two_machines_is_the_same():
    assert lines(START.format(state="ready")) == lines(QUICK_START.format(state="ready"))


def test_an_engine_in_another_state_is_not_the_same():
    assert lines(START.format(state="ready")) != lines(START.format(state="spare"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("digits: finished after 9 steps in 7 s\nloss 1 at step 9\n", "digits-2: finished after 9 steps in 4 min\n"),
        ("digits: step 13/675, loss 2.1, 13 s left\ndigits: step 468/675\ndigits: finished after 675 steps in 7.3 s\n",
         "digits: starting\ndigits: finished after 675 steps in 1 s\n"),
        ("digits: epoch 1 of 15 · step 13 of 675\nTrue\n", "digits: epoch 7 of 15 · step 600 of 675\nTrue\n"),
        ("<dnb.Run 'digits': finished, step 9 of 9, loss 0.6>", "<dnb.Run 'digits-3': finished, step 9 of 9, loss 1>"),
        ("<dnb.Run 'on-a-loader': finished, step 9 of 9>", "<dnb.Run 'on-a-loader-2': finished, step 9 of 9>"),
        ("[stdout:1] engine answers\n", "[stdout:0] engine answers\n"),
        ("measured: .dnb/runs/digits\n", "measured: .dnb/runs/digits-2\n"),
        ("validation accuracy 0.992\n", "validation accuracy 0.983\n"),
    ],
)  # fmt: skip
def test_what_differs_from_machine_to_machine_is_the_same(one, other):
    assert sanitize(one) == sanitize(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("digits: finished after 675 steps in 7.3 s\n", "digits: finished after 15 steps in 7.3 s\n"),
        ("digits: finished after 675 steps in 7.3 s\n", "digits: failed at step 675: the loss is NaN\n"),
        ("<dnb.Run 'digits': finished, step 675 of 675>", "<dnb.Run 'digits': failed, step 675 of 675>"),
        ("<dnb.Run 'digits': finished, step 675 of 675>", "<dnb.Run 'letters': finished, step 675 of 675>"),
        ("validation accuracy 0.992\n", "validation accuracy 0.412\n"),
        ("my own loss 0.25\n", "my own loss 0.75\n"),
    ],
)
def test_what_differs_in_kind_stays_different(one, other):
    assert sanitize(one) != sanitize(other)
