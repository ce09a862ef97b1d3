"""For every test: folders of its own, hypothesis profiles, and a proof that nothing is left behind.

The environment is set at import: IPython and matplotlib read it when they are first imported.
"""

import os
import shutil
import tempfile
from pathlib import Path

from tests import leftovers as leftovers_module

HOME = Path(tempfile.mkdtemp(prefix="test-home-"))
os.environ.update(
    {
        leftovers_module.MARK_NAME: leftovers_module.MARK_VALUE,
        "IPYTHONDIR": str(HOME / "ipython"),
        "JUPYTER_CONFIG_DIR": str(HOME / "jupyter-config"),
        "JUPYTER_DATA_DIR": str(HOME / "jupyter-data"),
        "JUPYTER_RUNTIME_DIR": str(HOME / "jupyter-runtime"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "MPLCONFIGDIR": str(HOME / "matplotlib"),
    }
)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("soak", max_examples=20_000, deadline=None)
settings.register_profile("dev", max_examples=50, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def leftovers():
    """Fails the session if it leaves anything; a test may ask earlier, by `wait_until_none`."""
    watch = leftovers_module.Leftovers()
    yield watch
    watch.wait_until_none(timeout_seconds=10)
