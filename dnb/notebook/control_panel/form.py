"""The form of the control panel: what to train, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
from torch.utils.data import DataLoader

from dnb.notebook.control_panel import choices
from dnb.notebook.control_panel.choices import Choice
from dnb.notebook.control_panel.lines import FitForm, batch_of, plan_line
from dnb.notebook.control_panel.widgets import LABEL_WIDTH, chooser, field, grid, offer

NO_MODEL = "no fitting model: define a torch.nn.Module"
NO_DATA = "no fitting data: define (X, y) or a Dataset"


class FormWidgets:
    """Widgets for the arguments of `fit`, by the arguments' names; `box` is all of them."""

    def __init__(self) -> None:
        self._hidden: Mapping[str, Any] = {}
        self._guessed_loss = ""  # that was chosen for the user, who may have chosen another since
        self.choosers = {
            "model": chooser("Model"),
            "train": chooser("Train data"),
            "val": chooser("Validation"),
            "loss": chooser("Loss or step"),
            "metrics": chooser("Metrics"),
            "optimizer": chooser("Optimizer"),
            "strategy": chooser("Strategy"),
        }
        self.fields = {
            "lr": field("Learning rate", hint="torch's default"),
            "batch_size": field("Batch size", hint="64"),
            "epochs": field("Epochs", hint="1"),
            "steps": field("Steps", hint="by epochs"),
            "shards": field("Shards", hint="automatic"),
            "seed": field("Seed", hint="0"),
            "clip_norm": field("Clip norm", hint="not clipped"),
            "checkpoint_every": field("Checkpoint", hint="every so many steps: none"),
            "name": field("Name", hint="by the model's class"),
            "exact": widgets.Checkbox(
                description="Exact to the bit",
                indent=True,
                style={"description_width": LABEL_WIDTH},
                layout=widgets.Layout(width="auto", min_width="0"),
            ),
        }
        parts = grid(list(self.choosers.values()), least=330), grid(list(self.fields.values()), least=240)
        self.box = widgets.VBox(parts)

    def __getitem__(self, name: str) -> widgets.Widget:
        return self.choosers[name] if name in self.choosers else self.fields[name]

    @property
    def inputs(self) -> list[widgets.Widget]:
        """All that the user may change."""
        return [*self.choosers.values(), *self.fields.values()]

    def offer(self, names: Mapping[str, Any], *, hidden: Mapping[str, Any]) -> None:
        """Offer what fits among the notebook's variables; each choice that still fits stays."""
        self._hidden = hidden
        own = choices.own_names(names, hidden=hidden)
        data = choices.data_sets(own)
        offer(self["model"], choices.models(own), wish="model", nothing=NO_MODEL)
        offer(self["train"], data, wish="train", nothing=NO_DATA)
        offer(self["val"], [Choice("none", ""), *data])
        offer(self["loss"], [Choice("none: the model returns it", ""), *choices.losses(own, names=names)])
        offer(self["metrics"], choices.metrics(own, names=names))
        offer(self["strategy"], choices.strategies(own, names=names))
        self.adapt(names)

    def adapt(self, names: Mapping[str, Any]) -> None:
        """Fit what depends on other choices: optimizers of the model, and numbers that objects bring along."""
        own = choices.own_names(names, hidden=self._hidden)
        self._guess_loss(own)
        offer(self["optimizer"], choices.optimizers(own, model=own.get(self["model"].value), names=names))
        is_instance = self["optimizer"].value.removeprefix("--optimizer ") in own
        _give_up(self["lr"], if_so=is_instance, because="the optimizer's own", hint="torch's default")
        is_loader = isinstance(names.get(self["train"].value), DataLoader)
        _give_up(self["batch_size"], if_so=is_loader, because="the DataLoader's own", hint="64")
        _give_up(self["epochs"], if_so=bool(self["steps"].value.strip()), because="as many as the steps take", hint="1")

    def _guess_loss(self, own: Mapping[str, Any]) -> None:
        """Choose the loss that fits the data's targets, unless the user has chosen one."""
        guess = choices.guess_loss(_value_of(self["train"].value, own), model=own.get(self["model"].value))
        words = next((words for _, words in self["loss"].options if guess and words == f"--loss {guess}"), "")
        if self["loss"].value == self._guessed_loss:
            self["loss"].value = words
        self._guessed_loss = words

    def read(self) -> FitForm:
        """Return the choices and typed values; fields that are disabled do not count."""
        chosen: dict[str, Any] = {
            name: self[name].value
            for name in ("model", "train", "val", "loss", "metrics", "optimizer", "strategy", "exact", "name")
        }
        names = ("lr", "batch_size", "epochs", "steps", "shards", "seed", "clip_norm", "checkpoint_every")
        fields: dict[str, widgets.Text] = {name: self[name] for name in names}
        return FitForm(**chosen | {name: "" if each.disabled else each.value for name, each in fields.items()})

    def plan_line(self, names: Mapping[str, Any]) -> str:
        """Write `plan` for the chosen model, on the first samples of the train data."""
        form = self.read()
        num_parts, num_samples = choices.shape_of(_value_of(form.train, names)) or (0, 0)
        batch = batch_of(form.train, num_parts=num_parts, num_samples=num_samples, batch_size=form.batch_size)
        return plan_line(form, batch=batch)

    @property
    def missing(self) -> str:
        """The choice that is missing before there is a line; "" if none is."""
        return NO_MODEL if not self["model"].value else NO_DATA if not self["train"].value else ""


def _give_up(text: widgets.Text, *, if_so: bool, because: str, hint: str) -> None:
    text.disabled = if_so
    text.placeholder = because if if_so else hint
    if if_so and text.value:
        text.value = ""


def _value_of(words: str, names: Mapping[str, Any]) -> Any:
    """Return the object behind a choice of data: a variable, or a pair of variables in braces."""
    if words.startswith("{"):
        return tuple(names.get(name.strip()) for name in words.strip("{()}").split(","))
    return names.get(words)
