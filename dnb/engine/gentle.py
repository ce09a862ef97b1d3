"""The command of an engine that joins while others train: its start leaves them the cores, see `dnb.engine.priority`.

Starting takes 3 s of CPU, most of it for imports: a thread does them that ends soon, and so need not be raised again.
"""

from __future__ import annotations

import importlib
import subprocess
import threading
from typing import Any

from dnb.engine.priority import become_gentle, lower_process, lower_thread

MODULES = ("ipyparallel.engine.app", "dnb.engine.worker")


def main() -> None:
    """Import at low priority, then be ipyparallel's engine."""
    become_gentle()
    helper = threading.Thread(target=_import_gently, name="dnb-imports")
    helper.start()
    helper.join()
    nanny: Any = importlib.import_module("ipyparallel.engine.nanny")
    nanny.Popen = _GentlePopen
    importlib.import_module("ipyparallel.engine.app").main()


class _GentlePopen(subprocess.Popen[bytes]):
    """Starts the engine's nanny, which imports a lot too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        lower_process(self.pid)


def _import_gently() -> None:
    lower_thread()
    for module in MODULES:
        importlib.import_module(module)


if __name__ == "__main__":
    main()
