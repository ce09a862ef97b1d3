from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnb.engine.runtime.gradients import Gradients
from dnb.transport.layout import LARGE_ELEMENTS, plan_gradients, slot_views
from dnb.transport.sockets.wires import Flat

pytestmark = pytest.mark.numeric

# A gradient of 16,384 elements is moved into the slab by a hook, a smaller one is added up in place.
LARGE, SMALL = 128, 127


class Slabs:
    """A model whose gradients are born in slabs."""

    def __init__(
        self, model: nn.Module, *, num_slabs: int = 1, is_written: Callable[[int], None] | None = None
    ) -> None:
        self.model = model
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.data = parameter.data.contiguous()  # as the hub's memory is, which a replica reads from
        self.layout = plan_gradients((name, p) for name, p in parameters.items() if p.requires_grad)
        self.names = [slot.name for slot in self.layout.slots]
        self.flats = [Flat(memoryview(bytearray(max(self.layout.num_bytes, 1)))) for _ in range(num_slabs)]
        self.views = [slot_views(self.layout, flat.memory) for flat in self.flats]
        self.gradients = Gradients([parameters[name] for name in self.names], self.layout, is_written=is_written)

    def begin(self, slab: int = 0, *, fresh: bool = True) -> None:
        self.gradients.begin(slab, self.flats[slab], fresh=fresh)

    def backward(self, loss: torch.Tensor, *, slab: int = 0, fresh: bool = True) -> list[str]:
        """One backward into a slab; the names of those that got no gradient."""
        self.begin(slab, fresh=fresh)
        loss.backward()
        return self.finish()

    def finish(self) -> list[str]:
        return sorted(self.names[index] for index in self.gradients.finish())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.views[0][name]

    def spoil(self, value: float = 9.0) -> None:
        """What an earlier step may have left."""
        for views in self.views:
            for view in views.values():
                view.fill_(value)


