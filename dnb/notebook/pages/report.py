"""A run as one page of HTML that needs nothing else: no kernel, no network, and if need be no JavaScript."""

from __future__ import annotations

import html
import json
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from dnb.api.runs.exporting import replacing
from dnb.hub.history.run_files import NOT_READ, RunSummary, read_summary
from dnb.notebook.pages.snapshot import PLOTLY_MIME, bundle
from dnb.notebook.text.summary import duration, one_line, summary
from dnb.notebook.views import RunView, WorkerView
from dnb.units import amount, milliseconds

log = logging.getLogger(__name__)

NOT_KNOWN = "not known"
# Events come by the thousand if an engine dies every second: the first and last ones tell the story.
MOST_EVENTS = 400
MAX_CELL = 2000
# Options that are texts of several lines, and the titles of their sections.
_TEXTS = {"layers": "Model", "code": "Code of the cell"}
# What a reader asks for first; all other options follow.
_FIRST = ("model", "loss", "step", "optimizer", "lr", "scheduler", "metrics", "epochs", "batch_size", "strategy")

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
pre { white-space: pre-wrap; font: inherit; margin: 0; }
.scroll { overflow-x: auto; } #chart { min-height: 20rem; } #chart img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .15rem .9rem .15rem 0; }
thead th { border-bottom: 1px solid; } tbody tr + tr { border-top: 1px solid rgba(128, 128, 128, .25); }
.unknown { opacity: .65; font-style: italic; }
@media print { body { max-width: none; } h2, tr { break-inside: avoid; } }
"""
# Nothing is fetched, and nothing but what stands in the page is run.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; base-uri 'none'; form-action 'none'"
)
_DRAW = """
const drawing = JSON.parse(document.getElementById("drawing").textContent);
const place = document.getElementById("chart");
const image = place.firstElementChild;
try {
  if (image) image.hidden = true;
  Plotly.newPlot(place, drawing.data, drawing.layout, {...drawing.config, responsive: true});
} catch (error) {
  if (image) image.hidden = false;
  console.error(error);
}
"""


class SavedRun(RunView, Protocol):
    """A run with a folder."""

    @property
    def folder(self) -> Path:
        """The folder of run.json."""


def write_report(run: SavedRun, path: str | Path) -> Path:
    """Write the page; it takes its place when it is whole.

    Raises:
        ArgumentError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs  # plotly: not before somebody wants a picture

    page = report(run, saved=_read_saved(run.folder), plotlyjs=get_plotlyjs())
    with replacing(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return Path(path)


def report(run: RunView, *, saved: RunSummary | None, plotlyjs: str, now: datetime | None = None) -> str:
    """Build the page.

    Args:
        run: as it is now.
        saved: what run.json says of it, if that is there.
        plotlyjs: the library's source, which goes into the page.
        now: when it is written.
    """
    content = bundle(run, with_image=True)
    when = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    title = one_line(run.name)
    options = {} if saved is None else saved.options
    parts = [
        f"<h1>{_safe(title)}</h1>",
        f"<p>{_safe(_begun(run))}Report of {when}.</p>",
        _section("Summary", f"<pre>{_safe(summary(run))}</pre>"),
        _section("Charts", _chart(content)),
        _section("Measured", _measured(run)),
        _section("Prediction of the plan", _prediction(run)),
        _section("Engines", _engines(run.workers)),
        _section("Events", _events(run)),
        _section("Options", _options(options)),
        *(_section(title, _text(options.get(name))) for name, title in _TEXTS.items()),
        _section("Versions", _versions(saved)),
    ]
    drawing = json.dumps(content[PLOTLY_MIME], allow_nan=False)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(title)}</title><style>{_STYLE}</style></head>\n<body><main>{''.join(parts)}</main>\n"
        f'<script id="drawing" type="application/json">{_in_script(drawing)}</script>\n'
        f"<script>{plotlyjs}</script>\n<script>{_DRAW}</script>\n</body></html>\n"
    )


# parts


def _section(title: str, content: str) -> str:
    """Write a section; nothing if there is no content."""
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


