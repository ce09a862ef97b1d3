"""Streams are put in place inside the tests: pytest has others while it prepares them."""

import contextlib
import io
import logging
import os
import sys
import threading
import warnings

import pytest
import torch

from dnb.user_code.captured_output import LINE_LENGTH, LINES_OF_A_KIND, MOST_KINDS, MOST_REPEATED, CapturedOutput

say = print


@contextlib.contextmanager
def captured(*, of_all_threads=False):
    before = io.StringIO()
    with contextlib.redirect_stdout(before), contextlib.redirect_stderr(io.StringIO()):
        output = CapturedOutput(of_all_threads=of_all_threads)
        try:
            yield output, before
        finally:
            output.close()


def test_lines_of_the_training_thread_are_taken_once():
    with captured() as (output, _):
        say("one", 2)
        say("three", end="")
        say("a warning", file=sys.stderr)
        assert output.collect() == ("one 2", "a warning", "three")
        assert output.collect() == ()


def test_what_other_threads_print_goes_where_it_went():
    with captured() as (output, before):
        thread = threading.Thread(target=lambda: say("a cell's"))
        thread.start()
        thread.join()
        assert before.getvalue() == "a cell's\n"
        assert output.collect() == ()


def test_of_a_line_that_is_written_over_the_last_state_is_taken():
    with captured() as (output, _):
        say("10 %\r50 %\r100 %\r")
        assert output.collect() == ("100 %",)


def test_a_long_line_is_cut():
    with captured() as (output, _):
        say("x" * 10 * LINE_LENGTH)
        (line,) = output.collect()
        assert len(line) <= LINE_LENGTH + 40


def test_a_line_that_never_ends_keeps_its_beginning_and_its_end():
    with captured() as (output, _):
        for letter in "a" + "x" * 100_000 + "z":
            sys.stdout.write(letter)
        (line,) = output.collect()
        assert (line[0], line[-1]) == ("a", "z")


def test_lines_that_differ_in_numbers_are_one_kind_of_which_the_first_come_and_the_rest_is_counted():
    with captured() as (output, _):
        for number in range(100_000):
            say("loss", number / 7)
        lines = output.collect()
        assert len(lines) == LINES_OF_A_KIND
        assert lines[0] == "loss 0.0"
        assert output.take_counts() == {"loss0": 100_000 - LINES_OF_A_KIND}
        assert (output.collect(), output.take_counts()) == ((), {})


def test_behind_a_flood_the_first_line_of_another_kind_comes():
    with captured() as (output, _):
        say("\n".join("x 1" for _ in range(100_000)))
        output.collect()
        say("careful")
        assert output.collect() == ("careful",)


def test_kinds_beyond_a_number_are_counted_together():
    with captured() as (output, _):
        for number in range(MOST_KINDS + 1000):
            say("word " + "a" * number)
        assert len(output.collect()) == MOST_KINDS
        assert output.take_counts() == {"": 1000}


def test_whole_lines_are_no_more_than_kinds_and_their_repetitions():
    with captured() as (output, _):
        for letters in range(MOST_KINDS):
            say("a" * (letters + 1) + "\n" + "\n".join("a" * (letters + 1) for _ in range(LINES_OF_A_KIND)))
        assert len(output.collect()) == MOST_KINDS + MOST_REPEATED


def test_indented_lines_written_with_another_belong_to_it():
    with captured() as (output, _):
        say(torch.arange(4).reshape(2, 2))
        say("    alone")
        assert output.collect() == ("tensor([[0, 1],\n        [2, 3]])", "    alone")


