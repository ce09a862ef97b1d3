"""Engines that compute parts of layers together: real processes, gloo over loopback, the hub's shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dnb.engine.replicas.outcome import WorkResult
from dnb.engine.replicas.tensor.tensor_random import OwnNoise
from dnb.partitioning.tensor.partitions import tensor_partitions
from dnb.partitioning.tensor.trial import ModelTrial
from dnb.protocol.engine_messages import PEER_LOST
from dnb.protocol.run import Partition, TensorStyle
from tests.unit.stage_teams import (
    Engines,
    Team,
    last_of,
    mlp,
    plain_gradients,
    sentences,
    vectors,
    word_loss,
)
from tests.unit.tensor_models import DividableGPT, FailingAt, Padded, SpareAndFrozen

pytestmark = [pytest.mark.numeric, pytest.mark.float64]

MakeTeam = Callable[..., Team]


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """They are started once; a test that kills one has it replaced."""
    made = Engines()
    yield made
    made.close()


@pytest.fixture
def team_of(engines: Engines, tmp_path: Path) -> Iterator[MakeTeam]:
    made: list[Team] = []

    def make(model: nn.Module, partition: Partition, **named: Any) -> Team:
        made.append(Team(engines, tmp_path, model, partition, **{"samples": vectors(), "num_slabs": 1, **named}))
        return made[-1]

    yield make
    for team in made:
        team.close()


def divided(num_engines: int, styles: dict[str, TensorStyle], **shares: int) -> Partition:
    return Partition(kind="tensor", num_engines=num_engines, styles=styles, shares=shares)


def planned(model: nn.Module, samples: Any, num_engines: int) -> Partition:
    trial = ModelTrial(tuple(tensor[:4] for tensor in samples))
    return next(p for p in tensor_partitions(model, trial, wanted=num_engines) if p.num_engines == num_engines)


PAIRS: dict[str, TensorStyle] = {"0": "colwise", "2": "rowwise", "4": "colwise", "6": "rowwise"}


def closeness(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - gradient).abs().max()) for name, gradient in wanted.items())


# Gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_engines", [2, 4])
def test_gradients_of_an_mlp_are_those_of_one_process(team_of: MakeTeam, num_engines: int):
    team = team_of(mlp(), planned(mlp(), vectors(), num_engines))
    team.compute()
    assert closeness(team.gradients(), plain_gradients(mlp(), vectors(), 1)) <= 1e-10


@pytest.mark.parametrize("num_engines", [2, 4])
def test_gradients_of_a_transformer_with_one_weight_for_words_and_head_are_those_of_one_process(
    team_of: MakeTeam, num_engines: int
):
    def make() -> nn.Module:
        return DividableGPT(width=32, num_words=2048)

    partition = planned(make(), sentences(), num_engines)
    assert partition.styles["head"] == "colwise_rep"
    team = team_of(make(), partition, samples=sentences(), loss=word_loss)
    team.compute()
    assert closeness(team.gradients(), plain_gradients(make(), sentences(), 1, word_loss)) <= 1e-10


@pytest.mark.parametrize(
    "styles",
    [{"0": "colwise_rep", "2": "rowwise_rep"}, {"0": "rowwise_rep", "2": "colwise", "4": "rowwise"}],
    ids=lambda styles: "-".join(styles.values()),
)
def test_layers_that_are_put_together_at_once_have_the_gradients_of_one_process(
    team_of: MakeTeam, styles: dict[str, TensorStyle]
):
    team = team_of(mlp(), divided(2, styles))
    team.compute()
    assert closeness(team.gradients(), plain_gradients(mlp(), vectors(), 1)) <= 1e-10


@pytest.mark.parametrize("style", ["rowwise", "colwise_rep"])
def test_an_embedding_that_is_divided_leaves_its_padding_without_gradient(team_of: MakeTeam, style: TensorStyle):
    team = team_of(Padded(), divided(2, {"words": style}), samples=sentences(), loss=word_loss)
    team.compute()
    assert closeness(team.gradients(), plain_gradients(Padded(), sentences(), 1, word_loss)) <= 1e-10


def test_micro_batches_add_up(team_of: MakeTeam):
    team = team_of(mlp(), divided(2, PAIRS), micro_batch=5)
    team.compute()
    assert closeness(team.gradients(), plain_gradients(mlp(), vectors(), 1)) <= 1e-10


def test_a_second_step_starts_from_zero(team_of: MakeTeam):
    team = team_of(mlp(), divided(2, PAIRS))
    team.compute()
    once = {name: gradient.clone() for name, gradient in team.gradients().items()}
    team.compute()
    assert closeness(team.gradients(), once) == 0.0


def test_shards_that_are_leased_again_are_added_to_the_slab(team_of: MakeTeam):
    team = team_of(mlp(), divided(2, PAIRS))
    team.compute()
    once = {name: gradient.clone() for name, gradient in team.gradients().items()}
    team.compute(fresh=False)
    assert closeness(team.gradients(), {name: 2 * gradient for name, gradient in once.items()}) <= 1e-10


def test_what_got_no_gradient_is_unused_on_every_engine_and_zero(team_of: MakeTeam):
    styles: dict[str, TensorStyle] = {
        f"{name}.{layer}": style
        for name in ("spare", "frozen", "used")
        for layer, style in ((0, "colwise"), (1 if name == "spare" else 2, "rowwise"))
    }
    team = team_of(SpareAndFrozen(), divided(2, styles))
    for gradient in team.gradients().values():
        gradient.fill_(7.0)
    answers = team.compute()
    names = [slot.name for slot in team.master.gradient_layout.slots]
    unused = set.intersection(*[{names[index] for index in answer.unused} for answer in answers])
    assert unused == {"spare.0.weight", "spare.0.bias", "spare.1.weight", "spare.1.bias"}
    gradients = team.gradients()
    assert all(not gradients[name].any() for name in unused)


@pytest.mark.usefixtures("float32")  # autocast leaves float64 alone
def test_autocast_reaches_divided_layers(team_of: MakeTeam):
    team = team_of(mlp(), divided(2, PAIRS), precision="bfloat16")
    team.compute()
    wanted = plain_gradients(mlp(), vectors(), 1)
    assert 1e-6 < closeness(team.gradients(), wanted) <= 2e-2


def error(output: torch.Tensor, target: torch.Tensor) -> float:
    return float((output.argmax(-1) != target).float().mean())


def step(model: nn.Module, batch: Any) -> Any:
    inputs, target = batch
    output = model(inputs)
    return cross_entropy(output, target), {"largest": float(output.detach().max())}


# Reports --------------------------------------------------------------------------------------------


def test_loss_samples_and_metrics_are_reported_by_one_engine(team_of: MakeTeam):
    team = team_of(mlp(), divided(2, PAIRS), metrics={"error": error})
    (sums,) = last_of(team.compute()).parts
    inputs, target = vectors()
    model = mlp().requires_grad_(requires_grad=False)
    assert sums.num_samples == 24
    assert sums.loss_total / sums.loss_weight == pytest.approx(float(cross_entropy(model(inputs), target)), abs=1e-10)
    assert sums.metric_totals["error"] / 24 == pytest.approx(error(model(inputs), target))


def test_a_step_function_has_the_whole_model(team_of: MakeTeam):
    team = team_of(mlp(), divided(2, PAIRS), loss=None, step=step)
    outcome: WorkResult = last_of(team.compute())
    assert outcome.parts[0].metric_totals["largest"] / 24 == pytest.approx(
        float(mlp()(vectors()[0]).detach().max()), abs=1e-10
    )
    assert closeness(team.gradients(), plain_gradients(mlp(), vectors(), 1)) <= 1e-10


def test_an_evaluation_is_in_eval_mode_and_leaves_gradients_alone(team_of: MakeTeam):
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.9), nn.Linear(8, 3))
    team = team_of(model, divided(2, {"0": "colwise", "2": "rowwise"}))
    (sums,) = last_of(team.compute(kind="evaluation")).parts
    inputs, target = vectors()
    assert sums.loss_total / 24 == pytest.approx(float(cross_entropy(model.eval()(inputs), target).detach()), abs=1e-10)
    assert all(not gradient.any() for gradient in team.gradients().values())


def test_an_encoder_layer_of_torch_is_evaluated_with_its_divided_layers(team_of: MakeTeam):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), encoder, nn.Flatten(), nn.Linear(6, 3))
    team = team_of(model, divided(2, {"1.linear1": "colwise", "1.linear2": "rowwise"}))
    (sums,) = last_of(team.compute(kind="evaluation")).parts
    inputs, target = vectors()
    assert sums.loss_total / 24 == pytest.approx(float(cross_entropy(model.eval()(inputs), target).detach()), abs=1e-10)


def test_buffers_are_written_back(team_of: MakeTeam):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    team = team_of(model, divided(2, {"0": "colwise", "2": "rowwise"}))
    team.compute()
    model.train()(vectors()[0])
    torch.testing.assert_close(team.buffers()["3.running_mean"], model[3].running_mean)


def test_a_gradient_that_is_not_finite_is_found_with_its_shard(team_of: MakeTeam):
    inputs, target = vectors()
    inputs[13] = float("inf")  # of shard 2
    team = team_of(mlp(), divided(2, PAIRS), samples=(inputs, target))
    assert {diagnosis.shard for diagnosis in team.diagnose()} == {2}


# Random numbers -------------------------------------------------------------------------------------


def noises(rank: int, depth: int = 2) -> list[torch.Tensor]:
    """What the dropouts in a pair of layers, and behind it, let through."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.Linear(64, 64), nn.Dropout())
    OwnNoise(model, {"0": "colwise", "2": "rowwise"}, rank)
    seen: list[torch.Tensor] = []
    for index in (1, 3):
        model[index].register_forward_hook(lambda _layer, _inputs, output: seen.append(output != 0))
    torch.default_generator.manual_seed(3)
    for _ in range(depth):
        model(torch.ones(8, 64))
    return seen


