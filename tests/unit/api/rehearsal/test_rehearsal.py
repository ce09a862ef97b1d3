"""A rehearsal computes a few samples on copies, and leaves what the user gave as it was."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from dnb.api.rehearsal import rehearsal
from dnb.api.rehearsal import trial as trials
from dnb.api.rehearsal.rehearsal import RehearsedRun, rehearse
from dnb.api.rehearsal.trial import PROBE_SAMPLES, Options, Trial
from dnb.errors import ArgumentError
from dnb.job import Data, DataSource, Job, Sum
from dnb.planning.sample_order import BatchOrder
from dnb.transport.pickling.copies import copy_together

GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(32, 6, generator=GENERATOR), torch.randint(0, 3, (32,), generator=GENERATOR)


@pytest.fixture(autouse=True)
def never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no busy machine make a model one that is tried with two samples alone."""
    monkeypatch.setattr(trials, "SLOW_SECONDS", math.inf)


def job_of(model: nn.Module, *, step: Callable[..., Any] | None = None, loss: Any = None, num_samples: int = 32) -> Job:
    return Job(
        model=model,
        loss=None if step is not None else loss or nn.functional.cross_entropy,
        step=step,
        metrics={},
        optimizer="adamw",
        lr=None,
        scheduler=None,
        order=BatchOrder(num_samples=num_samples, batch_size=8),
    )


def pair(x: Any = X, y: Any = Y) -> Data:
    return Data(train=DataSource(samples=(x, y), collate=None), val=None)


def trial_of(model: nn.Module, data: Data | None = None, **options: Any) -> Trial:
    return Trial.of(job_of(model, **options), data or pair(), Options())


def rehearsed(model: nn.Module, data: Data | None = None, **options: Any) -> RehearsedRun:
    return rehearse(job_of(model, **options), data or pair())


def test_a_trial_has_batch_output_target_and_loss_of_the_first_samples():
    model = nn.Linear(6, 3)
    trial = trial_of(model)
    assert trial.indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert trial.batch[0].equal(X[:8])
    assert trial.computed.target.equal(Y[:8])
    assert trial.computed.loss.item() == pytest.approx(nn.functional.cross_entropy(model(X[:8]), Y[:8]).item())
    assert trial.computed.error is None
    assert trial.computed.phase == ""


def test_the_user_s_model_has_no_gradients_afterwards_and_is_in_its_own_mode():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rehearsed(model)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_random_numbers_go_on_as_if_nothing_had_been_rehearsed():
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout())
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    rehearsed(model)
    assert torch.get_rng_state().equal(state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


class Opens(Dataset):
    """Opens its file at the first sample."""

    def __init__(self, path: str) -> None:
        self.path, self.file, self.asked = path, None, []

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        self.file = self.file or open(self.path, "rb")  # noqa: SIM115
        self.asked.append(index)
        return X[index], Y[index]


def test_a_file_that_a_data_set_opens_lazily_is_not_open_afterwards(tmp_path):
    (tmp_path / "samples").write_bytes(b"0")
    samples = Opens(str(tmp_path / "samples"))
    found = rehearsed(
        nn.Linear(6, 3), Data(train=DataSource(samples=samples, collate=torch.utils.data.default_collate), val=None)
    )
    assert found.probe is not None
    assert samples.file is None
    assert samples.asked == []


def test_a_step_function_that_counts_its_calls_has_counted_none():
    calls = [0]

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        calls[0] += 1
        step.calls += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    step.calls = 0
    assert rehearsed(nn.Linear(6, 3), step=step).probe is not None
    assert calls == [0]
    assert step.calls == 0


def test_prints_and_warnings_of_a_rehearsal_do_not_show(capsys):
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        import warnings

        print("step")  # noqa: T201
        warnings.warn("of step", stacklevel=1)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    trial = trial_of(nn.Linear(6, 3), step=step)
    assert trial.computed.warnings == ("of step",)
    assert capsys.readouterr().out == ""


def test_a_class_that_is_sent_by_value_is_not_changed_in_the_notebook():
    class Net(nn.Linear):
        calls = 0

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            type(self).calls += 1
            return super().forward(inputs)

    forward = Net.forward
    trial = trial_of(Net(6, 3))
    assert type(trial.job.model).calls == 2  # a probe, and a step
    assert type(trial.job.model) is not Net
    assert Net.calls == 0
    assert Net.forward is forward


def test_what_step_and_model_share_is_shared_by_their_copies():
    model = nn.Linear(6, 3)
    copies = copy_together((model, [model]), X)
    (copied, (again,)), data = copies.small, copies.large
    assert again is copied
    assert copied is not model
    assert data.equal(X)
    assert data.data_ptr() != X.data_ptr()


def test_a_list_of_many_samples_is_not_copied_to_look_at_eight():
    samples = [(torch.zeros(1), 0)] * 3 + [(torch.zeros(1), number) for number in range(6_000)]
    copies = copy_together(nn.Linear(1, 1), samples)
    assert copies.large is samples
    assert not copies.is_whole


def test_parameters_that_are_written_through_data_are_seen():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.seen = nn.Parameter(torch.zeros(1), requires_grad=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.seen.data += 1
            return self.layer(inputs)

    assert list(trial_of(Counts()).computed.written) == ["seen"]


def test_a_gradient_that_comes_before_backward_is_seen():
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward(retain_graph=True)
        return loss

    assert sorted(trial_of(nn.Linear(6, 3), step=step).computed.accumulated) == ["bias", "weight"]


def test_what_user_code_raises_is_told_with_the_phase_in_which_it_did():
    trial = trial_of(nn.Linear(5, 3))
    assert isinstance(trial.computed.error, RuntimeError)
    assert trial.computed.phase == "forward"
    assert trial.probe() is None


def test_the_probe_is_computed_with_the_buffers_that_the_model_came_with():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    probe = rehearsed(model).probe
    model.eval()
    assert probe == pytest.approx(nn.functional.cross_entropy(model(X[:PROBE_SAMPLES]), Y[:PROBE_SAMPLES]).item())


def refusal_of(step: Callable[..., Any]) -> str:
    with pytest.raises(ArgumentError) as refused:
        rehearsed(nn.Linear(6, 3), step=step)
    return str(refused.value)


def test_a_step_whose_loss_is_no_mean_over_samples_is_refused_with_the_recipe():
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]).sqrt()

    told = refusal_of(step)
    assert told.startswith("step's loss is no mean over samples: of 8 of them it is ")
    assert "return dnb.Sum(total, weight)" in told
    assert "loss=callable(output, target)" in told


