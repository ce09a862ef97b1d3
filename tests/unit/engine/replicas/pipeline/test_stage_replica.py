"""Engines that compute a pipeline's stages together: real processes, gloo over loopback, the hub's shared memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dnb.engine.replicas.pipeline.schedules import num_micro_batches_for, schedule_for
from dnb.engine.replicas.pipeline.stage_memory import own_layout
from dnb.job import Sum
from dnb.protocol.engine_messages import PEER_LOST
from dnb.protocol.run import Partition, ScheduleName
from dnb.transport.layout import plan_gradients
from tests.unit.stage_teams import (
    Dying,
    Engines,
    Failing,
    LossNet,
    NormNet,
    SkipNet,
    SmallGPT,
    Team,
    images,
    last_of,
    mlp,
    plain_gradients,
    sentences,
    vectors,
    word_loss,
)

pytestmark = pytest.mark.numeric

CUTS = {
    "mlp": {2: ("4",), 3: ("2", "6"), 4: ("2", "4", "6")},
    "skip": {2: ("third",), 3: ("second", "third"), 4: ("second", "third", "head")},
    "gpt": {2: ("blocks.1",), 3: ("blocks.1", "blocks.2"), 4: ("blocks.0", "blocks.1", "blocks.2")},
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any]] = {
    "mlp": (mlp, vectors, cross_entropy),
    "skip": (SkipNet, images, cross_entropy),
    "gpt": (SmallGPT, sentences, word_loss),
}
SCHEDULES: list[tuple[ScheduleName, int, int]] = [  # with stages and engines
    *[(name, number, number) for number in (2, 3, 4) for name in ("gpipe", "1f1b", "zero-bubble")],
    ("interleaved", 4, 2),
    ("zero-bubble", 4, 2),
]


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """They are started once; a test that kills one has it replaced."""
    made = Engines()
    yield made
    made.close()


MakeTeam = Callable[..., Team]


@pytest.fixture
def team_of(engines: Engines, tmp_path: Path) -> Iterator[MakeTeam]:
    made: list[Team] = []

    def make(model: nn.Module, partition: Partition, **named: Any) -> Team:
        made.append(Team(engines, tmp_path, model, partition, **{"samples": vectors(), **named}))
        return made[-1]

    yield make
    for team in made:
        team.close()


def pipeline(*cuts: str, num_engines: int | None = None, num_stages: int | None = None, **named: Any) -> Partition:
    stages = num_stages or len(cuts) + 1
    return Partition(
        kind="pipeline",
        num_engines=num_engines or stages,
        num_stages=stages,
        cuts=cuts,
        **{"schedule": "1f1b", "num_micro_batches": 4, **named},
    )


def differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)]


# Gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "num_stages", "num_engines"), SCHEDULES)
@pytest.mark.parametrize("name", ["mlp", "skip"])
def test_gradients_are_those_of_one_process_to_the_bit(
    team_of: MakeTeam, name: str, schedule: ScheduleName, num_stages: int, num_engines: int
):
    build, samples, loss = MODELS[name]
    partition = pipeline(*CUTS[name][num_stages], num_engines=num_engines, schedule=schedule)
    team = team_of(build(), partition, samples=samples(), loss=loss)
    team.compute()
    assert differing(team.gradients(), plain_gradients(build(), samples(), 4, loss)) == []


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("schedule", "num_stages", "num_engines"), SCHEDULES)
def test_only_the_tied_weight_of_a_transformer_differs_and_by_rounding(
    team_of: MakeTeam, schedule: ScheduleName, num_stages: int, num_engines: int
):
    partition = pipeline(*CUTS["gpt"][num_stages], num_engines=num_engines, schedule=schedule)
    team = team_of(SmallGPT(), partition, samples=sentences(), loss=word_loss)
    team.compute()
    found, wanted = team.gradients(), plain_gradients(SmallGPT(), sentences(), 4, word_loss)
    assert set(differing(found, wanted)) <= {"words.weight"}  # its two halves are added up at the end
    torch.testing.assert_close(found["words.weight"], wanted["words.weight"], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_gpipe_with_several_stages_per_engine_adds_micro_batches_up_backwards(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("2", "4", "6", num_engines=2, schedule="gpipe"))
    team.compute()
    wanted = plain_gradients(mlp(), vectors(), 4)
    torch.testing.assert_close(team.gradients(), wanted, rtol=1e-10, atol=1e-10)


def test_a_second_step_starts_from_zero(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"))
    team.compute()
    once = {name: gradient.clone() for name, gradient in team.gradients().items()}
    team.compute()
    assert differing(team.gradients(), once) == []


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_shards_that_are_leased_again_are_added_to_the_slab(team_of: MakeTeam, schedule: ScheduleName):
    team = team_of(mlp(), pipeline("4", schedule=schedule))
    team.compute()
    once = {name: gradient.clone() for name, gradient in team.gradients().items()}
    answers = team.compute(fresh=False)
    torch.testing.assert_close(
        team.gradients(), {name: 2 * gradient for name, gradient in once.items()}, rtol=1e-10, atol=1e-10
    )
    assert set.intersection(*[set(answer.unused) for answer in answers]) == set()


def test_a_stage_zeroes_its_own_slots_alone(team_of: MakeTeam):
    team = team_of(SkipNet(), pipeline("third"), samples=images())
    for gradient in team.slabs[0].gradients:
        gradient.fill_(7.0)
    team.engines.tell(1, "_slots.begin", (0, 1), fresh=True)
    team.engines.answer(1)
    zeroed = {name for name, gradient in team.gradients().items() if not gradient.any()}
    assert zeroed == {"third.weight", "third.bias", "head.weight", "head.bias"}


def test_what_every_engine_reports_as_unused_is_what_the_step_did_not_use(team_of: MakeTeam):
    model = mlp()
    model.add_module("spare", nn.Identity())
    model.spare.register_parameter("weight", nn.Parameter(torch.ones(2)))
    team = team_of(model, pipeline("4"))
    answers = team.compute()
    names = [slot.name for slot in team.master.gradient_layout.slots]
    unused = set.intersection(*[set(answer.unused) for answer in answers])
    assert [names[index] for index in unused] == ["spare.weight"]


def test_a_frozen_first_stage_has_no_gradient(team_of: MakeTeam):
    model = mlp()
    model[0].requires_grad_(False)
    wanted = plain_gradients(copy.deepcopy(model), vectors(), 4)
    team = team_of(model, pipeline("2"))
    team.compute()
    assert sorted(team.gradients()) == sorted(wanted)
    assert differing(team.gradients(), wanted) == []


def test_a_smaller_last_batch_takes_the_largest_number_of_micro_batches_that_divides_it(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"))
    team.compute()
    team.compute(21)
    wanted = plain_gradients(mlp(), [tensor[:21] for tensor in vectors()], 3)
    assert differing(team.gradients(), wanted) == []


def test_a_batch_of_no_samples_gives_zero_gradients(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"))
    team.compute()
    answers = team.compute_these(torch.empty(0, dtype=torch.int64))
    assert [answer.parts[0].num_samples for answer in answers] == [0, 0]
    assert all(not gradient.any() for gradient in team.gradients().values())


def test_half_a_precision_is_only_in_the_forward(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"), precision="bfloat16")
    team.compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = plain_gradients(mlp(), vectors(), 4)
    torch.testing.assert_close(team.gradients(), wanted, rtol=1e-2, atol=1e-3)


def test_dropout_depends_on_the_step_and_not_on_the_schedule(team_of: MakeTeam):
    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)]
        return nn.Sequential(*layers)

    found = []
    for schedule in ("gpipe", "1f1b"):
        team = team_of(model(), pipeline("3", schedule=schedule))
        team.compute(step=3)
        found.append({name: gradient.clone() for name, gradient in team.gradients().items()})
    team.compute(step=4)
    assert differing(found[0], found[1]) == []
    assert differing(team.gradients(), found[0]) != []


# Losses and metrics ---------------------------------------------------------------------------------------


def classes_hit(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


@pytest.mark.usefixtures("float64")
def test_the_last_stage_reports_the_loss_of_all_samples_and_the_others_nothing(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("2", "6"))
    answers = team.compute()
    x, y = vectors()
    assert [answer.parts[0].num_samples for answer in answers] == [0, 0, 24]
    assert [answer.parts[0].loss_weight for answer in answers] == [0.0, 0.0, 24.0]
    assert answers[2].parts[0].loss_total / 24 == pytest.approx(cross_entropy(mlp()(x), y).item(), rel=1e-10)


def test_metrics_are_those_of_all_samples(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"), metrics={"hits": classes_hit})
    (sums,) = last_of(team.compute()).parts
    x, y = vectors()
    assert sums.metric_totals["hits"] == pytest.approx(24 * classes_hit(mlp()(x), y).item())
    assert sums.metric_weights == {"hits": 24.0}


def loss_per_weight(output: torch.Tensor, target: torch.Tensor) -> Sum:
    return Sum(cross_entropy(output, target, reduction="sum"), float(target.sum()))


@pytest.mark.usefixtures("float64")
def test_a_sum_is_not_scaled(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"), loss=loss_per_weight)
    outcome = last_of(team.compute())
    x, y = vectors()
    model = mlp()
    cross_entropy(model(x), y, reduction="sum").backward()
    assert (outcome.is_sum, outcome.parts[0].loss_weight) == (True, float(y.sum()))
    torch.testing.assert_close(team.gradients()["0.weight"], model[0].weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_a_model_that_takes_dictionaries_returns_its_own_loss(team_of: MakeTeam):
    x, labels = vectors()
    rows = [{"x": x[i], "labels": labels[i]} for i in range(len(x))]
    team = team_of(LossNet(), pipeline("head"), loss=None, rows=rows, collate=torch.utils.data.default_collate)
    answer = last_of(team.compute())
    model = LossNet()
    loss = model(x, labels=labels).loss
    loss.backward()
    assert answer.parts[0].loss_total / 24 == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(team.gradients()["first.weight"], model.first.weight.grad, rtol=1e-10, atol=1e-10)


def test_stages_of_the_user_are_computed(team_of: MakeTeam):
    model = mlp()
    team = team_of(model, pipeline(num_stages=2), stages=[model[:4], model[4:]])
    team.compute()
    assert differing(team.gradients(), plain_gradients(mlp(), vectors(), 4)) == []


def test_another_loss_counts_from_the_next_step(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"))
    team.compute()
    team.ask("replace_functions", step=None, loss=loss_per_weight)
    assert last_of(team.compute()).is_sum


# Evaluation, buffers ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_evaluation_is_that_of_the_whole_model(team_of: MakeTeam):
    team = team_of(NormNet(), pipeline("second"), metrics={"hits": classes_hit})
    team.compute()
    answers = team.compute(kind="evaluation")
    x, y = vectors()
    model = NormNet().eval()
    assert last_of(answers).parts[0].loss_total / 24 == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-10)
    assert [answer.parts[0].num_samples for answer in answers] == [0, 24]


def test_evaluation_leaves_gradients_and_buffers_alone(team_of: MakeTeam):
    team = team_of(NormNet(), pipeline("second"))
    team.compute()
    before = {name: tensor.clone() for name, tensor in {**team.gradients(), **team.buffers()}.items()}
    team.compute(kind="evaluation")
    assert differing({**team.gradients(), **team.buffers()}, before) == []


def root(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """No mean over samples."""
    return cross_entropy(output, target).sqrt()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("cuts", "num_engines"),
    [(("2", "6"), 3), (("2", "4", "6"), 4), (("2", "4", "6"), 2)],
    ids=["three_stages", "four_stages", "two_stages_each"],
)
def test_a_loss_over_the_whole_batch_goes_through_many_stages(
    team_of: MakeTeam, cuts: tuple[str, ...], num_engines: int
):
    partition = pipeline(*cuts, num_engines=num_engines, schedule="gpipe")
    team = team_of(mlp(), partition, loss=root, loss_over="batch")
    x, y = vectors()
    whole = mlp()
    loss = root(whole(x), y)
    loss.backward()
    assert last_of(team.compute()).parts[0].loss_total / 24 == pytest.approx(loss.item(), rel=1e-10)
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
    torch.testing.assert_close(team.gradients(), wanted, rtol=1e-10, atol=1e-10)
    found = last_of(team.compute(kind="evaluation")).parts[0].loss_total / 24
    assert found == pytest.approx(loss.item(), rel=1e-10)


@pytest.mark.usefixtures("float64")
def test_evaluation_goes_through_interleaved_stages(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("2", "4", "6", num_engines=2, schedule="interleaved"))
    x, y = vectors()
    found = last_of(team.compute(kind="evaluation")).parts[0].loss_total / 24
    assert found == pytest.approx(cross_entropy(mlp()(x), y).item(), rel=1e-10)


def test_running_statistics_are_those_of_one_process(team_of: MakeTeam):
    team = team_of(NormNet(), pipeline("second"))
    team.compute()
    model = NormNet()
    for part in vectors()[0].split(6):
        model(part)
    assert differing(team.buffers(), dict(model.named_buffers())) == []


# What is refused --------------------------------------------------------------------------------------


def test_a_step_function_is_refused(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"), step=step_function, loss=None)
    assert all(answer.kind == "PlanError" and "give loss= instead of step=" in answer.message for answer in team.begun)


def step_function(model: nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def test_a_pipeline_cannot_be_exact(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"), exact=True)
    assert all("exact=True needs a gradient per shard" in answer.message for answer in team.begun)


def test_stages_that_cannot_be_dealt_evenly_are_refused(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("2", "4", num_engines=2))
    assert all("3 stages cannot be dealt evenly to 2 engines" in answer.message for answer in team.begun)


# Faults -----------------------------------------------------------------------------------------------


def breakable(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), layer, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def test_a_stage_that_raises_frees_the_others(team_of: MakeTeam, tmp_path: Path):
    switch = tmp_path / "broken"
    team = team_of(breakable(Failing(str(switch))), pipeline("2", "5"))
    team.compute()
    switch.touch()
    answers = team.compute()
    assert [answer.kind for answer in answers] == [PEER_LOST, "ArithmeticError", PEER_LOST]
    assert answers[1].message == "layer out of order"
    assert answers[1].place == "stage 1 (from 2), one of shards 0 to 3, samples 0, 1, 2, 3, 4, 5"


def test_engines_that_were_freed_form_a_new_group(team_of: MakeTeam, tmp_path: Path):
    switch = tmp_path / "broken"
    team = team_of(breakable(Failing(str(switch))), pipeline("2", "5"))
    switch.touch()
    team.compute()
    switch.unlink()
    team.begin(pipeline("2", "5"))
    team.compute()
    assert differing(team.gradients(), plain_gradients(breakable(nn.Identity()), vectors(), 4)) == []


def test_a_failing_loss_frees_the_others(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"), loss=failing_loss)
    answers = team.compute()
    assert [answer.kind for answer in answers] == [PEER_LOST, "ZeroDivisionError"]


def failing_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.mean() * (1 // 0)


def test_a_killed_stage_frees_the_others_which_form_a_smaller_group(team_of: MakeTeam, tmp_path: Path):
    switch = tmp_path / "deadly"
    team = team_of(breakable(Dying(str(switch))), pipeline("2", "5"))
    team.compute()
    switch.touch()
    team.tell_compute()
    team.engines.wait_for_death(1)
    answers = [team.engines.answer(0), team.engines.answer(2)]
    assert [answer.kind for answer in answers] == [PEER_LOST, PEER_LOST]
    switch.unlink()
    team.begin(pipeline("3"), members=[0, 2])
    team.compute()
    assert differing(team.gradients(), plain_gradients(breakable(nn.Identity()), vectors(), 4)) == []


def test_a_team_that_the_hub_gives_up_is_not_waited_for(team_of: MakeTeam, engines: Engines):
    team = team_of(mlp(), pipeline("4"))
    team.ask("close")
    number = team.tell_begin(pipeline("4"), members=[0])
    engines.cancel(number)
    answer = engines.answer(0)
    assert answer.kind == PEER_LOST
    assert answer.message.startswith(f"team {number} did not come together")


def test_an_engine_whose_group_broke_while_it_was_built_meets_those_that_were_not_in_it(
    team_of: MakeTeam, engines: Engines
):
    team = team_of(mlp(), pipeline("4"))
    team.ask("close")
    number = team.tell_begin(pipeline("4"), members=[0])
    store = engines.rendezvous(number).store
    store.wait(["here-0"])
    store.set("here-1", "1")  # and then it dies
    store.wait(["0//cpu//0/0"])  # gloo waits for its address
    engines.cancel(number)
    del store
    assert engines.answer(0).kind == PEER_LOST
    team.begin(pipeline("4"), members=[0, 1])
    team.compute()
    assert differing(team.gradients(), plain_gradients(mlp(), vectors(), 4)) == []


def test_the_engine_whose_gradient_is_not_finite_names_its_parameter(team_of: MakeTeam):
    x, y = vectors()
    x[13, 0] = torch.inf
    team = team_of(mlp(), pipeline("4"), samples=(x, y))
    first, last = team.diagnose()
    assert (first.shard, first.parameter) == (2, "0.weight")
    assert last.shard is None  # it could not know: what it received is finite


# What is measured ---------------------------------------------------------------------------------------


def test_the_timeline_has_every_action_of_the_last_step(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4", schedule="zero-bubble"))
    team.compute()
    kinds = [[action.kind for action in actions] for actions in team.ask("timeline")]
    assert [own.count("forward") for own in kinds] == [4, 4]
    assert [own.count("backward-weight") for own in kinds] == [4, 4]
    assert all("send" in own for own in kinds)


def test_the_timeline_has_no_gaps(team_of: MakeTeam):
    team = team_of(mlp(), pipeline("4"))
    team.compute()
    for actions in team.ask("timeline"):
        assert all(left.end == right.begin for left, right in pairwise(actions))


# Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "number"), [(24, 4), (21, 3), (22, 2), (23, 1), (3, 3)])
def test_micro_batches_divide_the_samples(num_samples: int, number: int):
    assert num_micro_batches_for(num_samples, pipeline("4")) == number


@pytest.mark.parametrize(("number", "schedule"), [(4, "1f1b"), (2, "1f1b"), (1, "gpipe")])
def test_too_few_micro_batches_fall_back_to_gpipe(number: int, schedule: ScheduleName):
    assert schedule_for(pipeline("4"), number) == schedule


def test_a_layout_of_some_slots_zeroes_nothing_between_them():
    named = [(name, torch.empty(16)) for name in "abcde"]
    layout = plan_gradients(named)
    own = own_layout(layout, [slot for slot in layout.slots if slot.name in "abd"])
    assert [(region.offset_bytes, region.num_elements) for region in own.regions] == [(0, 32), (192, 16)]
