import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dnb.transport.pickling.payloads import pickle_payload, unpack


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def symmetric(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def arrive(model, tmp_path):
    pickled, payload, segment = pickle_payload(model, name="model", folders=[tmp_path])
    found = unpack(pickled, payload)
    segment.unlink()
    return found


WRAPS = [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, symmetric]


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_a_parametrized_layer_arrives_and_trains(wrap, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Tanh()).eval()
    found = arrive(model, tmp_path)
    inputs = torch.randn(3, 4)
    assert torch.equal(found(inputs), model(inputs))
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in model.named_parameters()]
    for each in (model, found):
        each(inputs).square().sum().backward()
        with torch.no_grad():
            for parameter in each.parameters():
                parameter -= 0.1 * parameter.grad
    assert torch.equal(found(inputs), model(inputs))
    model.load_state_dict(found.state_dict())


def test_what_was_parametrized_there_may_be_made_plain_again(tmp_path):
    layer = arrive(parametrizations.weight_norm(nn.Linear(4, 2)), tmp_path)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


def test_a_layer_arrives_that_is_parametrized_twice(tmp_path):
    layer = nn.Linear(4, 4)
    layer = arrive(symmetric(parametrizations.orthogonal(layer, name="weight")), tmp_path)
    assert len(layer.parametrizations.weight) == 2


@pytest.fixture
def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)))


def test_a_scripted_module_arrives_as_a_part_of_another(scripted, tmp_path):
    scripted[0].weight.requires_grad_(False)
    model = nn.Sequential(scripted, nn.Linear(2, 1)).eval()
    found = arrive(model, tmp_path)
    inputs = torch.randn(3, 4)
    assert torch.equal(found(inputs), model(inputs))
    assert [(name, p.requires_grad) for name, p in found.named_parameters()] == [
        (name, p.requires_grad) for name, p in model.named_parameters()
    ]
    assert not found[0].training
