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

from dnb.api.rehearsal.losses import all_count_the_same
from dnb.engine.replicas.replica import added
from dnb.job import Data, DataSource, Job, Sum
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.measurements import Sums
from dnb.user_code.loss_judge import judge_loss
from dnb.user_code.loss_weights import weighed_loss
from dnb.user_code.return_values import ReturnError
from tests.unit.engine.replicas.test_replica import Engines

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


def test_gradients_of_a_mean_over_targets_that_all_count_need_no_division(engines_of):
    target = classes()
    model = scores()
    F.cross_entropy(model(inputs()), target).backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    engines = engines_of(model, target, loss=F.cross_entropy, reduction="targets")
    outcomes = [engines.compute(number, shards=shards) for number, shards in enumerate([(0,), (1, 2, 3)])]
    assert [outcome.parts[0].unit for outcome in outcomes] == [NUM_SAMPLES, NUM_SAMPLES]
    torch.testing.assert_close(engines.gradient(0, 1), wanted, rtol=0, atol=1e-12)


def test_sums_and_means_over_targets_may_follow_each_other_in_one_step(engines_of):
    target = classes(ignored=IGNORED)
    sizes: list[int] = []

    def step(model: nn.Module, batch: Any) -> Any:
        output, labels = model(batch[0]), batch[1]
        sizes.append(len(labels))
        if len(sizes) % 2:
            return F.cross_entropy(output, labels)
        return Sum(F.cross_entropy(output, labels, reduction="sum"), float((labels != -100).sum()))

    model = scores()
    expected, after = one_process(copy.deepcopy(model), target, F.cross_entropy)
    engines = engines_of(model, target, loss=None, step=step, reduction="targets", micro_batch=2)
    assert_same_step(engines, deal=((0, 1), (2, 3)), loss=expected, after=after)
    assert len(sizes) > 2


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and targets of three numbers."""
    return torch.randn(NUM_SAMPLES, 3, generator=generator()), torch.rand(NUM_SAMPLES, 3, generator=generator())


def numbers() -> nn.Module:
    return nn.Linear(3, 3)


def shares() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())


def log_shares() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.LogSoftmax(1))


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, (NUM_SAMPLES, *shape), generator=generator()).to(torch.get_default_dtype()) * 2 - 1


TORCH_LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], type[nn.Module]]] = {
    "l1": (numbers, lambda: pairs()[1], nn.L1Loss),
    "mse": (numbers, lambda: pairs()[1], nn.MSELoss),
    "huber": (numbers, lambda: pairs()[1], nn.HuberLoss),
    "smooth l1": (numbers, lambda: pairs()[1], nn.SmoothL1Loss),
    "soft margin": (numbers, lambda: signs(3), nn.SoftMarginLoss),
    "hinge embedding": (numbers, lambda: signs(3), nn.HingeEmbeddingLoss),
    "multi label soft margin": (numbers, lambda: (signs(3) + 1) / 2, nn.MultiLabelSoftMarginLoss),
    "multi label margin": (numbers, lambda: torch.tensor([[0, 2, -1]] * 5 + [[1, -1, 0]] * 5), nn.MultiLabelMarginLoss),
    "multi margin": (scores, classes, nn.MultiMarginLoss),
    "poisson": (numbers, lambda: pairs()[1].round(), nn.PoissonNLLLoss),
    "bce": (shares, lambda: (signs(3) + 1) / 2, nn.BCELoss),
    "bce with logits": (numbers, lambda: (signs(3) + 1) / 2, nn.BCEWithLogitsLoss),
    "kl": (log_shares, lambda: pairs()[1].softmax(1), nn.KLDivLoss),
    "cross entropy": (scores, lambda: classes(ignored=IGNORED), nn.CrossEntropyLoss),
    "cross entropy of shares": (
        scores,
        lambda: torch.rand(NUM_SAMPLES, CLASSES, generator=generator()).softmax(1),
        nn.CrossEntropyLoss,
    ),
    "nll": (log_shares, lambda: classes(ignored=IGNORED).clamp(max=2), nn.NLLLoss),
}
WAYS = [(name, way) for name in TORCH_LOSSES for way in ("mean", "sum")] + [("kl", "batchmean")]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # kl_div's own advice
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_every_loss_of_torch_is_that_of_one_process_by_what_is_found_of_it(engines_of, name, way):
    make, make_target, kind = TORCH_LOSSES[name]
    torch.manual_seed(0)
    model, target, loss = make(), make_target(), kind(reduction=way)
    expected, after = one_process(copy.deepcopy(model), target, loss)
    found = judge_loss(loss, model(inputs()), target, num_samples=NUM_SAMPLES).kind
    assert found == ("sum" if way == "sum" else "targets" if name in ("cross entropy", "nll") else "samples")
    engines = engines_of(model, target, loss=loss, reduction=found)
    assert_same_step(engines, deal=((1, 2), (0, 3)), loss=expected, after=after)


# Losses of the whole batch --------------------------------------------------------------------------


def root_of_mean(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(output, target).sqrt()


def in_batch_negatives(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    rows = F.normalize(output, dim=1)
    return F.cross_entropy(rows @ F.normalize(target, dim=1).T / 0.1, torch.arange(len(rows)))


def dice(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    share = output.sigmoid()
    return 1 - 2 * (share * target).sum() / (share.sum() + target.sum())


def ranking(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.relu(1 - (output[:, None] - output[None]) * (target[:, None] - target[None]).sign()).mean()


def masked(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    counts = ~target.isnan()
    return (output - target.nan_to_num()).square()[counts].mean()


def two_terms(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target) + 0.1 * output.square().mean()


@pytest.mark.parametrize("loss", [root_of_mean, in_batch_negatives, dice, ranking, masked])
def test_a_loss_that_looks_at_several_samples_at_once_is_one_of_the_batch(loss):
    assert judge_loss(loss, *pairs(), num_samples=NUM_SAMPLES).kind == "batch"


def test_so_is_a_mean_over_targets_beside_a_mean_over_samples():
    assert judge_loss(two_terms, scores()(inputs()), classes(), num_samples=NUM_SAMPLES).kind == "batch"


def test_outputs_that_are_all_alike_hide_nothing():
    output, target = torch.zeros(NUM_SAMPLES, 3), pairs()[1]
    assert judge_loss(in_batch_negatives, output, target, num_samples=NUM_SAMPLES).kind == "batch"


def test_targets_of_which_none_is_ignored_among_the_first_samples_are_weighed_all_the_same():
    found = judge_loss(F.cross_entropy, scores()(inputs()), classes(), num_samples=NUM_SAMPLES)
    assert found.kind == "targets"


def test_what_a_loss_draws_at_random_does_not_count_as_a_difference():
    def noisy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output + torch.randn_like(output), target)

    assert judge_loss(noisy, *pairs(), num_samples=NUM_SAMPLES).kind == "samples"


def test_a_loss_that_is_another_every_time_is_left_to_the_run():
    calls = iter(range(1_000))

    def counting(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, target) * next(calls)

    assert judge_loss(counting, *pairs(), num_samples=NUM_SAMPLES).kind is None


def test_a_sum_that_weighs_itself_may_be_judged_too():
    def padded(output: torch.Tensor, target: torch.Tensor) -> Sum:
        return Sum(F.cross_entropy(output, target, reduction="sum"), float((target != IGNORED).sum()))

    output, target = scores()(inputs()), classes(ignored=IGNORED)
    assert judge_loss(padded, output, target, num_samples=NUM_SAMPLES).kind == "targets"


def test_judging_leaves_random_numbers_as_they_were():
    before = torch.random.get_rng_state()
    judge_loss(root_of_mean, *pairs(), num_samples=NUM_SAMPLES)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("ignored", "is_sure"), [(None, True), (IGNORED, False)], ids=["none", "some"])
def test_targets_in_memory_that_all_count_need_no_weights(ignored, is_sure):
    target = classes(ignored=ignored)
    source = DataSource(samples=(inputs(), target), collate=None)
    output = scores()(inputs())
    assert all_count_the_same(F.cross_entropy, output, target, Data(train=source, val=None)) is is_sure
    assert not all_count_the_same(nn.CrossEntropyLoss(weight=weights()), output, target, Data(train=source, val=None))


def unlike(output, target):
    return F.cross_entropy(output, target) + 0.1 * output.square().mean()


def test_a_mean_over_targets_that_is_added_to_another_term_goes_by_samples_and_says_how_many_targets_count():
    output = nn.Linear(3, 4)(torch.randn(6, 3))
    target = torch.tensor([0, 1, 2, 3, 0, IGNORED])
    loss = unlike(output, target)
    assert weighed_loss(loss) == (loss, (5.0,))


def test_two_means_over_other_numbers_of_targets_go_by_samples_too():
    output = nn.Linear(3, 4)(torch.randn(6, 3))
    loss = F.cross_entropy(output, torch.tensor([0, 1, 2, 3, 0, IGNORED])) + F.cross_entropy(
        output, torch.arange(6) % 4
    )
    assert sorted(weighed_loss(loss)[1]) == [5.0, 6.0]


def root_step(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]).sqrt()


def plain_step(model: nn.Module, batch: Any) -> Any:
    output = model(batch[0])
    return F.cross_entropy(output, batch[1]), {"largest": output.max().item()}


def test_a_mended_step_that_is_no_mean_over_samples_is_refused_where_it_is_first_computed(engines_of):
    engines = engines_of(scores(), classes(), loss=F.cross_entropy, reduction="samples")
    engines.replica(0).replace_functions(step=root_step, loss=None)
    with pytest.raises(ReturnError, match=r"step's loss is no mean over samples: of 8 of them it is .*: run\.resume"):
        engines.compute(0)


def test_unless_the_user_says_what_it_is_a_mean_over(engines_of):
    engines = engines_of(scores(), classes(), loss=F.cross_entropy, reduction="samples", trusts_loss=True)
    engines.replica(0).replace_functions(step=root_step, loss=None)
    assert engines.compute(0).parts[0].num_samples == NUM_SAMPLES


def test_a_mended_step_is_put_together_by_what_it_is_and_its_metrics_are_judged(engines_of):
    model, target = scores(), classes()
    target[4:6] = IGNORED
    expected, after = one_process(copy.deepcopy(model), target, F.cross_entropy)
    engines = engines_of(model, target, loss=F.mse_loss, reduction="samples")
    for number in (0, 1):
        engines.replica(number).replace_functions(step=plain_step, loss=None)
    assert_same_step(engines, deal=((0, 1), (2, 3)), loss=expected, after=after)
    (told,) = engines.replica(0).take_news()
    assert told.startswith("'largest' of step is no mean over samples: shown is the mean of the parts' values")
    assert engines.replica(1).take_news() == ()


def part(num_samples: int, *targets: float) -> Sums:
    return Sums(
        loss_total=1.0,
        loss_weight=num_samples,
        metric_totals={},
        metric_weights={},
        num_samples=num_samples,
        targets_per_sample=targets,
    )


@pytest.mark.parametrize(
    "parts",
    [(part(3, 0.5), part(2, 0.5)), (part(3, 7.0), part(0)), (part(3), part(2)), (part(3, 1 / 3), part(2, 2 / 6))],
    ids=["as_many", "nobody", "no_targets", "rounded"],
)
def test_parts_with_as_many_targets_for_each_sample_are_put_together(parts):
    assert added(parts).num_samples == sum(part.num_samples for part in parts)


@pytest.mark.parametrize(
    ("parts", "figures"),
    [
        ((part(3, 0.5), part(2, 1.0)), "0.5 for each of 3 samples, and 1 for each of 2 samples"),
        ((part(3, 0.5, 1.0), part(2)), "0.5 and 1 for each of 3 samples"),
    ],
    ids=["fewer", "alone"],
)
def test_parts_with_fewer_targets_for_each_sample_are_refused(parts, figures):
    with pytest.raises(ReturnError, match=rf"mean over targets to another term, .* \({figures}\): return dnb\.Sum"):
        added(parts)


def composite(model: nn.Module, batch: Any) -> torch.Tensor:
    return unlike(model(batch[0]), batch[1])


def test_a_step_that_adds_a_mean_over_targets_to_another_is_that_of_one_process_where_all_count(engines_of):
    model, target = scores(), classes()
    expected, after = one_process(copy.deepcopy(model), target, unlike)
    engines = engines_of(model, target, loss=None, step=composite, reduction="terms")
    assert_same_step(engines, deal=((0,), (1, 2, 3)), loss=expected, after=after)


@pytest.mark.parametrize("reduction", ["targets", "terms"], ids=["not_known", "known"])
def test_its_evaluation_is_refused_where_some_do_not_count(engines_of, reduction):
    engines = engines_of(
        scores(), classes(ignored=IGNORED), loss=None, step=composite, reduction=reduction, batch_size=3
    )
    if reduction == "targets":  # an engine finds it out in its first step
        engines.compute(0, shards=(3,))
    with pytest.raises(ReturnError, match="the loss adds a mean over targets to another term"):
        engines.compute(0, shards=(0, 1, 2, 3), kind="evaluation")


def measuring(model: nn.Module, batch: Any) -> Any:
    output = model(batch[0])
    return F.cross_entropy(output, batch[1]), {"all": F.cross_entropy(output, batch[1].clamp(min=0)).item()}


def test_a_mean_over_targets_that_is_a_metric_alone_does_not_weigh_in_an_evaluation(engines_of):
    model, target = scores(), classes(ignored=IGNORED)
    engines = engines_of(model, target, loss=None, step=measuring, reduction="targets", batch_size=3)
    (sums,) = engines.compute(0, shards=(0, 1, 2, 3), kind="evaluation").parts
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs()), target).item()
    assert sums.loss_total / sums.loss_weight == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "other", [lambda w: 0.1 * w.square().sum(), lambda w: w.norm(), lambda w: (w.abs().mean() + w.pow(2).sum()) / 2]
)
def test_a_norm_of_parameters_is_the_same_for_every_part_and_may_be_added(other):
    weight = torch.randn(3, 4).requires_grad_()
    inputs, target = torch.randn(6, 3), torch.tensor([0, -100, 2, 3, -100, 1])

    def loss(part):
        return F.cross_entropy(inputs[part] @ weight, target[part]) + other(weight)

    parts = [weighed_loss(loss(part))[0] for part in (slice(0, 2), slice(2, 6))]
    together = sum(part.total for part in parts) / sum(part.weight for part in parts)
    assert together.item() == pytest.approx(loss(slice(0, 6)).item(), rel=1e-6)
