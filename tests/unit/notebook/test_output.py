import threading

from dnb.notebook import output
from dnb.notebook.live.display import show
from dnb.notebook.output import Outlet, say, speaking_into
from tests.fake_runs import FakeRun


def test_words_go_into_the_cell(capsys):
    say("engine 3 joined\n")
    assert capsys.readouterr().out == "engine 3 joined\n"


def test_words_go_to_who_runs_the_verb_elsewhere(capsys):
    said = []
    with speaking_into(Outlet(say=said.append, show=said.append)):
        say("engine 3 joined")
    assert (said, capsys.readouterr().out) == (["engine 3 joined"], "")


def test_other_threads_still_speak_into_their_cells(capsys):
    with speaking_into(Outlet(say=[].append, show=[].append)):
        cell = threading.Thread(target=say, args=("from a cell",))
        cell.start()
        cell.join()
    assert capsys.readouterr().out == "from a cell\n"


def test_a_run_is_shown_where_the_verb_was_run():
    shown, run = [], FakeRun()
    with speaking_into(Outlet(say=shown.append, show=shown.append)):
        show(run, display="widget")
    assert shown == [run]


def test_afterwards_it_is_as_before():
    with speaking_into(Outlet(say=[].append, show=[].append)):
        pass
    assert output.current() is None
