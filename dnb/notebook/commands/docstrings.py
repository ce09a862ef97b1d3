"""Sentences on parameters, read from the Args section of docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_ENTRY = re.compile(r"    (\w+): (.+)")
# A full stop before a capital letter or a bracket; "1.0" and "such as" have none.
_SENTENCE_END = re.compile(r"(?<=\.)\s+(?=[A-Z\"`(])")


def summary_sentence(function: Callable[..., Any]) -> str:
    """Return the first line of a function's docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def argument_sentences(function: Callable[..., Any]) -> dict[str, str]:
    """Return the first sentence of every entry in a docstring's Args section, by parameter."""
    return {name: _SENTENCE_END.split(text)[0] for name, text in argument_texts(function).items()}


def argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """Return the entries of a docstring's Args section, by parameter, each in one line."""
    texts: dict[str, str] = {}
    name = ""
    for line in _args_section(inspect.getdoc(function) or ""):
        found = _ENTRY.match(line)
        if found is not None:
            name = found[1]
            texts[name] = found[2].strip()
        elif name and line.strip():
            texts[name] += f" {line.strip()}"
    return texts


def _args_section(text: str) -> list[str]:
    """Return the indented lines below "Args:"."""
    _, _, below = text.partition("\nArgs:\n")
    lines = below.splitlines()
    end = next((index for index, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return lines[:end]
