"""Training and evaluation mode of a model, as the user has set them for each of its modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Modes:
    """Switches a model between training and evaluation; in training, modules that came in evaluation mode stay in it.

    A model that came in evaluation mode as a whole, as after an evaluation, trains as after `model.train()`.

    Args:
        roots: the model, and modules that are trained with it.
    """

    def __init__(self, roots: Sequence[torch.nn.Module]) -> None:
        self._roots = roots
        modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        is_any_training = any(module.training for module in modules)
        self._still = [module for module in modules if is_any_training and not module.training]
        self._is_training: bool | None = None

    def set_training(self, *, mode: bool) -> None:
        """Switch the mode when it changes, as a loop does around its evaluation; each switch walks the whole model."""
        if self._is_training is mode:
            return
        for root in self._roots:
            root.train(mode)
        for module in self._still:
            module.training = False
        self._is_training = mode