def _chart(content: Mapping[str, Any]) -> str:
    """Write the image, which the script replaces by the chart: without JavaScript it stays."""
    image = content.get("image/png")
    words = _safe(content["text/plain"])
    fallback = (
        f'<img alt="{words}" src="data:image/png;base64,{image}">'
        if image
        else "<noscript>The chart needs JavaScript; the summary has its numbers.</noscript>"
    )
    return f'<div class="scroll"><div id="chart">{fallback}</div></div>'


def _measured(run: RunView) -> str:
    rows = []
    for key in run.history:
        steps, values = run.history.column(key)
        finite = values[abs(values) < float("inf")]
        if len(values) and key != "digest":
            extremes = [f"{finite.min():.6g}", f"{finite.max():.6g}"] if len(finite) else [None, None]
            rows.append([key, f"{len(values):,}", f"{steps[-1]:,}", f"{values[-1]:.6g}", *extremes])
    return _table(["what", "values", "last at step", "last", "lowest", "highest"], rows)


def _prediction(run: RunView) -> str:
    prediction = run.prediction
    if prediction is None:
        return ""
    facts = {
        "step": milliseconds(prediction.step_seconds),
        "until the last gradient": milliseconds(prediction.compute_seconds),
        "bubble": f"{prediction.bubble:.0%}",
        "memory of an engine of each stage": ", ".join(amount(each) for each in prediction.stage_bytes),
        "for batches of": f"{prediction.batch_size:,} samples",
    }
    return _facts(facts)


def _engines(workers: Sequence[WorkerView]) -> str:
    columns = ["engine", "host", "pid", "state", "device", "threads", "compute", "wait", "data", "idle", "samples",
               "steps", "most memory"]  # fmt: skip
    return _table(columns, [_engine(worker) for worker in workers])


def _engine(worker: WorkerView) -> list[Any]:
    shares = [worker.compute, worker.wait, worker.data, worker.idle]
    peak = worker.peak_rss_bytes
    return [
        worker.engine,
        worker.host,
        worker.pid,
        worker.state,
        worker.device,
        worker.cores,
        *([f"{share:.0%}" for share in shares] if any(shares) else [None] * len(shares)),
        f"{worker.samples:,}",
        f"{worker.steps:,}",
        None if peak is None else amount(peak),
    ]


def _events(run: RunView) -> str:
    events = list(run.events)
    rows: list[list[Any]] = [
        [_moment(event.time), f"{event.step:,}", event.kind, "" if event.engine is None else event.engine, event.text]
        for event in events
    ]
    if len(rows) > MOST_EVENTS:
        half = MOST_EVENTS // 2
        gap = ["", "", "", "", f"{len(rows) - 2 * half:,} events are left out here; events.jsonl has all"]
        rows = [*rows[:half], gap, *rows[-half:]]
    return _table(["time (UTC)", "after step", "event", "engine", "what happened"], rows)


def _versions(saved: RunSummary | None) -> str:
    here = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("dnb", "torch", "numpy", "plotly")},
    }
    then = {} if saved is None else saved.versions
    rows = [[name, "" if name == "plotly" else then.get(name), here[name]] for name in here]
    return _table(["package", "that trained", "that wrote this page"], rows)


# pieces


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [[name.replace("_", " "), _in_words(value)] for name, value in facts.items()]
    return _table(["name", "value"], rows)


def _options(options: Mapping[str, Any]) -> str:
    order = [*(name for name in _FIRST if name in options), *(name for name in options if name not in _FIRST)]
    return _facts({name: options[name] for name in order if name not in _TEXTS})


def _text(value: Any) -> str:
    return f"<pre><code>{_safe(value)}</code></pre>" if isinstance(value, str) and value else ""


def _in_words(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else value


def _table(columns: Iterable[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{_safe(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return f'<td class="unknown">{NOT_KNOWN}</td>'
    return f"<td>{_safe(one_line(str(value), limit=MAX_CELL))}</td>"


def _begun(run: RunView) -> str:
    if not run.started:
        return ""
    return f"Submitted {_moment(run.started)} UTC, {duration(run.elapsed_seconds)} in all. "


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else NOT_KNOWN


def _safe(text: str) -> str:
    return html.escape(text)


def _in_script(text: str) -> str:
    """Escape JSON so that it cannot end its script element, nor begin a comment in it."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read_saved(folder: Path) -> RunSummary | None:
    try:
        return read_summary(folder)
    except NOT_READ as error:
        log.info("the report has no options: %s cannot be read: %s", folder, error)
        return None
