"""Several runs beside each other: `%dtrain compare a b`; live while one of them goes on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np
from IPython import get_ipython

from dnb.api import pools
from dnb.api.runs.run import Run
from dnb.api.runs.run_folders import RUNS_FOLDER, is_folder
from dnb.errors import ArgumentError
from dnb.notebook.charts.compare_figure import comparison
from dnb.notebook.charts.static_image import png
from dnb.notebook.charts.x_axis import checked_kind
from dnb.notebook.live.frontend import choose_display
from dnb.notebook.live.painter import PAINT_INTERVAL_SECONDS, Painter
from dnb.notebook.pages.snapshot import PLOTLY_MIME, plotly_json, publish
from dnb.notebook.text.summary import duration, inert, number, one_line, rate
from dnb.notebook.views import SET_APART, RunView, has_ended

if TYPE_CHECKING:
    from dnb.notebook.live.browser.live_figure import LiveFigure

_COLUMNS = ("run", "status", "steps", "loss", "best val_loss")
_LAST_COLUMNS = ("samples/s", "duration", "engines")
# Columns of a history that are no metrics of the user's.
_MEASURED = frozenset({"loss", "val_loss", "lr", "samples_per_second", "grad_norm", "seconds", "digest"})
_MAX_METRICS = 4
_MAX_LISTED = 12  # of the runs that there are


def show_runs(runs: Iterable[RunView] | Mapping[str, RunView], *, x: str = "step") -> None:
    """Show several runs in one chart, and keep it up to date until the last of them has ended.

    Args:
        runs: two or more; as a mapping, by the labels that they are to bear.
        x: what the x axis counts: "step", "samples" or "time".

    Raises:
        ArgumentError: no runs, or no such x axis.
    """
    named = dict(runs) if isinstance(runs, Mapping) else labelled(runs)
    if not named:
        raise ArgumentError("compare which runs? %dtrain compare a b")
    checked_kind(x)
    kind = choose_display(shell=get_ipython())
    if kind == "none":
        return
    if kind == "widget" and not all(has_ended(run) for run in named.values()):
        Comparison(named, x=x)  # its painter holds it
        return
    content = bundle(named, x=x, with_image=kind == "text")
    publish(content, display_id=f"dnb-compare-{uuid.uuid4().hex[:8]}")


def labelled(runs: Iterable[RunView]) -> dict[str, RunView]:
    """Runs by their names; of several with one name the later ones get a number."""
    named: dict[str, RunView] = {}
    for run in runs:
        label, count = run.name, 1
        while label in named:
            count += 1
            label = f"{run.name} ({count})"
        named[label] = run
    return named


def find_run(word: str, *, names: Mapping[str, Any], folder: Path = RUNS_FOLDER) -> RunView:
    """Find the run that a word stands for: a variable, the name of a run, or its folder.

    Raises:
        ArgumentError: there is none; with those that there are.
    """
    held = names.get(word)
    if isinstance(held, Run):
        return held
    pool = pools.current_pool()
    if pool is not None and pool.run is not None and pool.run.name == word:
        return pool.run
    for place in (folder / word, Path(word).expanduser()):
        if is_folder(place):
            return Run.open(place)
    what = f"{word!r} is a {type(held).__name__}, not a run" if word in names else f"{word!r} is no run"
    raise ArgumentError(f"{what}; {_known(names, folder)}")


def _known(names: Mapping[str, Any], folder: Path) -> str:
    variables = sorted(name for name, value in names.items() if isinstance(value, Run) and not name.startswith("_"))
    # a name may be any text, thus shown on one line
    stored = sorted(one_line(place.name, limit=60) for place in folder.iterdir()) if folder.is_dir() else []
    more = [f"and {len(stored) - _MAX_LISTED} more"] if len(stored) > _MAX_LISTED else []
    parts = [f"variables {', '.join(variables)}"] if variables else []
    parts += [f"in {folder}: {', '.join([*stored[:_MAX_LISTED], *more])}"] if stored else []
    return f"there are {'; '.join(parts)}" if parts else f"there are no runs yet, neither as variables nor in {folder}"


def bundle(runs: Mapping[str, RunView], *, x: str = "step", with_image: bool = False) -> dict[str, Any]:
    """Several runs as a mime bundle: the chart, the table, and an image if asked."""
    drawing = comparison(runs, x=x)
    table = table_text(runs)
    content = {PLOTLY_MIME: plotly_json(_with_table(drawing, table)), "text/plain": table}
    image = png(_with_table(drawing, table)) if with_image else None
    return content if image is None else {**content, "image/png": image}


def table_text(runs: Mapping[str, RunView]) -> str:
    """Write a line for each run: how it ended, its losses, pace and engines."""
    metrics = metric_keys(runs.values())
    head = (*_COLUMNS, *(one_line(key, limit=30) for key in metrics), *_LAST_COLUMNS)
    rows = [head, *(_row(label, run, metrics) for label, run in runs.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def metric_keys(runs: Iterable[RunView]) -> list[str]:
    """Return the metrics of runs: on validation data where any of them has that, else of the training."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.history) if key not in _MEASURED]
    return [key for key in keys if f"val_{key}" not in keys][:_MAX_METRICS]


