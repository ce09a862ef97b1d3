"""How a model is divided into stages, and where it can be cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from dnb.errors import PlanError
from dnb.partitioning.pipeline.cut_points import cut_points
from dnb.partitioning.pipeline.stage_builder import StageBuilder, divide
from dnb.partitioning.pipeline.stage_module import StagePart
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.protocol.run import Partition
from tests.unit.stage_teams import LossNet, NormNet, SkipNet, SmallGPT, images, mlp, sentences, vectors


def cut_at(*cuts: str, num_stages: int | None = None) -> Partition:
    number = num_stages or len(cuts) + 1
    return Partition(kind="pipeline", num_engines=number, num_stages=number, cuts=cuts)


def run(parts: Sequence[StagePart], *inputs: Any) -> Any:
    """All stages, one after the other."""
    received: Any = ()
    for part in parts:
        received = part.module(*received, *[inputs[position] for position in part.inputs])
    return received


def owners(parts: Sequence[StagePart]) -> list[list[str]]:
    return [sorted(part.parameters) for part in parts]


class Wrapped(nn.Module):
    """Made of one function of its children and its inputs."""

    def __init__(self, function: Any, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def two_layers(function: Any) -> nn.Module:
    torch.manual_seed(0)
    return Wrapped(function, first=nn.Linear(6, 4), second=nn.Linear(4, 4))


# What is computed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "cuts", "inputs"),
    [
        (mlp(), ("2", "6"), vectors()[0]),
        (SkipNet(), ("second", "third", "head"), images()[0]),
        (SmallGPT(), ("blocks.1", "blocks.2"), sentences()[0]),
    ],
    ids=["mlp", "skip", "gpt"],
)
def test_stages_one_after_the_other_give_the_models_own_output(model: nn.Module, cuts: Any, inputs: torch.Tensor):
    parts = divide(model, cut_at(*cuts), Inputs((inputs,)))
    assert torch.equal(run(parts, inputs), model(inputs))


def test_a_cut_may_lie_inside_a_layer():
    model = SmallGPT()
    parts = divide(model, cut_at("blocks.1.mlp.1"), Inputs((sentences()[0],)))
    assert torch.equal(run(parts, sentences()[0]), model(sentences()[0]))


def test_a_value_that_all_later_stages_use_is_handed_on_by_each():
    parts = divide(SkipNet(), cut_at("second", "third"), Inputs((images()[0],)))
    assert [len(part.receives) for part in parts] == [0, 1, 2]


def test_what_a_stage_sends_the_next_one_receives():
    parts = divide(SkipNet(), cut_at("second", "third"), Inputs((images(2)[0],)))
    assert [tuple(tensor.shape) for tensor in parts[1].sends] == [tuple(t.shape) for t in parts[2].receives]


def test_sizes_do_not_cross_a_cut():
    model = two_layers(lambda self, x: self.second(self.first(x)) * x.shape[1])
    parts = divide(model, cut_at("second"), Inputs((vectors()[0],)))
    assert [tensor.dtype for tensor in parts[1].receives] == [torch.float32]
    assert torch.equal(run(parts, vectors()[0]), model(vectors()[0]))


def test_a_tuple_crosses_a_cut_in_its_elements():
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).chunk(2, dim=1)
        return self.second(torch.cat([right, left], dim=1))

    model = two_layers(function)
    parts = divide(model, cut_at("second"), Inputs((vectors()[0],)))
    assert torch.equal(run(parts, vectors()[0]), model(vectors()[0]))


def test_every_stage_reads_the_inputs_that_it_uses():
    model = two_layers(lambda self, x, mask: self.second(self.first(x) * mask))
    x, mask = vectors()[0], torch.ones(24, 4)
    late = two_layers(lambda self, x, mask: self.second(self.first(x)) * mask)
    assert [part.inputs for part in divide(model, cut_at("second"), Inputs((x, mask)))] == [(0, 1), ()]
    assert [part.inputs for part in divide(late, cut_at("second"), Inputs((x, mask)))] == [(0,), (1,)]


def test_the_last_stage_of_a_model_with_named_inputs_gives_its_loss():
    model = LossNet()
    x, labels = vectors()
    parts = divide(model, cut_at("head"), Inputs.of({"x": x, "labels": labels}))
    assert torch.equal(run(parts, x, labels), model(x, labels=labels).loss)


def test_an_output_of_any_form_is_given_whole():
    model = two_layers(lambda self, x: {"hidden": (hidden := self.first(x)), "pair": [self.second(hidden), hidden]})
    found = run(divide(model, cut_at("second"), Inputs((vectors()[0],))), vectors()[0])
    assert torch.equal(found["pair"][0], model(vectors()[0])["pair"][0])


def test_random_numbers_of_a_forward_are_new_in_every_step():
    model = two_layers(lambda self, x: self.second(self.first(x)) * torch.rand(4))
    parts = divide(model, cut_at("second"), Inputs((vectors()[0],)))
    assert not torch.equal(run(parts, vectors()[0]), run(parts, vectors()[0]))


def test_a_forward_that_asks_for_types_is_traced_by_export():
    def function(self: Any, x: Any) -> torch.Tensor:
        doubled = x * 2 if isinstance(x, torch.Tensor) else x
        return self.second(self.first(doubled))

    model = two_layers(function)
    parts = divide(model, cut_at("second"), Inputs((vectors()[0],)))
    assert owners(parts) == [["first.bias", "first.weight"], ["second.bias", "second.weight"]]
    assert torch.equal(run(parts, vectors()[0]), model(vectors()[0]))


class Sorting(nn.Module):
    """Looks at values, though only inside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


