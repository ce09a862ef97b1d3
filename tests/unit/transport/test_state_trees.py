from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from dnb.protocol.client_messages import StateTree
from dnb.transport.state_trees import decode_state, encode_state, pack_state, take_items_apart, unpack_state


def round_trip(state: Any) -> Any:
    """As from the hub to the kernel: through bytes."""
    tree, frames = encode_state(state)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(tree), type=StateTree)
    return decode_state(received, [bytes(frame) for frame in frames])


def trained(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), **options)
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -(2**40),
        0.1,
        "text",
        [],
        {},
        (),
        [1, [2, None]],
        {"a": {"b": [1.5]}},
        {0: "zero", 1: "one"},
        {(1, 2): "pair"},
        (0.9, 0.999),
        {"tensor": 1, "dict": 2},
        math.inf,
    ],
    ids=repr,
)
def test_plain_values_survive(value: Any):
    assert round_trip(value) == value


def test_a_tuple_stays_a_tuple():
    assert type(round_trip({"betas": (0.9, 0.999)})["betas"]) is tuple


def test_keys_that_are_integers_stay_integers():
    assert list(round_trip({0: "a", 5: "b"})) == [0, 5]


def test_nan_survives():
    assert math.isnan(round_trip({"loss": math.nan})["loss"])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[1.5, -2.0]]),
        torch.tensor([1.5], dtype=torch.bfloat16),
        torch.tensor([2**40]),
        torch.tensor(7.0),
        torch.tensor([True, False]),
        torch.empty(0, 3),
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor([1 + 2j]),
    ],
    ids=["float32", "bfloat16", "int64", "scalar", "bool", "no elements", "transposed", "complex"],
)
def test_a_tensor_survives(tensor: torch.Tensor):
    arrived = round_trip({"weight": tensor})["weight"]
    assert (arrived.dtype, arrived.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(arrived, tensor)


def test_nan_in_a_tensor_survives():
    assert round_trip([torch.tensor([math.nan, 1.0])])[0].isnan().tolist() == [True, False]


def test_a_parameter_arrives_as_a_tensor_without_a_graph():
    assert not round_trip(nn.Parameter(torch.ones(2))).requires_grad


def test_a_tensor_owns_its_memory():
    tensor = torch.ones(2)
    arrived = round_trip(tensor)
    tensor.fill_(5.0)
    assert arrived.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ],
    ids=["adam", "fused adamw", "sgd"],
)
def test_the_state_of_an_optimizer_survives(kind: type[torch.optim.Optimizer], options: dict[str, Any]):
    model, optimizer = trained(kind, **options)
    fresh = kind(model.parameters(), **options)
    fresh.load_state_dict(round_trip(optimizer.state_dict()))
    torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_the_state_of_a_model_survives():
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    torch.testing.assert_close(dict(round_trip(state)), dict(state), rtol=0, atol=0)


def test_an_ordered_dictionary_keeps_its_order():
    assert list(round_trip(OrderedDict(b=1, a=2))) == ["b", "a"]


def test_a_learning_rate_that_numpy_computed_survives():
    assert round_trip({"lr": np.float64(0.125)})["lr"] == 0.125


@pytest.mark.parametrize("num_bytes", [0, 4, 12])
def test_a_frame_of_the_wrong_size_is_refused(num_bytes: int):
    tree, _ = encode_state({"weight": torch.ones(2)})
    with pytest.raises(ValueError, match=rf"tensor state.weight of shape \(2,\) came with {num_bytes} bytes"):
        decode_state(tree, [bytes(num_bytes)])


def test_a_missing_frame_is_refused():
    tree, _ = encode_state({"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        decode_state(tree, [])


@pytest.mark.parametrize("value", [object(), len], ids=["object", "function"])
@pytest.mark.parametrize("take", [encode_state, pack_state])
def test_what_would_need_pickle_is_refused_with_its_place(take: Any, value: Any):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"state\.inner\.1 is a {kind}, which cannot be kept without pickle"):
        take({"inner": [0, value]})


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", deque([1, 2], maxlen=None), Counter("aab"), 1 << 80], ids=repr)
def test_sets_bytes_and_large_numbers_survive(value: Any):
    assert round_trip(value) == value
    assert unpack_state(pack_state(value)) == value


def test_a_state_in_one_piece_is_the_same_state():
    state = {
        "a": [torch.arange(6.0).view(2, 3).t(), {0: torch.tensor(7)}],
        "b": (math.inf, None),
        "c": torch.empty(0, 3),
    }
    torch.testing.assert_close(unpack_state(pack_state(state)), state, rtol=0, atol=0)


def test_equal_states_are_equal_in_one_piece():
    assert pack_state({"a": torch.ones(2)}) == pack_state({"a": torch.ones(2)})
    assert pack_state({"a": torch.ones(2)}) != pack_state({"a": torch.zeros(2)})


@pytest.mark.parametrize("shape", [[3], [-2], [1 << 62, 4]])
def test_a_tensor_in_one_piece_has_the_bytes_that_its_shape_says(shape: list[int]):
    tree, told = msgspec.msgpack.decode(pack_state({"weight": torch.ones(2)}))
    told["state.weight"][1] = shape
    with pytest.raises(ValueError, match=r"tensor state\.weight of shape .* came with 8 bytes"):
        unpack_state(msgspec.msgpack.encode((tree, told)))


def test_items_that_cannot_be_kept_are_left_out_by_name():
    trees, tensors, left_out = take_items_apart({"lr": 0.1, "at": torch.ones(1), "lr_lambdas": [len]}, root="scheduler")
    assert trees == {"lr": 0.1, "at": {"$": "tensor", "of": "scheduler.at"}}
    assert list(tensors) == ["scheduler.at"]
    assert left_out == ("lr_lambdas",)
