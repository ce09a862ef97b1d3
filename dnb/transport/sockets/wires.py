"""Wires: one stream socket between hub and engine, for small records and raw pieces of flat buffers.

A frame is a header of 16 bytes and a body. The body of a record is msgpack, then raw bytes that belong to it; the
body of a piece is received straight into its landing, a buffer that was set out for its slot. On a wire that leaves the
host, header and body are sealed: see `dnb.transport.sockets.sealing`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from dnb.protocol.base import Message
from dnb.transport.encoding import encode_record
from dnb.transport.sockets.sealing import SEAL_BYTES, Seal, is_seal

PIECE_BYTES = 4 << 20
# Slots of a wire to an engine; a wire to the hub has one slot per slab.
PARAMETERS_SLOT, JOB_SLOT, DATA_SLOT = 0, 1, 2
# What the hub sends carries sample indices at most: 8 bytes each.
MAX_WORK_BYTES = 1 << 30
# What an engine reports: a few numbers per shard, metric and parameter, or the text of an error.
MAX_RECORD_BYTES = 32 << 20
# What a caller may send before it is known to be an engine: one short record.
MAX_GREETING_BYTES = 4096
# After so many bytes of one engine the others are looked at.
TURN_BYTES = 16 << 20

_HEADER = struct.Struct("<BxHIQ")  # kind, slot, bytes of the body, bytes of msgpack | offset in the landing
_RECORD, _PIECE = 1, 2
_BUFFER_BYTES = 1 << 16
_SOCKET_BUFFER_BYTES = 4 << 20


class WireError(Exception):
    """The other side broke the rules, or is gone."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A flat buffer that pieces are cut from.

    They are sent from where they lie: on one host `sendfile` was seen to take half as long again.
    """

    memory: memoryview


@dataclass(slots=True)
class _Outgoing:
    source: Flat
    offset: int
    left: int


@dataclass(frozen=True, slots=True)
class _Unsealed:
    """A frame that is sealed when its turn comes: frames are numbered in the order in which they are sent."""

    header: bytes
    body: bytes | memoryview


class Wire:
    """One end of a connection; never blocks but in `flush_all`.

    Args:
        sock: connected.
        is_trusted: whether the other side is known; until then little is read from it, and little memory is its own.
    """

    def __init__(self, sock: socket.socket, *, is_trusted: bool = True) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._queue: deque[memoryview | _Outgoing | _Unsealed] = deque()
        self._buffer = bytearray(_HEADER.size + MAX_GREETING_BYTES)
        self._start = self._end = 0
        self._landing = memoryview(b"")
        self.receive_buffers: dict[int, memoryview] = {}
        self.max_record_bytes = MAX_GREETING_BYTES
        self.is_greeting = False  # what follows the first record waits: it may be sealed
        self._sealing: Seal | None = None  # of what is sent
        self._checking: Seal | None = None  # of what is received
        self._is_header_checked = False
        self._owes_seal = False  # the piece that was received last
        self.is_closed = False
        self.num_records_out = 0
        if is_trusted:
            self.trust()

    def trust(self, *, max_record_bytes: int = MAX_WORK_BYTES) -> None:
        """Accept messages of a run, as fast as they come, from the other side, which is known now."""
        with contextlib.suppress(OSError):  # a Unix socket has no Nagle
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        self._buffer.extend(bytes(_BUFFER_BYTES - len(self._buffer)))
        self.max_record_bytes = max_record_bytes

    def fileno(self) -> int:
        """Return the socket's descriptor, for polling."""
        return self._sock.fileno()

    @property
    def wants_to_write(self) -> bool:
        """True while something waits for the other side to read."""
        return bool(self._queue) and not self.is_closed

    def seal(self, *, outgoing: bytes, incoming: bytes) -> None:
        """Seal every frame from now on, with one key for each direction."""
        self._sealing, self._checking = Seal(outgoing), Seal(incoming)

    @property
    def is_sealed(self) -> bool:
        """True if every byte is authenticated."""
        return self._sealing is not None

    def send(self, record: Message, raw: bytes | memoryview = b"") -> None:
        """Send a record, with raw bytes behind it; what the socket does not take at once waits for `flush`."""
        self.queue(record, raw)
        self.flush()

    def queue(self, record: Message, raw: bytes | memoryview = b"") -> None:
        """Set a record in line."""
        self.queue_frame(frame_of(record, raw))

    def queue_frame(self, frame: bytes) -> None:
        """Set what `frame_of` made in line."""
        self.num_records_out += 1
        if self._sealing is not None:
            self._queue.append(_Unsealed(frame[: _HEADER.size], memoryview(frame)[_HEADER.size :]))
            return
        self._queue.append(memoryview(frame))

    def queue_pieces(self, slot: int, source: Flat, ranges: Iterable[tuple[int, int]]) -> None:
        """Set pieces of a flat buffer in line; it must not change until they are out.

        Args:
            slot: which landing of the other side they are for.
            source: cut at the ranges.
            ranges: (first byte, past the last byte).
        """
        for first, last in ranges:
            for offset in range(first, last, PIECE_BYTES):
                size = min(PIECE_BYTES, last - offset)
                header = _HEADER.pack(_PIECE, slot, size, offset)
                if self._sealing is not None:
                    self._queue.append(_Unsealed(header, source.memory[offset : offset + size]))
                    continue
                self._queue.append(memoryview(header))
                self._queue.append(_Outgoing(source, offset, size))

    def flush(self) -> None:
        """Send what the socket takes now."""
        queue = self._queue
        try:
            while queue and not self.is_closed:
                item = queue[0]
                if isinstance(item, _Unsealed):
                    assert self._sealing is not None
                    item = queue[0] = self._sealing.seal(item.header, item.body)
                if isinstance(item, _Outgoing):
                    sent = self._send_part(item)
                    item.offset += sent
                    item.left -= sent
                    done = item.left == 0
                else:
                    more = socket.MSG_MORE if len(queue) > 1 and sys.platform == "linux" else 0
                    sent = self._sock.send(item, more)
                    done = sent == len(item)
                    if not done:
                        queue[0] = item[sent:]
                if done and queue:  # another thread may have closed the wire meanwhile
                    queue.popleft()
        except (BlockingIOError, IndexError):  # another thread has closed the wire meanwhile, and so emptied the queue
            return
        except OSError:
            self.close()

    def _send_part(self, part: _Outgoing) -> int:
        return self._sock.send(part.source.memory[part.offset : part.offset + part.left])

    def flush_all(self, *, timeout_seconds: float) -> None:
        """Wait until everything is out.

        Raises:
            WireError: the other side takes nothing for so long, or is gone.
        """
        self.flush()
        while self.wants_to_write:
            if not _poll(self._sock, select.POLLOUT, timeout_seconds):
                raise WireError(f"the other side took nothing for {timeout_seconds:g} s")
            self.flush()
        if self.is_closed:
            raise WireError("the other side is gone")

    def receive(self) -> list[tuple[memoryview, memoryview]]:
        """Return the messages that have come, as (msgpack, raw bytes); pieces are in their buffers already.

        Raises:
            WireError: a frame breaks the rules.
        """
        messages: list[tuple[memoryview, memoryview]] = []
        taken = 0
        most = TURN_BYTES if self.max_record_bytes > MAX_GREETING_BYTES else MAX_GREETING_BYTES
        try:
            if self._end - self._start >= _HEADER.size and not len(self._landing):
                self._parse(messages)  # what came with the greeting
            while taken < most:
                if len(self._landing):
                    got = self._sock.recv_into(self._landing)
                    if self._checking is not None:
                        self._checking.add(self._landing[:got])
                    self._landing = self._landing[got:]
                    is_all = False
                else:
                    space = len(self._buffer) - self._end
                    got = self._sock.recv_into(memoryview(self._buffer)[self._end :])
                    self._end += got
                    is_all = got < space
                if got == 0:
                    self.close()
                    break
                taken += got
                if not len(self._landing):
                    self._parse(messages)
                if (is_all and not len(self._landing)) or (self.is_greeting and messages):
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        return messages

    def wait_for_messages(self, *, timeout_seconds: float) -> list[tuple[memoryview, memoryview]]:
        """Block until there are some.

        Raises:
            WireError: none in time, or the other side is gone.
        """
        deadline = time.monotonic() + timeout_seconds
        while not (messages := self.receive()):
            left = deadline - time.monotonic()
            if self.is_closed:
                raise WireError("the other side is gone")
            if left <= 0 or not _poll(self._sock, select.POLLIN, left):
                raise WireError(f"the other side said nothing for {timeout_seconds:g} s")
        return messages

    def _parse(self, messages: list[tuple[memoryview, memoryview]]) -> None:
        seal = 0 if self._checking is None else SEAL_BYTES
        while self._take_owed_seal() and self._end - self._start >= _HEADER.size + seal:
            kind, slot, size, extra = _HEADER.unpack_from(self._buffer, self._start)
            body = self._start + _HEADER.size + seal
            self._check_header()
            if kind == _PIECE:
                self._land(slot, size, extra, body)
                continue
            if kind != _RECORD or size > self.max_record_bytes or extra > size:
                raise WireError(f"a frame of kind {kind} with {size} bytes is against the rules")
            if self._end - body < size + seal:
                self._make_room(_HEADER.size + size + 2 * seal)
                return
            whole = memoryview(bytes(self._buffer[body : body + size]))
            self._start = body + size
            if self._checking is not None:
                self._checking.add(whole)
                self._owes_seal = True
                self._take_owed_seal()
            messages.append((whole[:extra], whole[extra:]))
            if self.is_greeting:
                return
        self._make_room(_HEADER.size + 2 * seal)

    def _check_header(self) -> None:
        """Check a header before anything that it announces is received."""
        if self._checking is None or self._is_header_checked:
            return
        end = self._start + _HEADER.size
        self._check(self._checking.begin(self._buffer[self._start : end]), self._buffer[end : end + SEAL_BYTES])
        self._is_header_checked = True

    def _take_owed_seal(self) -> bool:
        """Check a body that has come; whether what follows may be looked at."""
        if not self._owes_seal:
            return True
        if self._checking is None or self._end - self._start < SEAL_BYTES:
            return False
        self._check(self._checking.end(), self._buffer[self._start : self._start + SEAL_BYTES])
        self._start += SEAL_BYTES
        self._owes_seal = self._is_header_checked = False
        return True

    def _check(self, expected: bytes, found: bytearray) -> None:
        if not is_seal(expected, found):
            raise WireError("a seal is broken: something between hub and engine has changed, added or left out bytes")

    def _land(self, slot: int, size: int, offset: int, body: int) -> None:
        landing = self.receive_buffers.get(slot)
        if landing is None or size > PIECE_BYTES or offset + size > len(landing):
            raise WireError(f"a piece of {size} bytes at {offset} has no place in slot {slot}")
        here = min(size, self._end - body)
        landing[offset : offset + here] = self._buffer[body : body + here]
        if self._checking is not None:
            self._checking.add(landing[offset : offset + here])
            self._owes_seal = True
        self._landing = landing[offset + here : offset + size]
        self._start = body + here

    def _make_room(self, needed: int) -> None:
        """Move what is left to the front; grow for a record that does not fit."""
        left = self._end - self._start
        if self._start and (not left or needed > len(self._buffer) - self._start):
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        size = len(self._buffer)
        if needed > size and self._end == size:  # as it comes: a header that announces much costs nothing by itself
            self._buffer.extend(bytes(min(needed, 2 * size) - size))

    def close(self) -> None:
        """Close the socket; safe to call twice."""
        self.is_closed = True
        self._queue.clear()
        self._sock.close()


