"""What Binder would build, asked of repo2docker itself; no docker, no network."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# Where conda-forge's name is not the one pip uses.
PIP_NAMES = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}


@pytest.fixture(scope="module")
def conda_requirements() -> dict[str, Requirement]:
    environment = yaml.safe_load((ROOT / "binder/environment.yml").read_text())
    # conda's `python=3.11` is no Python requirement, and no dependency of ours either.
    lines = [line for line in environment["dependencies"] if not re.match(r"python=", line)]
    requirements = [Requirement(line) for line in lines]
    return {PIP_NAMES.get(found.name, found.name): found for found in requirements}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def dry_build(tmp_path_factory) -> str:
    """Everything repo2docker prints about a copy of what Binder reads."""
    copy = tmp_path_factory.mktemp("binder") / "repo"
    shutil.copytree(ROOT / "binder", copy / "binder")
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy2(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    return report


def test_repo2docker_builds_with_conda_and_the_pinned_python(dry_build):
    assert "Building conda environment for python=3.11" in dry_build


def test_repo2docker_installs_the_environment_file(dry_build):
    assert re.search(r'env update .* --file "binder/environment\.yml"', dry_build)


def test_repo2docker_runs_post_build(dry_build):
    assert re.search(r"^RUN \./binder/postBuild$", dry_build, flags=re.MULTILINE)


def test_post_build_is_executable():
    assert os.access(ROOT / "binder/postBuild", os.X_OK)


def test_post_build_cannot_fetch_another_torch():
    installs = re.findall(r"pip install .*", (ROOT / "binder/postBuild").read_text())
    assert installs
    assert all("--no-deps" in line for line in installs)


@pytest.mark.parametrize("group", ["dependencies", "demo"])
def test_conda_provides_what_pyproject_asks_for(group, project, conda_requirements):
    wanted = project.get(group) or project["optional-dependencies"][group]
    for line in wanted:
        requirement = Requirement(line)
        provided = conda_requirements[requirement.name]
        assert provided.specifier == requirement.specifier, requirement.name
