"""The user of the process at the other end of a connection on this host, as the system says."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys

ROOT = 0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

# The system's table of connections is asked for one of its lines: linux/netlink.h, sock_diag.h and inet_diag.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_MESSAGE = struct.Struct("=IHHII")  # length, kind, flags, number, port
_REQUEST = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states
_PORTS = struct.Struct(">HH")  # source, destination
_PLACE = struct.Struct("=I8s")  # interface, cookie
_ANY_STATE = _NO_COOKIE = 0xFFFFFFFF
# In an answer, behind the head: family and state, the ports, addresses and place, expiry, two queues, then the user.
_USER_OFFSET = _MESSAGE.size + 4 + _PORTS.size + 32 + _PLACE.size + 12
_ANSWER_SECONDS = 1.0


def is_foreign(sock: socket.socket) -> bool:
    """Return whether the other end is known to be a process of another user of this host, root's apart."""
    return user_of_peer(sock) not in (os.geteuid(), ROOT, None)


def user_of_peer(sock: socket.socket) -> int | None:
    """Return the user whose process is at the other end; None if the system does not say, as for another host's.

    Args:
        sock: connected, of a Unix socket or TCP.
    """
    if sys.platform != "linux":
        return None
    if sock.family == socket.AF_UNIX:
        _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return int(user)
    try:
        host, port = sock.getpeername()[:2]
        own_host, own_port = sock.getsockname()[:2]
        return _ask(sock.family, (host, port), (own_host, own_port))
    except (OSError, ValueError, struct.error):  # the caller is gone, or the system has no such table
        return None


def _ask(family: int, source: tuple[str, int], destination: tuple[str, int]) -> int | None:
    """Ask the system for the user who holds the end of a TCP connection that has this source."""
    addresses = b"".join(socket.inet_pton(family, host).ljust(16, b"\0") for host, _ in (source, destination))
    request = (
        _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ANY_STATE)
        + _PORTS.pack(source[1], destination[1])
        + addresses
        + _PLACE.pack(0, struct.pack("=II", _NO_COOKIE, _NO_COOKIE))
    )
    head = _MESSAGE.pack(_MESSAGE.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with contextlib.closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)) as table:
        table.settimeout(_ANSWER_SECONDS)
        table.send(head + request)
        answer = table.recv(4096)
    if _MESSAGE.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    return int(struct.unpack_from("=I", answer, _USER_OFFSET)[0])
