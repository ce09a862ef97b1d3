"""The sockets by which engines and clients reach a hub."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

import zmq

from dnb.transport.sockets.channels import CLIENT_ROLE, ENGINE_ROLE, RoleKeys, bind_router, local, start_authenticator
from dnb.transport.sockets.listeners import PortWatcher


class PoolSockets:
    """Two routers, one for engines and one for clients, which only peers with the pool's keys can use.

    Args:
        keys: of the pool.
        listeners: the ports of engines and clients, by role.
    """

    def __init__(self, keys: RoleKeys, listeners: Mapping[str, socket.socket]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = start_authenticator(self._context, keys)
        self.engines, self.clients = (
            bind_router(self._context, keys, role=role, listener=listeners[role], local=listeners.get(local(role)))
            for role in (ENGINE_ROLE, CLIENT_ROLE)
        )
        self._port_watcher = PortWatcher({self.engines: listeners[ENGINE_ROLE], self.clients: listeners[CLIENT_ROLE]})
        self._port_watcher.start()

    @property
    def closing_steps(self) -> tuple[Callable[[], object], ...]:
        """The calls that close everything, in order; each is to be made, also when one before it has raised."""
        return (
            self._authenticator.stop,
            self._port_watcher.stop,
            self.engines.close,
            self.clients.close,
            self._context.term,
        )
