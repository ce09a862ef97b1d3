"""Profiles: bytes to the byte, seconds only by their order, and a model left as it was."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.models import CausalTransformer, token_loss
from dnb.engine.profiling import profiler
from dnb.engine.profiling.layers import find_layers
from dnb.engine.profiling.profiler import ProfileInput, choose_sizes, count_samples, profile_trial, take_samples
from dnb.errors import PlanError
from dnb.job import Sum
from dnb.planning.search.profiles import mean_profile


def profile(model, batch, *, sizes=(8,), **options):
    return profile_trial(ProfileInput(model=model, batch=batch, **options), sizes=sizes, num_threads=1)


def names(profile_made):
    return [layer.name for layer in profile_made.layers]


def mlp(*widths):
    layers = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rows(width, *, number=8):
    return torch.randn(number, width), torch.zeros(number, dtype=torch.long)


# layers


def test_the_layers_of_a_sequence_are_its_children():
    assert names(profile(mlp(4, 8, 8, 3), rows(4), loss=functional.cross_entropy)) == ["0", "1", "2", "3", "4"]


def test_a_sequence_in_a_sequence_is_looked_into():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    assert names(profile(model, torch.randn(8, 4))) == ["0", "1.0", "1.1"]


def test_blocks_of_one_kind_are_a_chain_and_not_looked_into():
    model = CausalTransformer(width=16, num_blocks=2, num_heads=2)
    tokens = torch.zeros(4, 64, dtype=torch.long)
    made = profile(model, (tokens, tokens), sizes=(4,), loss=token_loss)
    assert names(made) == ["tokens", "positions", "blocks.0", "blocks.1", "norm", "head"]


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = CausalTransformer(width=16, num_blocks=3, num_heads=2)
        self.last = nn.Linear(256, 2)

    def forward(self, tokens):
        return self.last(self.inner(tokens))


def test_a_module_that_holds_nearly_everything_is_looked_into():
    made = profile(Wrapped(), torch.zeros(4, 64, dtype=torch.long), sizes=(4,))
    assert names(made)[-3:] == ["inner.norm", "inner.head", "last"]
    assert "inner.blocks.1" in names(made)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.again(self.again(self.first(x))))


def test_a_module_that_is_called_twice_is_no_place_to_cut():
    assert names(profile(Twice(), torch.randn(8, 4))) == ["first", "last"]


def test_a_model_without_parts_is_one_layer():
    assert names(profile(nn.Linear(4, 2), torch.randn(8, 4))) == [""]


class Encoded(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.embed(x))


def test_an_encoder_that_is_part_of_a_model_is_looked_into():
    made = profile(Encoded(), torch.randn(8, 5, 4))
    assert names(made) == ["embed", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2"]


def test_finding_layers_leaves_no_hooks():
    model = mlp(4, 8, 3)
    find_layers(model, lambda: model(torch.randn(2, 4)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# bytes


def test_bytes_of_a_perceptron_are_exact():
    made = profile(mlp(4, 16, 3), rows(4), loss=functional.cross_entropy)
    linear, relu, last = made.layers
    assert [layer.parameter_bytes for layer in made.layers] == [4 * (4 * 16 + 16), 0, 4 * (16 * 3 + 3)]
    assert [layer.cut_bytes[0] for layer in made.layers] == [4 * 8 * 4, 4 * 8 * 16, 4 * 8 * 16]
    assert [layer.cut_gradient_bytes[0] for layer in made.layers] == [0, 4 * 8 * 16, 4 * 8 * 16]
    assert linear.kept_bytes == (0,)  # its input is the batch, its output nobody needs
    assert relu.kept_bytes == (4 * 8 * 16,)  # by itself and the layer behind it: once
    assert last.kept_bytes == (4 * 8 * 3 + 4,)  # log-softmax, and the sum of its weights


def test_targets_do_not_go_over_cuts():
    inputs, targets = rows(4)
    with_targets = profile(mlp(4, 16, 3), (inputs, targets), loss=functional.cross_entropy)
    without = profile(mlp(4, 16, 3), inputs)
    assert [layer.cut_bytes for layer in with_targets.layers] == [layer.cut_bytes for layer in without.layers]


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        skipped = self.a(x)
        return self.c(self.b(skipped).relu()) + skipped


def test_a_skip_connection_goes_over_every_cut_that_it_spans():
    made = profile(Skip(), torch.randn(8, 4))
    one = 4 * 8 * 6
    assert [layer.cut_bytes[0] for layer in made.layers] == [4 * 8 * 4, one, 2 * one]
    assert [layer.cut_gradient_bytes[0] for layer in made.layers] == [0, one, 2 * one]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, mask):
        return self.b(self.a(x)) * mask


def test_an_input_that_a_later_layer_uses_goes_over_the_cut_and_not_back():
    made = profile(Masked(), {"x": torch.randn(8, 4), "mask": torch.ones(8, 4)})
    assert made.layers[1].cut_bytes == (4 * 8 * 4,)  # used behind the last layer: the last stage has the batch, too
    assert made.layers[1].cut_gradient_bytes == (4 * 8 * 4,)


def test_bytes_follow_the_size():
    made = profile(mlp(4, 16, 3), rows(4, number=32), sizes=(8, 32), loss=functional.cross_entropy)
    assert made.layers[1].kept_bytes == (4 * 8 * 16, 4 * 32 * 16)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.middle(self.embed(tokens)))


def test_a_tied_parameter_is_counted_once_and_names_its_layers():
    made = profile(Tied(), torch.zeros(8, 2, dtype=torch.long))
    (shared,) = made.shared
    assert (shared.name, shared.layers, shared.parameter_bytes) == ("embed.weight", (0, 2), 4 * 16 * 4)
    assert made.parameter_bytes == 4 * (16 * 4 + 4 * 4 + 4)


def test_frozen_parameters_have_no_gradient():
    model = mlp(4, 16, 3)
    model[0].requires_grad_(False)
    made = profile(model, rows(4), loss=functional.cross_entropy)
    assert [layer.gradient_bytes for layer in made.layers] == [0, 0, 4 * (16 * 3 + 3)]


def test_parameters_inside_torchs_own_attention_belong_to_their_layer():
    made = profile(Encoded(), torch.randn(8, 5, 4))
    assert made.parameter_bytes == sum(4 * parameter.numel() for parameter in Encoded().parameters())
    assert len({layer.parameter_bytes for layer in made.layers[1:]}) == 1


# seconds


def test_a_layer_with_far_more_work_takes_longer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2048), nn.Linear(2048, 64))
    made = profile(model, torch.randn(64, 64), sizes=(64,))
    small, large, _ = made.layers
    assert large.forward_seconds[0] > small.forward_seconds[0]
    assert large.backward_seconds[0] > small.backward_seconds[0]


class Sleepy(torch.autograd.Function):
    """Works as long as it is told, so that the test does not depend on the machine."""

    @staticmethod
    def forward(ctx, x, rounds):
        ctx.rounds = rounds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        for _ in range(ctx.rounds):
            gradient = gradient @ torch.eye(len(gradient.t()))
        return gradient, None


class SlowBack(nn.Module):
    def __init__(self, rounds):
        super().__init__()
        self.rounds = rounds
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return Sleepy.apply(x * self.scale, self.rounds)


def test_the_seconds_of_a_backward_belong_to_the_layer_whose_forward_made_it():
    model = nn.Sequential(SlowBack(1), SlowBack(200), SlowBack(1))
    made = profile(model, torch.randn(64, 64), sizes=(64,))
    seconds = [layer.backward_seconds[0] for layer in made.layers]
    assert seconds[1] > 10 * max(seconds[0], seconds[2])


# the model afterwards


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.eval()
    model[0].weight.grad = gradient = torch.ones(8, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = rows(4)
    state = torch.get_rng_state()
    profile(model, batch, loss=functional.cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(8, 4))
    assert model[3].weight.grad is None
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    assert profile(mlp(4, 3), torch.randn(8, 4)).num_threads == 1
    assert torch.get_num_threads() == before


# batches


def test_a_step_function_may_be_what_is_profiled():
    def step(model, batch):
        inputs, targets = batch
        losses = functional.cross_entropy(model(inputs), targets, reduction="sum")
        return Sum(losses, float(len(inputs))), {}

    assert len(profile(mlp(4, 8, 3), rows(4), step=step).layers) == 3


def test_sizes_are_the_batch_a_quarter_and_a_sixteenth():
    assert [choose_sizes(number) for number in (64, 8, 2, 1)] == [(4, 16, 64), (2, 8), (2,), (1,)]


def test_every_tensor_with_samples_is_cut():
    batch = {"x": torch.zeros(8, 2), "scale": torch.zeros(3), "name": "n"}
    part = take_samples(batch, 2, of=count_samples(batch))
    assert (part["x"].shape, part["scale"].shape, part["name"]) == ((2, 2), (3,), "n")


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (mlp(4, 3), "words", "the batch is a str without samples"),
        (mlp(4, 3), torch.zeros(0, 4), "without samples"),
        (mlp(4, 3), torch.zeros(8, 5), r"the model fails on 2 samples of the batch: RuntimeError: mat1 and mat2"),
    ],
)
def test_a_batch_that_does_not_fit_the_model_is_refused(model, batch, message):
    with pytest.raises(PlanError, match=message):
        profile_trial(ProfileInput(model=model, batch=batch), num_threads=1)


# what is dear


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(4, 8, 3)
        self.num_forwards = 0

    def forward(self, x):
        self.num_forwards += 1
        return self.layers(x)


def test_a_model_that_takes_long_is_measured_once_with_the_fewest_samples(monkeypatch):
    monkeypatch.setattr(profiler, "DEAR_SECONDS", 0.0)
    monkeypatch.setattr(profiler, "CHEAP_SECONDS", 0.0)
    model = Counted()
    made = profile(model, rows(4), sizes=(2, 8), loss=functional.cross_entropy)
    assert made.sizes == (2,)
    assert model.num_forwards == 3  # two are timed, as the first may only have been the first; one shows what is kept
    assert all(len(layer.forward_seconds) == len(layer.kept_bytes) == 1 for layer in made.layers)
    assert all(layer.forward_seconds[0] > 0 for layer in made.layers)
    assert made.layers[0].backward_seconds[0] > 0


def test_of_engines_that_measured_other_sizes_those_count_that_all_of_them_did():
    model = mlp(4, 8, 3)
    two = profile(model, rows(4), sizes=(2, 8), loss=functional.cross_entropy)
    one = profile(model, rows(4), sizes=(2,), loss=functional.cross_entropy)
    mean = mean_profile([two, one])
    assert mean.sizes == (2,)
    pairs = zip(two.layers, one.layers, strict=True)
    assert [layer.forward_seconds for layer in mean.layers] == [
        (pytest.approx((a.forward_seconds[0] + b.forward_seconds[0]) / 2),) for a, b in pairs
    ]