def test_a_step_that_masks_its_targets_by_itself_is_refused_though_no_target_of_the_first_is_masked():
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        counts = batch[1] != -100
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (losses * counts).sum() / counts.sum()

    assert "mean of their parts" in refusal_of(step)


class Rows(Dataset):
    """Pairs, of which some targets may not count."""

    def __init__(self, *, ignored: tuple[int, ...] = ()):
        self.ignored = ignored

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return X[index], torch.tensor(-100) if index in self.ignored else Y[index]


def two_terms(model: nn.Module, batch: Any) -> torch.Tensor:
    output = model(batch[0])
    return nn.functional.cross_entropy(output, batch[1]) + 0.1 * output.square().mean()


def rows(**options: Any) -> Data:
    return Data(train=DataSource(samples=Rows(**options), collate=default_collate), val=None)


def test_a_step_that_adds_a_mean_over_targets_to_one_over_samples_may_train_as_long_as_all_count():
    assert rehearsed(nn.Linear(6, 3), rows(), step=two_terms).reduction == "terms"


def test_it_is_refused_where_some_of_the_first_samples_do_not_count():
    with pytest.raises(ArgumentError, match="step's loss is no mean over samples"):
        rehearsed(nn.Linear(6, 3), rows(ignored=(1, 4)), step=two_terms)


def test_a_term_that_masks_by_itself_is_refused_beside_a_mean_over_targets_too():
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        output, counts = model(batch[0]), batch[1] != -100
        of_counted = (output.square().mean(1) * counts).sum() / counts.sum()
        return nn.functional.cross_entropy(output, batch[1].clamp(min=0)) + 0.1 * of_counted

    with pytest.raises(ArgumentError, match="step's loss is no mean over samples"):
        rehearsed(nn.Linear(6, 3), rows(), step=step)


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def root(model: nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model, batch).sqrt()


@pytest.mark.parametrize(
    ("val_step", "reduction"), [(two_terms, "samples"), (root, "samples"), (cross_entropy, "targets")]
)
def test_a_val_step_whose_loss_is_no_mean_is_one_of_whole_batches_and_that_is_told(val_step, reduction):
    job = dataclasses.replace(job_of(nn.Linear(6, 3)), val_step=val_step)
    found = rehearse(job, dataclasses.replace(rows(), val=rows().train))
    assert found.val_reduction == reduction
    assert [each.text for each in found.findings] == [
        "val_loss of val_step is no mean over samples, and is the mean of its values on whole batches, by their samples"
    ] * (reduction == "samples")


