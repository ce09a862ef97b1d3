"""The words behind `%dtrain`, turned into the arguments of a function by its signature."""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dnb.errors import ArgumentError, nearest
from dnb.notebook.magic_words import as_magic

_CLOSING = {"{": "}", "(": ")", "[": "]"}
# A word may name a variable, except where a function wants just a word.
_WORDS_ONLY = frozenset({"str", "str | None"})
# Where a word of dnb's own may stand: a variable of that name counts only if it can be what is wanted.
_CHOICES = frozenset({"loss", "optimizer", "metrics", "strategy", "scheduler"})
# Flags as other libraries call them.
_SYNONYMS = {
    "learning_rate": "lr",
    "criterion": "loss",
    "loss_fn": "loss",
    "opt": "optimizer",
    "optim": "optimizer",
    "lr_scheduler": "scheduler",
    "sched": "scheduler",
    "bs": "batch_size",
    "batch": "batch_size",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "max_steps": "steps",
    "num_steps": "steps",
    "validation_data": "val",
    "val_data": "val",
    "valid": "val",
    "test": "val",
    "eval": "val",
    "metric": "metrics",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "gradient_clip_val": "clip_norm",
    "dtype": "precision",
    "engines": "n",
    "num_engines": "n",
    "workers": "n",
    "num_workers": "n",
    "threads": "threads_per_engine",
}
_NUMBERS = ("int", "float")
# By position, too, a word that names no variable is itself where a path is wanted.
_PATHS = frozenset({"str | Path", "str | Path | None"})


@dataclass(frozen=True, slots=True)
class Word:
    """One word of the line; an expression stood in braces."""

    text: str
    is_expression: bool = False


def split_line(line: str) -> list[Word]:
    """Cut lines at blanks, but not inside quotes, braces or brackets; what is behind a `#` is for people.

    A backslash at a line's end stands for nothing. `$name` is a variable, as everywhere in IPython.

    Raises:
        ArgumentError: a quote or brace is not closed.
    """
    return list(_words(line))


def _words(line: str) -> Iterator[Word]:
    position = 0
    while position < len(line):
        if line[position].isspace() or line[position : position + 2] == "\\\n":
            position += 1
            continue
        if line[position] == "#":
            end = line.find("\n", position)
            position = len(line) if end < 0 else end
            continue
        end = _end_of_word(line, position)
        text = line[position:end]
        if text[0] == "$" and text[1:].replace(".", "_").isidentifier():
            yield Word(text[1:], is_expression=True)
        elif text[0] == "{":
            yield Word(text[1:-1].strip() if _parses(text[1:-1]) else text, is_expression=True)
        elif text[0] in "\"'" and text[-1] == text[0]:
            yield Word(text[1:-1])
        else:
            yield Word(text)
        position = end


def _end_of_word(line: str, begin: int) -> int:
    expected: list[str] = []
    quote = ""
    for position in range(begin, len(line)):
        character = line[position]
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _CLOSING:
            expected.append(_CLOSING[character])
        elif expected and character == expected[-1]:
            expected.pop()
        elif character.isspace() and not expected:
            return position
    if quote or expected:
        raise ArgumentError(f"a {quote or expected[-1]} is missing at the end of: {line[begin:]}")
    return len(line)


def _parses(text: str) -> bool:
    try:
        ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    return True


def flags_of(
    function: Callable[..., Any], *, left_out: Collection[str] = (), more: Mapping[str, str] | None = None
) -> dict[str, inspect.Parameter]:
    """Return the flags that a function has: its parameters, by name.

    Args:
        function: parameters without a default come first on the line, by position.
        left_out: parameters that are not flags.
        more: annotations of further flags, by name; their default is None.
    """
    own = inspect.signature(function).parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    further = [inspect.Parameter(name, kind, default=None, annotation=word) for name, word in (more or {}).items()]
    named = (parameter for parameter in (*own, *further) if parameter.kind is not inspect.Parameter.VAR_KEYWORD)
    return {parameter.name: parameter for parameter in named if parameter.name not in left_out}


