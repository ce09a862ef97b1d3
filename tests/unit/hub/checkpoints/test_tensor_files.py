"""Files of tensors that anybody may have made: read, or refused; no tensor reaches beyond its own bytes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from dnb.hub.checkpoints.tensor_files import tensors_in

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: Any, data: bytes = bytes(8)) -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def test_a_file_of_the_safetensors_library_is_read():
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7, dtype=torch.int8), "none": torch.empty(0, 3)}
    found = tensors_in(bytearray(save(tensors, metadata={"format": "pt"})))
    assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }


@pytest.mark.parametrize("padding", range(9))
def test_tensors_may_lie_anywhere(padding: int):
    text = json.dumps({"x": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode() + b" " * padding
    assert tensors_in(file_of(text, torch.tensor([2.5], dtype=torch.float64).numpy().tobytes()))["x"].item() == 2.5


def test_a_file_without_tensors_has_none():
    assert tensors_in(file_of({}, b"")) == {}


ODD: dict[str, bytearray] = {
    "empty": bytearray(),
    "seven bytes": bytearray(7),
    "header longer than the file": bytearray((1 << 62).to_bytes(8, "little") + b"{}"),
    "header of the largest length": bytearray(b"\xff" * 16),
    "no json": file_of(b"no json"),
    "not UTF-8": file_of(b'{"\xff\xfe": 1}'),
    "a list": file_of([1, 2]),
    "deep": file_of(b"[" * 100_000),
    "deep inside": file_of(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "no entry": file_of({"x": 5}),
    "half an entry": file_of({"x": {"dtype": "F32", "shape": [2]}}),
    "one field more": file_of({"x": GOOD | {"strides": [1]}}),
    "unknown dtype": file_of({"x": GOOD | {"dtype": "F33"}}),
    "dtype of another name": file_of({"x": GOOD | {"dtype": "float32"}}),
    "negative size": file_of({"x": GOOD | {"shape": [-2]}}),
    "two negative sizes": file_of({"x": GOOD | {"shape": [-1, -2]}}),
    "huge size": file_of({"x": GOOD | {"shape": [1 << 62, 0], "data_offsets": [0, 0]}}),
    "size of 400 digits": file_of(b'{"x":{"dtype":"F32","shape":[' + b"9" * 400 + b'],"data_offsets":[0,8]}}'),
    "size of half": file_of({"x": GOOD | {"shape": [1.5]}}),
    "thousand dims": file_of({"x": GOOD | {"shape": [1] * 1000 + [2]}}),
    "other shape": file_of({"x": GOOD | {"shape": [3]}}),
    "beyond the end": file_of({"x": GOOD | {"shape": [4], "data_offsets": [0, 16]}}),
    "before the beginning": file_of({"x": GOOD | {"data_offsets": [-8, 0]}}),
    "backwards": file_of({"x": GOOD | {"data_offsets": [8, 0]}}),
    "a hole": file_of({"x": GOOD | {"shape": [1], "data_offsets": [4, 8]}}),
    "two in one place": file_of({"x": GOOD, "y": GOOD}),
    "what belongs to none": file_of({"x": GOOD}, bytes(9)),
    "huge offsets": file_of({"x": GOOD | {"data_offsets": [1 << 63, (1 << 63) + 8]}}),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_an_odd_file_is_refused(data: bytearray):
    with pytest.raises(ValueError, match=r"."):
        tensors_in(data)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes):
    with contextlib.suppress(ValueError):
        tensors_in(bytearray(data))


@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_gives_tensors_within_the_file_or_is_refused(place: int, value: int):
    data = bytearray(save({"a": torch.arange(3.0), "b": torch.arange(4, dtype=torch.int16)}))
    data[place % len(data)] = value
    try:
        found = tensors_in(data)
    except ValueError:
        return
    assert sum(tensor.numel() * tensor.element_size() for tensor in found.values()) < len(data)
