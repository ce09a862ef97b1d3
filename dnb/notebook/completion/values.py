"""Values that a flag of `%dtrain` takes, as far as this notebook knows them: nobody is asked, and the hub least."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from dnb.api import pools
from dnb.api.runs.run import Run
from dnb.api.runs.run_folders import RUNS_FOLDER
from dnb.notebook.commands.engine_arguments import CHAOS_VERBS
from dnb.notebook.commands.flag_words import words_of
from dnb.notebook.commands.verbs import Verb, load_verbs
from dnb.notebook.control_panel import choices
from dnb.planning.search.plans import Plan

_MOST_FILES = 200
_SETTINGS = ("lr", "clip_norm", "weight_decay", "momentum")


@dataclass(frozen=True, slots=True)
class Offer:
    """Something to complete: the text, and its kind as front ends show it."""

    text: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The variables of a notebook."""

    own: Mapping[str, Any]  # that the user has made
    every: Mapping[str, Any]
    model: Any = None  # that the line names

    @classmethod
    def of(cls, names: Mapping[str, Any], *, hidden: Mapping[str, Any]) -> Names:
        """Make them of a shell's variables, and those that were there before the first cell."""
        every = dict(names)
        return cls(own=choices.own_names(every, hidden=hidden), every=every)

    def with_model(self, name: str) -> Names:
        """Add the model that a line names."""
        return replace(self, model=self.own.get(name))

    def that(self, fits: Callable[[Any], bool]) -> list[str]:
        """Return the names of the user's variables that fit."""
        return [name for name, value in self.own.items() if fits(value)]

    def within_brackets(self, flag: str) -> list[Offer]:
        """Offer variables inside brackets: tensors and arrays where data are wanted, else all."""
        is_data = flag in _OF_DATA
        names = self.that(choices.holds_numbers) if is_data else list(self.own)
        return [Offer(name, "variable") for name in names]


def values_for(entry: Verb, flag: str, token: str, names: Names) -> list[Offer]:
    """Return what may stand behind a flag, or in its place: words, variables, paths, runs, engines."""
    annotation = str(entry.flags[flag].annotation)
    found = [Offer(name, "variable") for name in _variables(flag, annotation, names)]
    found += [Offer(word, "value") for word in words_of(entry.name, flag)]
    if flag in _OF_RUNS and entry.name in _OF_RUNS[flag]:
        found += [Offer(name, "run") for name in run_names(names)]
    if "Path" in annotation and flag != "run":
        found += [Offer(path, "path") for path in paths_at(token)]
    if flag == "on":
        found += [Offer("all", "value"), *(Offer(number, "engine") for number in engine_ids())]
    return found


def values_in_list(verb: str, words: Sequence[str], token: str, names: Names) -> tuple[str, list[Offer]]:
    """Return what may stand where a verb takes words by position, any number of them, and the letters it begins with.

    Args:
        verb: of which.
        words: by position that are complete.
        token: that the cursor is in.
        names: the notebook's variables.
    """
    if verb == "help":
        return token, [Offer(name, "verb") for name in load_verbs()] if not words else []
    if verb == "compare":
        return token, [Offer(name, "run") for name in run_names(names) if name not in words]
    if verb == "set":
        given = {word.partition("=")[0] for word in words}
        return token, [Offer(f"{name}=", "setting") for name in _SETTINGS if name not in given]
    if verb == "chaos" and not words:
        return token, [Offer(word, "value") for word in CHAOS_VERBS]
    if verb == "chaos" and (words[0] == "hub" or len(words) > 1):
        return token, []
    return _engines_in_list(words[1:] if verb == "chaos" else words, token)


def _engines_in_list(words: Sequence[str], token: str) -> tuple[str, list[Offer]]:
    """Offer engines that are not named yet, behind the last comma or dash."""
    before = token.replace("-", ",").rpartition(",")[0]
    named = {each for word in (*words, before) for each in word.replace("-", ",").split(",")}
    fragment = token[len(before) + 1 :] if before else token.lstrip(",-")
    return fragment, [Offer(number, "engine") for number in engine_ids() if number not in named]


