"""Seals: every byte of a wire that leaves the host is authenticated, before it counts.

A frame gets a seal behind its header and another one behind its body (HMAC-SHA256 cut to 16 bytes, RFC 2104). Both
sides derive two keys, one for each direction, from the secret of the offer and from what each of them drew by lot for
this connection. Frames are numbered: one that is changed, repeated, moved, left out or put in between breaks the seal.
The header has a seal of its own, so that no byte of a body is received into memory that somebody reads unless the other
side has announced it; a body that is changed on its way has the same effect as a connection that breaks.

It is a seal, not a veil: who can listen on the network reads what travels, as with torch.distributed.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

SEAL_BYTES = 16
_NUMBER = struct.Struct("<Q")
_TO_HUB, _TO_ENGINE = b"dnb to hub", b"dnb to engine"


class Seal:
    """One direction of a wire: seals its frames in order, or checks them.

    Args:
        key: of this direction.
    """

    def __init__(self, key: bytes) -> None:
        self._fresh = hmac.new(key, digestmod="sha256")
        self._number = 0
        self._open = self._fresh

    def begin(self, header: bytes | bytearray) -> bytes:
        """Return the seal of the next frame's header."""
        self._open = self._fresh.copy()
        self._open.update(_NUMBER.pack(self._number))
        self._number += 1
        self._open.update(header)
        return self._open.digest()[:SEAL_BYTES]

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        """Add a piece of the frame's body."""
        self._open.update(piece)

    def end(self) -> bytes:
        """Return the seal of header and body."""
        self._open.update(b"end")  # so that a body of no bytes has another seal than its header
        return self._open.digest()[:SEAL_BYTES]

    def seal(self, header: bytes, body: bytes | memoryview) -> memoryview:
        """Seal a whole frame; the body is copied once, and the copy is sealed."""
        frame = bytearray(len(header) + len(body) + 2 * SEAL_BYTES)
        first = len(header) + SEAL_BYTES
        frame[: len(header)] = header
        frame[len(header) : first] = self.begin(header)
        frame[first:-SEAL_BYTES] = body
        self.add(memoryview(frame)[first:-SEAL_BYTES])
        frame[-SEAL_BYTES:] = self.end()
        return memoryview(frame)


def is_seal(expected: bytes, found: bytes | bytearray | memoryview) -> bool:
    """Return whether a seal is the expected one; takes as long for any that is not."""
    return hmac.compare_digest(expected, bytes(found))


def derive_keys(token: str, *, hub_nonce: str, engine_nonce: str) -> tuple[bytes, bytes]:
    """Derive the keys of a connection: to the hub, and to the engine (keyed BLAKE2b, RFC 7693).

    Args:
        token: of the offer, which only these two know.
        hub_nonce: drawn by the hub for this connection.
        engine_nonce: drawn by the engine for this connection.
    """
    context = f"{hub_nonce}:{engine_nonce}".encode()
    secret = hashlib.sha512(token.encode()).digest()
    to_hub, to_engine = (
        hashlib.blake2b(context, key=secret, person=person, digest_size=32).digest() for person in (_TO_HUB, _TO_ENGINE)
    )
    return to_hub, to_engine
