import pytest
import torch

from dnb.api.arguments.checks import check_can_divide
from dnb.errors import ArgumentError


@pytest.mark.parametrize("strategy", ["pipeline", "tensor", "hybrid"])
def test_a_torch_that_cannot_divide_models_is_told(monkeypatch, strategy):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(ArgumentError, match=r"needs torch 2\.7 or later, and this is 2\.6\.0\+cpu"):
        check_can_divide(strategy)
    check_can_divide("data")
    monkeypatch.setattr(torch, "__version__", "2.7.0")
    check_can_divide(strategy)
