"""A plan drawn as HTML: a strip of its layers, a table of its stages, slower alternatives. No script, no own style.

Colours are those of the notebook's theme, so that it is legible on light and dark: ink is `currentColor`, stages are
tinted, and no sign is colour alone.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from dnb.notebook.text.summary import one_line
from dnb.planning.search.plan_text import alternatives_heading, describe, headline, layer_span, shortened
from dnb.planning.search.plans import Plan
from dnb.planning.search.prediction import Stage
from dnb.units import amount, milliseconds

# Okabe and Ito's, without black and yellow, which vanish on one of the two backgrounds.
TINTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
WIDTH, ROW, GAP = 760, 34, 4
# Narrower ones carry no name; it is in their tooltip.
LEAST_NAMED = 46
LETTER = 6.5
# More stages than this are not drawn one by one.
MOST_ROWS = 16
_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"
_NUMBER = "padding:2px 10px 2px 0;text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"
_COLUMNS = (
    "stage", "engines", "layers", "forward", "backward", "received", "returned", "parameters", "activations", "memory",
)  # fmt: skip


def bundle(plan: Plan) -> dict[str, Any]:
    """Return the plan as a mime bundle: the drawing, and the same numbers as text."""
    return {"text/html": draw(plan), "text/plain": describe(plan)}


def draw(plan: Plan) -> str:
    """Draw the plan as HTML that is safe to show: names of modules and engines are escaped."""
    parts = [
        f'<div style="font-size:13px"><p style="margin:0 0 6px"><b>{_safe(headline(plan))}</b></p>',
        _strip(plan),
        _stages(plan),
        _alternatives(plan),
        *(f'<p style="margin:4px 0;opacity:.8">{_safe(note)}</p>' for note in plan.notes),
        "</div>",
    ]
    return "".join(parts)


def _safe(text: str) -> str:
    return html.escape(one_line(text))


# the strip


def _strip(plan: Plan) -> str:
    """Draw every layer as wide as it takes time, in the tint of its stage; a gap is a cut."""
    seconds = [layer.forward_seconds[-1] + layer.backward_seconds[-1] for layer in plan.profile.layers]
    room = WIDTH - GAP * (len(plan.stages) - 1)
    scale = room / (sum(seconds) or 1.0)
    parts, left = [], 0.0
    for rank, stage in enumerate(plan.stages):
        begin = left
        for number in range(stage.first, stage.last):
            width = seconds[number] * scale
            parts.append(_layer(plan, number, rank, left=left, width=width))
            left += width
        parts.append(_stage_label(plan, rank, stage, left=begin, width=left - begin))
        left += GAP
    height = 2 * ROW
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" style="max-width:100%;color:inherit" '
        f'role="img" aria-label="{_safe(headline(plan))}" font-family="sans-serif" font-size="11">'
        f"{''.join(parts)}</svg>"
    )


def _layer(plan: Plan, number: int, rank: int, *, left: float, width: float) -> str:
    layer = plan.profile.layers[number]
    name = one_line(layer.name or plan.profile.model, limit=80)
    text = (
        f"{name} ({layer.kind}): forward {milliseconds(layer.forward_seconds[-1])}, backward "
        f"{milliseconds(layer.backward_seconds[-1])} for {plan.profile.sizes[-1]} samples, "
        f"parameters {amount(layer.parameter_bytes)}"
    )
    rect = (
        f'<rect x="{left:.1f}" y="{ROW}" width="{max(width, 0.5):.1f}" height="{ROW - 2}" '
        f'fill="{TINTS[rank % len(TINTS)]}" fill-opacity=".3" stroke="currentColor" stroke-opacity=".45"/>'
    )
    label = ""
    if width >= LEAST_NAMED:
        shown = one_line(name, limit=max(2, int(width / LETTER)))
        label = f'<text x="{left + width / 2:.1f}" y="{ROW * 1.55:.1f}" text-anchor="middle" fill="currentColor">'
        label += f"{html.escape(shown)}</text>"
    return f"<g><title>{_safe(text)}</title>{rect}{label}</g>"


def _stage_label(plan: Plan, rank: int, stage: Stage, *, left: float, width: float) -> str:
    """Label a stage above the strip with its rank and its engines, as far as there is room."""
    engines = f"engine{'s' if len(stage.engines) > 1 else ''} {shortened(stage.engines)}"
    words = engines if len(plan.stages) == 1 else f"stage {rank}: {engines}"
    room = max(2, int(width / LETTER))
    shown = words if len(words) <= room else str(rank)
    return (
        f'<text x="{left + 2:.1f}" y="{ROW * 0.75:.1f}" fill="currentColor">{html.escape(shown)}</text>'
        f'<line x1="{left:.1f}" x2="{left + width:.1f}" y1="{ROW - 4}" y2="{ROW - 4}" '
        f'stroke="{TINTS[rank % len(TINTS)]}" stroke-width="3"/>'
    )


# tables


def _stages(plan: Plan) -> str:
    shown = list(enumerate(plan.stages))
    left_out = ""
    if len(shown) > MOST_ROWS:
        left_out = _row([f"... {len(shown) - MOST_ROWS} more stages; print(plan) has all"], style=_CELL)
        shown = shown[:MOST_ROWS]
    body = "".join(_stage_row(plan, rank, stage) for rank, stage in shown)
    return _table(_COLUMNS, body + left_out)


def _stage_row(plan: Plan, rank: int, stage: Stage) -> str:
    held = f" x {stage.num_in_flight}" if stage.num_in_flight > 1 else ""
    words = [str(rank), shortened(stage.engines), layer_span(plan, stage)]
    numbers = [
        milliseconds(stage.forward_seconds),
        milliseconds(stage.backward_seconds),
        amount(stage.received_bytes) if rank else "",
        amount(stage.returned_bytes) if rank else "",
        amount(stage.parameter_bytes),
        f"{amount(stage.kept_bytes)}{held}",
        _memory(stage),
    ]
    tint = TINTS[rank % len(TINTS)]
    cells = [f'<td style="{_CELL};border-left:3px solid {tint};padding-left:6px">{_safe(words[0])}</td>']
    cells += [f'<td style="{_CELL}">{_safe(word)}</td>' for word in words[1:]]
    cells += [f'<td style="{_NUMBER}">{_safe(number)}</td>' for number in numbers]
    return f'<tr style="background:none">{"".join(cells)}</tr>'


def _memory(stage: Stage) -> str:
    if stage.memory_limit is None:
        return amount(stage.memory_bytes)
    return (
        f"{amount(stage.memory_bytes)} of {amount(stage.memory_limit)} ({stage.memory_bytes / stage.memory_limit:.0%})"
    )


def _alternatives(plan: Plan) -> str:
    if not plan.alternatives:
        return ""
    rows = (
        _row(
            [
                str(alternative.mesh),
                f"{alternative.num_micro_batches}",
                milliseconds(alternative.step_seconds),
                alternative.why,
            ],
            style=_CELL,
        )
        for alternative in plan.alternatives
    )
    return _table((alternatives_heading(plan), "micro-batches", "step", "why"), "".join(rows))


def _row(words: Iterable[str], *, style: str) -> str:
    cells = "".join(f'<td style="{style}">{_safe(word)}</td>' for word in words)
    return f'<tr style="background:none">{cells}</tr>'


def _table(columns: Sequence[str], body: str) -> str:
    head = "".join(f'<th style="{_CELL}">{_safe(column)}</th>' for column in columns)
    return (
        '<table style="border-collapse:collapse;margin:6px 0;color:inherit;background:none">'
        f'<thead><tr style="background:none;border-bottom:1px solid">{head}</tr></thead><tbody>{body}</tbody></table>'
    )
