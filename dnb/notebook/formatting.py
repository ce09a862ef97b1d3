"""Numbers, times and text of unknown origin, as a person would like to read them."""

from __future__ import annotations

import html

import numpy as np

MAX_MESSAGE = 300


def number(value: float) -> str:
    """Write a loss or metric with four decimals, or in powers of ten where those would say nothing."""
    if not np.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.3e}"


def duration(seconds: float) -> str:
    """Write seconds as a person would say them."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def time_left(seconds: float) -> str:
    """Write an estimate of the time left: whole seconds, since tenths would pretend to know."""
    return (
        "under 1 s left"
        if seconds < 1
        else f"{duration(max(round(seconds), 10))} left"
        if (seconds >= 9.95)
        else f"{round(seconds)} s left"
    )


def one_line(text: str, *, limit: int = MAX_MESSAGE) -> str:
    """Put text of unknown origin on one line: no control characters, no more than `limit` characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= limit else words[: limit - 1].rstrip() + "…"


def inert(text: str) -> str:
    """Escape text so that plotly shows it as it is: no tags, and no dollar signs, which would be typeset as TeX."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def counted(count: int, noun: str) -> str:
    """Write a count with its noun: "1 step", "12,800 steps"."""
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(words: list[str]) -> str:
    """Write words in a row: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def numbered(engines: list[int], *, limit: int = 4) -> str:
    """Write engines by their ids: "engine 1", "engines 1 and 3"; of many only the first."""
    if len(engines) == 1:
        return f"engine {engines[0]}"
    named = [str(engine) for engine in engines[:limit]]
    more = [f"{len(engines) - limit} more"] if len(engines) > limit else []
    return f"engines {listed(named + more)}"
