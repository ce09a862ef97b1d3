import os
import threading

import pytest

from dnb.user_code.descriptor_tail import MOST_BYTES, DescriptorTail


@pytest.fixture
def written(tmp_path):
    """Descriptor of a log, as an engine has it."""
    number = os.open(tmp_path / "engine.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(number, b"of before\n")
    yield number
    os.close(number)


@pytest.fixture
def tail(written):
    found = DescriptorTail([written, written])
    yield found
    found.close()


def test_what_is_appended_is_read_once(written, tail):
    os.write(written, b"from C\n")
    assert (tail.read(), tail.read()) == ("from C\n", "")


def test_bytes_that_are_no_text_are_escaped(written, tail):
    os.write(written, b"caf\xe9")
    assert tail.read() == "caf\\xe9"


def test_a_flood_is_read_as_far_as_it_is_allowed_and_that_is_said(written, tail):
    os.write(written, b"x" * (MOST_BYTES + 2048))
    assert tail.read() == "x" * MOST_BYTES + "\n(2.05 kB more of that are in the engine's log alone)\n"


def test_of_a_file_that_was_emptied_what_comes_next_is_read(written, tail):
    os.ftruncate(written, 0)
    assert tail.read() == ""
    os.write(written, b"news")
    assert tail.read() == "news"


def test_of_a_pipe_nothing_is_read_and_its_reader_gets_all():
    reader, writer = os.pipe()
    tail = DescriptorTail([writer])
    os.write(writer, b"news")
    assert tail.read() == ""
    assert os.read(reader, 10) == b"news"
    os.close(reader)
    os.close(writer)


def test_a_closed_descriptor_has_no_file():
    assert DescriptorTail([987_654]).read() == ""


def test_what_is_on_its_way_through_a_pipe_is_waited_for(written):
    reader, writer = os.pipe()
    tail = DescriptorTail([written], pipes=[writer])
    begun = threading.Event()

    def copy():
        begun.wait()
        os.write(written, os.read(reader, 100))

    thread = threading.Thread(target=copy)
    thread.start()
    os.write(writer, b"on its way")
    begun.set()
    assert tail.read() == "on its way"
    thread.join()
    tail.close()
    os.close(reader)
    os.close(writer)


def test_what_the_engine_s_program_writes_of_itself_is_left_out(written, tail):
    of_itself = "2026-12-01 16:01:06.143 [_ForkedEngine.1] Handling execute_request: ab15656c\n"
    warned = "2026-12-01 16:01:06.150 [IPEngine.12] | WARNING | No heartbeat in the last 3010 ms\n"
    own = "2026-12-01 16:01:06.150 [solver] converged\n"
    os.write(written, f"first\n{of_itself}{own}{warned}last".encode())
    assert tail.read() == f"first\n{own}last"
