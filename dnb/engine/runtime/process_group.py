"""The process group by which the engines of a team talk to each other."""

from __future__ import annotations

import gc
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed gives them no types

from dnb.errors import SUMMARY_LENGTH, DnbError, PlanError, clean_text, kind_of, text_of
from dnb.protocol.engine_messages import RankAssignment

# Whoever waits in the group is freed by a peer that leaves it, never by the clock: a user's forward may take hours.
FOREVER = timedelta(days=20)
CONNECT_SECONDS = 5.0
# How long the others may take to unpickle model and data before they come.
RENDEZVOUS_SECONDS = 600.0
LOOK_SECONDS = 0.01
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


class PeerLostError(DnbError):
    """Another engine of the team is gone, or has left its group: this one has nothing to blame."""


def open_group(assignment: RankAssignment, device: torch.device) -> None:
    """Meet the other engines of the team; the group is torch's default one.

    Raises:
        PeerLostError: somebody does not come, or the hub has given the team up.
        PlanError: the process has a group already.
    """
    if dist.is_initialized():
        raise PlanError(
            "a cell has initialized torch.distributed on this engine, which a pipeline needs for itself: "
            "call torch.distributed.destroy_process_group() there first"
        )
    size = assignment.partition.num_engines
    try:
        store = _join_store(assignment)
        _meet(store, assignment.rank, size)
        # Groups are numbered, and one that failed to come together has used up a number, on this engine alone: the next
        # one would look for its peers under another.
        dist.distributed_c10d._world.group_count = 0
        with _loopback_if(assignment.host):
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=assignment.rank,
                world_size=size,
                timeout=FOREVER,
            )
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        raise PeerLostError(f"team {assignment.team} did not come together: {first_line(error)}") from error


def close_group(error: BaseException | None = None) -> None:
    """Leave the group, which frees whoever waits for this engine in it.

    Args:
        error: whose traceback may hold the group: gloo closes its connections only when nobody refers to it any more.
    """
    if error is not None:
        release(error)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def release(error: BaseException) -> None:
    """Let go of all that an error's frames refer to; its text stays whole."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]


def is_about_peers(error: BaseException) -> bool:
    """Return whether an error raised outside user code only says that a connection has ended."""
    if isinstance(error, dist.DistError):
        return True
    text = text_of(error)
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _join_store(assignment: RankAssignment) -> TCPStore:
    """Connect to the team's store; an error at once if the hub has closed it, which torch's client would retry."""
    socket.create_connection((assignment.host, assignment.port), timeout=CONNECT_SECONDS).close()
    connect = timedelta(seconds=CONNECT_SECONDS)
    return TCPStore(assignment.host, assignment.port, is_master=False, timeout=connect, wait_for_workers=False)


def _meet(store: TCPStore, rank: int, size: int) -> None:
    """Wait until all are there, so that the group itself is built in an instant.

    The hub closes the store of a team that will never be complete, and thereby ends this wait, and gloo's own as well.
    """
    store.set(f"here-{rank}", "1")
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    keys = [f"here-{peer}" for peer in range(size)]
    # Asked again and again, as a store's own waiting ends with nothing but its server, or a warning on the console.
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [peer for peer in range(size) if not store.check([keys[peer]])]
            raise PeerLostError(f"after {RENDEZVOUS_SECONDS:.0f} s ranks {missing} have not come")
        time.sleep(LOOK_SECONDS)


@contextmanager
def _loopback_if(host: str) -> Iterator[None]:
    """Bind gloo to the loopback interface if the team is on one host, where nobody else can reach it."""
    before = os.environ.get(INTERFACE_VARIABLE)
    name = _loopback_name() if host in ("127.0.0.1", "localhost") else None
    if name is not None and before is None:
        os.environ[INTERFACE_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(INTERFACE_VARIABLE, None)


def _loopback_name() -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return str(name)
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or else its class."""
    lines = text_of(error).strip().splitlines()
    return clean_text(lines[0], length=SUMMARY_LENGTH) if lines else kind_of(error)
