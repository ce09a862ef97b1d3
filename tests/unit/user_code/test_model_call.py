"""What of a batch a model gets, and what a loss compares its output with."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dnb.errors import ArgumentError
from dnb.user_code.model_call import arguments_of, named_parts, takes_positional, with_parts

X, Y = torch.ones(3, 2), torch.zeros(3)


class Named(nn.Module):
    def forward(self, x: Any, labels: Any = None) -> Any: ...


class Whole(nn.Module):
    def forward(self, batch: Any, *, scale: float = 1.0) -> Any: ...


class Many(nn.Module):
    def forward(self, *parts: Any) -> Any: ...


@dataclass
class Rows:
    x: Any
    labels: Any


Pair = namedtuple("Pair", "x labels")


class Bag:
    """Has keys, and is no mapping."""

    def __init__(self, **parts: Any) -> None:
        self._parts = parts

    def keys(self) -> Any:
        return self._parts.keys()

    def __getitem__(self, key: str) -> Any:
        return self._parts[key]


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y)], ids=["tuple", "list", "namedtuple"])
def test_the_last_part_is_the_target(batch: Any):
    found = arguments_of(Named(), batch, has_target=True)
    assert found.positional == (X,)
    assert found.target is Y


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y)], ids=["tuple", "list", "namedtuple"])
def test_a_model_that_returns_its_own_loss_gets_all_parts(batch: Any):
    found = arguments_of(Named(), batch, has_target=False)
    assert len(found.positional) == 2
    assert found.target is None


@pytest.mark.parametrize(
    "batch",
    [{"x": X, "labels": Y}, UserDict(x=X, labels=Y), Rows(X, Y), Bag(x=X, labels=Y)],
    ids=["dict", "another mapping", "dataclass", "with keys"],
)
def test_parts_with_names_are_given_by_name(batch: Any):
    found = arguments_of(Named(), batch, has_target=False)
    assert found.positional == ()
    assert list(found.keywords) == ["x", "labels"]
    assert found.keywords["labels"] is Y


@pytest.mark.parametrize("batch", [{"x": X}, Rows(X, Y)], ids=["dict", "dataclass"])
def test_a_forward_of_one_argument_of_another_name_gets_the_batch_whole(batch: Any):
    assert arguments_of(Whole(), batch, has_target=False).positional == (batch,)


@pytest.mark.parametrize("batch", [X, SimpleNamespace(x=X)], ids=["tensor", "object"])
def test_what_has_neither_parts_nor_names_is_given_as_it_is(batch: Any):
    (given,) = arguments_of(Named(), batch, has_target=False).positional
    assert given is batch


@pytest.mark.parametrize("batch", [X, (X,), {"x": X}, SimpleNamespace(x=X)], ids=lambda b: type(b).__name__)
def test_a_loss_needs_a_target(batch: Any):
    with pytest.raises(ArgumentError, match=r"step=callable\(model, batch\)"):
        arguments_of(Named(), batch, has_target=True)


@pytest.mark.parametrize(
    ("model", "fits"), [(Named(), [1, 2]), (Whole(), [1]), (Many(), [1, 2, 3]), (nn.Linear(2, 1), [1])]
)
def test_how_many_parts_a_forward_takes_is_known(model: nn.Module, fits: list[int]):
    assert [number for number in (1, 2, 3) if takes_positional(model, number)] == fits


def test_a_compiled_function_may_take_anything():
    class Compiled(nn.Module):
        forward = staticmethod(print)

    assert takes_positional(Compiled(), 7)


@pytest.mark.parametrize("batch", [{"x": X, "labels": Y}, UserDict(x=X, labels=Y), Rows(X, Y)])
def test_parts_are_replaced_in_a_batch_of_the_same_kind(batch: Any):
    made = with_parts(batch, {"x": X[:1], "labels": Y[:1]})
    assert type(made) is type(batch)
    assert len(named_parts(made)["x"]) == 1
    assert len(named_parts(batch)["x"]) == 3
