"""Every loss of torch that takes an output and a target, over engines, against one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import nn

from dnb.planning.sample_order import BatchOrder
from dnb.transport.job import Data, DataSource, Job
from tests.unit.test_replica import Engines

pytestmark = [pytest.mark.numeric, pytest.mark.float64]

NUM_SAMPLES = 10
CLASSES = 4
IGNORED = -100


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def inputs() -> torch.Tensor:
    return torch.randn(NUM_SAMPLES, 3, generator=generator())


def classes(*shape: int, ignored: int | None = None) -> torch.Tensor:
    """Class indices; with ignored ones, whole shards of them and parts of others."""
    target = torch.randint(0, CLASSES, (NUM_SAMPLES, *shape), generator=generator())
    if ignored is not None:
        target[:4] = ignored
        target[7] = ignored
        if shape:
            target[8, 1:] = ignored
    return target


class Tokens(nn.Module):
    """Scores of classes for each of 5 places."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Linear(3, CLASSES * 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.places(x).unflatten(1, (CLASSES, 5))


def scores() -> nn.Module:
    return nn.Linear(3, CLASSES)


WEIGHTS = torch.tensor([0.1, 1.0, 5.0, 10.0])


def flattened(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.transpose(1, 2).reshape(-1, CLASSES), target.reshape(-1))


@wraps(F.cross_entropy)
def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
    return F.cross_entropy(*args, **kwargs)


def weights() -> torch.Tensor:
    return WEIGHTS.to(torch.get_default_dtype())


TARGET_LOSSES: dict[str, Callable[[], tuple[Callable[[], nn.Module], torch.Tensor, Any]]] = {
    "function": lambda: (scores, classes(ignored=IGNORED), F.cross_entropy),
    "class": lambda: (scores, classes(ignored=IGNORED), nn.CrossEntropyLoss()),
    "class weights": lambda: (scores, classes(), nn.CrossEntropyLoss(weight=weights())),
    "class weights and ignored": lambda: (
        scores,
        classes(ignored=1),
        nn.CrossEntropyLoss(weight=weights(), ignore_index=1),
    ),
    "smoothed": lambda: (scores, classes(ignored=IGNORED), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "smoothed with weights": lambda: (
        scores,
        classes(ignored=IGNORED),
        nn.CrossEntropyLoss(weight=weights(), label_smoothing=0.1),
    ),
    "partial": lambda: (scores, classes(ignored=2), partial(F.cross_entropy, ignore_index=2)),
    "lambda": lambda: (scores, classes(ignored=IGNORED), lambda o, t: F.cross_entropy(o, t, weight=weights())),
    "bound": lambda: (scores, classes(ignored=IGNORED), nn.CrossEntropyLoss().forward),
    "wrapped": lambda: (scores, classes(ignored=IGNORED), wrapped),
    "scaled": lambda: (scores, classes(ignored=IGNORED), lambda o, t: F.cross_entropy(o, t) / 0.7 + 2),
    "nll": lambda: (scores, classes(ignored=IGNORED), lambda o, t: F.nll_loss(o.log_softmax(1), t)),
    "nll class": lambda: (
        lambda: nn.Sequential(scores(), nn.LogSoftmax(1)),
        classes(ignored=IGNORED),
        nn.NLLLoss(weight=weights()),
    ),
    "tokens": lambda: (Tokens, classes(5, ignored=IGNORED), F.cross_entropy),
    "tokens flattened": lambda: (Tokens, classes(5, ignored=IGNORED), flattened),
}


@pytest.fixture(params=["memory", "socket"])
def engines_of(tmp_path: Path, request: pytest.FixtureRequest):
    made: list[Engines] = []

    def make(model: nn.Module, target: torch.Tensor, *, loss: Any, step: Any = None, **numbers: Any) -> Engines:
        source = DataSource(samples=(inputs(), target), collate=None)
        job = Job(
            model=model,
            loss=loss,
            step=step,
            metrics={},
            optimizer="sgd",
            lr=0.1,
            scheduler=None,
            order=BatchOrder(num_samples=NUM_SAMPLES, batch_size=NUM_SAMPLES),
        )
        made.append(Engines(tmp_path, job, Data(train=source, val=source), transport=request.param, **numbers))
        return made[-1]

    yield make
    for engines in made:
        engines.close()


def one_process(model: nn.Module, target: torch.Tensor, loss: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the whole batch, and parameters after a step of SGD."""
    value = loss(model(inputs()), target)
    value.backward()
    return value.item(), {name: p.detach() - 0.1 * p.grad for name, p in model.named_parameters()}  # type: ignore[operator]


def assert_same_step(engines: Engines, *, deal: tuple[tuple[int, ...], ...], loss: float, after: Any) -> None:
    outcomes = [(number, engines.compute(number, shards=shards)) for number, shards in enumerate(deal)]
    committed = engines.commit(*outcomes)
    assert committed.loss == pytest.approx(loss, abs=1e-12)
    for name, parameter in engines.master.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), after[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("deal", [((0, 1, 2, 3),), ((0,), (1, 2, 3)), ((3,), (0, 1), (2,))], ids=len)
@pytest.mark.parametrize("name", TARGET_LOSSES)
def test_a_mean_over_targets_is_that_of_one_process_however_ignored_and_weighed_they_are(engines_of, name, deal):
    make, target, loss = TARGET_LOSSES[name]()
    model = make()
    expected, after = one_process(copy.deepcopy(model), target, loss)
    engines = engines_of(model, target, loss=loss, reduction="targets")
    assert_same_step(engines, deal=deal, loss=expected, after=after)


@pytest.mark.parametrize("name", ["lambda", "nll class", "scaled", "tokens flattened"])
def test_an_evaluation_is_the_mean_over_all_targets_too(engines_of, name):
    make, target, loss = TARGET_LOSSES[name]()
    model = make()
    expected, _ = one_process(copy.deepcopy(model), target, loss)
    engines = engines_of(model, target, loss=loss, reduction="targets", batch_size=3)
    parts = [
        engines.compute(number, shards=shards, kind="evaluation") for number, shards in enumerate([(0, 3), (1, 2)])
    ]
    sums = [part for outcome in parts for part in outcome.parts]
    mean = sum(part.loss_total for part in sums) / sum(part.loss_weight for part in sums)
    assert mean == pytest.approx(expected, abs=1e-12)
