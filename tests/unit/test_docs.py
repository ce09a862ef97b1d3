"""Those parts of the documentation that come from the code; `make docs` builds the pages and checks their links."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

import dnb
from dnb import errors
from dnb.notebook.commands.reference import reference
from docs import generated_pages
from tests.documents import CodeBlock, blocks_of

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = [block for path in [ROOT / "README.md", *PAGES] for block in blocks_of(path)]
TEXTS = {"text", "cfg", "toml", "yaml"}


@pytest.fixture(scope="module")
def verbs() -> str:
    return generated_pages.verbs()


@pytest.fixture(scope="module")
def messages() -> str:
    return generated_pages.messages()


def test_every_verb_has_a_heading_and_its_sentence(verbs: str):
    missing = [
        each.name for each in reference() if f"### {each.name} {{ #{each.name} }}\n\n{each.sentence}" not in verbs
    ]
    assert missing == []


def test_every_flag_of_fit_is_in_the_table(verbs: str):
    fit = next(each for each in reference() if each.name == "fit")
    assert [flag.spelling for flag in fit.flags if f"| `{flag.spelling}` |" not in verbs] == []


def test_no_row_of_a_table_has_more_columns_than_its_head(verbs: str):
    rows = [line for line in verbs.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows}
    assert columns == {5}


def test_every_public_name_has_a_place_in_the_reference():
    headings = re.findall(r"heading: dnb\.(\w+)", generated_pages.api())
    assert set(headings) == {*dnb.__all__, "DnbError", "History"}
    assert len(headings) == len(set(headings))


def test_names_for_dnb_itself_are_not_in_the_reference():
    block = generated_pages.api().partition("heading: dnb.Run\n")[2]
    assert '"!^add_listener$"' in block.partition(":::")[0]


def test_every_class_of_the_error_tree_says_when_it_is_raised_and_the_way_out():
    tree = generated_pages.error_tree()
    for kind in (errors.DnbError, *errors.DnbError.__subclasses__(), errors.ShippingError):
        if kind.__module__ == "dnb.errors":
            text = tree.partition(f"### {kind.__name__} ")[2].partition("###")[0]
            assert len(re.findall(r"[.:] [A-Z`]", text)) >= 1, kind
            assert "Args:" not in text


def test_messages_are_those_of_the_code_with_an_ellipsis_for_what_differs(messages: str):
    assert "- the hub did not answer … within … s: it is busy or dead; %dtrain status looks again" in messages


def test_messages_show_as_they_are(messages: str):
    assert r"after\_step is a …: give a callable(model)" in messages


@pytest.mark.parametrize(
    ("source", "template"), [("'a b'", "a b"), ("f'{n} of {m:,} engines'", "… of … engines"), ("compose(n)", "")]
)
def test_the_template_of_a_string_is_its_fixed_words(source: str, template: str):
    assert generated_pages.template_of(ast.parse(source, mode="eval").body) == template


def test_every_notebook_is_on_the_shelf():
    shelf = generated_pages.notebooks()
    assert [path.name for path in (ROOT / "notebooks").glob("*.ipynb") if f"| `{path.name}` | **" not in shelf] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_asks_only_for_parts_that_there_are(path: Path):
    marks = set(re.findall(r"<!-- generated: (.*?) -->", path.read_text()))
    assert marks <= set(generated_pages.PARTS)


def test_every_part_has_a_page():
    text = "".join(path.read_text() for path in PAGES)
    assert [name for name in generated_pages.PARTS if f"<!-- generated: {name} -->" not in text] == []


def test_the_site_loads_nothing_from_elsewhere():
    text = (ROOT / "mkdocs.yml").read_text()
    assert yaml.safe_load(text)["theme"]["font"] is False
    assert "http" not in text


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_is_python_a_line_of_dtrain_or_shell_that_parses(block: CodeBlock):
    if block.is_cell:
        compile(TransformerManager().transform_cell(block.text), block.place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    elif block.is_shell:
        checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
    else:
        assert block.language in TEXTS


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_verbs_and_flags_that_a_page_names_are_there(path: Path):
    flags = {each.name: {word for flag in each.flags for word in words_of(flag.spelling)} for each in reference()}
    for verb, rest in re.findall(r"%dtrain[ \\]+([a-z]\w*)([^`\n]*)", path.read_text()):
        assert verb in flags
        wrong = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest.partition("#")[0])) - flags[verb] - {"--help"}
        assert wrong == set(), f"%dtrain {verb}{rest}"


def words_of(spelling: str) -> list[str]:
    return re.findall(r"--?[a-z][\w-]*", spelling)


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_what_a_mark_before_a_block_says_is_understood(path: Path):
    for block in blocks_of(path):
        assert re.fullmatch(r"|first|not run: .+|raises: \w+|generated: .*", block.mark), block.place


def test_a_warning_ends_the_build():
    (command,) = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert "--strict" in command
    assert "--quiet" not in command  # mkdocs counts only the warnings that it writes
