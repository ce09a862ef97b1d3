"""Tensors in flat buffers: one region per dtype, so that a whole model is summed in one pass."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch

from dnb.protocol.memory import Layout, Region, TensorSlot

Buffer = mmap.mmap | bytearray | memoryview

# Cache line, and the widest vector register (AVX-512).
ALIGNMENT_BYTES = 64
# Gradients of so many elements are moved into a slab by a hook, 5 microseconds each, instead of zeroed and added to.
LARGE_ELEMENTS = 1 << 14


def plan_layout(tensors: Iterable[tuple[str, torch.Tensor]], *, start_bytes: int = 0) -> Layout:
    """Give every named tensor a place; tensors of one dtype are neighbours, in the order given.

    Args:
        tensors: names with tensors; only shape and dtype count.
        start_bytes: where in the buffer the first one may lie; `num_bytes` counts from the buffer's start.
    """
    by_dtype: dict[torch.dtype, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
    slots: list[TensorSlot] = []
    regions: list[Region] = []
    offset = _aligned(start_bytes)
    for dtype, group in by_dtype.items():
        start = offset
        for name, tensor in group:
            slots.append(
                TensorSlot(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=dtype_name(dtype),
                    offset_bytes=offset,
                )
            )
            offset = _aligned(offset + tensor.numel() * dtype.itemsize)
        regions.append(
            Region(
                dtype=dtype_name(dtype),
                offset_bytes=start,
                num_elements=(offset - start) // dtype.itemsize,
            )
        )
    return Layout(slots=tuple(slots), regions=tuple(regions), num_bytes=offset)


def plan_gradients(tensors: Iterable[tuple[str, torch.Tensor]]) -> Layout:
    """Plan like `plan_layout`, with small tensors before large ones, so that the small can be zeroed at once."""
    named = list(tensors)
    return plan_layout(sorted(named, key=lambda item: item[1].numel() >= LARGE_ELEMENTS))


def slot_views(layout: Layout, memory: Buffer) -> dict[str, torch.Tensor]:
    """Return each tensor as a contiguous view of the buffer; nothing is copied."""
    return {
        slot.name: _view(memory, slot.dtype, slot.offset_bytes, _num_elements(slot.shape)).view(slot.shape)
        for slot in layout.slots
    }


def region_views(layout: Layout, memory: Buffer) -> list[torch.Tensor]:
    """Return each region as one flat tensor, padding (zeros) included."""
    return [_view(memory, region.dtype, region.offset_bytes, region.num_elements) for region in layout.regions]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: `torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name that `dtype_name` gave.

    Raises:
        ValueError: no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a torch dtype")
    return dtype


def _view(memory: Buffer, dtype: str, offset: int, num_elements: int) -> torch.Tensor:
    if num_elements == 0:
        return torch.empty(0, dtype=dtype_named(dtype))
    return torch.frombuffer(memory, dtype=dtype_named(dtype), count=num_elements, offset=offset)


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
