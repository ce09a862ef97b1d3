"""A rank of a rival: it joins the process group, then sleeps until the benchmark wants a turn."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

from benchmarks.rivals.messages import SOCKET_VARIABLE, Failed, Line, Message, Ready


def serve(turn: Callable[[Any, Line], Message]) -> None:
    """Answer turns until the benchmark closes the line, or is gone.

    Args:
        turn: carries out one request.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SOCKET_VARIABLE])
    line = Line(connection)
    line.send(Ready(rank=torch.distributed.get_rank()))
    try:
        # A rank that waits is blocked in a read: were it a barrier, the other side would be timed against it.
        while (request := line.receive_request()) is not None:
            line.send(turn(request, line))
    except BaseException:
        line.send(Failed(traceback=traceback.format_exc()))
        raise
    torch.distributed.destroy_process_group()
