"""`%dtrain` in a real IPython shell, on the shared pool."""

import _thread
import signal
import threading

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from dnb.errors import RunError
from tests.engines.test_fit import wait_for_step
from tests.models import digits, mlp

pytestmark = pytest.mark.engines


@pytest.fixture
def shell(pool):
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "dnb")
    shell.user_ns.update({"model": mlp(), "train": digits(), "val": digits(200)})
    yield shell
    shell.history_manager.end_session()
    InteractiveShell.clear_instance()


def run(shell, line):
    """The value of a line, or its error, as a cell would have it."""
    result = shell.run_cell(line, store_history=False)
    result.raise_error()
    return result.result


def test_start_tells_the_running_pool_its_engines_and_what_to_type_next(shell, capsys):
    run(shell, "%dtrain start -n 2")
    told = capsys.readouterr().out
    assert "using the running pool of 2 engines" in told
    assert "ready" in told
    assert "%dtrain fit model train --loss cross_entropy" in told


def test_fit_takes_variables_and_expressions_and_returns_the_run(shell):
    fitted = run(
        shell, "%dtrain fit model train --val {(val[0][:50], val[1][:50])} --loss cross_entropy --steps 3 --lr 1e-3"
    )
    assert run(shell, "%dtrain wait") is fitted
    assert (fitted.status, fitted.step, len(fitted.history["val_loss"])) == ("finished", 3, 1)


def test_a_fit_may_stand_on_several_lines(shell):
    cell = """%%dtrain fit model train   # of all engines
    --loss cross_entropy
    --steps 2 --lr $rate"""
    shell.user_ns["rate"] = 1e-3
    shell.run_cell(cell, store_history=False).raise_error()
    fitted = run(shell, "%dtrain wait")
    assert (fitted.status, fitted.step, fitted.history["lr"][0]) == ("finished", 2, 1e-3)


def test_a_run_that_never_made_a_step_makes_room_for_the_next(shell):
    def broken(output, target):
        if output.requires_grad and len(output) > 8:
            raise LookupError("no such thing")
        return torch.nn.functional.cross_entropy(output, target)

    shell.user_ns["broken"] = broken
    first = run(shell, "%dtrain fit model train --loss broken --steps 3 --name never")
    with pytest.raises(RunError, match=r"LookupError: no such thing.* then %dtrain resume --loss fixed or"):
        run(shell, "%dtrain wait")
    second = run(shell, "%dtrain fit model train --loss cross_entropy --steps 3")
    assert run(shell, "%dtrain wait").status == "finished"
    assert first.status == "stopped"
    told = [event.text for event in second.events]
    assert f"run {first.name!r}, which paused before its first step, was ended for this one" in told


def test_status_names_the_run(shell, capsys):
    run(shell, "%dtrain fit model train --loss cross_entropy --steps 1 --name told")
    run(shell, "%dtrain wait")
    capsys.readouterr()
    run(shell, "%dtrain status")
    assert "<dnb.Run 'told': finished, step 1 of 1" in capsys.readouterr().out


def test_prove_gives_the_table_as_the_cells_value(shell, capsys):
    run(shell, "%dtrain fit model train --loss cross_entropy --steps 3")
    proof = run(shell, "%dtrain prove 2")
    assert [step.step for step in proof.steps] == [1, 2]
    assert proof.is_same
    assert len(run(shell, "%dtrain prove").steps) == 3
    capsys.readouterr()
    run(shell, "%dtrain fit model train --loss cross_entropy --steps 3 --prove 3")
    assert "the same: 3 steps of run" in capsys.readouterr().out


def test_pause_resume_set_and_stop_steer_the_run_and_say_so_in_a_line(shell, capsys):
    fitted = run(shell, "%dtrain fit model train --loss cross_entropy --epochs 5000 --name steered")
    wait_for_step(fitted, 1)
    capsys.readouterr()
    run(shell, "%dtrain pause")
    assert capsys.readouterr().out.startswith(f"run {fitted.name!r} pauses after the step under way; step ")
    assert run(shell, "%dtrain wait").status == "paused"
    at = fitted.step
    capsys.readouterr()
    run(shell, "%dtrain set lr=1e-4")
    run(shell, "%dtrain resume")
    assert capsys.readouterr().out == (
        f"run {fitted.name!r}: lr=0.0001 from the next step on; step {at:,} is done\n"
        f"run {fitted.name!r} goes on after step {at:,}\n"
    )
    wait_for_step(fitted, at + 1)
    assert run(shell, "%dtrain stop").status == "stopped"
    assert fitted.history["lr"][-1] == 1e-4


@pytest.fixture
def interruptible():
    """A background job ignores SIGINT, and its children with it; a kernel does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_gives_the_prompt_back_and_training_goes_on(shell, interruptible):
    fitted = run(shell, "%dtrain fit model train --loss cross_entropy --epochs 5000")
    wait_for_step(fitted, 1)
    waiting = threading.Event()
    fitted.add_wait_hook(lambda _: waiting.set())

    def interrupt():
        waiting.wait(120)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, name="interrupt", daemon=True).start()
    run(shell, "%dtrain wait")
    at = fitted.step
    wait_for_step(fitted, at + 1)
    assert fitted.status == "running"


def test_px_reaches_every_engine(shell, pool):
    run(shell, "%dtrain start")
    run(shell, "%px answer = 6 * 7")
    assert pool.client[:]["answer"] == [42, 42]


def test_a_cell_runs_on_the_engines_that_are_named(shell, pool, capfd):
    engine = pool.engines[1].id
    shell.run_cell(f"%%dtrain --on {engine}\nprint('only', 'here')", store_history=False).raise_error()
    assert "only here" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%dtrain fti", "%dtrain has no verb 'fti': did you mean %dtrain fit?"),
        ("%dtrain fit modle train", "no variable 'modle' in this notebook: did you mean %dtrain fit model train?"),
        (
            "%dtrain fit model train --lsos mse_loss",
            "has no flag '--lsos': did you mean %dtrain fit model train --loss mse_loss?",
        ),
        ("%dtrain fit model", "needs model and train: train is missing"),
        ("%dtrain start -n 2 --profle x", "has no flag '--profle': did you mean %dtrain start -n 2 --profile x?"),
    ],
)
def test_a_wrong_line_is_refused_with_the_nearest_right_one(shell, line, message):
    result = shell.run_cell(line, store_history=False)
    assert message in str(result.error_in_exec)


def test_a_setting_without_a_value_is_refused_with_an_example(shell):
    run(shell, "%dtrain fit model train --loss cross_entropy --epochs 5000")
    result = shell.run_cell("%dtrain set momentum", store_history=False)
    assert "is not NAME=VALUE, such as in %dtrain set lr=1e-4" in str(result.error_in_exec)


def test_an_error_is_shown_as_one_line_without_dnb_s_own_frames(shell, capsys):
    shell.run_cell("%dtrain fti", store_history=False)
    told = capsys.readouterr().out
    assert told.startswith("\x1b[31mArgumentError\x1b[39m: %dtrain has no verb 'fti'")
    assert "Traceback" not in told
