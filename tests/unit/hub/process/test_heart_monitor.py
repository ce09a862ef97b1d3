"""When ipyparallel's heart monitor is replaced: it has ended, or does not beat any more."""

import logging
import multiprocessing
import signal

import pytest
import zmq

from dnb.hub.process.heart_monitor import FIRST_HEARTBEAT_SECONDS, LONGEST_WAIT_SECONDS, STILL_SECONDS, MonitorWatch

PERIOD = 0.25


def stand():
    signal.pause()


class Monitors:
    """Real processes that do nothing, beats as the test says, and a clock."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.beats, self.heartbeat_thread = self.context.socket(zmq.PAIR), self.context.socket(zmq.PAIR)
        self.beats.bind("inproc://beats")
        self.heartbeat_thread.connect("inproc://beats")
        self.started = []
        self.now = 1000.0
        self.fails = False
        self.watch = MonitorWatch(
            self.start(),
            start=self.start,
            heartbeats=self.beats,
            period_seconds=PERIOD,
            log=logging.getLogger("test"),
            clock=lambda: self.now,
        )

    def start(self):
        if self.fails:
            raise BlockingIOError("no process more")
        process = multiprocessing.get_context("fork").Process(target=stand, daemon=True)
        process.start()
        self.started.append(process)
        return process

    def beat(self):
        self.heartbeat_thread.send(b"beat")

    def pass_time(self, seconds, *, beating=False):
        for _ in range(round(seconds / 0.2)):
            self.now += 0.2
            if beating:
                self.beat()
            self.watch.check()

    def kill(self):
        self.started[-1].kill()
        self.started[-1].join()

    def close(self):
        for process in self.started:
            process.kill()
            process.join()
        self.context.destroy(linger=0)


@pytest.fixture
def monitors():
    monitors = Monitors()
    yield monitors
    monitors.close()


def test_a_monitor_that_beats_stays(monitors):
    monitors.pass_time(60, beating=True)
    assert len(monitors.started) == 1


def test_a_monitor_that_has_died_is_replaced_at_once(monitors):
    monitors.pass_time(1, beating=True)
    monitors.kill()
    monitors.pass_time(0.2)
    assert (len(monitors.started), monitors.watch.process) == (2, monitors.started[1])


def test_a_monitor_that_does_not_beat_any_more_is_killed_and_replaced(monitors):
    monitors.pass_time(1, beating=True)
    monitors.pass_time(STILL_SECONDS + 0.4)
    assert (len(monitors.started), monitors.started[0].exitcode) == (2, -signal.SIGKILL)


def test_a_monitor_that_was_just_started_has_time_for_its_first_beat(monitors):
    monitors.pass_time(FIRST_HEARTBEAT_SECONDS - 1)
    assert len(monitors.started) == 1
    monitors.pass_time(2)
    assert len(monitors.started) == 2


def test_a_controller_that_stood_still_itself_does_not_blame_its_monitor(monitors):
    monitors.pass_time(1, beating=True)
    monitors.now += 3600
    monitors.pass_time(1)
    assert len(monitors.started) == 1


def test_monitors_that_die_at_once_are_started_less_and_less_often(monitors):
    for _ in range(500):  # 100 s
        monitors.started[-1].kill()
        monitors.started[-1].join()
        monitors.pass_time(0.2)
    assert 8 < len(monitors.started) <= 100 / LONGEST_WAIT_SECONDS + 8


def test_it_is_tried_again_where_no_process_can_be_started(monitors, caplog):
    monitors.pass_time(1, beating=True)
    monitors.kill()
    monitors.fails = True
    monitors.pass_time(1)
    assert "no engine can join or be missed" in caplog.text
    monitors.fails = False
    monitors.pass_time(LONGEST_WAIT_SECONDS)
    assert len(monitors.started) == 2