def bind(
    flags: Mapping[str, inspect.Parameter],
    line: str,
    *,
    names: Mapping[str, Any],
    verb: str,
    operand: str = "",
    rest: str = "",
    example: str = "",
) -> dict[str, Any]:
    """Return the keyword arguments that a line stands for.

    Args:
        flags: by name; those without a default come first, by position.
        line: such as "model train --batch-size 256 --no-shuffle".
        names: the notebook's variables.
        verb: for messages.
        operand: a flag with a default that may be given by position, too.
        rest: under this name go the texts of all words by position, if there is a name.
        example: a line that is right, for messages.

    Raises:
        ArgumentError: an unknown or repeated flag, a missing value, a name that is not defined.
    """
    required = [name for name, parameter in flags.items() if parameter.default is parameter.empty]
    by_position = [*required, operand] if operand else required
    bound: dict[str, Any] = {}
    texts: list[str] = []
    words = split_line(line)
    _refuse_call(line, words, verb=verb)
    while words:
        word = words.pop(0)
        waiting = [name for name in by_position if name not in bound]
        if _is_flag(word):
            name, value = _flag(word.text, words, flags, names=names, verb=verb)
        elif rest:
            texts.append(word.text)
            continue
        elif waiting:
            name, value = waiting[0], _by_position(word, flags[waiting[0]], names)
            texts.append(word.text)
        else:
            raise ArgumentError(
                _unexpected(word, texts, flags, names=names, verb=verb, by_position=by_position, example=example)
            )
        if name in bound:
            raise ArgumentError(f"%dtrain {verb}: {name} is given twice")
        bound[name] = value
    missing = [name for name in required if name not in bound]
    if missing:
        such_as = f", such as in {example}" if example else ""
        raise ArgumentError(f"%dtrain {verb} needs {' and '.join(required)}: {missing[0]} is missing{such_as}")
    return {**bound, rest: texts} if rest else bound


def _refuse_call(line: str, words: Sequence[Word], *, verb: str) -> None:
    """Refuse words with commas between them, as they stand in a call."""
    if any(word.text.endswith(",") and not word.is_expression for word in words):
        raise ArgumentError(f"%dtrain {verb}: no commas between words, as in {as_magic(f'dnb.{verb}({line.strip()})')}")


def _unexpected(
    word: Word,
    texts: Sequence[str],
    flags: Mapping[str, inspect.Parameter],
    *,
    names: Mapping[str, Any],
    verb: str,
    by_position: Sequence[str],
    example: str,
) -> str:
    """Compose the message on a word too many, with the line that was meant as far as it can be guessed."""
    begin = f"%dtrain {verb}: unexpected {word.text!r}"
    if "train" in by_position and len(texts) == len(by_position) and _is_value(word, names):
        first, pair = " ".join(texts[:-1]), f"({texts[-1]}, {word.text})"
        return f"{begin}: inputs and targets go together, as in %dtrain {verb} {first} {pair}"
    if verb == word.text or not flags:
        return f"{begin}: %dtrain {verb} takes no more words"
    names_of_flags = [name for name in flags if name not in by_position]
    if not names_of_flags:
        return f"{begin}: %dtrain {verb} takes {len(by_position)} word{'s' * (len(by_position) != 1)} alone"
    name, equals, value = word.text.partition("=")
    name = _SYNONYMS.get(name, name).replace("-", "_")
    if equals and name in flags:
        return f"{begin}: did you mean '{_spelt(name)} {value}'?"
    return f"{begin}: a value stands behind its flag, as in {example or f'%dtrain {verb} {_spelt(names_of_flags[0])}'}"


def _is_value(word: Word, names: Mapping[str, Any]) -> bool:
    return word.is_expression or word.text.partition(".")[0] in names or word.text[:1] in "(["


def parse_settings(line: str, *, names: Mapping[str, Any]) -> dict[str, Any]:
    """Parse `name=value` words; a value may be a variable, a number, none, or an expression in braces.

    Raises:
        ArgumentError: a word is not of that form, or a name is given twice.
    """
    settings: dict[str, Any] = {}
    number = inspect.Parameter("value", inspect.Parameter.KEYWORD_ONLY)
    for word in split_line(line):
        name, equals, text = word.text.lstrip("-").partition("=")
        values = split_line(text)
        if word.is_expression or not equals or len(values) != 1:
            raise ArgumentError(f"%dtrain set: {word.text!r} is not NAME=VALUE, such as in %dtrain set lr=1e-4")
        name = name.replace("-", "_")
        name = _SYNONYMS.get(name, name)
        if name in settings:
            raise ArgumentError(f"%dtrain set: {name} is given twice")
        settings[name] = _value(values[0], number, names)
    return settings


