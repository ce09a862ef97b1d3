"""A drawn plan: the same numbers as in words, safe to show, and legible on any background."""

import re
import xml.etree.ElementTree as ElementTree

import msgspec
import pytest
from IPython.core.formatters import DisplayFormatter

from dnb.notebook.pages.drawers import register_drawers
from dnb.notebook.pages.plan_drawing import MOST_ROWS, bundle, draw
from dnb.units import amount, milliseconds
from tests.unit.planned import layer, profile
from tests.unit.planning.search.test_plans import plan


@pytest.fixture
def made():
    return plan(strategy="pipeline", engines=3, memory=10_000)


def test_drawing_and_words_have_the_same_numbers(made):
    shown = bundle(made)
    for stage in made.stages:
        for number in (
            milliseconds(stage.forward_seconds),
            milliseconds(stage.backward_seconds),
            amount(stage.parameter_bytes),
            amount(stage.memory_bytes),
        ):
            assert number in shown["text/html"]
            assert number in shown["text/plain"]
    for alternative in made.alternatives:
        assert milliseconds(alternative.step_seconds) in shown["text/html"]
        assert milliseconds(alternative.step_seconds) in shown["text/plain"]


def test_the_headline_has_step_time_and_bubble(made):
    assert f"{milliseconds(made.step_seconds)} per step" in draw(made)
    assert f"bubble {made.bubble:.0%}" in draw(made)


def test_names_of_modules_are_escaped(made):
    layers = [msgspec.structs.replace(layer(n), name=f"<script>{n}</script>", kind="<b>") for n in range(3)]
    drawn = draw(plan(strategy="pipeline", layers=profile(*layers, size=8)))
    assert "<script>" not in drawn
    assert "<b>)" not in drawn
    assert "&lt;script&gt;0&lt;/script&gt;" in drawn


def test_it_is_well_formed(made):
    ElementTree.fromstring(draw(made))


def test_ink_is_that_of_the_theme(made):
    drawn = draw(made)
    assert set(re.findall(r'<text[^>]* fill="([^"]+)"', drawn)) == {"currentColor"}
    assert "color:#" not in drawn
    assert not re.findall(r"background:(?!none)", drawn)


def test_layers_are_as_wide_as_they_take_time():
    layers = profile(layer(0, forward=1.0, backward=1.0), layer(1, forward=3.0, backward=3.0), size=8)
    drawn = draw(plan(strategy="pipeline", layers=layers))
    first, second = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn))
    assert second == pytest.approx(3 * first, rel=0.01)


def test_many_stages_are_not_drawn_one_by_one():
    layers = profile(*(layer(number) for number in range(40)), size=8)
    drawn = draw(plan(engines=40, num_stages=40, num_micro_batches=8, layers=layers))
    assert drawn.count("border-left:3px") == MOST_ROWS
    assert "24 more stages" in drawn


def test_a_notebook_is_shown_the_drawing(made):
    formatter = DisplayFormatter()
    register_drawers(formatter)
    assert formatter.format(made) == (bundle(made), {})
