from __future__ import annotations

import decimal
import enum
import math
from collections import OrderedDict, namedtuple
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dnb.api.arguments.losses import read_metrics
from dnb.errors import ArgumentError
from dnb.hub.history.engine_stats import HistoryColumns
from dnb.job import Sum
from dnb.user_code.accuracy import accuracy
from dnb.user_code.return_values import (
    MOST_NAMES,
    RESERVED_NAMES,
    STEP_COLUMNS,
    MetricReader,
    ReturnError,
    fault_of_name,
    read_loss,
    read_step,
    weighed,
)

LOSS = torch.ones(3, requires_grad=True).sum()  # 3.0
LOGITS = torch.ones(64, 4, requires_grad=True)

Pair = namedtuple("Pair", "logits loss")
Colour = enum.Enum("Colour", "RED")


class Loud(str):
    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__


# losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        LOSS,
        LOSS.reshape(1),
        LOSS.double(),
        LOSS.bfloat16(),
        (LOSS, {"accuracy": 0.5}),
        (LOSS, {}),
        (LOGITS, LOSS),
        (LOSS, LOGITS),
        [LOGITS, LOSS],
        (LOGITS, None, LOSS),
        (torch.ones(1, 1), LOSS),  # the logits of one sample
        {"loss": LOSS, "logits": LOGITS},
        OrderedDict(loss=LOSS),
        SimpleNamespace(loss=LOSS, logits=LOGITS),
        Pair(LOGITS, LOSS),
        (Pair(LOGITS, LOSS), {"accuracy": 0.5}),
    ],
    ids=str,
)
def test_the_loss_is_found_in_what_a_step_returns(result):
    loss, _ = read_step(result, needs_gradient=True)
    assert isinstance(loss, torch.Tensor)
    assert loss.item() == 3.0


def test_a_sum_may_stand_wherever_a_loss_may():
    for result in (Sum(LOSS, 4), (LOGITS, Sum(LOSS, 4)), {"loss": Sum(LOSS, np.int64(4))}, Sum(LOSS, torch.tensor(4))):
        loss, _ = read_step(result, needs_gradient=True)
        assert isinstance(loss, Sum)
        assert (loss.total.item(), loss.weight) == (3.0, 4.0)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, r"not None: is a return missing"),
        (0.5, r"not the float 0\.5, from which no gradient comes: leave out \.item"),
        (np.float32(0.5), r"not a float32, from which no gradient comes"),
        (3, r"not the int 3"),
        (10**5000, r"not the int of 16610 bits"),
        (True, r"not the bool True"),
        ("loss", r"not the str 'loss'"),
        ("\ud800" * 1000, r"not the str '\\ud800"),
        (np.ones(3), r"not an array of float64 and shape \(3,\)"),
        (torch.ones(64, requires_grad=True), r"not a tensor of float32 and shape \(64,\): take its mean"),
        (torch.ones(0, requires_grad=True), r"shape \(0,\): take its mean"),
        (LOSS.detach(), r"without a gradient: leave out \.detach"),
        (torch.tensor(3), r"a tensor of int64, which has no gradient"),
        (torch.tensor(True), r"a tensor of bool, which has no gradient"),
        (torch.ones((), dtype=torch.complex64, requires_grad=True), r"a tensor of complex64, which has no gradient"),
        (torch.ones((), device="meta", requires_grad=True), r"on the meta device"),
        (object(), r"not an object"),
        (lambda: 0, r"not a function"),
        ({}, r"not a dictionary of nothing without 'loss'"),
        ({"a": LOSS, 3: LOSS}, r"not a dictionary of 'a', the int 3 without 'loss'"),
        ({"loss": None}, r"not None"),
        (SimpleNamespace(loss=None), r"not a SimpleNamespace whose \.loss is None: has it no target\?"),
        ((), r"not a tuple of 0 \(\), in which it cannot be told"),
        ((LOSS, LOSS), r"not a tuple of 2 \(a tensor of float32, a tensor of float32\), in which it cannot be"),
        ((LOGITS, LOGITS), r"not a tuple of 2 \(a tensor of float32 and shape \(64, 4\), "),
        ((LOGITS, LOSS.detach()), r"without a gradient"),
        ((None, {"accuracy": 0.5}), r"not None"),
        (Sum(LOSS.detach(), 4), r"without a gradient"),
        (Sum(0.5, 4), r"the float 0\.5"),
        (Sum(Sum(LOSS, 1), 1), r"a Sum of a Sum"),
    ],
    ids=range(30),
)
def test_what_is_no_loss_is_refused_by_what_it_is(result, told):
    with pytest.raises(ReturnError, match=told) as caught:
        read_step(result, needs_gradient=True)
    assert str(caught.value).startswith("step must return the loss as a tensor of one number, dnb.Sum(total, weight), ")
    assert len(str(caught.value)) < 400
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (torch.ones(4, dtype=torch.bool), r"a number, not a tensor of bool and shape \(4,\)"),
        (None, "a number, not None"),
        (-1, "a number of at least 0, not -1"),
        (math.nan, "a number of at least 0, not nan"),
        (torch.tensor(math.inf), "a number of at least 0, not inf"),
    ],
    ids=str,
)
def test_the_weight_of_a_sum_must_be_a_number(weight, told):
    with pytest.raises(ReturnError, match=rf"^the weight in the dnb\.Sum of step must be {told}$"):
        read_step(Sum(LOSS, weight), needs_gradient=True)
    with pytest.raises(ReturnError, match=rf"^the weight in the dnb\.Sum of metric 'recall' must be {told}$"):
        weighed(Sum(LOSS, weight), 4, name="recall")


