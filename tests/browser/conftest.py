"""One browser and one JupyterLab for these tests; a fresh page and fresh kernels for each.

This folder is a package: then what belongs to all of its tests ends with the last of them.
"""

import contextlib
import os
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.browser.lab import CHROMIUM_FLAGS, PATIENCE_SECONDS, LabPage, LabServer, find_chromium
from tests.browser.voila import VoilaServer


def pytest_collection_modifyitems(items):
    """A test in a browser waits for many things, one after the other."""
    for item in items:
        if "browser" in item.keywords:
            item.add_marker(pytest.mark.timeout(5 * PATIENCE_SECONDS))


@pytest.fixture(scope="package")
def browser(nothing_is_left):
    """Chromium, not for longer: while playwright runs, its event loop owns the main thread."""
    executable = find_chromium()
    if executable is None:
        message = "no browser: apt-get install chromium, or set DNB_CHROMIUM"
        if os.environ.get("DNB_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="package")
def lab_server(nothing_is_left, tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    root = home / "root"
    root.mkdir()
    with LabServer(root=root, home=home) as server:
        yield server


@pytest.fixture
def notebook_folder(lab_server) -> Path:
    """Where a test writes or copies the notebook that it opens by name."""
    return lab_server.root


@pytest.fixture
def voila(tmp_path):
    """Start Voila on a notebook: `voila(path)` gives its address."""
    with contextlib.ExitStack() as stack:
        yield lambda path: stack.enter_context(VoilaServer(path, home=tmp_path)).url


@pytest.fixture
def lab(browser, lab_server):
    """A fresh page; `lab.open("name.ipynb")` comes first."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(1000 * PATIENCE_SECONDS)
    page = LabPage(context, lab_server)
    yield page
    context.close()
    lab_server.shut_down_kernels()
