"""The verbs of `%dtrain` that begin, steer and show runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from IPython.core.display_functions import display as publish

from dnb.api import pools, resuming, training
from dnb.api.proof.comparison import Proof
from dnb.api.runs.run import Run
from dnb.api.runs.run_views import check_display
from dnb.errors import ArgumentError
from dnb.notebook.commands.pool_commands import require_pool
from dnb.notebook.commands.verbs import run_line, verb
from dnb.notebook.live import compare
from dnb.notebook.live.display import keep, read_run, show
from dnb.notebook.magic_words import speak_magic
from dnb.notebook.output import say
from dnb.user_code.gradient_samples import USUAL_STEPS


@verb(
    "fit",
    group="run",
    flags_of=training.fit,
    left_out={"pool"},
    example="%dtrain fit model (X, y) --loss cross_entropy --epochs 5",
)
def _fit(model: Any, train: Any, *, display: str | None = None, **options: Any) -> Run:
    """Train a model on the pool's engines, and show the run."""
    check_display(display)
    run = training.fit(model, train, display="none", **options)
    speak_magic(run)
    show(run, display=display)
    if options.get("prove") is not None:
        publish(run.prove(options["prove"]))
    return run


@verb("wait", group="run", operand="timeout", example="%dtrain wait --timeout 10")
def _wait(*, timeout: float | None = None) -> Run:
    """Wait until the run has ended or paused.

    Args:
        timeout: seconds after which the waiting ends, while the run goes on.
    """
    run = _last_run()
    run.wait(timeout)
    keep(run)
    return run


@verb("pause", group="run")
def _pause() -> None:
    """Pause the run after the step under way."""
    run = _last_run()
    run.pause()
    say(f"run {run.name!r} pauses after the step under way; step {run.step:,} is done")


def _resume_paused(*, step: Any = None, loss: Any = None) -> None:
    """Let the paused run go on, with another step or loss function if one is given."""
    run = _last_run()
    run.resume(step=step, loss=loss)
    new = "".join(f" with another {name}" for name, given in (("step", step), ("loss", loss)) if given is not None)
    say(f"run {run.name!r} goes on after step {run.step:,}{new}")


@verb(
    "resume",
    group="run",
    flags_of=resuming.resume,
    left_out={"pool"},
    alone=_resume_paused,
    example="%dtrain resume --loss cross_entropy",
)
def _resume(path: Any, *, display: str | None = None, **options: Any) -> Run:
    """Go on from a checkpoint or a run's folder; without a path, the paused run does."""
    check_display(display)
    run = resuming.resume(path, display="none", **options)
    speak_magic(run)
    show(run, display=display)
    return run


@verb("stop", group="run")
def _stop() -> Run:
    """Stop the run after the step under way."""
    run = _last_run()
    run.stop()
    run.wait()
    keep(run)
    return run


@verb("set", group="run", args_of=[Run.set], has_settings=True, example="%dtrain set lr=1e-4 clip_norm=1")
def _set(**settings: Any) -> None:
    """Change settings of the run from the next step on, such as `lr=1e-4`."""
    if not settings:
        raise ArgumentError("%dtrain set needs NAME=VALUE: %dtrain set lr=1e-4")
    run = _last_run()
    run.set(**settings)
    new = ", ".join(f"{name}={value}" for name, value in settings.items())
    say(f"run {run.name!r}: {new} from the next step on; step {run.step:,} is done")


@verb("prove", group="run", args_of=[Run.prove], operand="steps", example="%dtrain prove 20")
def _prove(steps: int = USUAL_STEPS) -> Proof:
    """Compare the last run's first steps with a plain loop in one process; the table is the cell's value."""
    return _last_run().prove(steps)


@verb("checkpoint", group="run", args_of=[Run.checkpoint], operand="path")
def _checkpoint(path: str | Path | None = None) -> None:
    """Write a checkpoint of the run, now."""
    say(f"the checkpoint is in {_last_run().checkpoint(path)}")


@verb("attach", group="run", args_of=[pools.attach, show], operand="name", example="%dtrain attach digits")
def _attach(
    *,
    name: str | None = None,
    model: Any = None,
    display: str | None = None,
    steer: bool = False,
    clear: bool = False,
) -> Run:
    """Follow the run of a pool that another kernel has started."""
    run = pools.attach(name, model=model, steer=steer, clear=clear)
    speak_magic(run)
    show(run, display=display)
    if model is None:
        say(
            "run.model is the model with the weights of now, run.state_dict() these alone; --model model fills your own"
        )
    return run


@verb("dashboard", group="run", args_of=[show], operand="run", example="%dtrain dashboard digits")
def _dashboard(run: str | Path | None = None, *, display: str | None = None) -> None:
    """Show the last run; or another one by its variable, its name, or its folder."""
    show(run or _last_run(), display=display)


@verb("compare", group="run", args_of=[compare.show_runs], rest="runs", example="%dtrain compare first second --x time")
def _compare(shell: Any, runs: list[str], *, x: str = "step") -> None:
    """Draw runs by variable, name or folder, in any number, over each other; `--x time` counts seconds.

    Args:
        runs: two or more: variables, names of runs, or their folders.
    """
    names = dict(shell.user_ns)
    compare.show_runs({word: compare.find_run(word, names=names) for word in runs}, x=x)


@verb("export", group="run", args_of=[Run.export], example="%dtrain export losses.csv")
def _export(path: str | Path, *, run: str | Path | None = None) -> None:
    """Write the last run's values, or those of another one, to a file; its ending says the format.

    Args:
        run: another run than the last one: a variable, its name, or its folder.
    """
    shown = read_run(run) if run is not None else _last_run()
    say(f"run {shown.name!r} is written to {shown.export(path)}")


@verb("panel", group="run")
def _panel(shell: Any, *, close: bool = False) -> None:
    """Open the control panel: pool, training and run by mouse or keyboard.

    Args:
        close: close it in the place of opening one.
    """
    from dnb.notebook.control_panel.panel import close_panel, open_panel  # ipywidgets: not before somebody looks

    if close:
        close_panel()
    else:
        open_panel(shell, dtrain=lambda line: run_line(line, shell=shell))


def _last_run() -> Run:
    pool = require_pool()
    if pool.run is None:
        raise ArgumentError("there is no run yet: %dtrain fit model train --loss cross_entropy")
    return pool.run
