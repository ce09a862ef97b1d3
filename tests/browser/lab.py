"""A real JupyterLab and a hand on it: a server process, and a page driven as a person would."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import BrowserContext, Page

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# The limit of every wait: it says when nothing more is to be expected, not how long something should take. On a machine
# whose cores are all at other work, what takes 10 s by itself has taken over a minute.
PATIENCE_SECONDS = 180

# Lab keeps only the cells in view in the document; a test looks at all of them.
LAB_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

# What every script below may use: `app`, `panel` (the notebook in front) and `cells`.
PRELUDE = """
    const app = window.jupyterapp;
    const panel = app.shell.currentWidget;
    const cells = panel.content.widgets;
"""


def find_chromium() -> str | None:
    """Find the browser: $DNB_CHROMIUM, else the system's chromium."""
    named = os.environ.get("DNB_CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser")


def write_notebook(path: Path, sources: list[str]) -> None:
    """Write a notebook of code cells, without outputs."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, path)


class LabServer:
    """One JupyterLab on loopback, with folders of its own; a context manager.

    Args:
        root: what the file browser shows; notebooks are opened by names inside it.
        home: a folder for settings, runtime files and the log (`lab.log`).
    """

    def __init__(self, *, root: Path, home: Path) -> None:
        self.root = root
        self.log = home / "lab.log"
        self._home = home
        self._write_settings()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(self._command(), env=self._environment(), stdout=log, stderr=log, cwd=root)
        try:
            self.url, self.token = self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
            "--LabApp.expose_app_in_browser=True",
            "--ServerApp.ip=127.0.0.1",
            "--ServerApp.port=0",
            f"--ServerApp.root_dir={self.root}",
        ]

    def _environment(self) -> dict[str, str]:
        folders = {
            "IPYTHONDIR": "ipython",
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        }
        return os.environ | {name: str(self._home / folder) for name, folder in folders.items()}

    def _write_settings(self) -> None:
        for plugin, settings in LAB_SETTINGS.items():
            path = self._home / "settings/@jupyterlab" / f"{plugin}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))

    def _wait_until_ready(self) -> tuple[str, str]:
        info_path = self._home / f"runtime/jpserver-{self._process.pid}.json"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if info_path.exists() and (info := self._ask_status(info_path)):
                return info
            time.sleep(0.1)
        raise RuntimeError(
            f"JupyterLab did not answer within {PATIENCE_SECONDS} s "
            f"(exit code {self._process.poll()}); its log ends:\n{self.log.read_text()[-2000:]}"
        )

    def _ask_status(self, info_path: Path) -> tuple[str, str] | None:
        try:
            info = json.loads(info_path.read_text())
            self._request(info["url"], info["token"], "api/status")
        except (json.JSONDecodeError, urllib.error.URLError):  # still being written, or starting
            return None
        return info["url"], info["token"]

    @staticmethod
    def _request(url: str, token: str, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(url + path, method=method, headers={"Authorization": f"token {token}"})
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
            body = response.read()
        return json.loads(body) if body else None

    def ask(self, path: str, *, method: str = "GET") -> Any:
        """Call the server's REST API, as in `ask("api/kernels")`."""
        return self._request(self.url, self.token, path, method)

    def shut_down_kernels(self) -> None:
        """End every kernel as the menu does, so that the next test starts from none."""
        for session in self.ask("api/sessions"):
            self.ask(f"api/sessions/{session['id']}", method="DELETE")

    def stop(self) -> None:
        """End the server and its kernels; killed if it has not ended in time, which leaves its kernels."""
        self._process.terminate()
        try:
            self._process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "LabServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class LabPage:
    """One browser page on a LabServer. Cells are counted from 0, every wait has a limit.

    `page` is playwright's, for clicks and selectors; `problems` collects uncaught page errors.
    """

    def __init__(self, context: BrowserContext, server: LabServer) -> None:
        self.page: Page = context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self._server = server

    def open(self, name: str) -> None:
        """Open a notebook and wait until its kernel is ready."""
        server = self._server
        self.page.goto(f"{server.url}lab/tree/{name}?token={server.token}&reset")
        self._wait_until_ready()

    def reload(self) -> None:
        """Reload the page, as F5 does; the kernel goes on."""
        self.page.reload()
        self._wait_until_ready()

    def another(self) -> "LabPage":
        """The same notebook in a second tab of the same browser, on the same kernel."""
        tab = LabPage(self.page.context, self._server)
        tab.open(self.evaluate("return panel.context.path;"))
        return tab

    def wait_until_idle(self) -> None:
        """Wait until no kernel of the server is at work, whether a page looks at it or not."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while any(session["kernel"]["execution_state"] != "idle" for session in self._server.ask("api/sessions")):
            if time.monotonic() > deadline:
                raise RuntimeError(f"a kernel was still at work after {PATIENCE_SECONDS} s")
            time.sleep(0.1)

    def restart_kernel(self) -> None:
        """End the kernel's process and start another for the same notebook."""
        self.evaluate("return panel.sessionContext.session.kernel.restart().then(() => null);")
        self._wait_until_ready()

    def forget_kernel(self) -> None:
        """End the kernel and reload the page: what is drawn now comes from the file."""
        self._server.shut_down_kernels()
        self.reload()

    def run(self, index: int) -> None:
        """Start one cell and return at once."""
        self.evaluate(
            """
            panel.content.deselectAll();
            panel.content.activeCellIndex = argument;
            cells[argument].model.executionCount = null;
            void app.commands.execute('notebook:run-cell');
            """,
            index,
        )

    def run_all(self) -> None:
        """Start all cells and return at once."""
        self.evaluate(
            """
            for (const cell of cells) cell.model.executionCount = null;
            void app.commands.execute('notebook:run-all-cells');
            """
        )

    def wait(self, index: int) -> list[dict]:
        """Wait until a started cell has its number; return its outputs.

        Raises:
            AssertionError: the cell, or an earlier one in whose way it was, ended with an error.
        """
        self.wait_for(
            """
            const failed = cells.slice(0, argument + 1).some(cell =>
                (cell.model.outputs?.toJSON() ?? []).some(it => it.output_type === 'error'));
            const {executionCount, executionState} = cells[argument].model;
            return failed || (executionCount !== null && executionState === 'idle');
            """,
            index,
        )
        for earlier in range(index + 1):
            refuse_errors(earlier, self.outputs(earlier))
        return self.outputs(index)

    def run_and_wait(self, index: int) -> list[dict]:
        """Run one cell to its end; return its outputs."""
        self.run(index)
        return self.wait(index)

    def outputs(self, index: int) -> list[dict]:
        """Give a cell's outputs as the notebook file would hold them."""
        return self.evaluate("return cells[argument].model.outputs?.toJSON() ?? [];", index)

    def text(self, index: int) -> str:
        """Give the text that a reader sees under a cell."""
        return self.output_area(index).inner_text()

    def wait_for_picture(self, index: int) -> None:
        """Wait until a run's live view has become plain output, which a saved notebook keeps."""
        self.wait_for(
            """
            const outputs = cells[argument].model.outputs?.toJSON() ?? [];
            return outputs.some(it => it.data?.['application/vnd.plotly.v1+json']);
            """,
            index,
        )

    def output_area(self, index: int):
        """Locate what is drawn under a cell, for selectors and screenshots."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index).locator(".jp-OutputArea").first

    def command(self, name: str) -> None:
        """Carry out a Lab command to its end, as in `command("notebook:interrupt-kernel")`."""
        self.evaluate("return app.commands.execute(argument).then(() => null);", name)

    def save(self) -> Any:
        """Save the notebook; return what is now in the file."""
        self.command("docmanager:save")
        path = self.evaluate("return panel.context.path;")
        return nbformat.read(self._server.root / path, as_version=4)

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run the body of a JavaScript function that sees `app`, `panel`, `cells`, `argument`."""
        return self.page.evaluate(f"(argument) => {{ {PRELUDE} {script} }}", argument)

    def wait_for(self, script: str, argument: Any = None) -> None:
        """Wait until such a function returns something true."""
        self.page.wait_for_function(f"(argument) => {{ {PRELUDE} {script} }}", arg=argument)

    def screenshot(self, path: Path, *, index: int | None = None) -> None:
        """Take a picture of the page, or of one cell's output."""
        target = self.page if index is None else self.output_area(index)
        target.screenshot(path=path)

    def close(self) -> None:
        """Close the page; the kernel goes on."""
        self.page.close()

    def _wait_until_ready(self) -> None:
        self.page.wait_for_function(
            """() => {
                const panel = window.jupyterapp?.shell?.currentWidget;
                const kernel = panel?.sessionContext?.session?.kernel;
                return panel?.content?.widgets?.length > 0 && kernel?.status === 'idle';
            }"""
        )


def refuse_errors(index: int, outputs: list[dict]) -> None:
    """Raise with the kernel's traceback if a cell ended with an error."""
    for output in outputs:
        if output["output_type"] == "error":
            traceback = "\n".join(output["traceback"])
            raise AssertionError(f"cell {index} failed:\n{traceback}")
