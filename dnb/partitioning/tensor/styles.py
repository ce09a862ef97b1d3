"""Layers that DTensor can divide, and where each style cuts them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dnb.protocol.run import TensorStyle

STYLES: tuple[TensorStyle, ...] = ("colwise", "colwise_rep", "rowwise", "rowwise_rep")


def dividable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the layers that DTensor can divide."""
    for name, layer in model.named_modules():
        if is_dividable(layer):
            yield name, layer


def is_dividable(layer: nn.Module) -> bool:
    """Return whether DTensor can divide a layer, which computes as torch wrote it."""
    if type(layer).forward is nn.Linear.forward:
        return set(layer._parameters) == {"weight", "bias"} and not layer._buffers
    if type(layer).forward is not nn.Embedding.forward:
        return False
    assert isinstance(layer, nn.Embedding)
    is_plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return is_plain and set(layer._parameters) == {"weight"}


def cut_dim(layer: nn.Module, key: str, style: TensorStyle) -> int | None:
    """Return the dimension along which a parameter of a layer is cut; None: it stays whole."""
    by_columns = style.startswith("colwise")
    if isinstance(layer, nn.Embedding):
        return 1 if by_columns else 0
    if key == "bias" and not by_columns:
        return None
    return 0 if by_columns else 1
