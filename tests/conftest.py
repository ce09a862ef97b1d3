"""For every test: folders of its own, hypothesis profiles, and a proof that nothing is left behind.

The environment is set at import: IPython and matplotlib read it when they are first imported.
"""

import os
import shutil
import tempfile
from pathlib import Path

from dnb.transport.segments import FOLDERS_VARIABLE
from tests import leftovers as leftovers_module

HOME = Path(tempfile.mkdtemp(prefix="test-home-"))
# Folders of this process's own, so that what it leaves is told from what other test processes are at work with.
SEGMENTS = Path(tempfile.mkdtemp(prefix="test-segments-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
(HOME / "tmp").mkdir()
os.environ.update(
    {
        "TMPDIR": str(HOME / "tmp"),
        FOLDERS_VARIABLE: f"{SEGMENTS}{os.pathsep}{HOME / 'tmp'}",
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
    shutil.rmtree(SEGMENTS, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left():
    """Fails the session if it leaves anything."""
    watch = leftovers_module.Leftovers()
    yield
    watch.wait_until_none()


@pytest.fixture(scope="module", autouse=True)
def float_dtype(request):
    """Where a test trains, models and data are float64 unless its module is marked float32.

    In float64, two orders of one sum differ by some 1e-16, and what the steps of these tests make of it stays below
    1e-10; in float32 it would depend on the processor's kernels what a plain loop gives. What is compared to the bit,
    and by one kernel, is left in float32.
    """
    marks = {mark.name for mark in request.node.iter_markers()}
    if "float32" in marks or not marks & {"engines", "float64"}:
        yield
        return
    yield from _default_dtype("float64")


def _default_dtype(name):
    import torch  # not for tests of drawing and of words

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def float32():
    """For one test, if those of its module are in float64."""
    yield from _default_dtype("float32")


@pytest.fixture
def float64():
    """For one test, if those of its module are in float32."""
    yield from _default_dtype("float64")


@pytest.fixture
def leftovers():
    """What has appeared since the test began; the pool that tests share may be there all the time."""
    return leftovers_module.Leftovers()


@pytest.fixture(scope="session")
def shared(nothing_is_left):
    """The pool of this test process, for all tests that need none of their own."""
    from tests.engines.pools import SharedPool  # not for the unit tests

    pool = SharedPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session", params=[1, 2, 3, 4], ids="{}_engines".format)
def num_engines(request):
    """Of the session, so that tests of several files that want as many engines follow one another."""
    return request.param


@pytest.fixture
def pool_of(shared, num_engines, tmp_path, monkeypatch):
    """The shared pool with 1 to 4 engines."""
    monkeypatch.chdir(tmp_path)
    return shared.of(num_engines)


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """The shared pool with two engines, in a folder of the test's own, and without an active run at the end."""
    monkeypatch.chdir(tmp_path)
    yield shared.of(2)
    shared.calm()
