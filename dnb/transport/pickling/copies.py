"""Copies of the user's objects as an engine gets them: made in this process, through the pickle that would be sent."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnb.errors import DnbError
from dnb.transport.pickling.generators import OwnGenerators, is_generator
from dnb.transport.pickling.payloads import _packed, _Packer, _Unpacker
from dnb.transport.pickling.user_modules import read_whole

# Of tensors and arrays in a copy: the first ones are copied, the others are the user's own memory, only to be read.
MOST_COPIED_BYTES = 256 << 20
# Of a data set without its tensors and arrays, and of those: thousands of samples that are objects of their own are not
# copied to look at eight.
MOST_PICKLED_BYTES = 4 << 20
MOST_BUFFERS = 5_000
# Of tensors and arrays whose values count in a fingerprint: ten milliseconds' worth.
MOST_HASHED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Two objects that may share parts, copied.

    Args:
        small: the first one.
        large: the second one.
        generators: of random numbers, in both.
        is_whole: whether all of the second one was copied.
        shared: bytes of tensors and arrays that were not copied.
        fingerprint: the same for the same objects in the same state, their code included; None: it would take long.
    """

    small: Any
    large: Any
    generators: OwnGenerators
    is_whole: bool
    shared: int
    fingerprint: bytes | None = None


def copy_together(small: Any, large: Any, *, free: Iterable[torch.Tensor] = ()) -> Copies:
    """Copy two objects that may share parts, as one payload would bring them to an engine.

    Args:
        small: copied whole, except for tensors beyond the first 256 MB, which are shared and only to be read.
        large: likewise, unless it has so many parts that this takes long: then it is a shallow copy, so that an
            attribute that is set anew is set on the copy.
        free: tensors whose values do not count in the fingerprint.

    Raises:
        Exception: whatever pickling or unpickling raises.
    """
    try:
        packer = _packed((small, large), begin=_BoundedPacker)
        (first, second), generators, shared = _unpacked(packer)
        return Copies(
            small=first,
            large=second,
            generators=generators,
            is_whole=True,
            shared=shared,
            fingerprint=_fingerprint(packer, {each.untyped_storage().data_ptr() for each in free}),
        )
    except _TooLargeError:
        first, generators, shared = _unpacked(_packed(small, begin=_CopyPacker))
        return Copies(small=first, large=large, generators=generators, is_whole=False, shared=shared)


def shallow_copy(obj: Any) -> Any:
    """Copy an object's own attributes, and its generators of random numbers; what cannot be copied is given back."""
    try:
        copied = copy.copy(obj)
        for name, value in getattr(copied, "__dict__", {}).items():
            if is_generator(value) or isinstance(value, np.random.Generator):
                copied.__dict__[name] = copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - a user's __copy__ may raise anything
        return obj
    return copied


def close_files(copied: Any, original: Any) -> None:
    """Close the files that a copy has opened, and the original has not."""
    own = getattr(original, "__dict__", {})
    for name, value in list(getattr(copied, "__dict__", {}).items()):
        if isinstance(value, io.IOBase) and value is not own.get(name):
            value.close()


class _TooLargeError(DnbError):
    """There is more to be copied than is worth it."""


class _CopyPacker(_Packer):
    """A packer of objects that stay in this process."""

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            # Under its id cloudpickle would find the class of the notebook itself, and set its methods anew.
            function, (*arguments, _tracker_id, extra), *rest = reduced
            return (function, (*arguments, None, extra), *rest)
        return reduced


class _BoundedPacker(_CopyPacker):
    """A packer that gives up where a copy takes long."""

    def reducer_override(self, obj: Any) -> Any:
        if len(self.buffers) > MOST_BUFFERS or self.file.tell() > MOST_PICKLED_BYTES:
            raise _TooLargeError
        return super().reducer_override(obj)


def _fingerprint(packer: _Packer, free: Collection[int]) -> bytes | None:
    """Digest a pickle, and the tensors and arrays beside it, except for those at some addresses."""
    digest = hashlib.blake2b(packer.file.getvalue(), digest_size=16)
    left = MOST_HASHED_BYTES
    for buffer in packer.buffers:
        digest.update(buffer.nbytes.to_bytes(8, "little"))
        octets = np.frombuffer(buffer.cast("B"), dtype=np.uint8) if buffer.nbytes else None
        if octets is None or octets.ctypes.data in free:
            continue
        left -= buffer.nbytes
        if left < 0:
            return None
        digest.update(octets.data)
    return digest.digest()


def _unpacked(packer: _Packer) -> tuple[Any, OwnGenerators, int]:
    buffers, shared = _own(packer.buffers)
    file = io.BytesIO(packer.file.getvalue())
    copied, generators = read_whole(_Unpacker(file, buffers=buffers, arrays=packer.arrays), adopt=False)
    return copied, generators, shared


def _own(buffers: Sequence[memoryview]) -> tuple[list[memoryview], int]:
    found: list[memoryview] = []
    copied, shared = 0, 0
    for buffer in buffers:
        if copied + buffer.nbytes <= MOST_COPIED_BYTES:
            copied += buffer.nbytes
            found.append(memoryview(bytearray(buffer.cast("B"))))
        else:
            shared += buffer.nbytes
            found.append(buffer)
    return found, shared
