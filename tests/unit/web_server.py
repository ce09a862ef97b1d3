"""A port on which somebody answers who is no hub."""

import contextlib
import socket
import threading
import time

import zmq


class WebServer:
    """What answers on a port that was a hub's before: ZeroMQ gives such a connection up for good."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_callers = 0
        self._thread = threading.Thread(target=self._serve, name="web-server")
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = self._listener.accept()
                self.num_callers += 1
                with caller, contextlib.suppress(ConnectionError):
                    caller.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 48\r\n\r\n" + b"-" * 48)
                    while caller.recv(1024):
                        pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


def wait_until_given_up(dealer: zmq.Socket[bytes]) -> None:
    """By ZeroMQ: a while after the connection failed."""
    deadline = time.monotonic() + 10
    while dealer.poll(0, zmq.POLLOUT):
        assert time.monotonic() < deadline, "not within 10 s: ZeroMQ gives the connection up"
        time.sleep(0.01)
