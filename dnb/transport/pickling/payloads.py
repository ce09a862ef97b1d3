"""Payloads: user objects pickled once, their tensors and arrays beside the pickle in shared memory.

Only a payload signed with the cluster's key is ever opened: see `sign` and `verify`.
"""

from __future__ import annotations

import hmac
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jupyter_client.session import Session

from dnb.errors import USER_ERRORS, HubError, ShippingError, summary_of
from dnb.progress import Report, long_work
from dnb.protocol.memory import BufferRef, PayloadRef
from dnb.transport.pickling.generators import OwnGenerators
from dnb.transport.pickling.hooks import gradient_hooks, has_gradient_hooks, reduce_optimizer, set_gradient_hooks
from dnb.transport.pickling.user_modules import CodePickler, read_whole, unpicklable_globals
from dnb.transport.segments import Segment, create_segment, open_segment

ALIGNMENT_BYTES = 64
PROTOCOL = 5
# Copied between two looks at how far it is: a tenth of a second at worst.
PIECE_BYTES = 64 << 20


class _StorageRef:
    """Stands in the pickle for a tensor's memory."""

    def __init__(self, index: int) -> None:
        self.index = index


def _rebuild_tensor(
    storage: torch.Tensor,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> torch.Tensor:
    flat = storage.view(dtype) if storage.numel() else torch.empty(0, dtype=dtype)
    return flat.as_strided(shape, stride, offset).requires_grad_(requires_grad)


class _Packer(CodePickler):
    """A pickler that leaves CPU tensors and contiguous arrays out of the pickle."""

    def __init__(self, file: io.BytesIO, *, referenced: Mapping[tuple[str, str], Any] | None = None) -> None:
        self.file = file
        self.buffers: list[memoryview] = []
        self.arrays: list[int] = []  # those of `buffers` that pickle itself put out of band
        self._storages: dict[int, _StorageRef] = {}
        self._alive: list[Any] = []  # owners of the memory that `buffers` shows
        super().__init__(file, referenced=referenced, protocol=PROTOCOL, buffer_callback=self._keep_array)

    def _keep_array(self, buffer: pickle.PickleBuffer) -> None:
        self._alive.append(buffer)
        self.buffers.append(buffer.raw())
        self.arrays.append(len(self.buffers) - 1)

    def persistent_id(self, obj: Any) -> int | None:
        return obj.index if isinstance(obj, _StorageRef) else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            if not obj.is_leaf or not has_gradient_hooks(obj):
                return self._reduce_plain(obj)
            reduced = self._reduce_plain(obj)
            reduced = obj.__reduce_ex__(PROTOCOL) if reduced is NotImplemented else reduced
            if len(reduced) == 2:
                return (*reduced, gradient_hooks(obj), None, None, set_gradient_hooks)
            return reduced
        if isinstance(obj, torch.optim.Optimizer):
            usual = obj.__reduce_ex__(PROTOCOL)
            return reduce_optimizer(obj, usual) if isinstance(usual, tuple) else usual
        return super().reducer_override(obj)

    def _reduce_plain(self, obj: torch.Tensor) -> Any:
        if type(obj) is torch.Tensor and obj.layout is torch.strided and obj.device.type == "cpu" and obj.is_leaf:
            return self._reduce_tensor(obj)
        return super().reducer_override(obj)

    def _reduce_tensor(self, tensor: torch.Tensor) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        if tensor.is_conj() or tensor.is_neg():  # lazily so: the storage does not show it
            tensor = tensor.detach().resolve_conj().resolve_neg().requires_grad_(tensor.requires_grad)
            self._alive.append(tensor)
        whole = tensor.untyped_storage()
        needed = tensor.numel() * tensor.element_size()
        if whole.nbytes() > 2 * needed:  # a small view of something large: send only what it shows
            tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            self._alive.append(tensor)
            whole = tensor.untyped_storage()
        ref = self._storages.get(whole._cdata)
        if ref is None:
            flat = torch.empty(0, dtype=torch.uint8).set_(whole)
            self._alive.append(flat)
            self.buffers.append(flat.numpy().data)
            ref = self._storages[whole._cdata] = _StorageRef(len(self.buffers) - 1)
        place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return _rebuild_tensor, (ref, tensor.dtype, *place, tensor.requires_grad)


# Modules of dnb 0.1.0, named by pickles in checkpoints, and where what they held lives now.
MOVED_MODULES = {
    "dnb.inputs": "dnb.user_code.accuracy",
    "dnb.planning.calling": "dnb.user_code.model_call",
    "dnb.rehearsal.fitting": "dnb.api.rehearsal.fitting",
    "dnb.transport.hooks": "dnb.transport.pickling.hooks",
    "dnb.transport.job": "dnb.job",
    "dnb.transport.module_reducers": "dnb.transport.pickling.module_reducers",
    "dnb.transport.own_code": "dnb.transport.pickling.user_modules",
    "dnb.transport.own_generators": "dnb.transport.pickling.generators",
    "dnb.transport.parcels": "dnb.transport.pickling.payloads",
    "dnb.transport.returned": "dnb.user_code.return_values",
    "dnb.transport.stateful_metrics": "dnb.user_code.stateful_metrics",
}


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, *, buffers: Sequence[memoryview], arrays: Sequence[int]) -> None:
        self._buffers = buffers
        self._storages: dict[int, torch.Tensor] = {}
        super().__init__(file, buffers=[buffers[index] for index in arrays])

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        return super().find_class(MOVED_MODULES.get(module_name, module_name), global_name)

    def persistent_load(self, pid: Any) -> torch.Tensor:
        if pid not in self._storages:
            view = self._buffers[pid]
            self._storages[pid] = (
                torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)
            )
        return self._storages[pid]


