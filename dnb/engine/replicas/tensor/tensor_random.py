"""Random numbers in layers that are divided: of every engine's own where it has features of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dnb.engine.replicas.outcome import part_seed
from dnb.protocol.run import TensorStyle


class OwnNoise:
    """Between a layer that is divided by columns and the one by rows behind it an engine draws numbers of its own.

    Else the same features of every part would drop out together. Behind it all engines draw the same numbers again.
    Where an engine is, the generator itself says by its seed, so that checkpointed layers draw the same again.

    Args:
        model: whose layers are divided.
        styles: how.
        rank: of this engine.
    """

    def __init__(self, model: nn.Module, styles: Mapping[str, TensorStyle], rank: int) -> None:
        self._rank = rank
        self._behind: dict[int, int] = {}  # the seed behind a part, by the own one in it
        for name, style in styles.items():
            if style == "colwise":
                model.get_submodule(name).register_forward_hook(self._enter)
            elif style == "rowwise":
                model.get_submodule(name).register_forward_pre_hook(self._leave)

    def forget(self) -> None:
        """Forget a pass: another one begins."""
        self._behind.clear()

    def _enter(self, layer: nn.Module, _inputs: Any, _output: Any) -> None:
        generator = torch.default_generator
        if not layer.training or generator.initial_seed() in self._behind:
            return
        drawn = int(torch.empty((), dtype=torch.int64).random_())
        own = part_seed(drawn, self._rank, 0)
        self._behind[own] = part_seed(drawn, -1, 0)
        generator.manual_seed(own)

    def _leave(self, _layer: nn.Module, _inputs: Any) -> None:
        generator = torch.default_generator
        if generator.initial_seed() in self._behind:
            generator.manual_seed(self._behind[generator.initial_seed()])
