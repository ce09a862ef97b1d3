"""Lines that newcomers type: each is answered by one sentence that holds the line that is right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnb.api import pools
from dnb.errors import DnbError
from dnb.notebook.arguments import bind, parse_settings
from dnb.notebook.commands.magics import DtrainMagics
from dnb.notebook.commands.verbs import VERBS, begin_of

X, y = torch.randn(64, 4), torch.arange(64) % 3
MODEL = nn.Linear(4, 3)
NAMES: dict[str, Any] = {
    "nn": nn,
    "model": MODEL,
    "X": X,
    "y": y,
    "labels": y.float(),
    "train": DataLoader(TensorDataset(X, y), batch_size=16),
    "opt": torch.optim.Adam(MODEL.parameters()),
    "Net": nn.Linear,
    "accuracy": 0.97,
}
FIT = "fit model (X, y) --loss cross_entropy"

# As typed, and as it should be.
WRONG = [
    ("fiit model (X, y)", "fit model (X, y)"),
    ("Fit model (X, y)", "fit model (X, y)"),
    ("train model (X, y) --loss cross_entropy", FIT),
    ("model (X, y) --loss cross_entropy", FIT),
    ("fit(model, (X, y))", "fit model (X, y)"),
    ("fit model, (X, y), loss=cross_entropy", FIT),
    ("fit model X y --loss cross_entropy", "fit model (X, y)"),
    ("fit", "fit model (X, y) --loss cross_entropy --epochs 5"),
    ("fit model", "fit model (X, y) --loss cross_entropy --epochs 5"),
    ("fit modle (X, y) --loss cross_entropy", FIT),
    ("fit model (X, y)", FIT),
    ("fit model (X, y) --loss crossentropy", FIT),
    ("fit model (X, y) --loss CrossEntropyLoss", FIT),
    ("fit model (X, y) --loss nn.CrossEntropyLoss", "fit model (X, y) --loss nn.CrossEntropyLoss()"),
    ("fit model (X, y) --criterion cross_entropy", FIT),
    (f"{FIT} --val (X, y", f"{FIT} --val (X, y)"),
    (f"{FIT} --learning-rate 0.1", f"{FIT} --lr 0.1"),
    (f"{FIT} --lr fast", f"{FIT} --lr 1e-3"),
    (f"{FIT} --epoch 3", f"{FIT} --epochs 3"),
    (f"{FIT} --epochs", f"{FIT} --epochs 1"),
    (f"{FIT} epochs=3", f"{FIT} --epochs 3"),
    (f"{FIT} --epochs 2.5", f"{FIT} --epochs 5"),
    (f"{FIT} 3", f"{FIT} --epochs 5"),
    (f"{FIT} --batchsize 16", f"{FIT} --batch-size 16"),
    (f"{FIT} --batch-size 1000", f"{FIT} --batch-size 64"),
    ("fit model train --loss cross_entropy --batch-size 32", "fit model train --loss cross_entropy"),
    (f"{FIT} --optimizer adan", f"{FIT} --optimizer adam"),
    (f"{FIT} --optimizer opt --lr 0.1", f"{FIT} --optimizer opt"),
    (f"{FIT} --metrics acuracy", f"{FIT} --metrics accuracy"),
    (f"{FIT} --validation_data (X, y)", f"{FIT} --val (X, y)"),
    (f"{FIT} --strategy ddp", f"{FIT} --strategy data"),
    (f"{FIT} --precision fp16", f"{FIT} --precision bfloat16"),
    ("start 0", "start -n 2"),
    ("start -n two", "start -n 2"),
    ("start --engines 2", "start -n 2"),
    ("kill 1", "chaos kill 1"),
    ("chaos kill", "chaos kill 1"),
    ("chaos kill 7", "chaos kill 0"),
    ("chaos slow 1", "chaos slow 2 4x"),
    ("chaos stop 1 5", "chaos stop 1 5s"),
    ("remove engine 1", "remove 1,3-4"),
    ("set", "set lr=1e-4"),
    ("set lr 0.1", "set lr=1e-4"),
    ("export", "export losses.csv"),
    ("plan model", "plan model (X, y)"),
    ("plan model (X, y) --mesh 2x2", "plan model (X, y) --mesh data=2"),
]
# What is right is nothing to type behind %dtrain.
ANSWERS = [
    ("fit Net (X, y) --loss cross_entropy", "model is the class Linear: give one object of it, as Linear(...) is"),
    ("fit model (X, labels) --loss cross_entropy", "give y.long()"),
    ("fit model (X[:, :3], y) --loss cross_entropy", "give it in_features=3, or samples of 4 features"),
    ("fit model X --loss cross_entropy", "give pairs (X, y)"),
    ("attach nosuch", ".dnb/runs/nosuch is not the folder of a run: in .dnb/runs there are digits"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the folder of a run; engines 0 and 1 for what needs some, and none to train."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".dnb" / "runs" / "digits"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    monkeypatch.setattr(pools, "_pool", None)


def answer_to(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if line.startswith(("chaos", "remove", "set")):
        engines = [SimpleNamespace(id=0), SimpleNamespace(id=1)]
        monkeypatch.setattr(pools, "current_pool", lambda: SimpleNamespace(engines=engines, run=None))
    shell = SimpleNamespace(user_ns=dict(NAMES))
    with pytest.raises(DnbError) as caught:
        DtrainMagics(shell).dtrain(line)
    return str(caught.value)


@pytest.mark.parametrize(("line", "right"), WRONG, ids=[line for line, _ in WRONG])
def test_the_answer_to_a_wrong_line_holds_the_line_that_is_right(line: str, right: str, monkeypatch):
    answer = answer_to(line, monkeypatch)
    assert f"%dtrain {right}" in answer
    assert "\n" not in answer


@pytest.mark.parametrize(("line", "told"), ANSWERS, ids=[line for line, _ in ANSWERS])
def test_the_answer_to_what_lies_in_the_variables_says_what_to_give(line: str, told: str, monkeypatch):
    answer = answer_to(line, monkeypatch)
    assert told in answer
    assert "\n" not in answer


@pytest.mark.parametrize("right", sorted({right for _, right in WRONG}))
def test_the_line_that_is_right_is_understood(right: str):
    name, rest = begin_of(right)
    verb = VERBS[name]
    names = {**NAMES, "digits": None}
    if verb.has_settings:
        assert parse_settings(rest, names=names)
    else:
        bind(verb.flags, rest, names=names, verb=name, operand=verb.operand, rest=verb.rest)
