"""A checkpoint that dnb 0.1.0 wrote before its files were moved is gone on from, to the bits of the run of then."""

import shutil

import pytest
import torch
from torch import nn

import dnb
from tests.engines.pools import wait
from tests.unit.test_files_of_before import CHECKPOINT, LOSSES, RUN

pytestmark = pytest.mark.engines


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(CHECKPOINT, tmp_path / "kept")


def of_before():
    """The model and the data of the run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(48, 4, generator=generator, dtype=torch.float64)
    return model, (data, torch.randint(0, 3, (48,), generator=generator))


def test_a_checkpoint_of_before_goes_on_from_its_own_pickles(pool, checkpoint):
    run = wait(dnb.resume(checkpoint, trust=True, pool=pool))
    assert (run.status, run.step) == ("finished", 9)
    assert list(run.history["loss"]) == pytest.approx(LOSSES, rel=1e-12)


def test_a_checkpoint_of_before_goes_on_with_what_is_given_and_reads_no_pickle(pool, checkpoint):
    for pickle in checkpoint.glob("*.pickle"):
        assert b"dnb." in pickle.read_bytes()
    model, train = of_before()
    val = train[0][:16], train[1][:16]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    given = {"model": model, "train": train, "val": val, "optimizer": optimizer, "scheduler": scheduler}
    run = wait(dnb.resume(checkpoint, loss="cross_entropy", metrics="accuracy", pool=pool, **given))
    assert (run.status, run.step) == ("finished", 9)
    assert list(run.history["loss"]) == pytest.approx(LOSSES, rel=1e-12)


def test_a_run_of_before_is_attached_to_by_its_name(pool, tmp_path, monkeypatch):
    shutil.copytree(RUN, tmp_path / ".dnb" / "runs" / "before")
    monkeypatch.chdir(tmp_path)
    run = dnb.attach("before")
    assert (run.status, run.step, list(run.history["loss"])) == ("finished", 9, LOSSES)
