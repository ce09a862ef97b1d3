"""What strangers do to a pool's sockets; needs the standard library only, as processes of another user run it.

usage: wire|zmq|silent PLACE NUMBER SEED; a place is "@name" of a local socket, or a port of this host.
"""

import contextlib
import random
import select
import socket
import struct
import sys

HEADER = struct.Struct("<BxHIQ")  # of a wire: kind, slot, bytes of the body, bytes of msgpack or offset
ATTACH = b"\x83\xa4type\xa6Attach\xa6engine%s\xa5proof%s"
ENGINES = (b"\x00", b"\xff", b"\xcf" + b"\xff" * 8, b"\xa1x")
PROOFS = (b"\xa0", b"\xd9\x40" + b"0" * 64, b"\xc0", b"\xa3\xff\xfe\xfd", b"\xdb\x7f\xff\xff\xff")
GREETING = b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03\x00%s" + b"\0" * 32


def wire_frame(chance):
    """Bytes that no engine would send before it is known."""
    noise = chance.randbytes(chance.randrange(300))
    body = chance.choice(
        (
            noise,
            b"",
            b"\x91" * chance.randrange(1, 4000),
            ATTACH % (chance.choice(ENGINES), chance.choice(PROOFS)),
            b"\x82\xa4type\xa4Beat\xa6engine\x00",
            b"\xdd\x7f\xff\xff\xff" + noise,
            b"\x81\xa4type\xa2\xff\xfe",
        )
    )
    return chance.choice(
        (
            noise,
            HEADER.pack(1, 0, len(body), len(body)) + body,
            HEADER.pack(1, 0, len(body), len(body)) + body,
            HEADER.pack(1, 0, chance.choice((0xFFFFFFFF, 1 << 30, 4097)), chance.choice((0, 5, 1 << 63))) + noise,
            HEADER.pack(1, 0, 4096, 4096) + bytes(chance.randrange(4096)),
            HEADER.pack(2, chance.randrange(5), chance.choice((0, 10, 4 << 20)), chance.choice((0, (1 << 64) - 1)))
            + noise,
            HEADER.pack(chance.randrange(3, 256), chance.randrange(65536), len(noise), 0) + noise,
            HEADER.pack(1, 0, 0, 0) * 40,
        )
    )


def zmq_frame(chance):
    """Bytes that are no CurveZMQ, or not of a peer that has a key."""
    curve, plain, null = (GREETING % name.ljust(20, b"\0") for name in (b"CURVE", b"PLAIN", b"NULL"))
    return chance.choice(
        (
            chance.randbytes(200),
            null + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER",
            plain + chance.randbytes(100),
            curve + b"\x06" + struct.pack(">Q", chance.choice((1 << 62, 1 << 33, 1 << 20))) + chance.randbytes(300),
            curve + b"\x04\xc8\x05HELLO\x01\0" + chance.randbytes(192),
            b"GET / HTTP/1.1\r\n\r\n" * 20,
        )
    )


def connect(place, seconds):
    """A connection; raises OSError if none can be had in time."""
    if not place.startswith("@"):
        return socket.create_connection(("127.0.0.1", int(place)), seconds)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(seconds)
    try:
        sock.connect("\0" + place[1:])
    except OSError:
        sock.close()
        raise
    return sock


def send(make, place, number, chance):
    """Send so many frames, one to three on a connection; how many of them the other side has taken."""
    taken = sent = 0
    while sent < number:
        frames = [make(chance) for _ in range(chance.randrange(1, 4))]
        sent += len(frames)
        with contextlib.suppress(OSError), connect(place, 1.0) as sock:
            for frame in frames:
                sock.sendall(frame)
                taken += 1
            sock.settimeout(0.02)
            if chance.random() < 0.3:
                sock.recv(300)
    return taken


def say(*words):
    """Tell the test."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def call_silently(place, number):
    """Keep so many connections that say nothing, calling again where one was closed, until standard input ends."""
    sock_of = {}
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    num_calls = 0
    say("calling")
    while True:
        for _ in range(min(number - len(sock_of), 200)):
            try:
                sock = connect(place, 0.1)
            except OSError:
                break
            num_calls += 1
            sock.setblocking(False)
            sock_of[sock.fileno()] = sock
            poll.register(sock, select.POLLIN)
        for file, _ in poll.poll(10):
            if file == 0:
                return num_calls, len(sock_of)
            try:
                is_closed = not sock_of[file].recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                is_closed = True
            if is_closed:
                poll.unregister(file)
                sock_of.pop(file).close()


if __name__ == "__main__":
    what, where, count, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if what == "silent":
        say(*call_silently(where, count))
    else:
        say(send({"wire": wire_frame, "zmq": zmq_frame}[what], where, count, random.Random(seed)))
