"""The verbs of `%dtrain` that change and harm a pool, in a real IPython shell, on the shared pool."""

import pytest
from IPython.core.interactiveshell import InteractiveShell

from tests.engines.pools import wait_until
from tests.models import digits, mlp

pytestmark = pytest.mark.engines


@pytest.fixture
def shell(pool):
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "dnb")
    shell.user_ns.update({"model": mlp(), "train": digits(), "two": 2})
    yield shell
    shell.history_manager.end_session()
    InteractiveShell.clear_instance()


def run(shell, line):
    """The value of a line, or its error, as a cell would have it."""
    result = shell.run_cell(line, store_history=False)
    result.raise_error()
    return result.result


def test_add_and_remove_change_the_pool_and_say_what_was_done(shell, pool, capsys):
    before = [engine.id for engine in pool.engines]
    run(shell, "%dtrain add 1")
    told = capsys.readouterr().out
    new = [engine.id for engine in pool.engines if engine.id not in before]
    assert len(new) == 1
    assert told.startswith(f"engine {new[0]} joined (1 thread)")
    run(shell, f"%dtrain remove {new[0]}")
    assert capsys.readouterr().out == f"engine {new[0]} left the pool\n"
    assert [engine.id for engine in pool.engines] == before


def test_spares_are_shown_in_the_status_until_they_are_given_up(shell, pool, capsys):
    run(shell, "%dtrain spares 1")
    (spare,) = pool._members().spares
    assert capsys.readouterr().out == f"spares: {spare}\n"
    run(shell, "%dtrain status")
    assert " spare " in capsys.readouterr().out
    run(shell, "%dtrain spares 0")
    assert capsys.readouterr().out == "spares: none\n"


def test_a_run_begins_with_a_word_on_engines_that_are_slow_on_purpose(shell, pool):
    victim = pool.engines[1].id
    run(shell, f"%dtrain chaos slow {victim} 2x")
    fitted = run(shell, "%dtrain fit model train --loss cross_entropy --steps 3")
    run(shell, "%dtrain wait")
    run(shell, f"%dtrain chaos slow {victim} 1x")
    (told,) = [event.text for event in fitted.events if event.kind == "chaos" and not event.step]
    assert told == f"engine {victim} computes 2 times as long, on purpose, until %dtrain chaos slow {victim} 1x"


def test_chaos_slows_and_stops_engines_and_the_run_s_events_say_so(shell, pool, capsys):
    victim = pool.engines[1].id
    fitted = run(shell, "%dtrain fit model train --loss cross_entropy --epochs 5000")
    wait_until(fitted, lambda run: run.step > 3, what="step 3")
    capsys.readouterr()
    run(shell, f"%dtrain chaos slow {victim} 2x")
    assert capsys.readouterr().out == (
        f"engine {victim}: 2 times as slow, also in later runs, until %dtrain chaos slow {victim} 1x\n"
    )
    run(shell, "%dtrain status")
    assert ", 2x slower" in capsys.readouterr().out
    run(shell, f"%dtrain chaos slow {victim} 1x")
    run(shell, f"%dtrain chaos stop {victim} 0.2s")
    assert capsys.readouterr().out == f"engine {victim}: as fast as ever again\nengine {victim}: stopped for 0.2 s\n"
    wait_until(fitted, lambda run: sum(e.kind == "chaos" for e in run.events) == 3, what="three acts are told")
    at = fitted.step
    wait_until(fitted, lambda run: run.step > at + 3, what="it goes on")
    run(shell, "%dtrain stop")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%dtrain add 0", "n must be an integer of at least 1, not 0: %dtrain add 1"),
        ("%dtrain add two engines", "unexpected 'engines': a value stands behind its flag, as in %dtrain add 2"),
        ("%dtrain add -m 2", "%dtrain add has no flag '-m'"),
        ("%dtrain remove", "%dtrain remove needs engine ids: %dtrain remove 1,3-4"),
        ("%dtrain remove x", "'x' is no engine id or range; such as %dtrain remove 1,3-4"),
        ("%dtrain remove 977", "no engine 977: there are {ids}"),
        ("%dtrain remove 1 --forse", "has no flag '--forse': did you mean %dtrain remove 1 --force?"),
        ("%dtrain spares", "%dtrain spares needs n: n is missing"),
        ("%dtrain spares -1", "the number of spares must be 0 or more, not -1"),
        ("%dtrain chaos", "%dtrain chaos has no verb ''"),
        ("%dtrain chaos stop {one} 5", "'5' is no number of seconds, such as 5s: %dtrain chaos stop 1 5s"),
        ("%dtrain start --restart sometimes", "no restart 'sometimes'"),
    ],
)
def test_a_wrong_line_is_refused_with_one_that_is_right(shell, pool, line, message):
    ids = [engine.id for engine in pool.engines]
    names = {"one": ids[0], "ids": ", ".join(map(str, ids))}
    result = shell.run_cell(line.format(**names), store_history=False)
    assert message.format(**names) in str(result.error_in_exec)
