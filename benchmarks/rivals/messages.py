"""What the benchmark and a rival's ranks say to each other, one line of JSON each, over a socket file."""

from __future__ import annotations

import socket
from typing import Literal

import msgspec

Variant = Literal["bucket_view", "bucket_view_zeroed", "default"]
SOCKET_VARIABLE = "BENCH_SOCKET"


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what is sent alone."""


# Losses that a rival tells, so that it can be seen that it trains the same.
FIRST_LOSSES = 3


class Train(Message, frozen=True):
    """Train a case for so many steps, from its initial weights."""

    case: str
    steps: int
    variant: Variant = "bucket_view"
    progress_at: int | None = None  # step after which rank 0 says so, while it goes on
    gathers: bool = False  # outputs of all ranks before the loss is computed


class TrainPipeline(Message, frozen=True):
    """Train a case for so many steps as a pipeline with one stage per rank."""

    case: str
    steps: int
    batch_size: int
    micro_batches: int
    schedule: str  # "gpipe" | "1f1b"
    cuts: list[str]  # modules at which stages 1, 2, ... begin


class AllReduce(Message, frozen=True):
    """Average a flat float32 gradient so many times."""

    num_elements: int
    rounds: int


class Ready(Message, frozen=True):
    """A rank is in its process group."""

    rank: int


class Progress(Message, frozen=True):
    """The step that was asked for is done."""


class Trained(Message, frozen=True):
    """When each step was done, by the host's monotonic clock."""

    ends: list[float]
    first_step_wall: float  # seconds since the epoch
    first_losses: list[float] = []


class Reduced(Message, frozen=True):
    """When the gradient was in place and when its mean was there, per round, by the host's monotonic clock."""

    starts: list[float]
    ends: list[float]


class Failed(Message, frozen=True):
    """A rank raised; it ends."""

    traceback: str


Request = Train | TrainPipeline | AllReduce
Reply = Ready | Progress | Trained | Reduced | Failed


class Line:
    """One end of a socket file."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, message: Message) -> None:
        """Write one line."""
        self._connection.sendall(msgspec.json.encode(message) + b"\n")

    def receive_request(self) -> Request | None:
        """Sleep until the next request; None when the benchmark is gone."""
        text = self._file.readline()
        return msgspec.json.decode(text, type=Request) if text else None

    def receive_reply(self, *, timeout_seconds: float) -> Reply | None:
        """Sleep until the next reply; None when the rank is gone.

        Raises:
            TimeoutError: nothing came in time.
        """
        self._connection.settimeout(timeout_seconds)
        text = self._file.readline()
        return msgspec.json.decode(text, type=Reply) if text else None

    def close(self) -> None:
        """Let the other end read its end of file."""
        self._file.close()
        self._connection.close()
