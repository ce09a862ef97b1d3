from dnb.notebook.commands.docstrings import argument_sentences, argument_texts, summary_sentence


def documented(model, lr, buffers):
    """Train a model; returns at once.

    More of it.

    Args:
        model: trained in place: it holds the trained state
            when the run ends.
        lr: learning rate, such as 1.0. None takes torch's.
        buffers: by name. "first" keeps the first.

    Raises:
        ValueError: never.
    """


def bare():
    """Do nothing."""


def test_the_summary_is_the_first_line():
    assert summary_sentence(documented) == "Train a model; returns at once."


def test_an_entry_of_several_lines_is_one_text():
    assert argument_texts(documented)["model"] == "trained in place: it holds the trained state when the run ends."


def test_a_sentence_ends_at_a_full_stop_before_a_capital_letter_or_a_quote():
    assert argument_sentences(documented)["lr"] == "learning rate, such as 1.0."
    assert argument_sentences(documented)["buffers"] == "by name."


def test_other_sections_are_no_arguments():
    assert list(argument_texts(documented)) == ["model", "lr", "buffers"]


def test_a_docstring_without_the_section_has_no_arguments():
    assert argument_texts(bare) == {}
