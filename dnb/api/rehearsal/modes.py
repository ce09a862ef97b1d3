"""Training and evaluation mode as a model comes, and the findings about it."""

from __future__ import annotations

import torch

from dnb.protocol.run import Finding

_SHOWN_NAMES = 3


def mode_findings(model: torch.nn.Module) -> tuple[Finding, ...]:
    """Events about modules that are in evaluation mode when a run begins."""
    modes = {name: module.training for name, module in model.named_modules()}
    if all(modes.values()):
        return ()
    if not any(modes.values()):
        text = "the model came in evaluation mode, as after model.eval(): it is trained as after model.train()"
        return (Finding(kind="state", text=text),)
    still = [name or type(model).__name__ for name, is_training in modes.items() if not is_training]
    shown = ", ".join(repr(name) for name in still[:_SHOWN_NAMES])
    more = f" and {len(still) - _SHOWN_NAMES} more" if len(still) > _SHOWN_NAMES else ""
    verb = "stays" if len(still) == 1 else "stay"
    return (Finding(kind="state", text=f"{shown}{more} {verb} in evaluation mode, as set before the run"),)
