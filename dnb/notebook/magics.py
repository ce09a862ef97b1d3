"""`%dtrain` and `%%dtrain`: every verb parses its line and calls the function of the same name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython.core.display_functions import display as publish
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from dnb import resuming, training
from dnb.errors import ArgumentError, PoolError, nearest
from dnb.notebook import compare, engine_words
from dnb.notebook.arguments import bind, parse_settings, split_line
from dnb.notebook.display import keep, read_run, show, warm_up
from dnb.notebook.frontend import choose_display
from dnb.notebook.outlet import say
from dnb.notebook.plan_verb import PlanVerb
from dnb.notebook.pool_verbs import PoolVerbs
from dnb.notebook.wording import one_line
from dnb.planning.gradient_samples import USUAL_STEPS
from dnb.pool.engine_pool import describe_engines, describe_restarts
from dnb.proofs import Proof
from dnb.run import Run

NEXT_AFTER_START = """\
next: %dtrain fit model train --loss cross_entropy    train on these engines
      %px import os; os.getpid()                      run a line on every engine
      %dtrain status    %dtrain shutdown"""


@magics_class
class DtrainMagics(PoolVerbs, PlanVerb, Magics):
    """One root, verbs as in the API; arguments name variables, or are expressions in braces."""

    @no_var_expand
    @line_cell_magic
    def dtrain(self, line: str, cell: str | None = None) -> Any:
        """%dtrain VERB [ARGUMENTS].

        Of the pool: start, status, add, remove, spares, chaos, shutdown. Of the run: plan, fit, wait, pause, resume,
        stop, set, prove, checkpoint, attach, dashboard, compare, export. Of both: panel.

        As a cell magic, %%dtrain [--on 0,2-3|all] [--local] runs the cell on engines.
        """
        if cell is not None:
            return self._call(self._cell, line, verb="(cell)", cell=cell)
        return self._run_line(line)

    def _run_line(self, line: str) -> Any:
        verb, _, rest = line.strip().partition(" ")
        verbs = {name.removeprefix("_do_"): getattr(self, name) for name in dir(self) if name.startswith("_do_")}
        if verb not in verbs:
            raise ArgumentError(f"%dtrain has no verb {verb!r}: {nearest(verb, verbs)}")
        return self._call(verbs[verb], rest, verb=verb)

    def _call(self, function: Callable[..., Any], line: str, *, verb: str, **more: Any) -> Any:
        """Bind the line to a verb's own parameters; a verb that takes `options` binds them itself."""
        if "line" in inspect.signature(function).parameters:
            return function(line)
        options = bind(function, line, names=self._names(), verb=verb, left_out=frozenset(more))
        return function(**options, **more)

    def _names(self) -> dict[str, Any]:
        assert self.shell is not None
        return dict(self.shell.user_ns)

    # the pool

    def _do_start(self, line: str) -> None:
        defaults = {name: parameter.default for name, parameter in inspect.signature(training.start).parameters.items()}
        options = bind(training.start, line, names=self._names(), verb="start")
        if choose_display(shell=self.shell) == "widget":
            warm_up()
        pool, notices = training.open_pool(**(defaults | options))
        view = pool.client.direct_view("all")
        view.block = True
        view.activate()  # registers %px
        say("\n".join([*notices, describe_engines(pool.engines), NEXT_AFTER_START]))

    def _do_status(self) -> None:
        pool = training.current_pool()
        if pool is None:
            say("no pool is running: %dtrain start -n 2")
            return
        facts = pool.facts
        held = "no run" if facts.run is None else f"run {facts.run!r} is {facts.run_status}: %dtrain attach shows it"
        told = [describe_engines(pool.engines), str(held if pool.run is None else pool.run), pool.trouble]
        told.append(one_line(describe_restarts(facts.restarts), limit=400))
        say("\n".join(line for line in told if line))

    def _do_shutdown(self) -> None:
        say("the pool is shut down" if training.shutdown() else "no pool was running")

    # runs

    def _do_fit(self, line: str) -> Run:
        options = bind(_fit_with_display, line, names=self._names(), verb="fit", left_out=frozenset({"pool"}))
        display = options.pop("display", None)
        model, train = options.pop("model"), options.pop("train")
        run = training.fit(model, train, **options)
        show(run, display=display)
        if options.get("prove") is not None:
            publish(run.prove(options["prove"]))
        return run

    def _do_prove(self, line: str) -> Proof:
        """Of the last run; the table is the cell's value."""
        function = _prove_steps if line.strip() and not line.lstrip().startswith("-") else _prove
        return _last_run().prove(**bind(function, line, names=self._names(), verb="prove"))

    def _do_wait(self, timeout: float | None = None) -> Run:
        run = _last_run()
        run.wait(timeout)
        keep(run)
        return run

    def _do_pause(self) -> None:
        _last_run().pause()

    def _do_resume(self, line: str) -> Run | None:
        """A path goes on from a checkpoint; without one the paused run does, with a mended function if one is given."""
        if not line.strip() or line.lstrip().startswith("-"):
            _last_run().resume(**bind(_mended, line, names=self._names(), verb="resume"))
            return None
        options = bind(_resume_with_display, line, names=self._names(), verb="resume", left_out=frozenset({"pool"}))
        display = options.pop("display", None)
        run = resuming.resume(options.pop("path"), **options)
        show(run, display=display)
        return run

    def _do_checkpoint(self, line: str) -> None:
        function = _checkpoint_at if line.strip() else _checkpoint
        options = bind(function, line, names=self._names(), verb="checkpoint")
        say(f"the checkpoint is in {_last_run().checkpoint(**options)}")

    def _do_stop(self) -> Run:
        run = _last_run()
        run.stop()
        run.wait()
        keep(run)
        return run

    def _do_set(self, line: str) -> None:
        _last_run().set(**parse_settings(line, names=self._names()))

    def _do_attach(
        self,
        name: str | None = None,
        model: Any = None,
        display: str | None = None,
        *,
        steer: bool = False,
        clear: bool = False,
    ) -> Run:
        run = training.attach(name, model=model, steer=steer, clear=clear)
        show(run, display=display)
        return run

    def _do_dashboard(self, line: str) -> None:
        """Of the last run; of another one by its variable, its name, or its folder."""
        function = _dashboard_of if line.strip() and not line.lstrip().startswith("-") else _dashboard
        options = bind(function, line, names=self._names(), verb="dashboard")
        show(options.pop("run", None) or _last_run(), **options)

    def _do_export(self, line: str) -> None:
        options = bind(_export, line, names=self._names(), verb="export")
        run = read_run(options["run"]) if options.get("run") is not None else _last_run()
        say(f"run {run.name!r} is written to {run.export(options['path'])}")

    def _do_panel(self, *, close: bool = False) -> None:
        from dnb.notebook.control_panel import close_panel, open_panel  # ipywidgets: not before somebody looks

        if close:
            close_panel()
        else:
            open_panel(self.shell, dtrain=self._run_line)

    def _do_compare(self, line: str) -> None:
        """Runs by variable, name or folder, in any number; `--x time` counts seconds."""
        words, flags = [word.text for word in split_line(line)], []
        while flag := next((word for word in words if word.startswith("--")), None):
            place = words.index(flag)
            flags += words[place : place + 2]  # with its value
            del words[place : place + 2]
        options = bind(_compare_flags, " ".join(flags), names=self._names(), verb="compare")
        compare.show_runs({word: compare.find_run(word, names=self._names()) for word in words}, **options)

    # cells on engines

    def _cell(self, on: str = "all", *, local: bool = False, cell: str = "") -> None:
        pool = training.current_pool()
        if pool is None:
            raise PoolError("no pool is running: %dtrain start -n 2")
        known = [engine.id for engine in pool.engines]
        targets = known if on == "all" else engine_words.read_ids(on, known=known, example="--on 0,2-3")
        view = pool.client[targets]
        result = view.execute(cell, silent=False, block=False)
        if local:
            assert self.shell is not None
            self.shell.run_cell(cell)
        result.wait()
        result.display_outputs()
        result.get()