def test_a_loss_that_is_not_finite_is_no_mistake_of_type():
    loss, _ = read_step(LOSS * math.nan, needs_gradient=True)
    assert math.isnan(loss.item())


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), LOSS.detach() / 6, LOSS / 6], ids=str)
def test_where_no_backward_follows_a_plain_number_will_do(value):
    assert read_loss(value, needs_gradient=False).item() == 0.5


def test_a_loss_function_is_asked_for_a_mean_and_a_model_for_its_loss():
    with pytest.raises(ReturnError, match=r"^loss must return a tensor of one number, the mean over samples, or dnb"):
        read_loss(None, needs_gradient=True)
    with pytest.raises(ReturnError, match=r"^loss must return .*, not a dict"):
        read_loss({"loss": LOSS}, needs_gradient=True)
    with pytest.raises(
        ReturnError, match=r"^a model without loss= and step= must return its own loss, .* a tuple of 0"
    ):
        read_step((), needs_gradient=True, by="model")


def test_what_a_model_returns_beside_its_loss_is_no_metric():
    assert read_step((LOSS, {"hidden": LOGITS}), needs_gradient=True, by="model") == (LOSS, {})


# values of metrics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0.5, 0.5),
        (1, 1.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (torch.tensor(2), 2.0),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (Fraction(1, 2), 0.5),
        (decimal.Decimal("0.5"), 0.5),
    ],
    ids=str,
)
def test_a_metric_may_be_any_number(value, number):
    assert weighed(value, 4, name="x") == (4 * number, 4.0)


def test_a_metric_may_be_a_sum():
    assert weighed(Sum(torch.tensor(6.0, requires_grad=True), torch.tensor(3)), 4, name="x") == (6.0, 3.0)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "None"),
        ("0.5", "the str '0.5'"),
        (b"1", "the bytes b'1'"),
        (1j, r"the complex 1j"),
        (np.complex64(1), "a complex64"),
        (torch.tensor(1j), "a tensor of complex64"),
        (torch.ones(3), r"a tensor of float32 and shape \(3,\)"),
        (torch.ones((), device="meta"), "a tensor of float32 on the meta device"),
        (np.ones(3), r"an array of float64 and shape \(3,\)"),
        ([0.5], "a list"),
        ({"a": 0.5}, "a dict"),
        (10**400, "the int of 1329 bits"),
    ],
    ids=str,
)
def test_a_metric_that_is_no_number_is_refused_by_name(value, told):
    with pytest.raises(ReturnError, match=f"^metric 'recall' must be a number, not {told}$"):
        weighed(value, 4, name="recall")


# names of metrics -----------------------------------------------------------------------------------------


def test_numbers_of_classes_become_words():
    metrics = {3: 0.5, np.int64(4): 1.0, "macro": 0.25}
    assert MetricReader().read(metrics, 2) == {"3": (1.0, 2.0), "4": (2.0, 2.0), "macro": (0.5, 2.0)}


def test_a_class_whose_number_is_there_as_a_word_too_is_refused():
    with pytest.raises(ReturnError, match="each metric once, and '3' is there as a word and as a number"):
        MetricReader().read({3: 0.5, "3": 0.5}, 2)


def test_a_word_of_a_class_of_its_own_is_read_as_the_word_that_it_is():
    assert MetricReader().read({Loud("recall"): 0.5}, 2) == {"recall": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (None, "not None"),
        (True, "not the bool True"),
        (0.5, "not the float 0.5"),
        (("a", 1), "not a tuple"),
        (Colour.RED, "not a Colour"),
        (b"recall", "not the bytes b'recall'"),
    ],
    ids=str,
)
def test_a_name_that_is_no_word_is_refused(name, told):
    with pytest.raises(ReturnError, match=rf"^step must return its metrics by name, such as .*, {told}$"):
        MetricReader().read({name: 0.5}, 2)


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "val_x", "val_", "val_loss"])
def test_a_metric_takes_no_column_of_the_history(name):
    with pytest.raises(ReturnError, match=f"by other names: '{name}' cannot be the name of a metric: the history uses"):
        MetricReader().read({name: 7.0}, 2)
    with pytest.raises(ArgumentError, match=f"^'{name}' cannot be the name of a metric: the history uses it"):
        read_metrics({name: accuracy})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "it has no letters"),
        ("  ", "it has no letters"),
        ("a\nb", "characters that cannot be shown"),
        ("a\0", "characters that cannot be shown"),
        ("a\ud800", r"'a\\ud800' cannot be .* characters that cannot be shown"),
        ("x" * 101, "it has 101 letters, more than 100"),
        ("x" * 5_000_000, "it has 5,000,000 letters, more than 100"),
    ],
    ids=range(7),
)
def test_a_name_that_cannot_be_shown_is_refused(name, told):
    with pytest.raises(ReturnError, match=told) as caught:
        MetricReader().read({name: 0.5}, 2)
    str(caught.value).encode()
    with pytest.raises(ArgumentError, match=told):
        read_metrics({name: accuracy})


@pytest.mark.parametrize("name", ["accuracy", "top-5 accuracy", "Genauigkeit für ß", "精度", "3", "loss/head"])
def test_any_word_is_the_name_of_a_metric(name):
    assert fault_of_name(name) == ""
    assert list(MetricReader().read({name: 0.5}, 2)) == [name]


def test_names_that_grow_with_every_step_are_refused_before_they_fill_the_memory():
    reader = MetricReader()
    for number in range(MOST_NAMES):
        reader.read({f"loss_{number}": 0.5}, 2)
    reader.read({"loss_7": 0.5}, 2)
    with pytest.raises(ReturnError, match=r"the same names every time, at most 1,000: 'loss_1000' is one more"):
        reader.read({"loss_1000": 0.5}, 2)


# the history ----------------------------------------------------------------------------------------------


def test_a_metric_that_only_some_steps_have_stays_beside_its_steps():
    columns = HistoryColumns()
    own = dict.fromkeys(STEP_COLUMNS, 1.0)
    columns.add_step(own)
    columns.add_step(own | {"recall": 0.5})
    columns.add_step(own)
    columns.add_step(own | {"recall": 0.25})
    assert np.array_equal(columns.by_step["recall"], [math.nan, 0.5, math.nan, 0.25], equal_nan=True)
    assert {len(column) for column in columns.by_step.values()} == {4}