def test_dropout_differs_between_engines_where_they_have_different_features_and_nowhere_else():
    with torch.random.fork_rng(devices=[]):
        first, second = noises(0), noises(1)
    same = [torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True)]
    assert same == [False, True, False, True]
    assert not torch.equal(first[0], first[2])


def test_a_checkpointed_pair_drops_the_same_features_when_it_is_computed_again():
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(), nn.Linear(64, 16))
    OwnNoise(model, {"0": "colwise", "2": "rowwise"}, 1)
    seen: list[torch.Tensor] = []
    model[1].register_forward_hook(lambda _layer, _inputs, output: seen.append(output.detach() != 0))
    inputs = torch.randn(4, 16, requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        middle = checkpoint(model, inputs, use_reentrant=False)
        checkpoint(model, middle, use_reentrant=False).sum().backward()
    first, second, *again = seen
    assert [torch.equal(again[0], second), torch.equal(again[1], first)] == [True, True]


# Failures -------------------------------------------------------------------------------------------


def failing(path: Path, rank: int, *, kills: bool = False) -> nn.Module:
    torch.manual_seed(0)
    broken = FailingAt(str(path), rank, kills=kills)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), broken, nn.Linear(6, 8), nn.Linear(8, 3))


TWO_PAIRS: dict[str, TensorStyle] = {"0": "colwise", "2": "rowwise", "4": "colwise", "5": "rowwise"}