def test_a_layer_that_looks_at_values_stays_whole():
    model = nn.Sequential(nn.Linear(6, 4), Sorting(), nn.Linear(4, 2))
    parts = divide(model, cut_at("2"), Inputs((vectors()[0],)))
    assert torch.equal(run(parts, vectors()[0]), model(vectors()[0]))


def test_dividing_changes_no_buffer():
    model = NormNet()
    before = copy.deepcopy(model.state_dict())
    divide(model, cut_at("second"), Inputs((vectors()[0],)))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_dividing_draws_no_random_numbers():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    inputs = Inputs((vectors()[0],))
    state = torch.get_rng_state()
    divide(model, cut_at("1"), inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_stages_follow_the_models_mode():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    parts = divide(model, cut_at("2"), Inputs((vectors()[0],)))
    model.eval()
    assert torch.equal(run(parts, vectors()[0]), model(vectors()[0]))


def test_a_frozen_first_stage_sends_what_wants_no_gradient():
    model = mlp()
    model[0].requires_grad_(False)
    parts = divide(model, cut_at("2"), Inputs((vectors()[0],)))
    assert [tensor.requires_grad for tensor in parts[1].receives] == [False]


def test_a_second_shape_is_divided_like_the_first():
    model = SmallGPT()
    divider = StageBuilder(model, cut_at("blocks.2"))
    divider.parts(Inputs((sentences()[0],)))
    short = sentences()[0][:, :5]
    assert torch.equal(run(divider.parts(Inputs((short,))), short), model(short))


# Who owns what ----------------------------------------------------------------------------------------


def test_a_tied_weight_is_known_to_both_stages_by_one_name():
    parts = divide(SmallGPT(), cut_at("blocks.1", "blocks.2"), Inputs((sentences()[0],)))
    assert ["words.weight" in part.parameters for part in parts] == [True, False, True]


def test_stages_share_the_models_own_parameters():
    model = mlp()
    parts = divide(model, cut_at("4"), Inputs((vectors()[0],)))
    assert parts[1].parameters["4.weight"] is model[4].weight


def test_buffers_are_known_by_the_models_names():
    parts = divide(NormNet(), cut_at("second"), Inputs((vectors()[0],)))
    assert [sorted(part.buffers)[0] for part in parts] == ["early.num_batches_tracked", "late.num_batches_tracked"]


# The user's own stages ----------------------------------------------------------------------------------


def test_stages_of_the_user_are_chained():
    model = mlp()
    parts = divide(model, cut_at(num_stages=2), Inputs((vectors()[0],)), stages=[model[:2], model[2:]])
    assert torch.equal(run(parts, vectors()[0]), model(vectors()[0]))
    assert owners(parts)[0] == ["0.bias", "0.weight"]


def test_a_tuple_from_a_stage_becomes_several_inputs_of_the_next():
    first = Wrapped(lambda self, x: (self.layer(x), x), layer=nn.Linear(6, 6))
    second = Wrapped(lambda self, hidden, x: self.layer(hidden + x), layer=nn.Linear(6, 3))
    model = nn.ModuleList([first, second])
    parts = divide(model, cut_at(num_stages=2), Inputs((vectors()[0],)), stages=[first, second])
    assert [len(part.receives) for part in parts] == [0, 2]


def test_more_modules_than_stages_are_grouped():
    model = mlp()
    parts = divide(model, cut_at(num_stages=2), Inputs((vectors()[0],)), stages=list(model))
    assert [part.begins for part in parts] == ["stages[0]", "stages[4]"]


def test_a_stage_with_a_parameter_of_its_own_is_refused():
    model = mlp()
    with pytest.raises(PlanError, match=r"stage 1 has a parameter of shape .* that is not one of the model's"):
        divide(model, cut_at(num_stages=2), Inputs((vectors()[0],)), stages=[model[:2], copy.deepcopy(model[2:])])


def test_a_stage_that_hands_on_a_dictionary_is_refused():
    first = Wrapped(lambda self, x: {"x": self.layer(x)}, layer=nn.Linear(6, 6))
    model = nn.ModuleList([first, nn.Linear(6, 3)])
    with pytest.raises(PlanError, match="stage 0 hands on a dict"):
        divide(model, cut_at(num_stages=2), Inputs((vectors()[0],)), stages=list(model))


def test_a_stage_that_changes_its_input_in_place_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with pytest.raises(PlanError, match="stage 1 changes its input in place: set inplace=False"):
        divide(model, cut_at(num_stages=2), Inputs((vectors()[0],)), stages=[model[:1], model[1:]])


# What is refused --------------------------------------------------------------------------------------


def refused(model: nn.Module, partition: Partition, *inputs: torch.Tensor) -> str:
    with pytest.raises(PlanError) as caught:
        divide(model, partition, Inputs(inputs or (vectors()[0],)))
    return str(caught.value)


def test_more_stages_than_layers_are_refused_with_the_number_that_can_be():
    assert "this model has 9 that can be a stage: ask for 9 or fewer" in refused(mlp(), cut_at(num_stages=12))


def test_an_unknown_cut_is_refused_with_the_nearest_name():
    model = nn.ModuleDict({"encoder": mlp()})
    message = refused(Wrapped(lambda self, x: self.body["encoder"](x), body=model), cut_at("body.encoder.44"))
    assert "no layer 'body.encoder.44' to begin a stage at; did you mean 'body.encoder.4'?" in message


def test_too_few_cuts_are_refused_with_the_places():
    assert "3 pipeline stages need 2 cuts, and 1 were given" in refused(mlp(), cut_at("2", num_stages=3))


def test_a_cut_at_the_very_beginning_is_refused():
    assert "stage 0 would have no layer" in refused(mlp(), cut_at("0"))


def test_cuts_in_another_order_than_the_layers_run_are_refused():
    assert "in the order in which the model runs them: 2, 4" in refused(mlp(), cut_at("4", "2"))


def test_a_layer_that_is_never_called_is_no_place_for_a_cut():
    model = two_layers(lambda self, x: torch.nn.functional.linear(self.first(x), self.second.weight))
    assert "no stage can begin at 'second': the model's forward never calls it" in refused(model, cut_at("second"))


def test_an_operation_in_place_across_a_cut_is_refused_by_its_names():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    assert "stage 1 changes in place ('1') what stage 0 has made ('0')" in refused(model, cut_at("1"))


def test_an_operation_in_place_within_a_stage_is_fine():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    parts = divide(model, cut_at("2"), Inputs((vectors()[0],)))
    assert torch.equal(run(parts, vectors()[0]), model(vectors()[0]))


def test_a_module_that_cannot_be_traced_is_refused_with_operator_line_and_way_out():
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if hidden.sum() > 0:
            hidden = -hidden
        return self.second(hidden)

    message = refused(two_layers(function), cut_at("second"))
    assert "test_stage_builder.py" in message
    assert "if hidden.sum() > 0:" in message
    assert "after the operation 'gt'" in message
    assert "give the stages yourself: stages=[first, second, ...]" in message


# Where it can be cut ------------------------------------------------------------------------------------


def test_a_sequential_can_be_cut_before_every_layer_but_the_first():
    assert cut_points(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))) == ["1", "2"]


