"""The line that was meant: put into messages on lines that were wrong."""

from __future__ import annotations

import re

from dnb.notebook.commands.verbs import VERBS, begin_of
from dnb.notebook.magic_words import as_magic

# Values that are right, by flag.
_SAMPLES = {
    "loss": "cross_entropy",
    "optimizer": "adamw",
    "lr": "1e-3",
    "clip_norm": "1.0",
    "epochs": "5",
    "steps": "100",
    "batch_size": "64",
    "micro_batch": "16",
    "shards": "8",
    "seed": "0",
    "metrics": "accuracy",
    "strategy": "data",
    "precision": "bfloat16",
    "mesh": "data=2",
    "transport": "socket",
    "n": "2",
    "threads_per_engine": "1",
    "loss_over": "batch",
    "scheduler_every": "epoch",
    "checkpoint_every": "100",
}
# Behind a flag, if there is one.
_VALUE = r"(?:[ =](?:\{[^}]*\}|\"[^\"]*\"|\S+))?"


def corrected(message: str, line: str) -> str:
    """Return a message on a line of `%dtrain` with the line that is right in it, as far as it can be guessed.

    Args:
        message: of the error that the line has come to.
        line: as it was typed, behind `%dtrain`.
    """
    text, line = as_magic(message), " ".join(line.split())
    verb = begin_of(line)[0]
    hint = re.search(r"'([^']+)'.*?(did you mean '([^']+)'\?)", text)
    if hint is not None and hint[1] in line:
        return text.replace(hint[2], f"did you mean %dtrain {line.replace(hint[1], hint[3], 1)}?", 1)
    if "%dtrain" in text.removeprefix(f"%dtrain {verb}") or verb not in VERBS:
        return text
    if (right := _changed(line, text)) is not None:
        return f"{text}; such as %dtrain {right}"
    flag = _flag_of(text)
    if flag is None or flag not in VERBS[verb].flags:
        return text
    return f"{text}; such as {_with_sample(line, verb, flag)}"


def _changed(line: str, text: str) -> str | None:
    """Return the line as a message says that it should be."""
    if found := re.search(r"leave (\w+)(?:=\S+)? out", text):
        return re.sub(rf" ?{re.escape(_spelt(found[1]))}{_VALUE}", "", line, count=1)
    if found := re.match(r"a (\W) is missing at the end", text):
        return line + found[1]
    if found := re.match(r"no engine (\d+): there are (\d+)", text):
        return line.replace(found[1], found[2], 1)
    if found := re.match(r"(\w+) is the class", text):
        return re.sub(rf"({re.escape(_spelt(found[1]))}[ =][\w.]+)", r"\1()", line, count=1)
    if found := re.match(r"%dtrain \w+: (\S+) needs a value, as in (.*)", text):
        return line.replace(found[1], found[2], 1)
    return None


def _flag_of(text: str) -> str | None:
    """Return the flag that a message is about, if it has values that are always right."""
    found = re.match(r"(?:no )?(\w+)", text)
    name = "" if found is None else {"metric": "metrics"}.get(found[1], found[1])
    return name if name in _SAMPLES else None


def _with_sample(line: str, verb: str, flag: str) -> str:
    spelt = _spelt(flag)
    sample = f"{spelt} {_SAMPLES[flag]}"
    right, count = re.subn(rf"(?<!\S){re.escape(spelt)}{_VALUE}", sample, line, count=1)
    if count:
        return f"%dtrain {right}"
    return VERBS[verb].example if flag == VERBS[verb].operand else f"%dtrain {line} {sample}"


def _spelt(flag: str) -> str:
    return "-n" if flag == "n" else f"--{flag.replace('_', '-')}"
