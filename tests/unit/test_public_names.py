from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dnb
from dnb.api.launching import Pool
from dnb.api.runs.run import Run
from dnb.notebook.completion.public_names import public_names

# As design.md, section 4, has it, less what later releases bring; and `batches`, by which the order can be checked.
PUBLIC = [
    "Engine",
    "Plan",
    "Pool",
    "Run",
    "RunError",
    "Sum",
    "attach",
    "batches",
    "fit",
    "plan",
    "resume",
    "show",
    "start",
]
# Those, and the functions still to come.
FUNCTIONS = {"attach", "batches", "fit", "plan", "resume", "show", "start"}

# What TAB offers behind a run and a pool. A public name that is new stands here, or among those that are internal, in
# dnb/notebook/completion/public_names.py.
OF_RUN = [
    "batch_size", "checkpoint", "elapsed_seconds", "error", "error_traceback", "events", "export", "first_step",
    "folder", "history", "is_active", "model", "name", "num_samples", "num_shards", "num_steps", "output", "pause",
    "plot", "prediction", "prove", "recent_workers", "report", "resume", "samples_per_second", "seconds_left", "set",
    "show", "started", "state_dict", "status", "step", "steps_per_epoch", "stop", "timeline", "to_tensorboard",
    "utilisation", "wait", "workers",
]  # fmt: skip
OF_POOL = [
    "add", "chaos", "client", "engines", "fit", "is_open", "is_steered_here", "keep_spares", "linger_seconds", "remove",
    "restart", "restarts", "run", "shutdown", "spares", "trouble",
]  # fmt: skip


def test_the_public_names_are_those_of_the_design():
    assert dnb.__all__ == PUBLIC


def test_there_are_at_most_a_dozen_public_names_and_show():
    assert len(set(dnb.__all__) - {"show"}) <= 12


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_had(name: str):
    assert getattr(dnb, name).__name__ == name


def test_a_name_that_is_not_public_is_not_there():
    with pytest.raises(AttributeError, match="module 'dnb' has no attribute 'nothing'"):
        _ = dnb.nothing


def test_the_module_names_its_public_names_before_they_are_used_and_no_others():
    code = "import dnb; print(dir(dnb) == sorted(dnb.__all__))"
    assert run(code) == "True"


def test_no_module_bears_the_name_of_a_public_function():
    modules = {info.name.rpartition(".")[2] for info in pkgutil.walk_packages(dnb.__path__, "dnb.")}
    assert modules & FUNCTIONS == set()


@pytest.mark.parametrize(
    "module", ["dnb", "dnb.hub.process.controller", "dnb.hub.server.service", "dnb.notebook.arguments"]
)
def test_a_module_that_must_be_quick_does_not_import_torch(module: str):
    assert run(f"import sys, {module}; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("module", ["dnb.engine.process.worker", "dnb.hub.server.service"])
def test_engines_and_hub_do_without_torchs_compiler_which_is_large(module: str):
    assert run(f"import sys, {module}; print('torch._dynamo' in sys.modules)") == "False"


def test_a_run_and_a_pool_offer_these_names():
    pool = Pool.__new__(Pool)
    pool.chaos = pool.client = None  # what it holds itself
    assert list(public_names(Run("digits", None, folder=Path("nowhere")))) == OF_RUN
    assert list(public_names(pool)) == OF_POOL


LOAD = """
import sys
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
shell.run_line_magic("load_ext", "dnb")
print(sorted({"torch", "plotly", "ipywidgets", "ipyparallel", "numpy"} & set(sys.modules)))
"""


def test_the_extension_is_loaded_without_what_takes_seconds_to_import():
    assert run(LOAD) == "[]"


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()
