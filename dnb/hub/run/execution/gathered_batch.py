"""Outputs and targets of a whole batch, put together from what engines have computed of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod

import torch

from dnb.hub.message_checks import PeerError
from dnb.protocol.engine_messages import Gathered, OutputLeaf, WorkReport
from dnb.protocol.memory import LEAF_ALIGNMENT
from dnb.protocol.run import RunSpec

# What is gathered goes back behind a record, see `dnb.transport.sockets.wires.MAX_WORK_BYTES`, with the samples'
# indices.
MOST_BYTES = (1 << 30) - (64 << 20)

ITEM_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}


class CannotGather(Exception):  # noqa: N818 - a verdict, not a fault
    """The parts of a batch do not fit together; says why."""


def gathers_outputs(spec: RunSpec) -> bool:
    """Return whether a run's loss looks at outputs that several engines compute; a team has the whole batch at hand."""
    return spec.loss_over == "batch" and not spec.partitions


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one report."""

    leaves: tuple[OutputLeaf, ...]
    tensors: tuple[memoryview, ...]


@dataclass(slots=True)
class Gatherer:
    """Takes reports of outputs, and holds what they come to until the step is over."""

    _pieces: dict[int, tuple[int, list[memoryview]]] = field(default_factory=dict)  # by engine: lease, and what came
    _rows: dict[tuple[int, tuple[int, ...]], _Rows] = field(default_factory=dict)
    _leaves: tuple[OutputLeaf, ...] = ()
    _groups: tuple[tuple[int, ...], ...] = ()
    _sizes: tuple[int, ...] = ()
    _memory: bytes = b""

    def add_piece(self, engine: int, lease: int, raw: memoryview) -> None:
        """Keep a part of what stands behind a report that is to come.

        Raises:
            PeerError: it is more than can be gathered.
        """
        if engine not in self._pieces or self._pieces[engine][0] != lease:
            self._pieces[engine] = lease, []
        pieces = self._pieces[engine][1]
        pieces.append(raw)
        if sum(map(len, pieces)) > MOST_BYTES:
            del self._pieces[engine]
            raise PeerError(f"more than {MOST_BYTES} bytes of outputs")

    def take(self, engine: int, report: WorkReport, raw: memoryview, *, num_samples: int) -> None:
        """Keep the outputs of some shards.

        Raises:
            PeerError: they are not as long as they should be.
        """
        lease, pieces = self._pieces.pop(engine, (0, []))
        whole = memoryview(b"".join([*pieces, raw])) if pieces and lease == report.lease else raw
        tensors: list[memoryview] = []
        end = 0
        for leaf in report.outputs:
            if leaf.dtype not in ITEM_BYTES or min(leaf.shape, default=0) < 0:
                raise PeerError(f"no output has the dtype {leaf.dtype[:20]!r} and the shape {leaf.shape[:8]}")
            if leaf.has_rows and leaf.shape[:1] != (num_samples,):
                raise PeerError(f"an output of {num_samples} samples has the shape {leaf.shape[:8]}")
            begin, end = end, end + prod(leaf.shape) * ITEM_BYTES[leaf.dtype]
            tensors.append(whole[begin:end])
        if end != len(whole):
            raise PeerError(f"outputs of {end} bytes have {len(whole)}")
        self._rows[engine, report.shards] = _Rows(report.outputs, tuple(tensors))

    def gather(
        self, reports: Sequence[tuple[int, tuple[int, ...]]], *, sizes: tuple[int, ...], indices: bytes, exact: bool
    ) -> None:
        """Put the outputs of a batch together, in the order of its shards.

        Args:
            reports: engines and shards, of those that count.
            sizes: samples of every shard.
            indices: of the samples of the whole batch.
            exact: whether each shard went through a forward of its own.

        Raises:
            CannotGather: they differ in more than their samples, or are too large.
        """
        found = [(shards, self._rows[engine, shards]) for engine, shards in reports]
        self.clear()
        found = [(shards, rows) for shards, rows in found if rows.leaves]
        if not found:
            raise CannotGather("no engine has given outputs")
        for _, rows in found[1:]:
            _check_alike(found[0][1].leaves, rows.leaves)
        num_samples = sum(sizes)
        edges = [*pairwise(accumulate(sizes, initial=0))]
        memory: list[bytes | bytearray] = [indices]
        size = len(indices)
        for number, leaf in enumerate(found[0][1].leaves):
            padding = -size % LEAF_ALIGNMENT
            parts = [(shards, rows.tensors[number]) for shards, rows in found]
            memory += [bytes(padding), _joined(leaf, parts, edges, num_samples=num_samples)]
            size += padding + len(memory[-1])
        if size > MOST_BYTES:
            raise CannotGather(
                f"outputs and targets of {num_samples} samples are {size / 1e9:.2f} GB, and a loss over the whole "
                f"batch can be computed on at most {MOST_BYTES / 1e9:.2f} GB: a smaller batch_size, or fewer outputs"
            )
        memory.append(bytes(-size % LEAF_ALIGNMENT))
        self._memory = b"".join(memory)
        self._sizes = sizes
        self._leaves = tuple(
            OutputLeaf(dtype=leaf.dtype, shape=(num_samples, *leaf.shape[1:]) if leaf.has_rows else leaf.shape,
                       has_rows=leaf.has_rows)
            for leaf in found[0][1].leaves
        )  # fmt: skip
        groups = [shards for shards, _ in found]
        self._groups = tuple((shard,) for shards in groups for shard in shards) if exact else tuple(groups)

    def of(self, shards: Sequence[int]) -> Gathered:
        """Return the record for an engine that computes these shards of the step."""
        wanted = set(shards)
        groups = tuple(group for group in self._groups if not wanted.isdisjoint(group))
        return Gathered(leaves=self._leaves, shard_sizes=self._sizes, groups=groups)

    @property
    def memory(self) -> bytes:
        """Indices of the whole batch, and the leaves behind them."""
        return self._memory

    def describe_fault(self) -> str:
        """Return which sample's outputs or targets are not finite, for people; they are gathered."""
        num_samples = sum(self._sizes)
        offset = 8 * num_samples
        for leaf in self._leaves:
            offset += -offset % LEAF_ALIGNMENT
            dtype, count = getattr(torch, leaf.dtype), prod(leaf.shape)
            if leaf.has_rows and count and (dtype.is_floating_point or dtype.is_complex):
                rows = torch.frombuffer(bytearray(self._memory), dtype=dtype, count=count, offset=offset)
                faulty = ~torch.isfinite(rows.view(num_samples, -1)).all(1)
                if faulty.any():
                    place = int(faulty.int().argmax())
                    sample = int.from_bytes(self._memory[8 * place : 8 * place + 8], "little")
                    return f"outputs or targets of sample {sample} are not finite"
            offset += count * ITEM_BYTES[leaf.dtype]
        return "all outputs and targets are finite"

    def clear(self) -> None:
        """Forget everything: the step is over, or begins anew."""
        self._rows.clear()
        self._pieces.clear()
        self._memory = b""
        self._leaves = self._groups = ()