def measuring(model: nn.Module, batch: Any) -> Any:
    output, target = model(batch[0]), batch[1]
    counts, right = target != -100, output.argmax(1) == target
    loss = nn.functional.cross_entropy(output, target)
    return loss, {
        "loss again": loss.item(),
        "right": right[counts].double().mean(),
        "right of all": right.double().mean(),
        "weighed": Sum(right.sum(), counts.sum()),
        "rate": 0.1,
        "largest": output.max(),
    }


def test_metrics_that_a_step_returns_are_weighed_as_its_loss_or_told_if_they_are_no_means():
    torch.manual_seed(0)
    found = rehearse(job_of(nn.Linear(6, 3), step=measuring), rows())
    assert found.target_metrics == ("loss again", "right")
    assert [each.text for each in found.findings] == [
        "'largest' of step is no mean over samples: shown is the mean of the parts' values, not that of the whole "
        "batch; return dnb.Sum(total, weight), or give metrics= beside loss=, which are computed of all samples"
    ]


def test_metrics_of_val_step_are_judged_too():
    torch.manual_seed(0)
    job = dataclasses.replace(job_of(nn.Linear(6, 3)), val_step=measuring)
    found = rehearse(job, dataclasses.replace(rows(), val=rows().train))
    assert found.target_metrics == ("val_loss again", "val_right")
    assert [each.text for each in found.findings] == [
        "val_largest of val_step is no mean over samples, and is the mean of its values on whole batches, by their "
        "samples"
    ]


def test_metrics_of_a_step_whose_user_says_what_its_loss_is_are_judged_all_the_same():
    found = rehearse(job_of(nn.Linear(6, 3), step=measuring), pair(), Options(loss_over="samples"))
    assert [each.kind for each in found.findings] == ["metrics"]


def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0] + torch.randn_like(batch[0])), batch[1])


def variational(model: nn.Module, batch: Any) -> torch.Tensor:
    output = model(batch[0])
    drawn = output + torch.randn_like(output)
    return nn.functional.mse_loss(drawn, batch[0][:, :3], reduction="sum") + output.square().sum()


def own_sum(model: nn.Module, batch: Any) -> Sum:
    total = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    return Sum(total, float((batch[1] != -100).sum()))


@pytest.mark.parametrize(
    ("step", "reduction"),
    [(cross_entropy, "targets"), (noisy, "targets"), (variational, "sum"), (own_sum, "targets")],
    ids=["a_mean", "with_noise", "a_sum_over_the_batch", "a_sum_with_its_weight"],
)
def test_a_step_is_put_together_by_what_its_loss_is(step, reduction):
    found = rehearsed(nn.Linear(6, 3), step=step)
    assert (found.reduction, found.loss_over) == (reduction, "samples")


def test_a_loss_over_the_whole_batch_has_its_outputs_gathered():
    found = rehearsed(nn.Linear(6, 3), loss=lambda output, target: nn.functional.cross_entropy(output, target).sqrt())
    assert (found.reduction, found.loss_over) == ("samples", "batch")


def test_targets_in_memory_that_all_count_are_not_weighed():
    assert rehearsed(nn.Linear(6, 3)).reduction == "samples"