def test_cut_points_are_in_the_order_in_which_layers_run():
    model = Wrapped(lambda self, x: self.last(self.first(x)), last=nn.Linear(4, 4), first=nn.Linear(4, 4))
    assert cut_points(model, Inputs((torch.zeros(2, 4),))) == ["last"]


def test_a_place_has_the_name_of_the_outermost_layer_there():
    assert cut_points(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))) == ["1", "1.1"]


def test_no_stage_begins_with_a_layer_that_works_in_place():
    assert cut_points(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))) == ["2"]


def test_a_transformer_can_be_cut_at_and_within_its_blocks():
    points = cut_points(SmallGPT(num_blocks=2), Inputs((sentences()[0],)))
    assert points[:5] == ["places", "blocks.0", "blocks.0.qkv", "blocks.0.out", "blocks.0.mlp"]
    assert points[-2:] == ["norm", "head"]


def test_a_model_that_looks_at_values_can_be_cut_nowhere():
    model = two_layers(lambda self, x: self.second(self.first(x)) if x.sum() > 0 else x)
    assert cut_points(model, Inputs((vectors()[0],))) == []


def test_every_cut_point_is_a_place_where_a_stage_can_begin():
    model, x = nn.Sequential(nn.Linear(6, 6), mlp(), nn.Linear(3, 3)), vectors()[0]
    for point in cut_points(model):
        parts = divide(model, cut_at(point), Inputs((x,)))
        assert torch.equal(run(parts, x), model(x))


def test_what_cannot_be_followed_inside_can_be_cut_around():
    inner = two_layers(lambda self, x: self.second(self.first(x)) if x.sum() > 0 else x)
    assert cut_points(nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), inner), nn.ReLU())) == [
        "1",
        "1.1",
        "2",
    ]
