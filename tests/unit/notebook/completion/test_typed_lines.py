import pytest

from dnb.notebook.completion.typed_lines import read_typed


@pytest.mark.parametrize(
    "text",
    [
        "%dtrain fit mod",
        "  %dtrain fit mod",
        "run = %dtrain fit mod",
        "x = 1\na.b[0] = %dtrain fit mod",
        "dtrain fit mod",
    ],
)
def test_a_line_of_the_magic_ends_the_text(text):
    typed = read_typed(text)
    assert (typed.words, typed.token, typed.is_cell) == (("fit",), "mod", False)


@pytest.mark.parametrize(
    "text",
    ["", "model.fit", "%dtrain", "%dtrain fit\n", "print('%dtrain fit ", "dtrain = mod", "%%px\nx", "x = dtrain fit"],
)
def test_other_text_is_no_line_of_the_magic(text):
    assert read_typed(text) is None


def test_behind_a_blank_the_token_is_empty():
    assert read_typed("%dtrain fit model ").token == ""


def test_a_blank_in_brackets_or_quotes_does_not_end_a_word():
    assert read_typed("%dtrain fit {a + b} (X, ").words == ("fit", "{a + b}")
    assert read_typed("%dtrain fit {a + b} (X, ").token == "(X, "
    assert read_typed("%dtrain export 'my fi").token == "'my fi"


def test_lines_that_end_in_a_backslash_are_one():
    assert read_typed("%dtrain fit model \\\n  train --lr").words == ("fit", "model", "train")


def test_a_cell_of_a_verb_goes_over_several_lines():
    typed = read_typed("%%dtrain fit\n  model\n  train --lo")
    assert (typed.words, typed.token, typed.is_cell) == (("fit", "model", "train"), "--lo", True)


@pytest.mark.parametrize("text", ["%%dtrain\nimpor", "%%dtrain --on 0\nimpor", "%%dtrain --local\nx = 1\nimpor"])
def test_below_the_first_line_of_a_cell_for_engines_stands_python(text):
    assert read_typed(text) is None
