"""The first steps of a run beside those of one process: how they are held against each other, and shown."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Two orders of adding up differ by so much, relative to what is added up; by element size of the parameters.
ROUNDING = {8: 1e-10, 4: 2e-6, 2: 2e-2}
# Gradients are sums over many more elements than a loss is, and small ones stand beside large ones.
GRADIENT_FACTOR = 100.0
# What rounding has made of one step, the optimizer carries into the next ones.
LATER_FACTOR = 10.0
# A gradient that is this share of the largest one is nothing but rounding, as of a bias before a BatchNorm.
NEGLIGIBLE = 1e-5
MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """The gradient of one parameter, in the run and in one process."""

    name: str
    share: float  # the largest difference, relative to the largest element


@dataclass(frozen=True, slots=True)
class ProvedStep:
    """One step, in the run and in one process.

    Args:
        step: its number.
        loss: in the run, and here.
        norm: of the gradient of all parameters before it is clipped, likewise.
        differing: parameters whose gradients differ by more than rounding, in the model's order.
        largest: difference of any gradient.
        is_same: whether loss and gradients differ by rounding alone.
    """

    step: int
    loss: tuple[float, float]
    norm: tuple[float, float]
    differing: tuple[Difference, ...]
    largest: float
    is_same: bool

    @property
    def loss_gap(self) -> float:
        """Between the two losses."""
        return abs(self.loss[0] - self.loss[1])


@dataclass(frozen=True, slots=True)
class Proof:
    """The first steps of a run beside those of one process; it draws itself as a table in a notebook.

    Args:
        name: of the run.
        steps: that were compared.
        suspects: what may be the reason, if they differ.
        notes: what was left out.
    """

    name: str
    steps: tuple[ProvedStep, ...]
    suspects: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        """True if one process has the same losses and gradients, but for rounding."""
        return all(step.is_same for step in self.steps)

    @property
    def first_difference(self) -> ProvedStep | None:
        """The first step that differs."""
        return next((step for step in self.steps if not step.is_same), None)

    @property
    def verdict(self) -> str:
        """The finding in one sentence."""
        first = self.first_difference
        if first is None:
            gap = max((step.loss_gap for step in self.steps), default=0.0)
            share = max((step.largest for step in self.steps), default=0.0)
            return (
                f"the same: {len(self.steps)} steps of run {self.name!r} and of one process differ by rounding alone, "
                f"losses by at most {gap:.1e}, gradients by {share:.1e} of their largest element"
            )
        run, here = first.loss
        return (
            f"not the same from step {first.step} on: the loss is {run:.9g} in run {self.name!r} and {here:.9g} in "
            f"one process{_named(first)}"
        )

    @property
    def text(self) -> str:
        """The table as text, the verdict first."""
        rows = [_COLUMNS, *(_cells(step) for step in self.steps)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self.verdict, *self._remarks, "", *(line.rstrip() for line in lines)])

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        style = "text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding:1px 10px 1px 0"
        head = "".join(f'<th style="{style}">{html.escape(cell)}</th>' for cell in _COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f'<td style="{style}">{html.escape(cell)}</td>' for cell in _cells(step)) + "</tr>"
            for step in self.steps
        )
        remarks = "".join(f'<p style="margin:2px 0">{html.escape(remark)}</p>' for remark in self._remarks)
        return (
            f'<div style="font-size:13px"><p style="margin:0 0 4px"><b>{html.escape(self.verdict)}</b></p>{remarks}'
            f'<table style="border-collapse:collapse"><tr>{head}</tr>{rows}</table></div>'
        )

    @property
    def _remarks(self) -> list[str]:
        return [*(f"suspect: {suspect}" for suspect in self.suspects), *self.notes]


_COLUMNS = ("step", "loss in the run", "in one process", "|gradient| in the run", "in one process", "differs")


def _cells(step: ProvedStep) -> tuple[str, ...]:
    if step.is_same:
        word = "no"
    elif step.differing:
        word = f"{step.differing[0].name} by {step.differing[0].share:.1%}"
    else:
        word = f"loss by {step.loss_gap:.1e}"
    numbers = (*step.loss, *step.norm)
    return (str(step.step), *(f"{number:.9g}" for number in numbers), word)


def _named(step: ProvedStep) -> str:
    if not step.differing:
        return ", and the gradients are the same" if step.largest < math.inf else ""
    shown = ", ".join(f"{each.name!r} by {each.share:.2g}" for each in step.differing[:MOST_NAMES])
    more = len(step.differing) - MOST_NAMES
    others = f" and {more} more" if more > 0 else ""
    return f"; gradients that differ, by shares of their largest element: {shown}{others}"


def compare(
    step: int,
    row: np.ndarray[Any, np.dtype[np.float64]],
    here: tuple[float, float, np.ndarray[Any, np.dtype[np.float64]]],
    names: Sequence[str],
    sizes: Sequence[int],
    bound: float,
) -> ProvedStep:
    """Compare one step's loss and gradients of the run with those of one process."""
    loss, norm, elements = here
    scale = max(np.abs(elements).max(initial=0.0), np.abs(row[2:]).max(initial=0.0))
    differing: list[Difference] = []
    largest = 0.0
    ends = np.cumsum(sizes)
    for name, end, size in zip(names, ends, sizes, strict=True):
        ours, theirs = elements[end - size : end], row[2 + end - size : 2 + end]
        own = max(np.abs(ours).max(initial=0.0), np.abs(theirs).max(initial=0.0), NEGLIGIBLE * scale)
        share = float(np.abs(ours - theirs).max(initial=0.0) / own) if own else 0.0
        largest = max(largest, share)
        if not share <= bound * GRADIENT_FACTOR:
            differing.append(Difference(name, share))
    is_same = (
        not differing
        and abs(row[0] - loss) <= bound * max(1.0, abs(loss))
        and abs(row[1] - norm) <= bound * GRADIENT_FACTOR * max(norm, 1e-30)
    )
    return ProvedStep(
        step, (float(row[0]), loss), (float(row[1]), norm), tuple(differing), largest, is_same=bool(is_same)
    )