def engine_ids() -> list[str]:
    """Return the ids of the engines of this kernel's pool, as its client has heard of them."""
    pool = pools.current_pool()
    return [] if pool is None else [str(number) for number in sorted(pool.client.ids)]


def run_names(names: Names) -> list[str]:
    """Return runs by variable, then those in the working folder, the latest first."""
    return list(dict.fromkeys([*names.that(lambda value: isinstance(value, Run)), *_stored_runs()]))


def _stored_runs() -> Iterable[str]:
    found = [entry for entry in _entries(RUNS_FOLDER) if entry.is_dir() and _is_one_word(entry.name)]
    return [entry.name for entry in sorted(found, key=lambda entry: entry.stat().st_mtime, reverse=True)]


def paths_at(token: str) -> list[str]:
    """Return files and folders that begin as a token does; those with a dot in front only if it was typed."""
    folder, slash, start = token.rpartition("/")
    place = Path(folder + slash).expanduser() if folder or slash else Path()
    found = sorted(
        (entry for entry in _entries(place) if entry.name.startswith(start) and _is_one_word(entry.name)),
        key=lambda entry: entry.name,
    )
    return [
        f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in found
        if start.startswith(".") or not entry.name.startswith(".")
    ][:_MOST_FILES]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:  # no such folder, or not ours to read
        return


def _is_one_word(name: str) -> bool:
    return not any(character.isspace() or character in "\"'{}()[]$" for character in name)


def _variables(flag: str, annotation: str, names: Names) -> list[str]:
    """Return the names of variables that fit a flag."""
    if flag in _LISTED:
        return [
            words
            for choice in _LISTED[flag](names)
            if (words := _without_flag(choice.words)) in names.own or words.startswith("{(")
        ]
    if flag in _FITTING:
        return names.that(_FITTING[flag])
    kinds = tuple(kind for word, kind in (("int", int), ("float", float)) if word in annotation.split(" | "))
    if float in kinds:
        kinds = (int, float)
    return names.that(lambda value: isinstance(value, kinds) and not isinstance(value, bool)) if kinds else []


def _without_flag(words: str) -> str:
    return words.partition(" ")[2] if words.startswith("--") else words


def _losses(names: Names, *, flag: str) -> list[choices.Choice]:
    found = choices.losses(names.own, names=names.every)
    return [choice for choice in found if choice.words.startswith(f"--{flag} ")]


def _batches(names: Names) -> list[choices.Choice]:
    alone = names.that(lambda value: isinstance(value, Mapping) or choices.holds_numbers(value))
    return [*choices.data_sets(names.own), *(choices.Choice(name, name) for name in alone)]


def _takes_one(function: Callable[..., Any]) -> bool:
    """Return True if it can be called with one value and nothing else."""
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError):
        return False
    return True


_OF_DATA = frozenset({"train", "val", "batch"})
# Where a run's name stands; another `--name` is that of a run to come.
_OF_RUNS = {"name": {"attach"}, "run": {"dashboard", "export"}, "path": {"resume"}}
# By what the control panel offers, too.
_LISTED: Mapping[str, Callable[[Names], list[choices.Choice]]] = {
    "model": lambda names: choices.models(names.own),
    "train": lambda names: choices.data_sets(names.own),
    "val": lambda names: choices.data_sets(names.own),
    "batch": _batches,
    "loss": lambda names: _losses(names, flag="loss"),
    "step": lambda names: _losses(names, flag="step"),
    "val_step": lambda names: _losses(names, flag="step"),
    "optimizer": lambda names: choices.optimizers(names.own, model=names.model, names=names.every),
    "metrics": lambda names: choices.metrics(names.own, names=names.every),
}
_FITTING: Mapping[str, Callable[[Any], bool]] = {
    "after_step": lambda value: choices.is_function(value) and _takes_one(value),
    "scheduler": lambda value: isinstance(value, LRScheduler) or (choices.is_function(value) and _takes_one(value)),
    "strategy": lambda value: isinstance(value, Plan),
    "stages": lambda value: (
        isinstance(value, list | tuple) and all(isinstance(each, str | torch.nn.Module) for each in value)
    ),
    "buffers": lambda value: isinstance(value, Mapping),
    "tensor_plan": lambda value: isinstance(value, Mapping),
}
