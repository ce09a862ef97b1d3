import threading
import types
from typing import Any

import ipywidgets as widgets
import pytest
import torch
from torch import nn

from dnb.errors import PoolError, RunError
from dnb.notebook import output
from dnb.notebook.control_panel import panel
from dnb.notebook.control_panel.panel import ControlPanel, close_panel, open_panel
from dnb.notebook.control_panel.watcher import FALLBACK
from dnb.notebook.live import display
from dnb.notebook.pages.snapshot import PLOTLY_MIME
from dnb.progress import long_work
from dnb.transport.system.processes import this_process
from tests.fake_runs import FakeRun, wait_until

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


class FakePool:
    def __init__(self, *, run: FakeRun | None = None, engines: tuple[int, ...] = (0, 1)) -> None:
        self.run = run
        self.trouble = ""
        self.engines = [types.SimpleNamespace(id=each, state="ready", host="host-a") for each in engines]

    @property
    def facts(self) -> Any:
        name, status = (None, None) if self.run is None else (self.run.name, self.run.status)
        return types.SimpleNamespace(run=name, run_status=status, owner=this_process())


class Kernel:
    """What stands behind the panel: variables, a pool, the magic, and what was displayed."""

    def __init__(self) -> None:
        data = torch.zeros(100, 4), torch.zeros(100, dtype=torch.long)
        self.names: dict[str, Any] = {"model": nn.Linear(4, 2), "train": data}
        self.pool: FakePool | None = None
        self.lines: list[str] = []
        self.threads: list[str] = []
        self.does: Any = None  # called by every line
        self.displays: dict[str, Any] = {}
        self.shown: list[FakeRun] = []
        self.panel = ControlPanel(
            self.dtrain,
            names=lambda: self.names,
            hidden={},
            pool=lambda: self.pool,
            view_of=self.view_of,
            publish=self.publish,
        )

    def dtrain(self, line: str) -> Any:
        self.lines.append(line)
        self.threads.append(threading.current_thread().name)
        return None if self.does is None else self.does()

    def view_of(self, run: FakeRun) -> widgets.Widget:
        self.shown.append(run)
        return widgets.HTML("live")

    def publish(self, content: dict[str, Any], *, display_id: str, update: bool = False) -> None:
        assert update == (display_id in self.displays)
        self.displays[display_id] = content

    def look(self) -> None:
        self.panel._look_again()

    def press(self, name: str) -> None:
        self.panel.widgets.actions[name].button.click()
        assert self.panel.join(timeout_seconds=20)

    def told(self) -> str:
        return "".join(message.value for message in self.panel.widgets.messages.values())

    def row(self, name: str) -> str:
        return self.panel.widgets.actions[name].shown.value


@pytest.fixture
def kernel():
    kernel = Kernel()
    yield kernel
    if not kernel.panel._watcher.is_closed:
        kernel.panel.close()
    assert kernel.panel.join(timeout_seconds=20)


@pytest.fixture
def training(kernel):
    """A kernel whose pool has a run."""
    kernel.pool = FakePool(run=FakeRun())
    kernel.look()
    return kernel


# the line


def test_the_line_follows_what_is_typed(kernel):
    kernel.panel.widgets.form["lr"].value = "1e-3"
    kernel.panel.widgets.form["loss"].value = "--loss cross_entropy"
    assert "%dtrain fit model train --loss cross_entropy --lr 1e-3<" in kernel.row("fit")


def test_a_press_runs_the_line_that_is_shown(kernel):
    kernel.panel.widgets.n.value = "3"
    shown = kernel.row("start")
    kernel.press("start")
    assert "%dtrain start -n 3<" in shown
    assert kernel.lines == ["start -n 3"]


def test_every_line_runs_beside_the_main_thread(training):
    for name in ("shutdown", "pause"):
        training.press(name)
    assert training.threads == ["dnb-panel-pool", "dnb-panel-run"]


