"""The house's own rules: what may not grow again. Each limit may only come down."""

from __future__ import annotations

import ast
import re
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dnb"
MOST_LINES = 400
# May only become fewer, and shorter.
LONG_FILES = {
    "dnb/hub/scheduling/coordinator.py": 787,  # one invariant: every shard of a step counts once
    "dnb/hub/parameters/master.py": 701,  # its safety when a hub dies was proven as it is
    "dnb/hub/parameters/durability.py": 637,  # likewise
}
MOST_FILES, MOST_MEDIAN_FILES = 14, 8
MOST_CLASS_LINES, MOST_METHODS, MOST_ATTRIBUTES = 400, 45, 15
LARGE_CLASSES = {"Coordinator", "Master", "UpdateLog"}  # one invariant each; proven as they are
MOST_FUNCTION_LINES = 60
# Names in pickles of earlier versions, whatever floor they are on now.
PICKLED = "dnb/transport/pickling/payloads.py: "
# No subject, no verb: a reader who searches finds neither.
RIDDLES = {"What", "Who", "Whose", "Whether", "Which", "Of", "That", "How", "Where", "Likewise"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def classes() -> Iterator[tuple[Path, ast.ClassDef]]:
    for path in files():
        yield from ((path, node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef))


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def methods_of(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]


def attributes_of(node: ast.ClassDef) -> set[str]:
    """Attributes that `__init__` sets."""
    return {
        each.attr
        for method in methods_of(node)
        if method.name == "__init__"
        for each in ast.walk(method)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def test_no_file_is_long_but_those_that_are_named_here():
    long = {name_of(path): len(path.read_text().splitlines()) for path in files()}
    long = {name: lines for name, lines in long.items() if lines > MOST_LINES}
    assert set(long) <= set(LONG_FILES)
    assert {name: lines for name, lines in long.items() if lines > LONG_FILES[name]} == {}


def test_the_list_of_long_files_names_only_files_that_are_long():
    assert [name for name in LONG_FILES if len((ROOT / name).read_text().splitlines()) <= MOST_LINES] == []
    assert len(LONG_FILES) <= 6


def test_folders_hold_few_files():
    folders = {path.parent for path in files()}
    sizes = {
        name_of(folder): len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) for folder in folders
    }
    assert {name: size for name, size in sizes.items() if size > MOST_FILES} == {}
    assert statistics.median(sizes.values()) <= MOST_MEDIAN_FILES


def test_a_class_name_stands_once_in_the_package():
    homes = defaultdict(list)
    for path, node in classes():
        homes[node.name.lstrip("_")].append(name_of(path))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_no_class_holds_too_much():
    large = {
        f"{name_of(path)}: {node.name}": sizes
        for path, node in classes()
        if node.name not in LARGE_CLASSES
        and (
            (sizes := (node.end_lineno - node.lineno + 1, len(methods_of(node)), len(attributes_of(node))))[0]
            > MOST_CLASS_LINES
            or sizes[1] > MOST_METHODS
            or sizes[2] > MOST_ATTRIBUTES
        )
    }
    assert large == {}


def test_no_function_is_long():
    long = {f"{name_of(path)}: {node.name}": body_lines(node) for path, node in functions()}
    assert {name: lines for name, lines in long.items() if lines > MOST_FUNCTION_LINES} == {}


def test_docstrings_begin_with_their_subject():
    found = []
    for path in files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if (re.match(r"\w*", text) or [""])[0] in RIDDLES:
                    found.append(f"{name_of(path)}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}")
    assert found == []


def test_every_package_says_in_a_sentence_what_it_holds():
    silent = [name_of(path) for path in files() if path.name == "__init__.py" and not ast.get_docstring(tree_of(path))]
    assert silent == []


@cache
def docstrings_of(path: Path) -> set[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, documented)]
    return {text for node in nodes if (text := ast.get_docstring(node, clean=False)) is not None}


def floors() -> dict[str, int]:
    """The floor of every module and package directly below `dnb`, counted from above."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["dnb"])
    return {name.strip(): floor for floor, layer in enumerate(layers) for name in layer.split("|")}


def test_no_string_names_a_module_of_a_floor_above():
    floor_of = floors()
    found = []
    for path in files():
        if path.parent == PACKAGE and path.name == "__init__.py":  # where public names live
            continue
        own = floor_of[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings_of(path):
                names = re.findall(r"\bdnb\.(\w+)\.\w+", node.value)
                found += [f"{name_of(path)}: {node.value}" for name in names if floor_of.get(name, own) < own]
    assert [each for each in found if not each.startswith(PICKLED)] == []


def test_the_tests_of_units_mirror_the_tree():
    folders = [
        path.relative_to(ROOT / "tests" / "unit") for path in (ROOT / "tests" / "unit").rglob("*") if path.is_dir()
    ]
    strange = [
        str(folder) for folder in folders if "__pycache__" not in folder.parts and not (PACKAGE / folder).is_dir()
    ]
    assert strange == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_a_file_that_a_map_names_is_there(name: str):
    paths = re.findall(
        r"`((?:dnb|tests|benchmarks|notebooks|binder)/[a-z_0-9/]*(?:\.(?:py|ipynb|js|md))?)`", (ROOT / name).read_text()
    )
    paths = [path for path in paths if path != "dnb/checkpoint_secret"]  # below the user's own folder of data
    assert [path for path in paths if not (ROOT / path).exists()] == []
