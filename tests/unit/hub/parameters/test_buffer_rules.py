"""Rules for buffers, as users give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dnb.errors import ArgumentError
from dnb.hub.parameters.buffer_rules import default_rule, differing_text, read_buffer_rules


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("ema", torch.zeros(3))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))


def model() -> nn.Module:
    return nn.ModuleDict({"first": Counting(), "second": Counting(), "norm": nn.BatchNorm1d(3)})


@pytest.mark.parametrize(
    ("wish", "names"),
    [
        ("first.seen", ["first.seen"]),
        ("seen", ["first.seen", "second.seen"]),
        ("*.seen", ["first.seen", "second.seen"]),
        ("norm.*", ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]),
    ],
)
def test_a_rule_is_for_a_whole_name_a_pattern_or_a_buffer_s_own_name(wish: str, names: list[str]):
    assert read_buffer_rules({wish: "first"}, model()) == dict.fromkeys(names, "first")


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"queue": "first"}, "names no buffer of the model"),
        ({"seen": "max"}, "known: first, mean, sum"),
        ({"seen": "mean"}, r"'first.seen' is of torch.int64, which has no mean: use 'first' or 'sum'"),
        ({"mask": "sum"}, r"'first.mask' is of torch.bool, which has no sum: use 'first'"),
        ("seen=sum", "must be a dictionary of names and rules"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(wishes: Any, words: str):
    with pytest.raises(ArgumentError, match=words):
        read_buffer_rules(wishes, model())


def test_running_statistics_are_averaged_and_of_all_others_the_first_is_kept():
    found = {name: default_rule(name, buffer) for name, buffer in nn.BatchNorm1d(3).named_buffers()}
    assert found == {"running_mean": "mean", "running_var": "mean", "num_batches_tracked": "first"}


def test_many_buffers_that_differ_are_one_event():
    assert differing_text(["a", "b", "c", "d", "e"]).startswith(
        "engines have made different things of buffers 'a', 'b', 'c' and 2 more"
    )
