"""The `%dtrain` lines that do the same as the control panel's form."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

from dnb.errors import ArgumentError
from dnb.notebook.arguments import is_number, split_line

USUAL_BATCH_SIZE = 64  # of `fit`
# A word that means itself in a cell, too: no blanks, no quotes, no "?" behind which IPython would look for help.
_PLAIN = re.compile(r"[\w.+-]+")
_PLAIN_PATH = re.compile(r"[\w./~+-]+")
_LITERAL_STRATEGY = re.compile(r"--strategy (\w+|\{'\w+'\})")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitForm:
    """The choices of the form, each as the words that it adds to the line; "" is the default and adds none.

    `model`, `train` and `val` are variables or expressions in braces; `loss`, `metrics`, `optimizer` and `strategy`
    begin with their flag; all others are what was typed.
    """

    model: str = ""
    train: str = ""
    val: str = ""
    loss: str = ""
    metrics: str = ""
    optimizer: str = ""
    strategy: str = ""
    lr: str = ""
    batch_size: str = ""
    epochs: str = ""
    steps: str = ""
    shards: str = ""
    seed: str = ""
    clip_norm: str = ""
    checkpoint_every: str = ""
    exact: bool = False
    name: str = ""


_TYPED = ("lr", "batch_size", "epochs", "steps", "shards", "seed", "clip_norm", "checkpoint_every")


def fit_line(form: FitForm) -> str:
    """Write `fit` with all arguments that differ from their defaults."""
    words = ["fit", form.model, form.train, _flag("val", form.val), form.loss, form.metrics, form.optimizer]
    words += [_flag(name, typed(getattr(form, name))) for name in _TYPED]
    words += [form.strategy, "--exact" if form.exact else "", _flag("name", _own_word(form.name))]
    return _joined(words)


def plan_line(form: FitForm, *, batch: str) -> str:
    """Write `plan` for the same model, on a batch; a plan that is chosen as strategy is not planned again."""
    strategy = form.strategy if _LITERAL_STRATEGY.fullmatch(form.strategy) else ""
    size = _flag("batch_size", typed(form.batch_size))
    return _joined(["plan", form.model, batch, form.loss, form.optimizer, size, strategy])


def batch_of(train: str, *, num_parts: int, num_samples: int, batch_size: str) -> str:
    """Write the first samples of `train` as an argument of `plan`.

    Args:
        train: a variable, or a pair of variables in braces.
        num_parts: of a tuple of tensors; 0 for a data set or a DataLoader, of which `plan` takes the first batch.
        num_samples: of the tensors.
        batch_size: as typed.
    """
    size = int(batch_size) if re.fullmatch(r"0*[1-9]\d{0,8}", batch_size.strip()) else USUAL_BATCH_SIZE
    if not num_parts or size >= num_samples:
        return train
    if train.startswith("{"):
        names = [name.strip() for name in train.strip("{()}").split(",")]
        return "{(" + ", ".join(f"{name}[:{size}]" for name in names) + ")}"
    return f"{{tuple(part[:{size}] for part in {train})}}"


def start_line(*, n: str, threads: str) -> str:
    """Write `start` with so many engines and threads, if they were given."""
    number = typed(n)
    return _joined(["start", f"-n {number}" if number else "", _flag("threads_per_engine", typed(threads))])


def add_line(n: str) -> str:
    """Write `add`, one engine if nothing was typed."""
    return _joined(["add", typed(n)])


def remove_line(engines: Sequence[int]) -> str:
    """Write `remove` with ids, runs of them shortened; "" for none."""
    if not engines:
        return ""
    spans: list[list[int]] = []
    for engine in sorted(engines):
        if spans and spans[-1][-1] == engine - 1:
            spans[-1] = [spans[-1][0], engine]
        else:
            spans.append([engine])
    return "remove " + ",".join("-".join(map(str, span)) for span in spans)


def set_line(lr: str) -> str:
    """Write `set` for the learning rate; "" if none was typed."""
    return f"set lr={typed(lr)}" if lr.strip() else ""


def checkpoint_line(path: str, *, names: Container[str]) -> str:
    """Write `checkpoint`, at a path if one was typed; one that is also a variable's name is quoted."""
    text = path.strip()
    is_plain = _PLAIN_PATH.fullmatch(text) and not text.startswith("-") and text not in names
    return _joined(["checkpoint", text if is_plain or not text else quoted(text)])


def literal(word: str, *, names: Container[str]) -> str:
    """Write a known word, such as a loss; quoted if a variable has its name, for that would come first."""
    return quoted(word) if word in names else word


def typed(text: str) -> str:
    """Write a field's text as one word of the line: a number, a variable, or an expression in braces.

    Anything else becomes a string, which the verb refuses in its own words: never another flag.
    """
    text = text.strip()
    if _PLAIN.fullmatch(text) and (not text.startswith("-") or is_number(text)):
        return text
    is_expression = text.startswith("{") and text.endswith("}") and text.isprintable() and _is_one_word(text)
    return text if is_expression or not text else quoted(text)


def quoted(text: str) -> str:
    """Write a string as an expression in braces, whatever is in it."""
    escaped = repr(text)[1:-1].replace("\\'", "\\x27").replace("'", "\\x27").replace('"', "\\x22")
    return f"{{'{escaped}'}}"


def _own_word(text: str) -> str:
    """Write a parameter that wants just a word: variables do not count."""
    text = text.strip()
    return text if not text or (_PLAIN.fullmatch(text) and not text.startswith("-")) else quoted(text)


def _is_one_word(text: str) -> bool:
    try:
        return len(split_line(text)) == 1
    except ArgumentError:
        return False


def _flag(name: str, value: str) -> str:
    return f"--{name.replace('_', '-')} {value}" if value else ""


def _joined(words: Sequence[str]) -> str:
    return " ".join(word for word in words if word)
