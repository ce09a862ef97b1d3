"""Padding to the longest sample of a batch: right where it does not count, and else refused or told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from dnb.api.rehearsal.rehearsal import RehearsedRun, rehearse
from dnb.api.rehearsal.trial import Options
from dnb.errors import ArgumentError
from dnb.job import Data, DataSource, Job, Sum
from dnb.planning.sample_order import BatchOrder

LENGTHS = (7, 2, 5, 3, 6, 4, 3, 5)
PAD = 0


class Sentences(Dataset):
    """Tokens from 1, and as many targets, of several lengths."""

    def __init__(self, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens, targets = torch.randint(1, 9, (2, self.lengths[index]), generator=generator)
        return tokens, targets


class Ratings(Sentences):
    """Tokens, and one class for all of them."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__getitem__(index)[0], torch.tensor(index % 3)


class Grades(Sentences):
    """Tokens, and one number for all of them."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__getitem__(index)[0], torch.tensor([index / 7])


class Noisy(Sentences):
    """Sentences that are others every time."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randint(1, 9, (2, self.lengths[index])))  # type: ignore[return-value]


def padded(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, targets = zip(*samples, strict=True)
    padded_targets = torch.stack(targets) if targets[0].numel() == 1 else pad_sequence(list(targets), batch_first=True)
    return pad_sequence(list(tokens), batch_first=True), padded_targets


class Pooled(nn.Module):
    """One row for each sentence, of all its tokens, or of those that are no padding."""

    def __init__(self, *, num_outputs: int, masks: bool) -> None:
        super().__init__()
        self.table, self.last, self.masks = nn.Embedding(9, 4), nn.Linear(4, num_outputs), masks

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        counts = (tokens != PAD) if self.masks else torch.ones_like(tokens)
        found = self.table(tokens) * counts.unsqueeze(2)
        return self.last(found.sum(1) / counts.sum(1, keepdim=True))


def tagger() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))


def all_of_them(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.transpose(1, 2), target)


def those_that_count(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.transpose(1, 2), target, ignore_index=PAD)


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output[..., 0] - target).square().mean()


def step_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, batch: loss(model(batch[0]), batch[1])


def own_sum(output: torch.Tensor, target: torch.Tensor) -> Sum:
    total = functional.cross_entropy(output.transpose(1, 2), target, ignore_index=PAD, reduction="sum")
    return Sum(total, float((target != PAD).sum()))


def rehearsed(model: nn.Module, data: Sentences, options: Options | None = None, **given: Any) -> RehearsedRun:
    job = Job(
        model=model,
        loss=given.get("loss"),
        step=given.get("step"),
        metrics={},
        optimizer="adamw",
        lr=None,
        scheduler=None,
        order=BatchOrder(num_samples=len(data), batch_size=8),
    )
    val = None if "val" not in given else DataSource(samples=given["val"], collate=padded)
    return rehearse(job, Data(train=DataSource(samples=data, collate=padded), val=val), options)


REFUSED = (
    r"^collate_fn pads samples to the longest of a batch, each part has another longest, and padding counts in the "
    r"loss: of 8 samples it is [\d.]+, and of their parts [\d.]+: leave padding out of it by ignore_index or "
    r"dnb\.Sum\(total, weight\), or pad all samples to one length; loss_over='samples' trains on the mean of the parts$"
)


@pytest.mark.parametrize(
    "given",
    [{"loss": all_of_them}, {"loss": squares}, {"step": step_of(all_of_them)}, {"step": step_of(squares)}],
    ids=["targets", "samples", "step_over_targets", "step_over_samples"],
)
def test_a_loss_that_counts_padding_is_refused(given):
    with pytest.raises(ArgumentError, match=REFUSED):
        rehearsed(tagger(), Sentences(), **given)


@pytest.mark.parametrize(
    "given",
    [{"loss": those_that_count}, {"loss": own_sum}, {"step": step_of(those_that_count)}, {"step": step_of(own_sum)}],
    ids=["ignored", "sum", "step_that_ignores", "step_with_a_sum"],
)
def test_padding_that_the_loss_leaves_out_is_right(given):
    assert rehearsed(tagger(), Sentences(), **given).findings == ()


def test_samples_of_one_length_have_no_padding():
    assert rehearsed(tagger(), Sentences((5,) * 8), loss=all_of_them).findings == ()


def test_samples_that_are_others_every_time_show_nothing():
    assert rehearsed(tagger(), Noisy(), loss=all_of_them).findings == ()


@pytest.mark.parametrize(
    ("data", "num_outputs", "loss"),
    [(Ratings(), 3, functional.cross_entropy), (Grades(), 1, functional.mse_loss)],
    ids=["classes", "numbers"],
)
def test_a_model_that_sees_padding_is_told_and_one_that_masks_it_is_right(data, num_outputs, loss):
    (told,) = rehearsed(Pooled(num_outputs=num_outputs, masks=False), data, loss=loss).findings
    assert told.kind == "data"
    assert told.text.startswith(
        "collate_fn pads samples to the longest of a batch, each part has another longest, and the model sees padding: "
        "the loss is not that of one process (of 8 samples it is "
    )
    assert rehearsed(Pooled(num_outputs=num_outputs, masks=True), data, loss=loss).findings == ()


@pytest.mark.parametrize(
    "options", [Options(loss_over="samples"), Options(cuts_batches=False)], ids=["wished", "whole_batches"]
)
def test_what_the_user_wishes_or_engines_make_whole_is_not_refused(options):
    assert rehearsed(tagger(), Sentences(), options, loss=all_of_them).findings == ()


def test_padding_of_validation_data_alone_is_told_and_not_refused():
    (told,) = rehearsed(tagger(), Sentences((5,) * 8), loss=all_of_them, val=Sentences()).findings
    assert told.kind == "data"
    assert told.text.startswith(
        "val's collate_fn pads samples to the longest of a batch, and each part has another longest: val_loss is not "
        "that of one process (of some samples it is "
    )


def test_padding_of_validation_data_that_the_loss_leaves_out_is_right():
    assert rehearsed(tagger(), Sentences((5,) * 8), loss=those_that_count, val=Sentences()).findings == ()