def _row(label: str, run: RunView, metrics: Sequence[str]) -> tuple[str, ...]:
    losses, validation = run.history.column("loss")[1], run.history.column("val_loss")[1]
    finite = validation[np.isfinite(validation)]
    per_second = rate(run)
    return (
        one_line(label, limit=40),
        run.status,
        f"{run.step:,}",
        number(float(losses[-1])) if len(losses) else "none",
        number(float(finite.min())) if len(finite) else "none",
        *(number(float(last[0])) if len(last := run.history.column(key)[1][-1:]) else "none" for key in metrics),
        f"{per_second:,.0f}" if per_second else "unknown",
        duration(run.elapsed_seconds),
        _engines(run),
    )


def _engines(run: RunView) -> str:
    """Count the engines that work, or did at the end; and all, if others took part before."""
    working = {worker.engine for worker in run.workers if worker.state not in SET_APART}
    if has_ended(run) and not run.workers:  # read from its folder
        working = set(run.utilisation.last_engines)
    num_all = len({*run.utilisation.engines, *(worker.engine for worker in run.workers)})
    if not num_all:
        return "unknown"
    return f"{len(working)} (of {num_all})" if len(working) < num_all else str(num_all)


def _with_table(drawing: dict[str, Any], table: str) -> dict[str, Any]:
    """Put the table below the chart, for readers of a saved notebook."""
    layout = drawing["layout"]
    pixels = 17 * (table.count("\n") + 1) + 16
    plot_pixels = layout["height"] - layout["margin"]["t"] - layout["margin"]["b"]
    text = inert(table).replace(" ", "\u00a0").replace("\n", "<br>")
    words = {
        "text": text,
        "showarrow": False,
        "align": "left",
        "x": 0,
        "xanchor": "left",
        "xref": "paper",
        "y": -(layout["margin"]["b"] + 4) / plot_pixels,
        "yanchor": "top",
        "yref": "paper",
        "font": {"size": 11, "family": "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"},
    }
    margin = {**layout["margin"], "b": layout["margin"]["b"] + pixels}
    notes = [*layout["annotations"], words]
    return {
        **drawing,
        "layout": {**layout, "margin": margin, "height": layout["height"] + pixels, "annotations": notes},
    }


class Comparison:
    """The live view of several runs; ends with the last of them, as plain output.

    Args:
        runs: by label.
        x: what the x axis counts.
        interval_seconds: the least time between two paintings.
        publish: how output gets into the notebook.
    """

    def __init__(
        self,
        runs: Mapping[str, RunView],
        *,
        x: str = "step",
        interval_seconds: float = PAINT_INTERVAL_SECONDS,
        publish: Callable[..., None] = publish,
    ) -> None:
        self._runs = runs
        self._x = x
        self._publish = publish
        self._display_id = f"dnb-compare-{uuid.uuid4().hex[:8]}"
        self.figure: LiveFigure | None = None
        self.box = widgets.VBox([])
        self._publish({**self.box._repr_mimebundle_(), "text/plain": table_text(runs)}, display_id=self._display_id)
        self._watched: Sequence[RunView] = [run for run in runs.values() if not has_ended(run)]
        self._painter = Painter(
            "comparison",
            paint=self.paint,
            rest=self._fit_to_page,
            is_over=lambda: all(has_ended(run) for run in self._watched),
            finish=self._finish,
            interval_seconds=interval_seconds,
            is_resting=lambda: self.figure is not None and self.figure.is_resting,
        )
        self._listener = self._painter.wake
        for run in self._watched:
            run.add_listener(self._listener)
        self._painter.start()

    def paint(self) -> None:
        """Bring the chart up to date, or stop if the user has closed it."""
        if self._is_closed():
            self.close()
            return
        drawing = _with_table(comparison(self._runs, x=self._x), table_text(self._runs))
        if self.figure is not None:
            self.figure.paint(drawing)
            return
        from dnb.notebook.live.browser.live_figure import LiveFigure  # plotly: seconds, in this thread

        self.figure = LiveFigure(drawing)
        self.box.children = (self.figure,)

    def close(self) -> None:
        """Stop painting; the runs go on."""
        self._painter.close()

    def join(self, *, timeout_seconds: float) -> bool:
        """Wait for the painter to end; return True if it did."""
        return self._painter.join(timeout_seconds=timeout_seconds)

    def _is_closed(self) -> bool:
        return any(widget is not None and widget.comm is None for widget in (self.box, self.figure))

    def _fit_to_page(self) -> None:
        if self.figure is not None:
            self.figure.fit_to_page()

    def _finish(self) -> None:
        for run in self._watched:
            run.remove_listener(self._listener)
        if not self._painter.is_closed:
            self._publish(bundle(self._runs, x=self._x), display_id=self._display_id, update=True)
            for widget in (self.box, self.figure):
                if widget is not None and not (self.figure is not None and self.figure.was_asked_again):
                    widget.close()