def test_what_is_typed_is_shown_and_not_run_by_the_browser(kernel):
    kernel.panel.widgets.form["name"].value = "<script>x</script>"
    assert "&lt;script&gt;" in kernel.row("fit")
    assert "<script>" not in kernel.row("fit")


def test_an_optimizer_of_the_users_own_brings_its_learning_rate(kernel):
    kernel.names["mine"] = torch.optim.SGD(kernel.names["model"].parameters(), lr=0.1)
    kernel.panel.refill()
    kernel.panel.widgets.form["lr"].value = "1"
    kernel.panel.widgets.form["optimizer"].value = "--optimizer mine"
    assert kernel.panel.widgets.form["lr"].disabled
    assert kernel.panel.widgets.actions["fit"].line == "fit model train --loss cross_entropy --optimizer mine"


def test_a_loader_brings_its_batch_size(kernel):
    kernel.names["loader"] = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*kernel.names["train"]))
    kernel.panel.refill()
    kernel.panel.widgets.form["batch_size"].value = "16"
    kernel.panel.widgets.form["train"].value = "loader"
    assert kernel.panel.widgets.actions["fit"].line == "fit model loader --loss cross_entropy"


# the choices


def test_the_loss_is_guessed_from_the_targets(kernel):
    assert kernel.panel.widgets.actions["fit"].line == "fit model train --loss cross_entropy"
    kernel.names["curve"] = torch.zeros(100, 4), torch.zeros(100, 2)
    kernel.panel.refill()
    kernel.panel.widgets.form["train"].value = "curve"
    assert kernel.panel.widgets.actions["fit"].line == "fit model curve --loss mse_loss"


def test_a_loss_that_was_chosen_is_not_guessed_anew(kernel):
    kernel.panel.widgets.form["loss"].value = ""
    kernel.panel.refill()
    kernel.names["curve"] = torch.zeros(100, 4), torch.zeros(100, 2)
    kernel.panel.refill()
    kernel.panel.widgets.form["train"].value = "curve"
    assert kernel.panel.widgets.actions["fit"].line == "fit model curve"


def test_choices_follow_the_variables_after_a_cell(kernel):
    kernel.names["other"] = nn.Linear(4, 2)
    kernel.panel.refill()
    assert [words for _, words in kernel.panel.widgets.form["model"].options] == ["model", "other"]


def test_what_was_chosen_stays_while_it_fits(kernel):
    kernel.names["other"] = nn.Linear(4, 2)
    kernel.panel.refill()
    kernel.panel.widgets.form["model"].value = "other"
    kernel.names["third"] = nn.Linear(4, 2)
    kernel.panel.refill()
    assert kernel.panel.widgets.form["model"].value == "other"


def test_without_a_model_there_is_no_line_but_the_reason(kernel):
    del kernel.names["model"]
    kernel.panel.refill()
    assert kernel.panel.widgets.actions["fit"].button.disabled
    assert "no fitting model: define a torch.nn.Module" in kernel.row("fit")


def test_engines_to_remove_are_chosen(kernel):
    kernel.pool = FakePool(engines=(0, 1, 2))
    kernel.look()
    kernel.panel.widgets.leaving.value = (1, 2)
    kernel.press("remove")
    assert kernel.lines == ["remove 1-2"]


# pool and run


def test_a_pool_that_a_cell_started_is_seen(kernel):
    kernel.pool = FakePool()
    kernel.panel.refill()
    wait_until(lambda: "2 engines on host-a" in kernel.panel.widgets.pool_state.value)


def test_fit_says_why_it_waits_while_a_run_is_active(training):
    assert training.panel.widgets.actions["fit"].button.disabled
    assert "run digits is running: stop it, or wait for its end" in training.row("fit")


def test_the_end_of_a_run_is_heard(training):
    training.pool.run.end("finished")
    wait_until(lambda: not training.panel.widgets.actions["fit"].button.disabled)
    assert "finished after" in training.panel.widgets.run_state.value


