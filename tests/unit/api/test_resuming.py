"""Whose pickles `dnb.resume` reads: this user's own, those of whoever is trusted, and no others."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dnb
from dnb.errors import ArgumentError
from dnb.hub.checkpoints.format import SIGNATURE_FILE
from dnb.hub.checkpoints.signing import secret_path
from dnb.protocol.run import PlainJob
from tests.unit.kept_runs import KeptRun, job_of, rewrite

Change = Callable[[dict[str, Any]], object]
TRAIN = (torch.arange(8.0), torch.zeros(8))
PLAIN = PlainJob(loss="mse_loss", optimizer="adamw", lr=1e-2, metrics=(), shuffle=True, drop_last=False, others=())


class ReachedError(Exception):
    """Nothing is left to do but to start a pool."""


class Bomb:
    """An object that leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of this user, of words only."""
    run = KeptRun(tmp_path_factory.mktemp("own"), job_of(small()), plain=PLAIN)
    yield run.train(2).keep().folder
    run.close()


@pytest.fixture
def fired(tmp_path: Path) -> Path:
    """Is there if a stranger's code has run."""
    return tmp_path / "fired"


@pytest.fixture
def theirs(own: Path, tmp_path: Path, fired: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in which a stranger has put other pickles; it may be changed further."""
    monkeypatch.setattr("dnb.api.resuming.start", _reach)
    monkeypatch.setattr("dnb.api.resuming.current_pool", lambda: None)
    copy = Path(shutil.copytree(own, tmp_path / "theirs"))
    rewrite(copy, lambda _: None, dict.fromkeys(["job.pickle", "data.pickle"], pickle.dumps(Bomb(fired))))
    return copy


def _reach() -> Any:
    raise ReachedError


def mended(fired: Path) -> dict[str, bytes]:
    return {"mended.pickle": pickle.dumps(Bomb(fired))}


def plain(**words: Any) -> Change:
    return lambda manifest: manifest["spec"]["plain"].update(words)


def spec(**words: Any) -> Change:
    return lambda manifest: manifest["spec"].update(words)


def test_given_model_and_data_a_stranger_s_pickles_are_not_read(theirs: Path, fired: Path):
    with pytest.raises(ReachedError):
        dnb.resume(theirs, model=small(), train=TRAIN)
    assert not fired.exists()


@pytest.mark.parametrize("is_signed", [True, False], ids=["with the old signature", "without a signature"])
@pytest.mark.parametrize(
    ("change", "given", "told"),
    [
        (
            spec(),
            {},
            "keeps model and train as pickles, which run code when they are read, and .*: give model=, train=",
        ),
        (spec(), {"model": small()}, r"keeps train as pickles.*: give train=, or trust=True \(--trust\) if you trust"),
        (spec(), {"train": TRAIN}, "keeps model as pickles.*: give model=, or trust=True"),
        (spec(plain=None), {"model": small(), "train": TRAIN}, "keeps loss, step, .*, metrics and after_step as"),
        (plain(others=["scheduler"]), {"model": small(), "train": TRAIN}, "keeps scheduler as pickles.*: give sched"),
        (plain(others=["loss", "scheduler"]), {"model": small(), "train": TRAIN}, ": give loss=, scheduler=, or trust"),
        (spec(num_val_samples=8), {"model": small(), "train": TRAIN}, "keeps val as pickles.*: give val=, or trust="),
    ],
    ids=["nothing", "model", "train", "no words", "scheduler", "loss and scheduler", "val"],
)
def test_what_would_have_to_be_unpickled_of_a_stranger_is_named(
    theirs: Path, fired: Path, change: Change, given: dict[str, Any], told: str, is_signed: bool
):
    rewrite(theirs, change)
    if not is_signed:
        (theirs / SIGNATURE_FILE).unlink()
    with pytest.raises(ArgumentError, match=told):
        dnb.resume(theirs, **given)
    assert not fired.exists()


def test_functions_that_a_stranger_pretends_were_mended_are_not_read(theirs: Path, fired: Path):
    rewrite(theirs, spec(), mended(fired))
    with pytest.raises(ArgumentError, match=r"keeps loss as pickles, which run code .*: give loss=, or trust=True"):
        dnb.resume(theirs, model=small(), train=TRAIN)
    with pytest.raises(ReachedError):
        dnb.resume(theirs, model=small(), train=TRAIN, loss="mse_loss")
    assert not fired.exists()


def test_trust_reads_them(theirs: Path, fired: Path):
    with pytest.raises(ArgumentError, match=r"job\.pickle, written under Python .* TypeError: it holds a NoneType"):
        dnb.resume(theirs, train=TRAIN, trust=True)
    assert fired.exists()


def test_trust_reads_no_more_than_is_needed(theirs: Path, fired: Path):
    with pytest.raises(ReachedError):
        dnb.resume(theirs, model=small(), train=TRAIN, trust=True)
    assert not fired.exists()


@pytest.mark.parametrize("given", [{}, {"model": small()}, {"train": TRAIN}], ids=["nothing", "model", "train"])
def test_one_s_own_checkpoint_is_read_without_trust(own: Path, theirs: Path, given: dict[str, Any]):
    with pytest.raises(ReachedError):
        dnb.resume(own, **given)


def test_a_copy_of_one_s_own_checkpoint_is_one_s_own(own: Path, theirs: Path, tmp_path: Path):
    with pytest.raises(ReachedError):
        dnb.resume(shutil.copytree(own, tmp_path / "copy"))


def test_of_one_s_own_checkpoint_a_file_that_was_changed_is_not_read(own: Path, theirs: Path, fired: Path):
    copy = Path(shutil.copytree(own, theirs.parent / "copy"))
    (copy / "job.pickle").unlink()
    (copy / "job.pickle").write_bytes(pickle.dumps(Bomb(fired)))
    with pytest.raises(ArgumentError, match=r"no checkpoint at .* is whole: .*job\.pickle has"):
        dnb.resume(copy)
    assert not fired.exists()


def test_the_signature_of_another_checkpoint_does_not_fit(own: Path, theirs: Path, fired: Path):
    shutil.copy(own / SIGNATURE_FILE, theirs / SIGNATURE_FILE)
    with pytest.raises(ArgumentError, match="was changed, or written by another user or on another host"):
        dnb.resume(theirs)
    assert not fired.exists()


def test_the_checkpoint_of_another_user_is_not_one_s_own(
    own: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "another home"))
    with pytest.raises(ArgumentError, match=r"its signature cannot be checked, as .*checkpoint_secret cannot be read"):
        dnb.resume(own)
    assert not secret_path().exists()


ODD: dict[str, tuple[Change, str]] = {
    "no batch": (spec(batch_size=0), "batch_size must be a positive integer, not 0"),
    "a huge batch": (spec(batch_size=10**30), "batch_size is 1000000000000000000000000000000, which is no size"),
    "negative epoch": (spec(steps_per_epoch=-2), "steps_per_epoch must be a positive integer"),
    "longer epoch": (spec(steps_per_epoch=3), "steps_per_epoch is 3, and its order has 2"),
    "more shards": (spec(num_shards=5), "num_shards=5 is more than batch_size=4"),
    "no micro-batch": (spec(micro_batch=0), "micro_batch must be a positive integer, not 0"),
    "huge seed": (spec(seed=1 << 70), "seed must be an integer of 64 bits"),
    "a precision of its own": (spec(precision="float8"), "no precision 'float8'"),
    "clipped to nothing": (spec(clip_norm=-1.0), "clip_norm must be a positive number"),
    "a checkpoint every 0 steps": (spec(checkpoints={"every": 0, "keep": 1, "best": None}), "checkpoint_every must be"),
    "the best by a riddle": (
        spec(checkpoints={"every": 1, "keep": 1, "best": "x"}),
        "checkpoint_best='x' does not say which way is better",
    ),
    "objects of another kind": (plain(others=["model.forward"]), "'model.forward' is no argument"),
    "a transport of no engine": (spec(transport={"x": "memory"}), "invalid literal"),
    "stages on no engine": (
        spec(partitions=[{"kind": "pipeline", "num_engines": 0}]),
        "num_engines must be a positive",
    ),
    "an optimizer that there is not": (plain(optimizer="exec"), "no optimizer 'exec'"),
    "no optimizer": (plain(optimizer=None), "optimizer is a NoneType"),
    "a rate of nothing": (plain(lr=-1.0), "lr must be a positive number"),
}


@pytest.mark.parametrize(("change", "told"), ODD.values(), ids=ODD)
def test_a_run_that_no_fit_has_started_is_refused(theirs: Path, change: Change, told: str):
    rewrite(theirs, change)
    with pytest.raises(ArgumentError, match=f"theirs is not as dnb writes checkpoints: {told}"):
        dnb.resume(theirs, model=small(), train=TRAIN)


@pytest.mark.parametrize(
    ("change", "told"),
    [(plain(loss="eval"), "no loss 'eval'"), (plain(metrics=["exec"]), "no metric 'exec'")],
    ids=["loss", "metric"],
)
def test_a_word_that_stands_for_nothing_is_refused(theirs: Path, change: Change, told: str):
    rewrite(theirs, change)
    with pytest.raises(ArgumentError, match=told):
        dnb.resume(theirs, model=small(), train=TRAIN)
