"""The wheel: built, unzipped into a folder of its own, and used from there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engines, pytest.mark.notebooks]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return next(folder.glob("dnb-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but the wheel's content."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_installed(installed: Path, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dnb.cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_types_rules_and_the_quickstart(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dnb/py.typed", "dnb/nbval_sanitize.cfg", "dnb/quickstart.ipynb"} <= set(names)
    assert [name for name in names if not name.startswith(("dnb/", "dnb-"))] == []


def test_the_rules_for_nbval_are_found_in_an_installed_package(installed, tmp_path):
    path = run_installed(installed, "nbval-sanitize", folder=tmp_path).strip()
    assert Path(path) == installed / "dnb/nbval_sanitize.cfg"
    assert Path(path).exists()


def test_the_demo_runs_from_an_installed_wheel_twice(installed, tmp_path):
    for name in ("quickstart", "quickstart-2"):
        printed = run_installed(installed, "demo", "--output", "out", folder=tmp_path)
        assert "validation accuracy 0.9" in printed
        assert name in {path.name for path in (tmp_path / "out/.dnb/runs").iterdir()}
        page = (tmp_path / "out/quickstart.html").read_text()
        assert f".dnb/runs/{name}\n" in page
        assert f".dnb/runs/{name}-" not in page
