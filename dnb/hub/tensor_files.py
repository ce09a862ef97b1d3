"""Tensors in safetensors files: copied into one flat buffer at once, written from there piece by piece.

The format is that of https://github.com/huggingface/safetensors#format. We write it ourselves, as its library copies
every tensor once more while it holds the GIL, and neither hashes what it writes nor syncs it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from dnb.errors import ArgumentError
from dnb.transport.layout import dtype_name

# Names of dtypes in the format.
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE_BYTES = 4 << 20


class TensorBuffer:
    """A copy of named tensors, as the bytes of a safetensors file; may be filled again."""

    def __init__(self) -> None:
        self._facts: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self._views: dict[str, torch.Tensor] = {}
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._header = b""

    def fill(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Copy the tensors; memory is reserved when names, shapes or dtypes differ from the last time.

        Raises:
            ArgumentError: a dtype that safetensors does not have.
        """
        facts = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        if facts != self._facts or not self._header:
            self._reserve(facts)
            self._header = self._make_header(metadata)
            self._facts = facts
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor.detach())

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return len(self._header) + len(self._flat)

    def pieces(self) -> Iterator[memoryview]:
        """The file, from its beginning to its end."""
        yield memoryview(self._header)
        whole = self._flat.numpy().data
        for begin in range(0, len(self._flat), PIECE_BYTES):
            yield whole[begin : begin + PIECE_BYTES]

    def _reserve(self, facts: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        for name, dtype, _ in facts:
            if dtype not in CODES:
                raise ArgumentError(
                    f"{name!r} is of {dtype_name(dtype)}, which a checkpoint cannot hold: safetensors has no such dtype"
                )
        # The widest first, so that every tensor lies at a multiple of its items' size without holes between.
        facts = sorted(facts, key=lambda fact: -fact[1].itemsize)
        sizes = [dtype.itemsize * math.prod(shape) for _, dtype, shape in facts]
        self._views = {}
        self._flat = torch.empty(sum(sizes), dtype=torch.uint8)
        begin = 0
        for (name, dtype, shape), size in zip(facts, sizes, strict=True):
            self._views[name] = self._flat[begin : begin + size].view(dtype).view(shape)
            begin += size

    def _make_header(self, metadata: Mapping[str, str]) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        begin = 0
        for name, view in self._views.items():
            end = begin + view.numel() * view.element_size()
            entries[name] = {"dtype": CODES[view.dtype], "shape": list(view.shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, in memory of its own.

    Raises:
        OSError: there is none.
        ValueError: it is not a whole safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
