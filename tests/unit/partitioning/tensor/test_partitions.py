"""Which layers are divided, and that what is wrong is refused before anything starts."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.nn.functional import cross_entropy

from dnb.errors import ArgumentError, PlanError
from dnb.partitioning.tensor.partitions import tensor_partitions
from dnb.partitioning.tensor.trial import ModelTrial
from dnb.protocol.run import Partition
from tests.unit.stage_teams import LossNet, SkipNet, SmallGPT, images, mlp, sentences, vectors
from tests.unit.tensor_models import DividableGPT, Leaking, NormedHeads, Planned, Softened

EIGHTS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64)
PAIR = {"up": "colwise", "down": "rowwise"}


def partitions(model: nn.Module, samples: Any, **named: Any) -> dict[int, Partition]:
    batch = samples if isinstance(samples, Mapping) else tuple(tensor[:4] for tensor in samples)
    return {each.num_engines: each for each in tensor_partitions(model, ModelTrial(batch, loss=cross_entropy), **named)}


def test_linear_layers_are_paired_by_columns_and_by_rows():
    found = partitions(mlp(), vectors())
    assert found[1].styles == {}
    assert found[2].styles == {"0": "colwise", "2": "rowwise", "4": "colwise", "6": "rowwise"}


def test_only_numbers_that_divide_everything_are_planned_for():
    assert list(partitions(mlp(), vectors())) == [1, 2, 4]  # 160 and 12


def test_attention_is_divided_by_heads_and_every_engine_counts_its_own():
    found = partitions(DividableGPT(), sentences())
    attention = {name: style for name, style in found[2].styles.items() if name.startswith("blocks.1.attention")}
    assert attention == {
        "blocks.1.attention.q": "colwise",
        "blocks.1.attention.k": "colwise",
        "blocks.1.attention.v": "colwise",
        "blocks.1.attention.out": "rowwise",
    }
    assert found[4].shares == {"blocks.0.attention.num_heads": 1, "blocks.1.attention.num_heads": 1}
    assert list(found) == [1, 2, 4]  # as there are four heads


def test_packed_attention_stays_whole_and_the_layers_behind_it_are_divided():
    styles = partitions(SmallGPT(), sentences())[2].styles
    assert {name.partition("mlp")[1] for name in styles} == {"mlp"}


def test_a_large_packed_layer_is_divided_and_put_together_at_once():
    styles = partitions(SmallGPT(num_blocks=1, width=128), sentences())[2].styles
    assert styles["blocks.0.qkv"] == "colwise_rep"
    assert "blocks.0.out" not in styles


def test_a_large_embedding_and_the_head_that_shares_its_weight_are_divided_by_words():
    styles = partitions(DividableGPT(width=32, num_words=2048), sentences())[2].styles
    assert (styles["words"], styles["head"]) == ("rowwise", "colwise_rep")
    assert "places" not in styles


def test_of_a_transformer_layer_of_torch_the_two_linear_layers_are_divided():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten())
    samples = torch.randn(4, 3, 8), torch.zeros(4)
    assert partitions(model, samples)[2].styles == {"0.linear1": "colwise", "0.linear2": "rowwise"}


def test_a_dictionary_batch_is_planned_for_by_its_loss():
    batch = {"x": vectors()[0][:4], "labels": vectors()[1][:4]}
    assert partitions(LossNet(), batch)[2].styles == {"first": "colwise", "head": "rowwise"}


def test_the_model_stays_as_it_is():
    model = mlp().train()
    before = [parameter.clone() for parameter in model.parameters()]
    generator = torch.get_rng_state()
    partitions(model, vectors())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert model.training
    assert torch.equal(generator, torch.get_rng_state())


# What cannot be divided -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", [NormedHeads(), Softened(), Leaking()], ids=lambda model: type(model).__name__)
def test_what_would_change_the_answer_is_refused(model: nn.Module):
    with pytest.raises(PlanError, match=r"differs from the whole model's|RuntimeError"):
        partitions(model, vectors(), plan=PAIR)


def test_a_weight_that_all_parts_use_is_noticed_by_its_gradient():
    with pytest.raises(PlanError, match=r"the gradient of 'norm\.weight' differs from the whole model's"):
        partitions(NormedHeads(), vectors(), plan=PAIR)


@pytest.mark.parametrize("model", [NormedHeads(), Leaking()], ids=lambda model: type(model).__name__)
def test_what_would_change_the_answer_is_not_found(model: nn.Module):
    with pytest.raises(PlanError, match="strategy='data', or say which layers: tensor_plan="):
        partitions(model, vectors())


def test_convolutions_have_nothing_to_divide():
    with pytest.raises(PlanError, match=r"divides nn\.Linear and nn\.Embedding, and this model has none"):
        partitions(SkipNet(), images())


def test_a_number_of_engines_that_does_not_divide_is_refused_with_one_that_does():
    message = "'0' has 160 outputs, which 3 engines cannot share evenly; mesh='tensor=2'"
    with pytest.raises(PlanError, match=message):
        partitions(mlp(), vectors(), wanted=3)


def test_heads_that_do_not_divide_are_refused_with_the_number_that_does():
    message = "over 2 or 4 engines, not over 8: 'blocks.0.attention.num_heads' is 4, which 8 engines cannot"
    with pytest.raises(PlanError, match=message):
        partitions(DividableGPT(), sentences(), wanted=8)


def test_a_model_that_fails_alone_is_told_with_its_line():
    with pytest.raises(PlanError, match=r"could not be tried out on a few samples.*assert time <= 12"):
        partitions(SmallGPT(), (torch.zeros(4, 13, dtype=torch.int64), torch.zeros(4)))


# The user's plan, and the model's -------------------------------------------------------------------


def test_a_star_stands_for_one_word():
    plan = {"blocks.*.mlp.1": "colwise", "blocks.*.mlp.3": "rowwise"}
    assert len(partitions(SmallGPT(), sentences(), plan=plan)[2].styles) == 6


def test_styles_of_torch_are_understood():
    plan = {
        "words": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
        "blocks.0.mlp.1": ColwiseParallel(),
        "blocks.0.mlp.3": RowwiseParallel(),
    }
    styles = partitions(SmallGPT(), sentences(), plan=plan)[2].styles
    assert list(styles.values()) == ["rowwise", "colwise_rep", "colwise", "rowwise"]


def test_a_plan_of_the_model_is_honoured():
    model = Planned({"layers.*.gate": "colwise", "layers.*.up": "colwise", "layers.*.down": "rowwise"})
    model._tp_plan["head"] = "colwise_gather_output"
    found = partitions(model, EIGHTS)
    assert found[2].styles["head"] == "colwise_rep"
    assert len(found[2].styles) == 7
    assert list(found) == [1, 2, 4]


def test_a_plan_of_the_model_may_name_what_is_not_there_and_leave_a_tied_embedding_out():
    model = SmallGPT()
    model._tp_plan = {"head": "colwise_rep", "blocks.*.experts.*": "grouped_gemm"}
    assert partitions(model, sentences())[2].styles == {"head": "colwise_rep", "words": "rowwise"}


def test_a_base_models_plan_counts_from_its_own_root():
    base = Planned({})
    model = nn.Sequential()
    model.add_module("base", base)
    model.base_model_prefix = "base"
    model.config = types.SimpleNamespace(base_model_tp_plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"})
    with pytest.raises(PlanError, match="the model's own tp_plan cannot be carried out"):  # as it forgets the gate
        partitions(model, EIGHTS)
    model.config.base_model_tp_plan["layers.*.gate"] = "colwise"
    assert len(partitions(model, EIGHTS)[2].styles) == 6


def test_a_style_of_the_model_that_is_not_known_is_named():
    with pytest.raises(PlanError, match=r"wants 'head' to be 'packed_colwise', which is not in this release"):
        partitions(Planned({"head": "packed_colwise"}), EIGHTS)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"uo": "colwise"}, ArgumentError, "the model has no module 'uo': did you mean 'up'"),
        ({"up": "columns"}, ArgumentError, "no style 'columns': did you mean 'colwise'"),
        ({"up": SequenceParallel()}, ArgumentError, "is no style that can be used here"),
        ({"up": 3}, ArgumentError, "is no style that can be used here"),
        ("colwise", ArgumentError, "must be a dictionary"),
        ({"up": "replicate"}, PlanError, "divides nothing"),
        ({"up": "colwise"}, PlanError, "cannot be carried out: RuntimeError"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_way_out(plan: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        partitions(Softened(), vectors(), plan=plan)


def test_packed_attention_is_refused_by_name():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten())
    samples = torch.randn(4, 3, 8), torch.zeros(4)
    with pytest.raises(
        PlanError, match=r"'0\.self_attn' is a MultiheadAttention, which holds queries, keys and values"
    ):
        partitions(model, samples, plan={"0.self_attn": "colwise"})


def test_one_of_two_layers_with_one_weight_is_refused():
    with pytest.raises(
        PlanError, match="'words' by dimension 0, 'head' whole; an embedding 'rowwise' goes with a head"
    ):
        partitions(SmallGPT(), sentences(), plan={"words": "rowwise"})
