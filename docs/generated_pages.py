"""Parts of the documentation that come from the code: verbs, the API, errors, notebooks, benchmarks."""

from __future__ import annotations

import ast
import html
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import dnb
from dnb import errors
from dnb.notebook.commands.reference import FlagRecord, VerbRecord, reference
from dnb.notebook.completion.public_names import internal_names

ROOT = Path(__file__).parents[1]
GROUPS = {"pool": "The pool", "run": "Runs", "help": "Help"}
_ORDER = ["start", "fit", "attach", "resume", "show", "plan", "batches"]  # as a notebook uses them
_MORE = ["History", "DnbError"]  # of the API, though TAB does not offer them behind `dnb.`
_HOLE = "…"


def verbs() -> str:
    """Return every verb of `%dtrain` with its flags."""
    parts = []
    for group in dict.fromkeys(verb.group for verb in reference()):
        parts.append(f"## {GROUPS.get(group, group)}\n")
        parts += [_verb(verb) for verb in reference() if verb.group == group]
    return "\n".join(parts)


def _verb(verb: VerbRecord) -> str:
    lines = [f"### {verb.name} {{ #{verb.name} }}", "", verb.sentence, "", "```text", *verb.usage, "```", ""]
    if verb.flags:
        lines += ["| argument | is | if left out | |", "|---|---|---|---|", *map(_flag, verb.flags), ""]
    if verb.example not in verb.usage:
        lines += ["For example:", "", "```ipython", verb.example, "```", ""]
    return "\n".join(lines)


def _flag(flag: FlagRecord) -> str:
    kind = _code(flag.type) if flag.type else "a switch"
    return f"| {_code(flag.spelling)} | {kind} | {_code(flag.default)} | {_in_cell(flag.sentence)} |"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _in_cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def api() -> str:
    """Return a block for each public name, which mkdocstrings fills with signature and docstring."""
    names = [*_ORDER, *sorted(set(dnb.__all__) - set(_ORDER)), *_MORE]
    return "\n".join(_api_block(name) for name in dict.fromkeys(names))


def _api_block(name: str) -> str:
    value = getattr(dnb, name)
    lines = [f"::: {value.__module__}.{value.__qualname__}", "    options:", f"      heading: dnb.{name}"]
    lines.append(f"      toc_label: {name}")
    if isinstance(value, type):
        hidden = [f'"!^{each}$"' for each in ("_.*", *sorted(internal_names(value)))]
        lines += ["      inherited_members: true", f"      filters: [{', '.join(hidden)}]"]
    return "\n".join([*lines, ""])


def error_tree() -> str:
    """Return every class of the error tree with its docstring."""
    return "\n".join(_error(kind) for kind in _error_classes(errors.DnbError))


def _error_classes(kind: type[errors.DnbError]) -> Iterator[type[errors.DnbError]]:
    yield kind
    for each in kind.__subclasses__():
        if each.__module__ == errors.__name__:
            yield from _error_classes(each)


def _error(kind: type[errors.DnbError]) -> str:
    bases = " and ".join(f"`{base.__name__}`" for base in kind.__bases__)
    text = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:")[0].strip()
    return f"### {kind.__name__} {{ #{kind.__name__} }}\n\n*Is {_article(bases)} {bases}.* {text}\n"


def _article(text: str) -> str:
    return "an" if text.strip("`")[0] in "AEIOU" else "a"


def messages() -> str:
    """Return the text of every error that the code raises, by class; what depends on the case is an ellipsis."""
    found: dict[str, set[str]] = {kind.__name__: set() for kind in _error_classes(errors.DnbError)}
    for path in sorted((ROOT / "dnb").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                text = template_of(node.exc.args[0]) if node.exc.args else ""
                if node.exc.func.id in found and len(text.replace(_HOLE, "").split()) > 2:
                    found[node.exc.func.id].add(text)
    return "\n".join(_messages_of(name, sorted(texts, key=_sort_key)) for name, texts in found.items() if texts)


def template_of(node: ast.expr) -> str:
    """Return the fixed words of a string in the source, with an ellipsis in each gap; "" if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template_of(part) or _HOLE for part in node.values)
    return ""


def _sort_key(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().lower()


def _messages_of(name: str, texts: Sequence[str]) -> str:
    lines = [f"- {_literal(text)}" for text in texts]
    amount = "1 message" if len(texts) == 1 else f"{len(texts)} messages"
    return "\n".join([f"### {name}: {amount} {{ #messages-of-{name.lower()} }}", "", *lines, ""])


def _literal(text: str) -> str:
    """Write a text so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def notebooks() -> str:
    """Return a table of the notebooks: title and first sentences of each."""
    rows = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"), key=lambda path: (path.stem != "quickstart", path.stem)):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        title, _, text = first.partition("\n")
        rows.append(f"| `{path.name}` | **{title.lstrip('# ')}.** {_in_cell(text.strip().split(chr(10) * 2)[0])} |")
    return "\n".join(["| notebook | is about |", "|---|---|", *rows, ""])


def benchmarks() -> str:
    """Return the text on the benchmarks with all figures, as it stands beside them."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    return text.partition("\n")[2].strip()


# What stands in the place of `<!-- generated: NAME -->` in a page.
PARTS: Mapping[str, Callable[[], str]] = {
    "verbs": verbs,
    "api": api,
    "error tree": error_tree,
    "messages": messages,
    "notebooks": notebooks,
    "benchmarks": benchmarks,
}
_MARK = re.compile(r"<!-- generated: (?P<name>[\w ]+) -->")


def filled(text: str) -> str:
    """Return the text of a page, with each mark replaced by the part that it names."""
    return _MARK.sub(lambda found: PARTS[found["name"]](), text)
