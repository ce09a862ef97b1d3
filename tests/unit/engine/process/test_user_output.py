"""Streams are put in place inside the tests: pytest has others while it prepares them."""

import contextlib
import io
import sys
import threading

from dnb.engine.process.user_output import LINE_LENGTH, MOST_LINES, CapturedOutput

say = print


@contextlib.contextmanager
def captured():
    before = io.StringIO()
    with contextlib.redirect_stdout(before), contextlib.redirect_stderr(io.StringIO()):
        output = CapturedOutput()
        try:
            yield output, before
        finally:
            output.close()


def test_lines_of_the_training_thread_are_taken_once():
    with captured() as (output, _):
        say("one", 2)
        say("three", end="")
        say("a warning", file=sys.stderr)
        assert output.collect() == ("one 2", "threea warning")
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


def test_many_lines_and_long_ones_are_cut_and_that_is_said():
    with captured() as (output, _):
        say("x" * 10 * LINE_LENGTH)
        for number in range(MOST_LINES + 100):
            say(number)
        lines = output.collect()
        assert len(lines) == MOST_LINES + 1
        assert len(lines[0]) <= LINE_LENGTH + 40
        assert lines[-1] == f"(more than {MOST_LINES} lines: the rest is not shown)"
        say("more")
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
