"""Results: a line per row as soon as it is there, and JSON with the machine's facts."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from benchmarks.pairs import Compared, Spread
from benchmarks.workspace import ROOT

RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parent / "README.md"
TABLE_BEGIN, TABLE_END = "<!-- table: begin -->\n", "<!-- table: end -->"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table."""

    name: str  # "mlp-17m N=2"
    unit: str
    ours: Spread | None = None
    rival: Spread | None = None
    ratio: Spread | None = None  # ours / rival, unless `figure` says what else is held against `reach`
    reach: float | None = None  # the most that the figure may be
    figure: float | None = None  # held against `reach`; the ratio's median if left out
    is_available: bool = True  # False where this release of dnb lacks what is to be measured
    note: str = ""
    pairs: tuple[tuple[float, float], ...] = ()
    details: dict[str, Any] = {}

    @property
    def verdict(self) -> str:
        """PASS, LOSES, or why neither can be said."""
        if not self.is_available:
            return "not available"
        figure = self.figure if self.figure is not None else self.ratio.median if self.ratio else None
        if figure is None or self.reach is None:
            return "-"
        return "PASS" if figure <= self.reach else "LOSES"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and the code that gave the figures."""

    cpu: str
    cores: int
    memory_gb: float
    load_average: float  # over the minute before
    python: str
    torch: str
    date: str
    commit: str
    is_quick: bool


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One file under results/."""

    facts: Facts
    rows: list[Row]


def compared_row(name: str, compared: Compared, *, unit: str, scale: float = 1.0, **fields: Any) -> Row:
    """A row of two sides that took turns.

    Args:
        name: of the row.
        compared: the two sides' figures.
        unit: to show them in.
        scale: from the figures to that unit.
        fields: others of `Row`.
    """
    return Row(
        name=name,
        unit=unit,
        ours=scaled(compared.ours, scale),
        rival=scaled(compared.rival, scale),
        ratio=compared.ratio,
        pairs=tuple((ours * scale, rival * scale) for ours, rival in compared.pairs),
        **fields,
    )


def scaled(spread: Spread, scale: float) -> Spread:
    """The same in another unit."""
    return Spread(median=spread.median * scale, low=spread.low * scale, high=spread.high * scale)


def machine_facts(*, is_quick: bool) -> Facts:
    """Look at this machine and this checkout."""
    return Facts(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        torch=str(torch.__version__),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        is_quick=is_quick,
    )


def describe(facts: Facts) -> str:
    """The facts in one line."""
    quick = ", quick: not for claims" if facts.is_quick else ""
    return (
        f"{facts.cpu}, {facts.cores} cores, {facts.memory_gb:g} GB, load {facts.load_average:g}; python "
        f"{facts.python}, torch {facts.torch}; {facts.date}, commit {facts.commit}{quick}"
    )


HEADER = ("row", "ours", "rival", "ours / rival", "reach", "")
_WIDTHS = (38, 28, 28, 23, 6, 0)


def header_line() -> str:
    """The columns' names."""
    return _line(HEADER)


def row_line(row: Row) -> str:
    """One row for the terminal; its note follows on a line of its own."""
    note = f"\n    {row.note}" if row.note else ""
    return _line(cells(row)) + note


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: medians with their quartiles."""
    ratio = row.ratio
    return (
        row.name,
        _figure(row.ours, row.unit),
        _figure(row.rival, row.unit),
        "" if ratio is None else f"{ratio.median:.3g} ({ratio.low:.3g}..{ratio.high:.3g})",
        "" if row.reach is None else f"{row.reach:.3g}",
        row.verdict,
    )


def write_result(group: str, facts: Facts, rows: list[Row]) -> Path:
    """Keep the rows of one group."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{group}.json"
    encoded = msgspec.json.encode(Result(facts=facts, rows=rows), enc_hook=_plain)
    path.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
    return path


def update_readme(order: Sequence[str]) -> None:
    """Put the tables of all results into the README, between its two marks.

    Args:
        order: of the groups.
    """
    text = README.read_text()
    before, _, rest = text.partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    paths = [RESULTS / f"{group}.json" for group in order]
    groups = [f"### {path.stem}\n\n{_markdown(path)}\n" for path in paths if path.exists()]
    README.write_text(before + TABLE_BEGIN + "\n" + "\n".join(groups) + "\n" + TABLE_END + after)


def _markdown(path: Path) -> str:
    result = msgspec.json.decode(path.read_bytes(), type=Result)
    lines = ["| " + " | ".join((*HEADER[:-1], "verdict")) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result.rows]
    notes = [f"- {row.name}: {row.note}" for row in result.rows if row.note]
    return "\n".join([*lines, "", f"{describe(result.facts)}.", *(["", *notes] if notes else [])])


def _figure(spread: Spread | None, unit: str) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.3g} {unit} ({spread.low:.3g}..{spread.high:.3g})"


def _line(texts: tuple[str, ...]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(texts, _WIDTHS, strict=True)).rstrip()


def _plain(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} in a row's details")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The checkout's commit; results that were just written do not make it another."""
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/README.md")
    return (_git("rev-parse", "--short=10", "HEAD") or "unknown") + ("-dirty" if changes else "")


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip()
