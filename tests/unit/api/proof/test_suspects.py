"""What a proof names as a likely reason for a difference."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dnb.api.proof.comparison import ProvedStep
from dnb.api.proof.suspects import suspects_of
from dnb.job import DataSource, Job
from dnb.planning.sample_order import BatchOrder
from dnb.transport.system.process_settings import notebook_settings

NUM_SAMPLES = 16


def suspects(model: nn.Module, *, step: Any = None, at: int = 1, **named: Any) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    samples = (torch.randn(NUM_SAMPLES, 6, generator=generator), torch.randint(0, 3, (NUM_SAMPLES,)))
    loss = None if step is not None else functional.cross_entropy
    options: dict[str, Any] = {
        "num_samples": NUM_SAMPLES,
        "batch_size": NUM_SAMPLES,
        "micro_batch": None,
        "sync_batchnorm": False,
        "loss_over": "samples",
        "reduction": "samples",
        "buffers": {},
        "settings": None,
        **named,
    }
    job = Job(
        model=model.train(),
        loss=loss,
        step=step,
        metrics={},
        optimizer="sgd",
        lr=0.1,
        scheduler=None,
        order=BatchOrder(num_samples=NUM_SAMPLES, batch_size=NUM_SAMPLES),
    )
    spec: Any = SimpleNamespace(**options)
    first = ProvedStep(at, (1.0, 2.0), (1.0, 2.0), (), 1.0, is_same=False)
    return suspects_of(job, DataSource(samples=samples, collate=None), spec, first=first)


class Drawing(nn.Module):
    """Adds noise of a generator of its own."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.noise = generator

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if isinstance(self.noise, torch.Generator):
            noise = torch.randn(inputs.shape, generator=self.noise)
        elif isinstance(self.noise, random.Random):
            noise = torch.tensor(self.noise.random())
        else:
            noise = torch.tensor(self.noise.random(tuple(inputs.shape)), dtype=inputs.dtype)
        return self.inner(inputs + noise)


@pytest.mark.parametrize(
    "generator", [torch.Generator(), np.random.default_rng(0), random.Random(0)], ids=["torch", "numpy", "python"]
)
def test_a_generator_of_the_model_is_named(generator: Any):
    assert suspects(nn.Sequential(Drawing(generator))) == [
        "a random generator of your own ('0.noise') draws other numbers in each part of a batch than in the whole"
    ]


def test_a_generator_of_a_step_function_is_a_suspect():
    generator = torch.Generator()

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        kept = torch.rand(len(batch[0]), generator=generator) > 0.5
        return functional.cross_entropy(model(batch[0])[kept], batch[1][kept]) if kept.any() else model(batch[0]).sum()

    (found,) = suspects(nn.Linear(6, 3), step=step)[:1]
    assert found.startswith("a random generator of your own draws other numbers")


class Noisy(nn.Module):
    """Draws from the generators that everybody shares."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(functional.dropout(inputs, 0.5, training=self.training))


def test_numbers_that_forward_draws_without_a_layer_for_it_are_named():
    assert suspects(Noisy()) == [
        "forward or the loss draws random numbers, others in each part of a batch than in the whole: prove the model "
        "without them"
    ]


def test_a_layer_of_dropout_is_named_once():
    (found,) = suspects(nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)))
    assert found.startswith("dropout ('0') draws other numbers")


def test_batch_norm_of_each_part_is_named():
    (found,) = suspects(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)))
    assert found.startswith("BatchNorm ('0') takes its statistics from each part of a batch")


@pytest.mark.parametrize(
    ("layer", "options"), [(nn.SyncBatchNorm(6), {}), (nn.BatchNorm1d(6), {"sync_batchnorm": True})]
)
def test_batch_norm_over_all_engines_is_named_as_such(layer: nn.Module, options: dict[str, Any]):
    (found,) = suspects(nn.Sequential(layer, nn.Linear(6, 3)), **options)
    assert found == (
        "SyncBatchNorm ('0') takes its statistics of all engines' parts, added up in another order than those of the "
        "whole batch are"
    )
    (found,) = suspects(nn.Sequential(layer, nn.Linear(6, 3)), micro_batch=4, **options)
    assert "of all engines' micro-batches of at most 4 samples each, not of the whole batch" in found


class Centred(nn.Module):
    """Statistics of a batch, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs - inputs.mean(0) if self.training else inputs)


def test_a_model_that_looks_at_the_batch_by_itself_is_named():
    assert suspects(Centred()) == [
        "forward looks at the whole batch while the model trains, as for statistics of it: engines take those of their "
        "parts"
    ]


class Queue(nn.Module):
    """Keeps the last outputs, and adds their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.register_buffer("queue", torch.zeros(4, 3))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.inner(inputs) * self.scale + self.queue.mean()
        if self.training:
            self.queue = torch.cat([output.detach(), self.queue])[:4]
        return output


@pytest.mark.parametrize(("rules", "rule"), [({}, "first"), ({"queue": "mean"}, "mean")])
def test_a_buffer_is_named_with_its_rule(rules: dict[str, str], rule: str):
    found = suspects(Queue(), buffers=rules, at=2)
    assert any(f"('queue' by the rule '{rule}'), and in one process are those of the whole batch" in s for s in found)
    assert not any("'scale'" in each for each in found)


def test_a_setting_that_was_changed_since_fit_is_named(monkeypatch: pytest.MonkeyPatch):
    then = notebook_settings()
    torch.set_default_dtype(torch.float64)
    try:
        found = suspects(nn.Linear(6, 3).float(), settings=then)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0] == (
        "settings of this notebook are not what they were at fit: default_dtype; set them as they were, and prove again"
    )
    assert not any("settings" in each for each in suspects(nn.Linear(6, 3), settings=notebook_settings()))


def test_nothing_is_suspected_of_a_plain_model_but_code_that_differs():
    (found,) = suspects(nn.Linear(6, 3))
    assert found.startswith("code that differs: engines may have imported another state of it")