def frame_of(record: Message, raw: bytes | memoryview = b"") -> bytes:
    """Encode a record with raw bytes behind it as one frame."""
    packed = encode_record(record)
    return b"".join((_HEADER.pack(_RECORD, 0, len(packed) + len(raw), len(packed)), packed, raw))


class Outbox(threading.Thread):
    """Sends on a wire from a thread of its own, so that pieces travel while backward goes on."""

    def __init__(self, wire: Wire, *, timeout_seconds: float) -> None:
        super().__init__(name="dnb-outbox", daemon=True)
        self._wire = wire
        self._timeout_seconds = timeout_seconds
        self._jobs: SimpleQueue[bytes | tuple[int, Flat, Sequence[tuple[int, int]]] | None]
        self._jobs = SimpleQueue()

    def send(self, record: Message, raw: bytes = b"") -> None:
        """Send a record after all that was given before; one that cannot be encoded raises here."""
        self._jobs.put(frame_of(record, raw))

    def send_pieces(self, slot: int, source: Flat, ranges: Sequence[tuple[int, int]]) -> None:
        """Send pieces after all that was given before."""
        self._jobs.put((slot, source, ranges))

    def run(self) -> None:
        """Send until stopped; a wire that fails is closed, which its reader sees."""
        while (job := self._jobs.get()) is not None:
            if isinstance(job, bytes):
                self._wire.queue_frame(job)
            else:
                self._wire.queue_pieces(*job)
            try:
                self._wire.flush_all(timeout_seconds=self._timeout_seconds)
            except WireError:
                self._wire.close()

    def stop(self) -> None:
        """End the thread once all is sent."""
        self._jobs.put(None)


def _poll(sock: socket.socket, mask: int, seconds: float) -> bool:
    poll = select.poll()
    try:
        poll.register(sock, mask)
    except ValueError:  # another thread has closed it: that is news too
        return True
    return bool(poll.poll(seconds * 1000))
