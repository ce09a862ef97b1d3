"""Models with low-rank adapters beside frozen layers: every cut that is chosen for them can be carried out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dnb.engine.profiling.layers import find_layers
from dnb.partitioning.pipeline.cut_points import cut_points
from dnb.partitioning.pipeline.partitions import pipelines
from dnb.partitioning.pipeline.stage_builder import StageBuilder
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.protocol.run import Partition
from tests.models import adapted_net

NUM_SAMPLES = 8
ROWS = torch.randn(NUM_SAMPLES, 64)


class Cache:
    """Values of earlier layers: no tensor, and nothing that a graph can hold."""

    def __init__(self) -> None:
        self.values: list[Any] = []


class CachingBlock(nn.Module):
    """Puts what it made into the cache, as attention does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor, cache: Cache) -> torch.Tensor:
        cache.values.append(self.inner(inputs))
        return inputs + torch.tanh(cache.values[-1])


class CachingNet(nn.Module):
    """Adapted layers, to each of which a cache is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, *blocks, self.head = adapted_net()
        self.blocks = nn.ModuleList(CachingBlock(block) for block in blocks)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden, cache = self.first(inputs), Cache()
        for block in self.blocks:
            hidden = block(hidden, cache)
        return self.head(hidden)


def llama(**adapters: Any) -> nn.Module:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **adapters)
    )


def check_all_cuts(model: nn.Module, inputs: Inputs, *, least: int) -> None:
    """Cut for 2, 3, ... stages and at every point alone, to train and to evaluate."""
    partitions, _ = pipelines(
        model, inputs, most_engines=6, num_samples=NUM_SAMPLES, micro_batch=None, schedule="1f1b", stages=None
    )
    assert len(partitions) >= least
    points = cut_points(model, inputs)
    single = [Partition(kind="pipeline", num_engines=2, num_stages=2, cuts=(point,)) for point in points[::5]]
    for partition in [*partitions[1:], *single]:
        for mode in (True, False):
            parts = StageBuilder(model.train(mode), partition).parts(inputs)
            assert [part.begins for part in parts] == ["", *partition.cuts]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_with_adapters_can_be_cut_wherever_a_cut_is_chosen(dropout: float):
    check_all_cuts(adapted_net(dropout=dropout), Inputs((ROWS,)), least=6)


def test_layers_that_are_given_what_no_graph_holds_can_be_cut_wherever_a_cut_is_chosen():
    check_all_cuts(CachingNet(), Inputs((ROWS,)), least=6)


def test_no_stage_begins_at_a_dropout_that_does_nothing():
    assert not [point for point in cut_points(CachingNet(), Inputs((ROWS,))) if "dropout" in point]


def test_stages_of_a_model_that_is_traced_by_export_begin_at_modules_without_operations_too():
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Identity(), nn.Linear(64, 10)])

        def forward(self, x: Any) -> Any:
            x = x * 2 if isinstance(x, torch.Tensor) else x
            for layer in self.layers:
                x = layer(x)
            return x

    model = Asking()
    partition = Partition(kind="pipeline", num_engines=2, num_stages=2, cuts=("layers.1",))
    first, second = StageBuilder(model, partition).parts(Inputs((ROWS,)))
    assert list(first.parameters) == ["layers.0.weight", "layers.0.bias"]
    assert torch.equal(second.module(*first.module(ROWS)), model(ROWS))


def test_a_module_that_works_in_place_or_does_nothing_begins_no_layer_of_a_profile():
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Identity(), nn.Linear(8, 2))
    assert [layer.name for layer in find_layers(model, lambda: model(ROWS))] == ["0", "3"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layers", [["q_proj", "v_proj"], "all-linear"], ids=["attention", "all"])
def test_a_model_of_peft_can_be_cut_wherever_a_cut_is_chosen(dropout: float, layers: Any):
    model = llama(lora_dropout=dropout, target_modules=layers)
    ids = torch.randint(0, 50, (NUM_SAMPLES, 6))
    check_all_cuts(model, Inputs.of({"input_ids": ids, "labels": ids}), least=6)
