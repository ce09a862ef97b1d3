import pytest
import torch

from dnb.api.arguments.checks import check_can_divide
from dnb.errors import PlanError
from dnb.protocol.run import Partition


@pytest.mark.parametrize("kind", ["pipeline", "tensor"])
def test_a_torch_that_cannot_divide_models_is_told(monkeypatch, kind):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(PlanError, match=r"needs torch 2\.7 or later, and this is 2\.6\.0\+cpu"):
        check_can_divide([Partition(kind=kind, num_engines=2)])
    check_can_divide([])
    check_can_divide([Partition(kind="synced", num_engines=2)])
    monkeypatch.setattr(torch, "__version__", "2.7.0")
    check_can_divide([Partition(kind=kind, num_engines=2)])
