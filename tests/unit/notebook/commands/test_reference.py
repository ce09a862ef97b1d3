"""Records of all verbs and flags: nothing may be without a sentence, and every example must be a line that works."""

import pytest

from dnb.notebook.arguments import bind, parse_settings
from dnb.notebook.commands.pool_commands import CELL
from dnb.notebook.commands.reference import reference, verb_record
from dnb.notebook.commands.verbs import load_verbs

RECORDS = {record.name: record for record in reference()}
FLAGS = {(record.name, flag.name): flag for record in RECORDS.values() for flag in record.flags}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_every_verb_has_a_sentence(record):
    assert record.sentence.endswith(".")


@pytest.mark.parametrize("flag", FLAGS.values(), ids=[" ".join(key) for key in FLAGS])
def test_every_flag_has_a_sentence(flag):
    assert flag.sentence.endswith(".")
    assert not flag.sentence.startswith(("see ", "likewise", "of "))


def test_the_flags_of_a_cell_on_engines_have_sentences():
    assert [flag.name for flag in verb_record(CELL).flags if not flag.sentence] == []


@pytest.mark.parametrize("flag", FLAGS.values(), ids=[" ".join(key) for key in FLAGS])
def test_every_flag_has_a_type_unless_it_is_a_switch(flag):
    is_switch = flag.default in ("on", "off")
    assert bool(flag.type) is not is_switch


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_the_example_of_every_verb_is_a_line_that_its_flags_take(record):
    entry = load_verbs()[record.name]
    verb, _, words = record.example.partition("%dtrain ")[2].partition(" ")
    names = dict.fromkeys(("model", "train", "val", "X", "y"))
    assert verb == record.name
    if entry.has_settings:
        assert parse_settings(words, names=names)
    elif entry.alone is not None:
        assert bind(entry.alone.flags, words, names=names, verb=verb)
    else:
        bind(entry.flags, words, names=names, verb=verb, operand=entry.operand, rest=entry.rest)


def test_defaults_are_those_of_the_signature():
    assert FLAGS["fit", "batch_size"].default == "64"
    assert FLAGS["fit", "optimizer"].default == "adamw"
    assert FLAGS["fit", "lr"].default == ""
    assert FLAGS["start", "timeout_seconds"].default == "60"


def test_types_are_those_of_the_annotation():
    assert FLAGS["fit", "batch_size"].type == "INT"
    assert FLAGS["fit", "loss"].type == "NAME|FUNCTION"
    assert FLAGS["fit", "model"].type == "MODULE"
    assert FLAGS["fit", "val"].type == "DATA"
    assert FLAGS["export", "path"].type == "PATH"


def test_few_known_words_stand_in_the_place_of_a_type():
    assert FLAGS["compare", "x"].type == "step|samples|time"
    assert FLAGS["fit", "transport"].type == "memory|socket|DICT"
    assert FLAGS["plan", "strategy"].type == "auto|data|pipeline|hybrid"


def test_flags_are_spelled_as_they_are_typed():
    assert FLAGS["start", "n"].spelling == "N or -n"
    assert FLAGS["fit", "batch_size"].spelling == "--batch-size"
    assert FLAGS["fit", "shuffle"].spelling == "--shuffle, --no-shuffle"
    assert FLAGS["fit", "exact"].spelling == "--exact"


def test_words_in_any_number_and_settings_are_told_too():
    assert FLAGS["remove", "ids"].spelling == "IDS..."
    assert FLAGS["set", "options"].sentence.startswith("lr, clip_norm (None does not clip), or another number")


def test_usage_has_a_line_for_each_form_of_a_verb():
    assert RECORDS["fit"].usage == ("%dtrain fit MODEL TRAIN [FLAGS]",)
    assert RECORDS["add"].usage == ("%dtrain add [N] [FLAGS]",)
    assert RECORDS["remove"].usage == ("%dtrain remove IDS... [FLAGS]",)
    assert RECORDS["set"].usage == ("%dtrain set NAME=VALUE...",)
    assert RECORDS["resume"].usage[1] == "%dtrain resume [--step OBJECT] [--loss NAME|OBJECT]"