def show(message, category, filename, lineno, file=None, line=None):
    """Write a warning as Python does where pytest does not collect them."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def test_a_warning_comes_with_its_source_as_often_as_filters_let_it():
    with captured() as (output, _), warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("default")
        for _ in range(5):
            warnings.warn("careful", UserWarning, stacklevel=1)
        (text,) = output.collect()
        head, source = text.split("\n")
        assert head.endswith("UserWarning: careful")
        assert source.strip().startswith("warnings.warn(")
        warnings.simplefilter("always")
        for _ in range(5):
            warnings.warn("again", UserWarning, stacklevel=1)
        assert len(output.collect()) == 5


@pytest.fixture
def logger():
    found = logging.getLogger("tests.of_output")
    found.propagate = False
    yield found
    found.handlers.clear()
    found.propagate = True


def test_a_logger_that_holds_the_stream_of_before_writes_to_the_run_until_its_end(logger):
    with contextlib.redirect_stderr(io.StringIO()) as before:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        output = CapturedOutput()
        logger.warning("careful %d", 1)
        assert output.collect() == ("careful 1",)
        output.close()
        logger.warning("after")
        assert before.getvalue() == "after\n"


def test_a_logger_made_in_a_run_writes_where_output_goes_behind_it(logger):
    with captured() as (output, before):
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.warning("within")
        assert output.collect() == ("within",)
        output.close()
        logger.warning("after")
        assert before.getvalue() == "after\n"


def test_a_progress_bar_is_one_kind_in_all_its_states():
    tqdm = pytest.importorskip("tqdm").tqdm
    with captured() as (output, _):
        for _ in range(LINES_OF_A_KIND + 10):
            for _ in tqdm(range(20), mininterval=0, file=sys.stderr, desc="batches"):
                pass
        lines = output.collect()
        assert len(lines) == LINES_OF_A_KIND
        assert lines[0].startswith("batches: 100%|")
        assert list(output.take_counts().values()) == [10]


def test_escape_sequences_and_control_characters_are_left_out():
    with captured() as (output, _):
        say("\x1b[1;31mred\x1b[0m\x07 \x1b]0;title\x07and\tblue\x00\x1b[A")
        assert output.collect() == ("red and\tblue",)


def test_what_is_no_text_is_escaped():
    with captured() as (output, _):
        say(b"caf\xe9".decode("utf-8", "surrogateescape"))
        assert output.collect() == ("caf\\udce9",)


def test_what_is_printed_while_muted_is_let_go():
    with captured() as (output, _):
        with output.muted():
            say("once more")
        say("news")
        assert output.collect() == ("news",)


def test_output_of_all_threads_is_taken_if_asked():
    with captured(of_all_threads=True) as (output, _):
        thread = threading.Thread(target=lambda: say("a helper's"))
        thread.start()
        thread.join()
        assert output.collect() == ("a helper's",)


def test_a_forked_child_prints_where_it_did_before():
    with captured() as (output, before):
        pid = os.fork()
        if pid == 0:
            say("of the child")
            os._exit(0 if before.getvalue() == "of the child\n" else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert output.collect() == ()


def test_behind_a_run_everything_is_printed_as_before():
    with captured() as (output, before):
        output.close()
        assert sys.stdout is before
        say("after")
        assert before.getvalue() == "after\n"


def test_a_stream_that_user_code_has_put_there_stays():
    with captured() as (output, _):
        own = io.StringIO()
        sys.stdout = own
        output.close()
        assert sys.stdout is own


def test_other_attributes_are_those_of_the_stream_that_was_there():
    with captured() as (output, _):
        assert sys.stdout.getvalue() == ""
        sys.stdout.flush()
        sys.stdout.writelines(["a\n", "b\n"])
        assert output.collect() == ("a", "b")


def test_where_all_threads_are_heard_warnings_of_loggers_are_taken_but_dnb_has_its_own_log():
    with captured(of_all_threads=True) as (output, _):
        logging.getLogger("tests.of_output").warning("norm %d", 3)
        logging.getLogger("tests.of_output").info("unheard")
        logging.getLogger("dnb.tests").warning("own")
        assert output.collect() == ("norm 3",)
        output.close()
        logging.getLogger("tests.of_output").warning("after")
        assert output.collect() == ()