@pytest.mark.parametrize("rank", [0, 1])
def test_an_engine_that_raises_frees_the_others_and_all_can_form_a_new_team(
    team_of: MakeTeam, tmp_path: Path, rank: int
):
    path = tmp_path / "broken"
    team = team_of(failing(path, rank), divided(2, TWO_PAIRS))
    path.touch()
    answers = team.compute()
    assert answers[rank].kind == "ArithmeticError"
    assert answers[rank].place == "one of shards 0 to 3, samples 0, 1, 2, 3, 4, 5, 6, 7 and 16 more"
    assert answers[1 - rank].kind == PEER_LOST
    path.unlink()
    team.begin(divided(2, TWO_PAIRS))
    team.compute()
    assert closeness(team.gradients(), plain_gradients(failing(path, rank), vectors(), 1)) <= 1e-10


def test_an_engine_that_is_killed_frees_the_others_which_go_on_without_it(
    team_of: MakeTeam, engines: Engines, tmp_path: Path
):
    path = tmp_path / "broken"
    model = failing(path, 2, kills=True)
    team = team_of(model, divided(4, TWO_PAIRS))
    path.touch()
    team.tell_compute()
    engines.wait_for_death(2)
    assert [engines.answer(member).kind for member in (0, 1, 3)] == [PEER_LOST] * 3
    path.unlink()
    team.begin(divided(2, TWO_PAIRS), [1, 3])
    team.compute()
    assert closeness(team.gradients(), plain_gradients(model, vectors(), 1)) <= 1e-10


def test_an_exact_run_is_refused(team_of: MakeTeam):
    team = team_of(mlp(), divided(2, PAIRS), exact=True)
    assert ["a gradient per shard" in answer.message for answer in team.begun] == [True, True]