def test_a_run_that_dies_is_told_with_its_reason(training):
    training.pool.run.end("failed", error="engine <0> died")
    wait_until(lambda: "failed at step 0: engine &lt;0&gt; died" in training.panel.widgets.run_state.value)


def test_a_pool_that_is_lost_is_told(kernel, monkeypatch):
    def lost(_self):
        raise PoolError("its hub has died")

    kernel.pool = FakePool(run=FakeRun())
    monkeypatch.setattr(FakePool, "facts", property(lost))
    kernel.look()
    assert "its hub has died" in kernel.panel.widgets.pool_state.value
    assert not kernel.panel.widgets.actions["start"].button.disabled


def test_pause_gives_way_to_resume(training):
    training.pool.run.status = "paused"
    training.look()
    rows = {name: training.panel.widgets.actions[name].box.layout.display for name in ("pause", "resume")}
    assert rows == {"pause": "none", "resume": ""}


# while a line is under way


def test_while_engines_are_added_the_pool_waits_and_the_run_can_be_steered(training):
    done = threading.Event()
    training.does = lambda: done.wait(20)
    training.panel.widgets.actions["add"].button.click()
    assert training.panel.widgets.actions["shutdown"].button.disabled
    assert "<b>Working</b>" in training.told()
    assert not training.panel.widgets.actions["stop"].button.disabled
    done.set()
    assert training.panel.join(timeout_seconds=20)
    assert not training.panel.widgets.actions["shutdown"].button.disabled


def test_how_far_long_work_is_stands_beside_its_line(kernel):
    told = threading.Event()

    def start_slowly():
        with long_work("starting 2 engines") as report:
            report("1 of 2 is there")
            assert told.wait(20)

    kernel.does = start_slowly
    kernel.panel.widgets.actions["start"].button.click()
    wait_until(lambda: "starting 2 engines: 1 of 2 is there" in kernel.told())
    told.set()


def test_a_second_press_does_not_run_the_line_again(kernel):
    done = threading.Event()
    kernel.does = lambda: done.wait(20)
    for _ in range(2):
        kernel.panel.widgets.actions["start"].button.click()
    done.set()
    assert kernel.panel.join(timeout_seconds=20)
    assert kernel.lines == ["start"]


def test_what_a_verb_says_is_in_the_panel(kernel, capsys):
    kernel.does = lambda: output.say("engine 2 joined, <b>with</b> 1 thread")
    kernel.press("start")
    assert "<b>Done</b>" in kernel.told()
    assert "engine 2 joined, &lt;b&gt;with&lt;/b&gt; 1 thread" in kernel.told()
    assert capsys.readouterr().out == ""


def test_an_error_is_one_escaped_message(kernel):
    def fail():
        raise PoolError("no <room>")

    kernel.does = fail
    kernel.press("start")
    assert "<b>Failed</b>" in kernel.told()
    assert "PoolError: no &lt;room&gt;" in kernel.told()
    assert not kernel.panel.widgets.actions["start"].button.disabled


def test_an_engines_traceback_is_folded_behind_the_message(kernel):
    def fail():
        raise RunError("run 'digits': engine 1 failed", remote_traceback="Traceback\n  ZeroDivisionError")

    kernel.does = fail
    kernel.press("start")
    message, _, details = kernel.told().partition("<details>")
    assert "run &#x27;digits&#x27;: engine 1 failed</div>" in message
    assert "ZeroDivisionError" in details


# views


def test_fit_shows_the_live_view_in_the_panel(kernel):
    run = FakeRun()
    kernel.does = lambda: display.show(run, display="widget")
    kernel.press("start")
    assert kernel.shown == [run]
    assert kernel.panel.widgets.run_view.children[0].value == "live"


def shown_live(kernel: Kernel) -> FakeRun:
    """A run whose live view is in the panel."""
    run = FakeRun()
    kernel.pool = FakePool(run=run)
    kernel.does = lambda: display.show(run, display="widget")
    kernel.press("start")
    kernel.look()
    return run