def pickle_payload(obj: Any, *, name: str, folders: Sequence[Path]) -> tuple[bytes, PayloadRef, Segment | None]:
    """Pickle `obj`, its tensors and arrays into one new segment.

    Args:
        obj: anything cloudpickle takes.
        name: of the segment's file.
        folders: where the segment may lie.

    Raises:
        ShippingError: something in it cannot be pickled.
        SpaceError: no room for the tensors.
    """
    with long_work(f"shipping {name}") as report:
        report("pickling")
        return _pack(obj, name=name, folders=folders, report=report)


def _pack(obj: Any, *, name: str, folders: Sequence[Path], report: Report) -> tuple[bytes, PayloadRef, Segment | None]:
    packer = _packed(obj)
    refs: list[BufferRef] = []
    offset = 0
    for buffer in packer.buffers:
        refs.append(BufferRef(offset_bytes=offset, num_bytes=buffer.nbytes))
        offset += -(-buffer.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    segment = create_segment(name, offset, folders=folders) if refs else None
    if segment is not None:
        target = np.frombuffer(segment.memory, dtype=np.uint8)
        for ref, buffer in zip(refs, packer.buffers, strict=True):
            source = np.frombuffer(buffer, dtype=np.uint8)
            for begin in range(0, ref.num_bytes, PIECE_BYTES):
                first = ref.offset_bytes + begin
                report(f"{first / 1e6:,.0f} of {offset / 1e6:,.0f} MB")
                piece = source[begin : begin + PIECE_BYTES]
                target[first : first + len(piece)] = piece
    payload = PayloadRef(
        buffers=tuple(refs),
        arrays=tuple(packer.arrays),
        segment=segment.ref if segment is not None else None,
    )
    return packer.file.getvalue(), payload, segment


def _packed(obj: Any, *, begin: Callable[..., _Packer] | None = None) -> _Packer:
    """Return a pickler that has taken an object; it holds the globals of user's modules that pickle refuses."""
    referenced: dict[tuple[str, str], Any] = {}
    while True:
        packer = (begin or _Packer)(io.BytesIO(), referenced=referenced)
        try:
            packer.dump_whole(obj)
            return packer
        except KeyboardInterrupt:
            raise
        except USER_ERRORS:  # a user's __reduce__ may raise anything
            new = unpicklable_globals(packer)
            if not new.keys() - referenced.keys():
                raise
            referenced.update(new)


def copy_of(obj: Any) -> Any:
    """Copy an object as an engine would get it, but that its tensors and arrays show the same memory.

    Raises:
        ShippingError: something in it cannot be pickled.
    """
    packer = _packed(obj)
    unpacker = _Unpacker(io.BytesIO(packer.file.getvalue()), buffers=packer.buffers, arrays=packer.arrays)
    return read_whole(unpacker, adopt=False)[0]


def unpack(data: bytes, payload: PayloadRef, *, memory: memoryview | None = None) -> Any:
    """Rebuild what `pickle_payload` took; tensors are views of the segment, copied only where written.

    The caller has verified the signature.

    Args:
        data: the pickle.
        payload: where its tensors lie.
        memory: what the segment holds, where it cannot be mapped.
    """
    return _unpack(data, payload, memory=memory, adopt=False)[0]


def adopt(data: bytes, payload: PayloadRef, *, memory: memoryview | None = None) -> tuple[Any, OwnGenerators]:
    """Rebuild a payload in a process that computes for the notebook: its modules become those of the notebook.

    Args:
        data: as for `unpack`; likewise the others.
        payload: see data.
        memory: see data.

    Returns:
        The object, and the generators of random numbers in it.
    """
    return _unpack(data, payload, memory=memory, adopt=True)


def _unpack(data: bytes, payload: PayloadRef, *, memory: memoryview | None, adopt: bool) -> tuple[Any, OwnGenerators]:
    if payload.segment is None:
        buffers: list[memoryview] = []
    else:
        whole = memoryview(open_segment(payload.segment, private=True).memory) if memory is None else memory
        buffers = [whole[ref.offset_bytes : ref.offset_bytes + ref.num_bytes] for ref in payload.buffers]
    return read_whole(_Unpacker(io.BytesIO(data), buffers=buffers, arrays=payload.arrays), adopt=adopt)


def sign(key: bytes, frames: Sequence[bytes]) -> bytes:
    """Return the HMAC-SHA256 of the frames with the cluster's key, as ipyparallel signs its own messages."""
    signature: bytes = Session(key=key, signature_scheme="hmac-sha256").sign(list(frames))
    return signature


def verify(key: bytes, frames: Sequence[bytes], signature: bytes) -> None:
    """Refuse frames that the holder of the cluster's key did not sign.

    Raises:
        HubError: the signature does not fit.
    """
    if not key or not hmac.compare_digest(sign(key, frames), signature):
        raise HubError("a payload without this cluster's signature was refused")


def explain_unpicklable(obj: Any, *, name: str) -> ShippingError | None:
    """Find the innermost attribute of `obj` that cannot be pickled; None if all can."""
    fault = _fault(obj)
    if fault is None:
        return None
    try:
        path, kind, reason = _innermost(obj, name=name, reason=fault, depth=0)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS:  # such as a key whose __repr__ raises
        path, kind, reason = name, type(obj).__name__, fault
    return ShippingError(
        f"{path} (a {kind}) cannot be sent to the engines: {reason}. "
        f"Remove it from {name}, or create it inside the method that uses it"
    )


def _innermost(obj: Any, *, name: str, reason: str, depth: int) -> tuple[str, str, str]:
    if depth < 6:
        for part, child in _parts(obj):
            fault = _fault(child)
            if fault is not None:
                return _innermost(child, name=f"{name}{part}", reason=fault, depth=depth + 1)
    return name, type(obj).__name__, reason


def _parts(obj: Any) -> list[tuple[str, Any]]:
    if isinstance(obj, dict):
        return [(f"[{key!r}]", value) for key, value in obj.items()]
    if isinstance(obj, list | tuple):
        return [(f"[{index}]", value) for index, value in enumerate(obj)]
    if isinstance(obj, torch.nn.Module):
        modules = list(obj.named_children())
        internal = vars(torch.nn.Module())
        own = {key: value for key, value in vars(obj).items() if key not in internal}
        hooked = [
            (f".{name}'s hook", hook)
            for name, parameter in obj.named_parameters(recurse=False)
            for hooks in gradient_hooks(parameter)
            for hook in hooks
        ]
        return [(f".{key}", value) for key, value in [*own.items(), *modules]] + hooked
    return [(f".{key}", value) for key, value in getattr(obj, "__dict__", {}).items()]


def _fault(obj: Any) -> str | None:
    try:
        _packed(obj)
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:  # a user's __reduce__ may raise anything; it is the answer
        return summary_of(error)
    return None
