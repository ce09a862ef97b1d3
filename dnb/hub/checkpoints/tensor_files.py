"""Tensors in safetensors files: copied into one flat buffer at once, written from there piece by piece.

The format is that of https://github.com/huggingface/safetensors#format. We write it ourselves, as its library copies
every tensor once more while it holds the GIL, and neither hashes what it writes nor syncs it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
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
_DTYPES = {code: dtype for dtype, code in CODES.items()}
PIECE_BYTES = 4 << 20
# As the library of safetensors has it.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 64


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
        """The size of the whole file."""
        return len(self._header) + len(self._flat)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the file in pieces, from its beginning to its end."""
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
    """Read every tensor of a file, in memory of its own.

    Raises:
        OSError: there is none.
        ValueError: it is not a whole safetensors file.
    """
    try:
        return tensors_in(bytearray(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in the header of a file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def tensors_in(data: bytearray) -> dict[str, torch.Tensor]:
    """Return every tensor of a file's bytes as a view of them; none reaches beyond its own, whatever the bytes are.

    Raises:
        ValueError: they are not those of a whole safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length:,} bytes does not fit into {len(data):,}")
    begin = 8 + length
    entries = _read_header(bytes(memoryview(data)[8:begin]))
    flat = torch.frombuffer(data, dtype=torch.uint8)[begin:] if len(data) > begin else torch.empty(0, dtype=torch.uint8)
    tensors: dict[str, torch.Tensor] = {}
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        first, last = entry.data_offsets
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise ValueError(f"{name!r} is of {entry.dtype!r}, which is no dtype of a checkpoint")
        if len(entry.shape) > MAX_DIMS or any(not 0 <= size <= len(data) for size in entry.shape):
            raise ValueError(f"{name!r} has the shape {entry.shape[:MAX_DIMS]}, which is none of a tensor")
        if math.prod(entry.shape) * dtype.itemsize != last - first:
            raise ValueError(f"{name!r} of shape {entry.shape} and {entry.dtype} does not have {last - first} bytes")
        if first != expected or last > len(flat):
            raise ValueError(f"{name!r} lies at {first} to {last}, not at {expected}, in {len(flat)} bytes")
        expected = last
        piece = flat[first:last]
        aligned = piece if piece.storage_offset() % dtype.itemsize == 0 else piece.clone()
        tensors[name] = aligned.view(dtype).view(entry.shape)
    if expected != len(flat):
        raise ValueError(f"{len(flat) - expected} bytes belong to no tensor")
    return tensors


def _read_header(text: bytes) -> dict[str, _Entry]:
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        return {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"its header cannot be read: {error}") from error