def shown_buttons(kernel: Kernel) -> set[str]:
    return {name for name, action in kernel.panel.widgets.actions.items() if action.box.layout.display != "none"}


def test_beside_the_live_view_stand_only_buttons_that_it_has_not_and_that_do_not_wait_for_the_end(kernel):
    run = shown_live(kernel)
    assert shown_buttons(kernel) == {"add", "remove", "shutdown", "set", "checkpoint"}
    run.end("finished")
    kernel.panel._look_and_settle()
    assert {"plan", "fit", "dashboard"} <= shown_buttons(kernel)


def test_steps_are_counted_in_one_place(kernel):
    run = shown_live(kernel)
    assert kernel.panel.widgets.run_state.value == ""
    run.end("finished")
    wait_until(lambda: "finished after" in kernel.panel.widgets.run_state.value)


def test_choices_are_folded_when_a_run_is_shown_below_them(kernel):
    assert kernel.panel.widgets.choices.selected_index == 0
    shown_live(kernel)
    assert kernel.panel.widgets.choices.selected_index is None


def test_when_the_run_has_ended_its_plain_chart_stays(kernel):
    run = FakeRun()
    kernel.pool = FakePool(run=run)
    kernel.does = lambda: display.show(run, display="widget")
    kernel.press("start")
    run.end("finished")
    wait_until(lambda: isinstance(kernel.panel.widgets.run_view.children[0], widgets.Output))
    assert PLOTLY_MIME in kernel.panel.widgets.run_view.children[0].outputs[0]["data"]


def test_a_saved_notebook_says_what_was_there_and_how_to_open_it_again(kernel):
    kernel.panel.show()
    (content,) = kernel.displays.values()
    assert (WIDGET_MIME in content, content["text/plain"]) == (True, FALLBACK)


def test_two_displays_are_two_views_of_the_same_widgets(kernel):
    kernel.panel.show()
    kernel.panel.show()
    one, other = kernel.displays.values()
    assert one == other


def test_a_closed_panel_leaves_text_and_hears_nothing_more(training):
    run = training.pool.run
    training.panel.show()
    training.panel.close()
    assert training.panel.join(timeout_seconds=20)
    assert list(training.displays.values()) == [{"text/plain": FALLBACK}]
    assert run.listeners == []


def test_every_field_has_a_label(kernel):
    form = kernel.panel.widgets.form
    fields = (*form.inputs, kernel.panel.widgets.n, kernel.panel.widgets.leaving, kernel.panel.widgets.lr)
    assert all(field.description for field in fields)


# the verb


class FakeShell:
    def __init__(self) -> None:
        self.user_ns: dict[str, Any] = {}
        self.user_ns_hidden: dict[str, Any] = {}
        self.callbacks: list[Any] = []
        self.events = types.SimpleNamespace(
            register=lambda _name, callback: self.callbacks.append(callback),
            unregister=lambda _name, callback: self.callbacks.remove(callback),
        )


@pytest.fixture
def shell(monkeypatch):
    monkeypatch.setenv("DNB_DISPLAY", "widget")
    defaults = ControlPanel.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "publish", lambda *_args, **_options: None)
    monkeypatch.setitem(defaults, "pool", lambda: None)
    yield FakeShell()
    close_panel()


def test_without_widgets_the_verb_says_what_does_the_same(monkeypatch, capsys):
    monkeypatch.setenv("DNB_DISPLAY", "text")
    open_panel(FakeShell(), dtrain=print)
    said = capsys.readouterr().out
    assert "needs widgets" in said
    assert "%dtrain start -n 2" in said


def test_a_second_panel_is_the_first_one(shell):
    open_panel(shell, dtrain=print)
    first = panel._panel
    open_panel(shell, dtrain=print)
    assert panel._panel is first
    assert len(shell.callbacks) == 1


def test_a_closed_panel_is_not_told_of_cells_any_more(shell):
    open_panel(shell, dtrain=print)
    close_panel()
    assert shell.callbacks == []
