"""Every verb of `%dtrain` with its flags, types, defaults and sentences, as records: for help, completion and pages."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from dnb.notebook.commands.flag_words import words_of
from dnb.notebook.commands.verbs import Verb, load_verbs

_DATA = frozenset({"train", "val", "batch"})
_MOST_WORDS = 6  # that stand in the place of a type
_TYPES = {
    "int": "INT",
    "float": "NUMBER",
    "str": "TEXT",
    "Any": "OBJECT",
    "Path": "PATH",
    "Plan": "PLAN",
    "torch.nn.Module": "MODULE",
    "Callable": "FUNCTION",
    "Mapping": "DICT",
    "Sequence": "LIST",
    "Iterable": "LIST",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagRecord:
    """A flag of a verb, or a word by position."""

    name: str  # of the parameter
    spelling: str  # as it is typed: --batch-size; of a word by position MODEL, and of one that may be both N or -n
    type: str  # such as INT or NAME|FUNCTION; "" of a switch
    default: str  # "" if there is none, or if leaving it out is a case of its own, which the sentence tells
    sentence: str
    is_positional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VerbRecord:
    """A verb of `%dtrain`."""

    name: str
    group: str
    usage: tuple[str, ...]  # one line for each form that it has
    sentence: str
    flags: tuple[FlagRecord, ...]
    example: str


def reference() -> list[VerbRecord]:
    """Return every verb of `%dtrain`, in the order in which help lists them."""
    return [verb_record(entry) for entry in load_verbs().values()]


def verb_record(entry: Verb) -> VerbRecord:
    """Return all that help tells of a verb."""
    by_position = [name for name, parameter in entry.flags.items() if _is_required(parameter)]
    by_position += [entry.operand] if entry.operand else []
    flags = tuple(
        _flag_record(entry, name, parameter, is_positional=name in by_position)
        for name, parameter in entry.flags.items()
    )
    flags = (*_list_records(entry), *flags)
    return VerbRecord(
        name=entry.name,
        group=entry.group,
        usage=tuple(_usages(entry, flags)),
        sentence=entry.sentence,
        flags=flags,
        example=entry.example,
    )


def _list_records(entry: Verb) -> list[FlagRecord]:
    """Return the record of words by position in any number, if the verb takes some."""
    name, spelling = ("options", "NAME=VALUE...") if entry.has_settings else (entry.rest, f"{entry.rest.upper()}...")
    if not name:
        return []
    sentence = entry.sentences.get(name, "")
    return [FlagRecord(name=name, spelling=spelling, type="TEXT", default="", sentence=sentence, is_positional=True)]


def flag_spelling(name: str) -> str:
    """Write a parameter's name as the flag that is typed."""
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


def _flag_record(entry: Verb, name: str, parameter: inspect.Parameter, *, is_positional: bool) -> FlagRecord:
    spelling = name.upper() if is_positional else flag_spelling(name)
    if name == entry.operand:
        spelling = f"{spelling} or {flag_spelling(name)}"
    if parameter.default is True:
        spelling = f"{spelling}, --no-{name.replace('_', '-')}"
    return FlagRecord(
        name=name,
        spelling=spelling,
        type=_type_of(entry, name, parameter),
        default=_default_of(parameter),
        sentence=entry.sentences.get(name, ""),
        is_positional=is_positional,
    )


def _type_of(entry: Verb, name: str, parameter: inspect.Parameter) -> str:
    if isinstance(parameter.default, bool):
        return ""
    annotation = str(parameter.annotation)
    parts = [part.partition("[")[0] for part in _alternatives(annotation) if part != "None"]
    known = words_of(entry.name, name)
    if known and len(known) <= _MOST_WORDS:
        words = [*known, *(_TYPES[part] for part in parts if part != "str" and part != "Any")]
    elif "Path" in parts:
        words = ["PATH"]
    elif annotation == "Any":
        words = [*(["NAME"] if known else []), "DATA" if name in _DATA else "OBJECT"]
    else:
        words = ["NAME" if part == "str" and known else _TYPES.get(part, part.upper()) for part in parts]
    return "|".join(dict.fromkeys(words))


def _alternatives(annotation: str) -> list[str]:
    """Split a union at its bars, but not inside brackets."""
    parts, depth = [""], 0
    for character in annotation:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _default_of(parameter: inspect.Parameter) -> str:
    if _is_required(parameter) or parameter.default is None:
        return ""
    if isinstance(parameter.default, bool):
        return "on" if parameter.default else "off"
    if isinstance(parameter.default, float):
        return f"{parameter.default:g}"
    return str(parameter.default)


def _usages(entry: Verb, flags: Sequence[FlagRecord]) -> list[str]:
    words = [f"%dtrain {entry.name}"]
    words += [_positional(entry, flag) for flag in flags if flag.is_positional]
    if any(not flag.is_positional for flag in flags):
        words.append("[FLAGS]")
    others = [] if entry.alone is None else [_alone_usage(entry, entry.alone)]
    return [" ".join(words), *others]


def _alone_usage(entry: Verb, alone: Verb) -> str:
    flags = " ".join(
        f"[{flag_spelling(name)} {_type_of(alone, name, parameter)}]" for name, parameter in alone.flags.items()
    )
    return f"%dtrain {entry.name} {flags}"


def _positional(entry: Verb, flag: FlagRecord) -> str:
    return f"[{flag.name.upper()}]" if flag.name == entry.operand else flag.spelling


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty
