from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import pytest

from dnb.api.fit_arguments import FitArguments
from dnb.api.launching import Pool
from dnb.api.training import fit


def test_a_pool_fits_with_the_defaults_of_fit():
    of_fit = {
        name: each.default
        for name, each in inspect.signature(fit).parameters.items()
        if name not in ("pool", "display")
    }
    of_record = {each.name: each.default for each in fields(FitArguments)}
    assert of_record == {name: MISSING if each is inspect.Parameter.empty else each for name, each in of_fit.items()}


def test_a_pool_refuses_what_is_no_argument_of_fit_under_the_name_of_fit():
    pool = object.__new__(Pool)
    with pytest.raises(TypeError, match=r"^fit\(\) got an unexpected keyword argument 'batchsize'$"):
        pool.fit(None, None, batchsize=3)
