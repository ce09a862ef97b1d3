import pytest

from dnb.errors import ArgumentError
from dnb.notebook.commands.help_text import help_on, page_text, table_text
from dnb.notebook.commands.reference import FlagRecord, VerbRecord
from dnb.notebook.commands.verbs import load_verbs

FLAG = FlagRecord(name="lr", spelling="--lr", type="NUMBER", default="0.1", sentence="learning rate.")
SWITCH = FlagRecord(name="exact", spelling="--exact", type="", default="off", sentence="equal to the bit.")
WORD = FlagRecord(
    name="model", spelling="MODEL", type="MODULE", default="", sentence="trained in place.", is_positional=True
)
FIT = VerbRecord(
    name="fit",
    group="run",
    usage=("%dtrain fit MODEL [FLAGS]",),
    sentence="Train a model.",
    flags=(FLAG, SWITCH, WORD),
    example="%dtrain fit model --lr 1e-3",
)


def test_a_page_tells_usage_sentence_flags_and_example():
    assert page_text(FIT, columns=80) == (
        "usage: %dtrain fit MODEL [FLAGS]\n"
        "\n"
        "Train a model.\n"
        "\n"
        "  MODEL        trained in place.\n"
        "  --lr NUMBER  learning rate. Default: 0.1.\n"
        "  --exact      equal to the bit.\n"
        "\n"
        "example: %dtrain fit model --lr 1e-3"
    )


@pytest.mark.parametrize("verb", load_verbs())
def test_no_line_of_flags_is_wider_than_the_text(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    flags = [line for line in help_on(verb).splitlines() if line.startswith("  ")]
    assert [line for line in flags if len(line) > 70 and line.startswith("   ")] == []


def test_the_table_groups_the_verbs():
    told = table_text([FIT])
    assert "\nRun\n  fit  Train a model.\n" in told


def test_the_table_names_every_verb_in_a_line_of_its_own():
    lines = help_on().splitlines()
    assert all(any(line.startswith(f"  {verb} ") for line in lines) for verb in load_verbs())


def test_help_on_an_unknown_verb_names_the_nearest():
    with pytest.raises(ArgumentError, match="%dtrain has no verb 'fti': did you mean 'fit'"):
        help_on("fti")