def _joined(
    leaf: OutputLeaf,
    parts: Sequence[tuple[tuple[int, ...], memoryview]],
    edges: Sequence[tuple[int, int]],
    *,
    num_samples: int,
) -> bytes | bytearray:
    """The rows of all parts of one tensor, each in its place."""
    if not leaf.has_rows:
        return bytes(parts[0][1])
    row = prod(leaf.shape[1:]) * ITEM_BYTES[leaf.dtype]
    joined = bytearray(row * num_samples)
    for shards, rows in parts:
        taken = 0
        for shard in shards:
            first, last = edges[shard]
            joined[first * row : last * row] = rows[taken : taken + (last - first) * row]
            taken += (last - first) * row
    return joined


def _check_alike(left: Sequence[OutputLeaf], right: Sequence[OutputLeaf]) -> None:
    if len(left) != len(right):
        raise CannotGather(f"the model gave {len(left)} tensors for some samples, and {len(right)} for others")
    for a, b in zip(left, right, strict=True):
        is_same = a.shape[1:] == b.shape[1:] if a.has_rows else a.shape == b.shape
        if not is_same or a.dtype != b.dtype or a.has_rows != b.has_rows:
            raise CannotGather(
                f"this loss looks at the whole batch, and its parts do not fit together: {a.dtype} of shape {a.shape} "
                f"on one engine, {b.dtype} of shape {b.shape} on another. Pad all samples to one length, or return "
                "dnb.Sum(total, weight) and give loss_over='samples'"
            )
