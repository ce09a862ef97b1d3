"""The matrix of versions for CI elsewhere, held against what pyproject.toml admits."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MATRIX = yaml.safe_load((ROOT / ".github/workflows/versions.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_python_that_is_named_is_tried():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert MATRIX["python"] == named


def test_the_lowest_torch_that_is_admitted_is_tried_beside_the_newest():
    line = next(line for line in PROJECT["dependencies"] if line.startswith("torch"))
    assert MATRIX["torch"] == [line.replace(">=", "==") + ".0", "torch"]
