"""The rendezvous of a team's engines: a key-value store that the hub serves."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from torch.distributed import TCPStore  # type: ignore[attr-defined]

# An engine that waits for another longer than this will not see it any more.
WAIT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The store of one team; it ends with the object, which frees whoever still waits in it for the others."""

    store: TCPStore
    host: str
    port: int


def open_rendezvous(host: str = "127.0.0.1") -> Rendezvous:
    """Serve a store on one interface."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    serve = partial(
        TCPStore,
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=WAIT_SECONDS),
        master_listen_fd=listener.detach(),
    )
    try:
        store = serve()
    except NotImplementedError:  # torch 2.6: its libuv takes no socket that listens already
        store = serve(use_libuv=False)
    return Rendezvous(store, host, port)