def _flag(
    text: str,
    words: list[Word],
    known: Mapping[str, inspect.Parameter],
    *,
    names: Mapping[str, Any],
    verb: str,
) -> tuple[str, Any]:
    name, has_value, inline = text.lstrip("-").partition("=")
    name = name.replace("-", "_")
    negated = name.removeprefix("no_")
    if name not in known and negated in known and _is_switch(known[negated]):
        return negated, False
    if name not in known:
        raise ArgumentError(f"%dtrain {verb} has no flag {text!r}: {_nearest_flag(name, known)}")
    parameter = known[name]
    if has_value:
        words[:0] = split_line(inline)
    is_followed = bool(words) and not _is_flag(words[0]) and not (has_value and not inline)
    if _is_switch(parameter) and not (is_followed and words[0].text.lower() in ("true", "false")):
        return name, True
    if not is_followed:
        raise ArgumentError(f"%dtrain {verb}: {text} needs a value, as in {_spelt(name)} {_usual(parameter)}")
    return name, _value(words.pop(0), parameter, names)


def _nearest_flag(name: str, known: Mapping[str, inspect.Parameter]) -> str:
    flags = [_spelt(each) for each in known]
    meant = _SYNONYMS.get(name)
    if not known:
        return "it has none"
    if meant is not None and meant in known:
        return f"did you mean {_spelt(meant)!r}? known: {', '.join(sorted(flags))}"
    return nearest(_spelt(name), flags)


def _spelt(name: str) -> str:
    """Return a flag as it stands in a line."""
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


def _usual(parameter: inspect.Parameter) -> str:
    """Return the value that a flag has if it is left out, or what stands for one."""
    has_default = parameter.default is not parameter.empty and parameter.default is not None
    return str(parameter.default) if has_default else "VALUE"


def _value(word: Word, parameter: inspect.Parameter, names: Mapping[str, Any]) -> Any:
    if word.is_expression:
        return _evaluate(word.text, names)
    if str(parameter.annotation) in _WORDS_ONLY:
        return word.text
    root = word.text.partition(".")[0]
    if root in names and _parses(word.text):
        value = _evaluate(word.text, names)
        if parameter.name not in _CHOICES or root != word.text or _may_be_chosen(value):
            return value
        return word.text
    if word.text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[word.text.lower()]
    try:
        return ast.literal_eval(word.text)
    except (ValueError, SyntaxError):
        return _evaluate(word.text, names) if _is_composed(word.text, names) else word.text


def _is_composed(text: str, names: Mapping[str, Any]) -> bool:
    """Tell whether a word is a tuple, a list, a call or the like of what is defined here: `(X[:300], y[:300])`."""
    if not _parses(text):
        return False
    tree = ast.parse(text, mode="eval").body
    held = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & names.keys()
    return bool(held) and isinstance(tree, ast.Tuple | ast.List | ast.Dict | ast.Call | ast.Subscript | ast.Lambda)


def _may_be_chosen(value: Any) -> bool:
    """Tell whether a variable can be a loss, an optimizer, metrics or a strategy: what it was computed to is none."""
    is_object = callable(value) or hasattr(value, "step") or hasattr(value, "with_")
    is_words = isinstance(value, list | tuple) and all(isinstance(each, str) or callable(each) for each in value)
    return is_object or value is None or isinstance(value, str | Mapping) or (is_words and bool(value))


def _by_position(word: Word, parameter: inspect.Parameter, names: Mapping[str, Any]) -> Any:
    kind = str(parameter.annotation)
    if not word.is_expression and (kind in _WORDS_ONLY or (kind.startswith(_NUMBERS) and word.text not in names)):
        return _value(word, parameter, names)
    if str(parameter.annotation) in _PATHS and not word.is_expression and word.text not in names:
        return word.text
    return _variable(word, names)


def _variable(word: Word, names: Mapping[str, Any]) -> Any:
    if not word.is_expression and word.text.isidentifier() and word.text not in names:
        raise ArgumentError(f"no variable {word.text!r} in this notebook: {_nearest_variable(word.text, names)}")
    return _evaluate(word.text, names)


def _nearest_variable(word: str, names: Mapping[str, Any]) -> str:
    own = [name for name in names if not name.startswith("_")]
    return nearest(word, own).partition("known:")[0].strip() or "define it in a cell first"


def _evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    if expression.isidentifier() and expression not in names and not hasattr(builtins, expression):
        raise ArgumentError(f"no variable {expression!r} in this notebook: {_nearest_variable(expression, names)}")
    try:
        return eval(expression, {"__builtins__": builtins}, dict(names))  # noqa: S307 - the user's own cell
    except Exception as error:
        raise ArgumentError(f"{{{expression}}} cannot be evaluated: {type(error).__name__}: {error}") from error


def _is_flag(word: Word) -> bool:
    return not word.is_expression and word.text.startswith("-") and not is_number(word.text)


def _is_switch(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.default, bool)


def is_number(text: str) -> bool:
    """Say whether a word is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
