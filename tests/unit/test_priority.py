"""Threads and processes that leave the cores to others."""

import os
import subprocess
import sys
import threading

import pytest

from dnb.engine import priority

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="niceness per thread is Linux's")


def in_thread(what):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(what()), name="helper")
    thread.start()
    thread.join()
    return answers[0]


def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_lowered_thread_does_not_lower_the_one_that_waits_for_it():
    before = niceness()

    def lowered():
        priority.lower_thread()
        return niceness()

    assert in_thread(lowered) == max(before, priority.NICENESS)
    assert niceness() == before


def test_a_thread_that_is_lower_already_is_not_raised():
    def twice():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        priority.lower_thread()
        return niceness()

    assert in_thread(twice) == 15


def test_a_process_that_has_ended_is_no_error():
    process = subprocess.Popen(["true"])
    process.wait()
    priority.lower_process(process.pid)


def test_a_session_that_is_gentle_becomes_usual_again():
    code = (
        "import pathlib; from dnb.engine import priority; path = pathlib.Path('/proc/self/autogroup')\n"
        "read = lambda: path.read_text().split()[-1] if path.exists() else '-'\n"
        "before = read(); priority.become_gentle(); during = read(); priority.become_usual()\n"
        "print(before, during, read())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, check=True
    )
    before, during, after = output.stdout.split()
    assert during == (str(priority.NICENESS) if before != "-" else "-")
    assert after == before


def test_a_session_that_is_shared_with_others_is_left_alone():
    code = (
        "import os, pathlib; from dnb.engine import priority; path = pathlib.Path('/proc/self/autogroup')\n"
        "read = lambda: path.read_text() if path.exists() else '-'\n"
        "before = read(); priority.become_gentle(); print(before == read())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "True"
