"""The form of the control panel: what to train, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
from torch.utils.data import DataLoader

from dnb.notebook.control_panel import choices as panel_choices
from dnb.notebook.control_panel.choices import Choice
from dnb.notebook.control_panel.lines import FitForm, batch_of, plan_line
from dnb.notebook.control_panel.widgets import LABEL_WIDTH, chooser, field, grid, offer

NO_MODEL = "no fitting model: define a torch.nn.Module"
NO_DATA = "no fitting data: define (X, y) or a Dataset"


class TrainingForm:
    """Widgets for the arguments of `fit`; `box` is all of them."""

    def __init__(self) -> None:
        self._hidden: Mapping[str, Any] = {}
        self.model = chooser("Model")
        self.train = chooser("Train data")
        self.val = chooser("Validation")
        self.loss = chooser("Loss or step")
        self.metrics = chooser("Metrics")
        self.optimizer = chooser("Optimizer")
        self.strategy = chooser("Strategy")
        self.lr = field("Learning rate", hint="torch's default")
        self.batch_size = field("Batch size", hint="64")
        self.epochs = field("Epochs", hint="1")
        self.steps = field("Steps", hint="by epochs")
        self.shards = field("Shards", hint="automatic")
        self.seed = field("Seed", hint="0")
        self.clip_norm = field("Clip norm", hint="not clipped")
        self.checkpoint_every = field("Checkpoint", hint="every so many steps: none")
        self.name = field("Name", hint="by the model's class")
        self.exact = widgets.Checkbox(
            description="Exact to the bit",
            indent=True,
            style={"description_width": LABEL_WIDTH},
            layout=widgets.Layout(width="auto", min_width="0"),
        )
        self.choosers = (
            self.model, self.train, self.val, self.loss, self.metrics, self.optimizer, self.strategy,
        )  # fmt: skip
        self.fields = (
            self.lr, self.batch_size, self.epochs, self.steps, self.shards, self.seed, self.clip_norm,
            self.checkpoint_every, self.name, self.exact,
        )  # fmt: skip
        self.box = widgets.VBox([grid(self.choosers, least=330), grid(self.fields, least=240)])

    def offer(self, names: Mapping[str, Any], *, hidden: Mapping[str, Any]) -> None:
        """Offer what fits among the notebook's variables; each choice that still fits stays."""
        self._hidden = hidden
        own = panel_choices.own_names(names, hidden=hidden)
        data = panel_choices.data_sets(own)
        offer(self.model, panel_choices.models(own), wish="model", nothing=NO_MODEL)
        offer(self.train, data, wish="train", nothing=NO_DATA)
        offer(self.val, [Choice("none", ""), *data])
        offer(self.loss, [Choice("none: the model returns it", ""), *panel_choices.losses(own, names=names)])
        offer(self.metrics, panel_choices.metrics(own, names=names))
        offer(self.strategy, panel_choices.strategies(own, names=names))
        self.adapt(names)

    def adapt(self, names: Mapping[str, Any]) -> None:
        """Fit what depends on other choices: optimizers of the model, and numbers that objects bring along."""
        own = panel_choices.own_names(names, hidden=self._hidden)
        offer(self.optimizer, panel_choices.optimizers(own, model=own.get(self.model.value), names=names))
        is_instance = self.optimizer.value.removeprefix("--optimizer ") in own
        _give_up(self.lr, if_so=is_instance, because="the optimizer's own", hint="torch's default")
        is_loader = isinstance(names.get(self.train.value), DataLoader)
        _give_up(self.batch_size, if_so=is_loader, because="the DataLoader's own", hint="64")
        _give_up(self.epochs, if_so=bool(self.steps.value.strip()), because="as many as the steps take", hint="1")

    def read(self) -> FitForm:
        """What is chosen and typed; fields that are given up do not count."""
        chosen: dict[str, Any] = {
            name: getattr(self, name).value
            for name in ("model", "train", "val", "loss", "metrics", "optimizer", "strategy", "exact", "name")
        }
        names = ("lr", "batch_size", "epochs", "steps", "shards", "seed", "clip_norm", "checkpoint_every")
        fields: dict[str, widgets.Text] = {name: getattr(self, name) for name in names}
        return FitForm(**chosen | {name: "" if each.disabled else each.value for name, each in fields.items()})

    def plan_line(self, names: Mapping[str, Any]) -> str:
        """`plan` for what is chosen, on the first samples of the train data."""
        form = self.read()
        num_parts, num_samples = panel_choices.shape_of(_value_of(form.train, names)) or (0, 0)
        batch = batch_of(form.train, num_parts=num_parts, num_samples=num_samples, batch_size=form.batch_size)
        return plan_line(form, batch=batch)

    @property
    def missing(self) -> str:
        """What has to be there before a line is one; "" if nothing."""
        return NO_MODEL if not self.model.value else NO_DATA if not self.train.value else ""


def _give_up(text: widgets.Text, *, if_so: bool, because: str, hint: str) -> None:
    text.disabled = if_so
    text.placeholder = because if if_so else hint
    if if_so and text.value:
        text.value = ""


def _value_of(words: str, names: Mapping[str, Any]) -> Any:
    """The object behind a choice of data: a variable, or a pair of variables in braces."""
    if words.startswith("{"):
        return tuple(names.get(name.strip()) for name in words.strip("{()}").split(","))
    return names.get(words)