def _fit_with_display() -> None:
    """Stands for `dnb.fit` with one flag more; its signature is what counts."""


def _resume_with_display() -> None:
    """Stands for `dnb.resume`, likewise."""


for _stand_in, _function in ((_fit_with_display, training.fit), (_resume_with_display, resuming.resume)):
    _signature = inspect.signature(_function)
    _stand_in.__signature__ = _signature.replace(  # type: ignore[attr-defined]
        parameters=[
            *_signature.parameters.values(),
            inspect.Parameter("display", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None"),
        ]
    )


def _mended(step: Any = None, loss: Any = None) -> None:
    """`%dtrain resume` without a path."""


def _compare_flags(x: str = "step") -> None:
    """`%dtrain compare RUN RUN ... [--x step|samples|time]`."""


def _prove(steps: int = USUAL_STEPS) -> None:
    """`%dtrain prove [--steps 20]`."""


def _prove_steps(steps: int) -> None:
    """`%dtrain prove 20`."""


def _checkpoint() -> None:
    """`%dtrain checkpoint` alone."""


def _checkpoint_at(path: str | Path) -> None:
    """`%dtrain checkpoint PATH`."""


def _dashboard(display: str | None = None) -> None:
    """`%dtrain dashboard` alone."""


def _dashboard_of(run: str | Path, display: str | None = None) -> None:
    """`%dtrain dashboard RUN`."""


def _export(path: str | Path, run: str | Path | None = None) -> None:
    """`%dtrain export PATH [--run RUN]`."""


def _last_run() -> Run:
    pool = training.current_pool()
    if pool is None:
        raise PoolError("no pool is running: %dtrain start -n 2")
    if pool.run is None:
        raise ArgumentError("there is no run yet: %dtrain fit model train --loss cross_entropy")
    return pool.run