def test_what_the_user_says_of_a_loss_counts():
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return cross_entropy(model, batch).sqrt()

    found = rehearse(job_of(nn.Linear(6, 3), step=step), pair(), Options(loss_over="samples"))
    assert (found.reduction, found.loss_over) == ("samples", "samples")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Trials that were computed, and not only recalled."""
    monkeypatch.setattr(rehearsal, "_known", {})
    found: list[Trial] = []
    run = Trial.run

    def noted(trial: Trial) -> None:
        found.append(trial)
        run(trial)

    monkeypatch.setattr(Trial, "run", noted)
    return found


def test_the_same_objects_are_rehearsed_once_and_only_the_probe_is_computed_anew(runs: list[Trial]):
    model, data = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), pair()
    first = rehearsed(model, data)
    with torch.no_grad():  # as training does
        model[0].weight.mul_(2)
        model[1].running_mean.add_(1)
        model[1].num_batches_tracked.add_(7)
    job = job_of(model)
    second = rehearse(job, data)
    assert len(runs) == 1
    assert second.job is job
    assert second.data is data
    assert second.probe == pytest.approx(nn.functional.cross_entropy(model.eval()(X[:8]), Y[:8]).item())
    assert (second.findings, second.reduction, second.loss_over) == (first.findings, first.reduction, first.loss_over)


def _clamp(module: nn.Module, inputs: Any) -> None:
    module.weight.data.clamp_(-1, 1)


def _double(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given.update(model=given["model"].eval()),
        lambda given: given["model"].register_forward_hook(_double),
        lambda given: given["model"].append(nn.ReLU()),
        lambda given: given["model"].register_buffer("scale", torch.ones(1)),
        lambda given: given["loss"].weight.mul_(torch.tensor([1.0, 2.0, 3.0])),
        lambda given: given["y"].__setitem__(20, -100),
        lambda given: given["x"].__setitem__(3, 0.0),
        lambda given: given.update(loss=nn.CrossEntropyLoss(reduction="sum")),
        lambda given: given.update(x=given["x"][:, :5], model=nn.Sequential(nn.Linear(5, 3))),
        lambda given: given.update(options=Options(loss_over="batch")),
        lambda given: given.update(options=Options(precision="bfloat16")),
    ],
    ids=[
        "mode",
        "hook",
        "layer",
        "buffer",
        "weight",
        "ignored",
        "sample",
        "reduction",
        "shape",
        "loss_over",
        "precision",
    ],
)
def test_what_has_changed_is_rehearsed_anew(runs: list[Trial], change: Callable[[dict[str, Any]], Any]):
    given: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(6, 3)),
        "loss": nn.CrossEntropyLoss(weight=torch.ones(3)),
        "x": X.clone(),
        "y": Y.clone(),
        "options": Options(),
    }
    for turn in range(2):
        if turn:
            change(given)
        job = job_of(given["model"], loss=given["loss"])
        rehearse(job, pair(given["x"], given["y"]), given["options"])
    assert len(runs) == 2


def test_a_hook_that_writes_parameters_is_refused_though_the_model_was_rehearsed_without_it(runs: list[Trial]):
    model = nn.Linear(6, 3)
    rehearsed(model)
    model.register_forward_pre_hook(_clamp)
    with pytest.raises(ArgumentError, match="writes parameter 'weight'"):
        rehearsed(model)


def test_what_was_converted_is_converted_every_time(runs: list[Trial]):
    data = pair(X.double())
    assert [rehearsed(nn.Linear(6, 3), data).data.train.samples[0].dtype for _ in range(2)] == [torch.float32] * 2


def test_a_large_model_is_probed_with_two_samples():
    model = nn.Sequential(nn.Linear(6, 1500), nn.Linear(1500, 700), nn.Linear(700, 3))
    found = rehearsed(model)
    assert found.probe_samples == 2
    assert found.probe == pytest.approx(nn.functional.cross_entropy(model(X[:2]), Y[:2]).item())


def test_a_slow_model_is_tried_with_two_samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trials, "SLOW_SECONDS", 0.0)
    trial = trial_of(nn.Linear(6, 3))
    assert trial.batch[0].equal(X[:2])
    assert rehearsed(nn.Linear(6, 3), loss=lambda output, target: output.std() + 0 * target.sum()).loss_over == "batch"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "SMALL_MODEL", 0)


def median(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target, reduction="none").quantile(0.5)


@pytest.mark.usefixtures("large")
def test_a_large_model_is_computed_with_two_samples_and_its_loss_judged_with_four_rows():
    trial = trial_of(nn.Linear(6, 3))
    output, target, number = trials.outputs_to_judge(trial)
    assert (len(trial.computed.output), number) == (2, 4)
    assert output.equal(trial.computed.output[[0, 1, 1, 1]])
    assert target.equal(Y[:2][[0, 1, 1, 1]])


@pytest.mark.usefixtures("large")
def test_a_median_over_the_outputs_of_a_large_model_is_no_mean():
    assert rehearsed(nn.Linear(6, 3), loss=median).loss_over == "batch"


@pytest.mark.usefixtures("large")
def test_a_step_of_a_large_model_that_takes_a_median_is_refused():
    with pytest.raises(ArgumentError, match="step's loss is no mean over samples: of 4 of them"):
        rehearsed(nn.Linear(6, 3), step=lambda model, batch: median(model(batch[0]), batch[1]))


@pytest.mark.usefixtures("large")
def test_a_step_of_a_large_model_that_takes_no_single_sample_is_judged_with_pairs():
    def pairs(model: nn.Module, batch: Any) -> torch.Tensor:
        assert len(batch[0]) > 1
        return median(model(batch[0]), batch[1])

    with pytest.raises(ArgumentError, match="step's loss is no mean over samples: of 4 of them"):
        rehearsed(nn.Linear(6, 3), step=pairs)


def test_a_step_that_draws_elsewhere_than_torch_is_left_to_the_run():
    source = random.SystemRandom()

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) * source.random()

    assert rehearsed(nn.Linear(6, 3), step=step).reduction == "targets"
