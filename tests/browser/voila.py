"""A real Voila on loopback."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.browser.lab import PATIENCE_SECONDS


class VoilaServer:
    """Serves one notebook as a page; a context manager.

    Args:
        notebook: whose cells run anew for each visitor.
        home: a folder for settings, runtime files and the log (`voila.log`).
    """

    def __init__(self, notebook: Path, *, home: Path) -> None:
        self._log = home / "voila.log"
        folders = {"IPYTHONDIR": "ipython", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime"}
        environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "voila", str(notebook), "--no-browser"),
                    *(f"--port={_free_port()}", "--Voila.ip=127.0.0.1", f"--Voila.connection_dir_root={home}"),
                ],
                env=environment,
                stdout=log,
                stderr=log,
            )
        self.url = self._wait_for_address()

    def _wait_for_address(self) -> str:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+/", self._log.read_text()):
                return found[0]
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(
            f"Voila did not answer within {PATIENCE_SECONDS} s; its log ends:\n{self._log.read_text()[-2000:]}"
        )

    def stop(self) -> None:
        """End the server and its kernels; killed if it has not ended in time, which leaves its kernels."""
        self._process.terminate()
        try:
            self._process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "VoilaServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def _free_port() -> int:
    """One that is free now: asked for port 0, Voila does not say which it got; it takes another if this is taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