def plain(model: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients that torch gives without us."""
    model = copy.deepcopy(model)
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_plain(slabs: Slabs, loss_of: Callable[[nn.Module], torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    slabs.spoil()
    slabs.backward(loss_of(slabs.model))
    for name, gradient in wanted.items():
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        torch.testing.assert_close(slabs[name], dense, rtol=0, atol=0, msg=name)


def linear(width: int, *, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, width, bias=False)


def large_and_small() -> nn.Module:
    return nn.ModuleDict({"large": linear(LARGE), "small": linear(SMALL)})


def both(model: Any) -> torch.Tensor:
    return model["large"](torch.ones(2, LARGE)).sin().sum() + model["small"](torch.ones(2, SMALL)).sin().sum()


def only(name: str) -> Callable[[Any], torch.Tensor]:
    width = {"large": LARGE, "small": SMALL}[name]
    return lambda model: model[name](torch.ones(2, width)).sin().sum()


KINDS = pytest.mark.parametrize("name", ["large", "small"])


# where gradients are born --------------------------------------------------------------------------


def test_the_two_kinds_are_told_apart_by_their_elements():
    assert SMALL * SMALL < LARGE_ELEMENTS <= LARGE * LARGE


def test_a_large_gradient_is_left_to_autograd_and_a_small_one_is_added_to_in_place():
    slabs = Slabs(large_and_small())
    slabs.begin()
    assert slabs.model.large.weight.grad is None
    assert slabs.model.small.weight.grad.data_ptr() == slabs["small.weight"].data_ptr()


def test_gradients_of_both_kinds_are_in_the_slab():
    model = large_and_small()
    assert_plain(Slabs(model), both, plain(model, both))


def test_gradients_are_views_of_the_slab_after_backward():
    slabs = Slabs(large_and_small())
    slabs.backward(both(slabs.model))
    places = {name: p.grad.data_ptr() for name, p in slabs.model.named_parameters()}
    assert places == {name: slabs[name].data_ptr() for name in slabs.names}


def test_gradients_are_written_to_the_slab_that_was_begun():
    slabs = Slabs(large_and_small(), num_slabs=2)
    slabs.backward(both(slabs.model), slab=1)
    assert not any(view.any() for view in slabs.views[0].values())
    assert all(view.any() for view in slabs.views[1].values())


def test_a_slab_keeps_its_gradients_when_another_is_written():
    slabs = Slabs(large_and_small(), num_slabs=2)
    slabs.backward(both(slabs.model), slab=0)
    before = {name: view.clone() for name, view in slabs.views[0].items()}
    slabs.backward(2 * both(slabs.model), slab=1)
    assert all(torch.equal(slabs[name], before[name]) for name in slabs.names)
    assert all(torch.equal(slabs.views[1][name], 2 * before[name]) for name in slabs.names)


@KINDS
def test_a_fresh_slab_forgets_what_was_in_it(name: str):
    slabs = Slabs(large_and_small())
    slabs.spoil(math.nan)
    slabs.backward(both(slabs.model))
    assert torch.isfinite(slabs[f"{name}.weight"]).all()


@KINDS
def test_a_slab_that_is_not_fresh_is_added_to(name: str):
    slabs = Slabs(large_and_small())
    slabs.backward(both(slabs.model))
    once = slabs[f"{name}.weight"].clone()
    slabs.backward(both(slabs.model), fresh=False)
    assert torch.equal(slabs[f"{name}.weight"], 2 * once)


@KINDS
def test_micro_batches_add_up(name: str):
    slabs = Slabs(large_and_small())
    slabs.begin()
    for factor in (1.0, 2.0, 4.0):
        (factor * both(slabs.model)).backward()
    slabs.finish()
    torch.testing.assert_close(slabs[f"{name}.weight"], 7 * plain(slabs.model, both)[f"{name}.weight"])


@KINDS
def test_micro_batches_add_up_where_one_of_them_does_not_use_a_parameter(name: str):
    other = {"large": "small", "small": "large"}[name]
    slabs = Slabs(large_and_small())
    slabs.spoil()
    slabs.begin()
    only(other)(slabs.model).backward()
    both(slabs.model).backward()
    only(other)(slabs.model).backward()
    assert slabs.finish() == []
    torch.testing.assert_close(slabs[f"{name}.weight"], plain(slabs.model, both)[f"{name}.weight"])


# unused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "not fresh"])
@KINDS
def test_a_parameter_that_got_no_gradient_is_named(name: str, fresh: bool):
    slabs = Slabs(large_and_small())
    slabs.backward(both(slabs.model))
    other = {"large": "small", "small": "large"}[name]
    assert slabs.backward(only(other)(slabs.model), fresh=fresh) == [f"{name}.weight"]


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "not fresh"])
def test_none_is_named_when_all_got_a_gradient(fresh: bool):
    slabs = Slabs(large_and_small())
    assert slabs.backward(both(slabs.model), fresh=fresh) == []


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "not fresh"])
def test_all_are_named_without_a_backward(fresh: bool):
    slabs = Slabs(large_and_small())
    slabs.begin(fresh=fresh)
    assert slabs.finish() == ["large.weight", "small.weight"]


@KINDS
def test_a_gradient_of_zeros_is_a_gradient(name: str):
    slabs = Slabs(large_and_small())
    assert slabs.backward(0 * both(slabs.model)) == []
    assert not slabs[f"{name}.weight"].any()


@KINDS
def test_a_parameter_that_got_no_gradient_has_zeros_in_a_fresh_slab(name: str):
    slabs = Slabs(large_and_small())
    slabs.spoil()
    other = {"large": "small", "small": "large"}[name]
    slabs.backward(only(other)(slabs.model))
    assert not slabs[f"{name}.weight"].any()


@KINDS
def test_a_parameter_that_got_no_gradient_keeps_what_was_in_a_slab_that_is_not_fresh(name: str):
    slabs = Slabs(large_and_small())
    slabs.backward(both(slabs.model))
    once = slabs[f"{name}.weight"].clone()
    other = {"large": "small", "small": "large"}[name]
    slabs.backward(only(other)(slabs.model), fresh=False)
    assert torch.equal(slabs[f"{name}.weight"], once)


# user code in between ------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "not fresh"])
@KINDS
def test_zero_grad_before_backward_loses_nothing(name: str, fresh: bool):
    slabs = Slabs(large_and_small())
    slabs.backward(both(slabs.model))
    once = slabs[f"{name}.weight"].clone()
    slabs.begin(fresh=fresh)
    slabs.model.zero_grad()
    both(slabs.model).backward()
    assert slabs.finish() == []
    assert torch.equal(slabs[f"{name}.weight"], once if fresh else 2 * once)


@KINDS
def test_zero_grad_before_every_micro_batch_loses_nothing(name: str):
    slabs = Slabs(large_and_small())
    slabs.spoil()
    slabs.begin()
    for _ in range(3):
        slabs.model.zero_grad()
        both(slabs.model).backward()
        slabs.gradients.bring_home()
    slabs.finish()
    torch.testing.assert_close(slabs[f"{name}.weight"], 3 * plain(slabs.model, both)[f"{name}.weight"])


@KINDS
def test_zero_grad_alone_is_no_gradient(name: str):
    slabs = Slabs(large_and_small())
    slabs.begin()
    slabs.model.zero_grad()
    other = {"large": "small", "small": "large"}[name]
    only(other)(slabs.model).backward()
    assert slabs.finish() == [f"{name}.weight"]


@KINDS
def test_gradients_are_born_in_the_slab_again_after_zero_grad(name: str):
    slabs = Slabs(large_and_small())
    slabs.begin()
    slabs.model.zero_grad()
    both(slabs.model).backward()
    slabs.finish()
    assert slabs.model[name].weight.grad.data_ptr() == slabs[f"{name}.weight"].data_ptr()


@KINDS
def test_a_gradient_of_a_gradient_in_the_loss_is_counted_once(name: str):
    def penalized(model: Any) -> torch.Tensor:
        loss = both(model)
        (slope,) = torch.autograd.grad(loss, [model[name].weight], create_graph=True)
        return loss + slope.square().sum()

    model = large_and_small()
    assert_plain(Slabs(model), penalized, plain(model, penalized))


# kinds of parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [5, 1_000])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "not fresh"])
@pytest.mark.parametrize("zeroes", [False, True], ids=["", "zero_grad"])
def test_a_sparse_gradient_becomes_a_dense_one(num_rows: int, fresh: bool, zeroes: bool):
    torch.manual_seed(0)
    slabs = Slabs(nn.Embedding(num_rows, 17, sparse=True))
    slabs.spoil(0.0 if not fresh else 9.0)
    slabs.begin(fresh=fresh)
    for rows in ([1, 3, 3], [3]):
        if zeroes:
            slabs.model.zero_grad()
        slabs.model(torch.tensor(rows)).sum().backward()
        slabs.gradients.bring_home()
    assert slabs.finish() == []
    assert slabs["weight"].sum(1).tolist() == [{1: 17.0, 3: 51.0}.get(row, 0.0) for row in range(num_rows)]


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_tied_weights_get_the_gradient_of_both_uses(width: int):
    model = nn.Sequential(linear(width), nn.Tanh(), linear(width))
    model[2].weight = model[0].weight

    def loss_of(model: nn.Module) -> torch.Tensor:
        return model(torch.ones(2, width)).sum()

    assert_plain(Slabs(model), loss_of, plain(model, loss_of))


def test_a_parameter_without_elements_is_taken():
    model = nn.ParameterDict({"empty": nn.Parameter(torch.empty(0, 3)), "full": nn.Parameter(torch.ones(3))})
    slabs = Slabs(model)
    assert slabs.backward(model["empty"].sum() + model["full"].sum()) == []
    assert slabs["full"].tolist() == [1.0, 1.0, 1.0]


def test_a_parameter_without_elements_that_is_not_used_is_named():
    model = nn.ParameterDict({"empty": nn.Parameter(torch.empty(0, 3)), "full": nn.Parameter(torch.ones(3))})
    slabs = Slabs(model)
    assert slabs.backward(model["full"].sum()) == ["empty"]


def test_a_model_of_nothing_but_an_empty_parameter_is_taken():
    slabs = Slabs(nn.ParameterDict({"empty": nn.Parameter(torch.empty(0))}))
    assert slabs.backward(slabs.model["empty"].sum()) == []


def test_parameters_of_several_dtypes_have_gradients_of_their_own_dtypes():
    torch.manual_seed(0)
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.complex64]
    model = nn.ParameterDict(
        {
            f"{dtype}-{size}".removeprefix("torch."): nn.Parameter(torch.randn(size, dtype=dtype))
            for size in (3, LARGE_ELEMENTS)
            for dtype in dtypes
        }
    )

    def loss_of(model: Any) -> torch.Tensor:
        return sum(p.abs().double().square().sum() for p in model.values())

    assert_plain(Slabs(model), loss_of, plain(model, loss_of))


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize(
    "arrange", [lambda t: t.t(), lambda t: torch.stack([t, t], 2)[..., 0]], ids=["transposed", "every second"]
)
def test_a_parameter_that_is_not_contiguous_has_a_gradient_that_is(width: int, arrange: Any):
    torch.manual_seed(0)
    model = nn.ParameterDict({"weight": nn.Parameter(arrange(torch.randn(width, width)))})

    def loss_of(model: Any) -> torch.Tensor:
        return (model["weight"] * torch.arange(width * width).view(width, width)).sum()

    slabs = Slabs(copy.deepcopy(model))
    assert_plain(slabs, loss_of, plain(model, loss_of))
    assert slabs["weight"].is_contiguous()


def test_a_convolution_whose_gradient_is_channels_last_is_taken():
    torch.manual_seed(0)
    model = nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)

    def loss_of(model: nn.Module) -> torch.Tensor:
        return model(torch.ones(1, 64, 5, 5).to(memory_format=torch.channels_last)).sin().sum()

    slabs = Slabs(copy.deepcopy(model))
    slabs.backward(loss_of(slabs.model))
    torch.testing.assert_close(slabs["weight"], plain(model, loss_of)["weight"].contiguous())


class Checkpointed(nn.Module):
    """Layers that are computed again in backward, one of them in two places."""

    def __init__(self, width: int, *, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(width, width) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        x = checkpoint(self.second, x.tanh(), use_reentrant=self.use_reentrant)
        return checkpoint(self.first, x.tanh(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["one backward", "reentrant"])
def test_a_checkpointed_backward_gives_the_same_gradients(width: int, use_reentrant: bool):
    model = Checkpointed(width, use_reentrant=use_reentrant)

    def loss_of(model: nn.Module) -> torch.Tensor:
        return model(torch.ones(2, width, requires_grad=True)).sin().sum()

    assert_plain(Slabs(model), loss_of, plain(model, loss_of))


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["one backward", "reentrant"])
def test_checkpointed_micro_batches_add_up(width: int, use_reentrant: bool):
    model = Checkpointed(width, use_reentrant=use_reentrant)

    def loss_of(model: nn.Module) -> torch.Tensor:
        return model(torch.ones(2, width, requires_grad=True)).sin().sum()

    slabs = Slabs(copy.deepcopy(model))
    slabs.spoil()
    slabs.begin()
    for _ in range(3):
        loss_of(slabs.model).backward()
    assert slabs.finish() == []
    for name, gradient in plain(model, loss_of).items():
        torch.testing.assert_close(slabs[name], 3 * gradient, rtol=1e-5, atol=1e-5)


# who is told ---------------------------------------------------------------------------------------


def test_every_gradient_that_is_written_is_told_once():
    told: list[int] = []
    slabs = Slabs(large_and_small(), is_written=told.append)
    slabs.backward(both(slabs.model))
    assert sorted(slabs.names[index] for index in told) == ["large.weight", "small.weight"]


def test_a_gradient_that_is_not_written_is_not_told():
    told: list[int] = []
    slabs = Slabs(large_and_small(), is_written=told.append)
    slabs.backward(only("small")(slabs.model))
    assert [slabs.names[index] for index in told] == ["small.weight"]


@pytest.mark.parametrize("zeroes", [False, True], ids=["", "zero_grad"])
@KINDS
def test_a_gradient_is_in_the_slab_when_it_was_told_last(name: str, zeroes: bool):
    """Whoever sends it may do so at once, and does not look again."""
    seen: dict[str, torch.Tensor] = {}
    slabs = Slabs(
        large_and_small(), is_written=lambda index: seen.update({slabs.names[index]: slabs[slabs.names[index]].clone()})
    )
    slabs.begin()
    if zeroes:
        slabs.model.zero_grad()
    both(slabs.model).backward()
    slabs.finish()
    assert torch.equal(seen[f"{name}.weight"], slabs[f"{name}.weight"])


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["one backward", "reentrant"])
def test_a_checkpointed_gradient_is_in_the_slab_when_it_was_told_last(width: int, use_reentrant: bool):
    seen: dict[str, torch.Tensor] = {}
    slabs = Slabs(
        Checkpointed(width, use_reentrant=use_reentrant),
        is_written=lambda index: seen.update({slabs.names[index]: slabs[slabs.names[index]].clone()}),
    )
    slabs.backward(slabs.model(torch.ones(2, width, requires_grad=True)).sin().sum())
    assert all(torch.equal(seen[name], slabs[name]) for name in slabs.names)


# faults --------------------------------------------------------------------------------------------


def test_finite_gradients_have_no_fault():
    slabs = Slabs(large_and_small())
    slabs.backward(both(slabs.model))
    assert slabs.gradients.first_fault() is None


@pytest.mark.parametrize(("factor", "kind"), [(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "inf")])
@KINDS
def test_a_fault_is_told_with_its_parameter_and_kind(name: str, factor: float, kind: str):
    slabs = Slabs(large_and_small())
    other = {"large": "small", "small": "large"}[name]
    slabs.backward(slabs.model[name].weight.sum() * factor + only(other)(slabs.model))
    assert slabs.gradients.first_fault() == (f"{name}.weight", kind)


def test_the_first_of_two_faults_is_told():
    slabs = Slabs(large_and_small())
    slabs.backward(both(slabs.model) * math.nan)
    assert slabs.gradients.first_fault() == ("small.weight", "NaN")


def test_a_large_finite_gradient_is_no_fault():
    slabs = Slabs(nn.ParameterDict({"weight": nn.Parameter(torch.ones(3))}))
    slabs.backward(slabs.model["weight"].sum() * 3e38)
    assert slabs.gradients.first_fault() is None


# the end -------------------------------------------------------------------------------------------


def test_parameters_are_let_go_of():
    told: list[int] = []
    slabs = Slabs(large_and_small(), is_written=told.append)
    slabs.backward(both(slabs.model))
    told.clear()
    slabs.gradients.close()
    assert [p.grad for p in slabs.model.parameters()] == [None, None]
    both(slabs.model).backward()
    assert told == []
    assert slabs.model.large.weight.grad.data_ptr() != slabs["large.weight"].data_ptr()
