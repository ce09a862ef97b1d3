"""Shapes and dtypes: data that do not fit a model or a loss are converted where that is plain, or refused by name."""

from __future__ import annotations

import dis
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnb.api.rehearsal.trial import Computed, Trial
from dnb.errors import ArgumentError, summary_of, text_of
from dnb.job import DataSource
from dnb.protocol.run import Finding
from dnb.user_code.model_call import named_parts, with_parts

_TORCH = str(Path(torch.__file__).parent)
# What torch says of shapes and dtypes; whatever else user code raises is reported by the run, with engine and samples.
_MISFIT = re.compile(
    r"shape|dtype|size|dimension|scalar type|expected|mat1|channels|broadcast|same type"
    r"|Long|Float|Double|Half|Byte|must match|not implemented for|multi-target",
)
_BROADCAST = "Using a target size"


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of one tensor of a batch that may make it fit, and how a user makes it."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    way: str  # with {} for the tensor's name


@dataclass(frozen=True, slots=True)
class AsFloat32:
    """A collate_fn whose float64 tensors become float32."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> Any:
        """Collate samples, and convert."""
        return _as_float32(self.collate(samples))


def fit_data(trial: Trial) -> Sequence[Finding]:
    """Convert float64 data for a float32 model, and refuse by name what does not fit.

    Raises:
        ArgumentError: shapes or dtypes of train do not fit the model or the loss.
    """
    findings: list[Finding] = []
    if trial.computed.error is not None and trial.computed.phase != "data":
        findings += _convert(trial)
    if trial.computed.error is not None and trial.computed.phase != "data":
        _explain(trial)
    elif trial.computed.error is None:
        _refuse_broadcast(trial)
    return findings


def _convert(trial: Trial) -> list[Finding]:
    """Take float64 data as float32 if that is all that is wrong."""
    doubles = [name for name, tensor in _tensors(trial.batch) if tensor.dtype == torch.float64]
    dtypes = {each.dtype for each in trial.job.model.parameters() if each.is_floating_point()}
    if not doubles or torch.float64 in dtypes:
        return []
    batch, before = trial.batch, trial.computed
    trial.batch = _as_float32(batch)
    if trial.compute().error is not None:
        trial.batch, trial.computed = batch, before
        return []
    trial.data = replace(
        trial.data, train=_source_as_float32(trial.data.train), val=_optional_as_float32(trial.data.val)
    )
    trial.given_data = replace(
        trial.given_data,
        train=_source_as_float32(trial.given_data.train),
        val=_optional_as_float32(trial.given_data.val),
    )
    trial.probed = None if trial.changed else trial.probe()
    verb = "is" if len(doubles) == 1 else "are"
    text = f"train's {' and '.join(doubles)} {verb} float64 and the model's parameters float32: taken as float32"
    return [Finding(kind="data", text=text)]


def _explain(trial: Trial) -> None:
    """Refuse what does not fit, with the change that makes it fit if there is one."""
    computed = trial.computed
    assert computed.error is not None
    if not is_misfit(computed.error):
        return
    for name, tensor in _tensors(trial.batch):
        if computed.phase == "loss" and name != _target_name(trial.batch):
            continue
        for change in _changes(trial, computed, name, tensor):
            if _attempt(trial, name, change).error is None:
                raise ArgumentError(
                    f"train's {name} is {_described(tensor)}, which {_whom(trial, computed)} does not take: give "
                    f"{change.way.format(name)} ({_brief(computed.error)})"
                ) from computed.error
    trial.computed = computed
    _refuse(trial, computed)


def _attempt(trial: Trial, name: str, change: _Change) -> Computed:
    batch = trial.batch
    try:
        trial.batch = _with_changed(batch, name, change.apply)
        return trial.compute()
    finally:
        trial.batch = batch


def _changes(trial: Trial, computed: Computed, name: str, tensor: torch.Tensor) -> list[_Change]:
    """List the changes that may make a tensor fit."""
    floats = next((each.dtype for each in trial.job.model.parameters() if each.is_floating_point()), torch.float32)
    word = str(floats).removeprefix("torch.")
    found: list[_Change] = []
    output, is_target = computed.output, trial.job.loss is not None and name == _target_name(trial.batch)
    if tensor.dtype != torch.int64:
        found.append(_Change(lambda each: each.long(), "{0}.long() (of an array: {0}.astype('int64'))"))
    if tensor.dtype != floats:
        call = "{0}.float()" if floats == torch.float32 else f"{{0}}.to(torch.{word})"
        found.append(_Change(lambda each: each.to(floats), f"{call} (of an array: {{0}}.astype('{word}'))"))
    if is_target and tensor.dim() == 2 and tensor.shape[1] == 1:
        found.append(_Change(lambda each: each.squeeze(1).long(), "{0}.reshape(-1).long()"))
        found.append(_Change(lambda each: each.squeeze(1), "{0}.reshape(-1)"))
    if is_target and isinstance(output, torch.Tensor) and output.numel() == tensor.numel():
        shape = ", ".join(["-1", *map(str, output.shape[1:])])
        found.append(_Change(lambda each: each.reshape(output.shape), f"{{0}}.reshape({shape})"))
        found.append(
            _Change(lambda each: each.reshape(output.shape).to(output.dtype), f"{{0}}.reshape({shape}).float()")
        )
    if not is_target and tensor.dim() > 1:
        found.append(_Change(lambda each: each.flatten(1), "{0}.reshape(len({0}), -1)"))
    if not is_target and tensor.dim() > 0:
        found.append(_Change(lambda each: each.unsqueeze(1), "{0}[:, None]"))
    return found


def _refuse(trial: Trial, computed: Computed) -> None:
    error = computed.error
    assert error is not None
    parts = [f"{name} of {_described(tensor)}" for name, tensor in _tensors(trial.batch)]
    if computed.phase == "loss" and isinstance(computed.output, torch.Tensor):
        target = f"train's {_target_name(trial.batch)}"
        shown = _described(computed.target) if isinstance(computed.target, torch.Tensor) else "no tensor"
        raise ArgumentError(
            f"the loss does not take an output of {_described(computed.output)} with {target} of {shown}: "
            f"change the last layer, the loss or the target ({_brief(error)})"
        ) from error
    place = _locate(trial)
    trial.computed = computed
    if place is None:
        whom = _whom(trial, computed)
        raise ArgumentError(f"train's {' and '.join(parts)} do not fit {whom}: {_brief(error)}") from error
    what = f"layer {place.path!r}" if place.path else "the model"
    got = "" if place.given is None else f", which gets {_described(place.given)}"
    raise ArgumentError(
        f"train's {' and '.join(parts)} do not fit {what}, {_shown(place.module)}{got}: "
        f"{_way_of_layer(place.module, place.given)}({_brief(error)})"
    ) from error


@dataclass(frozen=True, slots=True)
class _FailedLayer:
    """The layer in which a forward failed, and the first tensor that it was given."""

    path: str
    module: nn.Module
    given: torch.Tensor | None


def _locate(trial: Trial) -> _FailedLayer | None:
    """Run forward again, to see in which layer it fails; None: in none."""
    entered: list[_FailedLayer] = []

    def enter(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append(
            _FailedLayer(path, module, next((each for each in args if isinstance(each, torch.Tensor)), None))
        )

    def leave(*_: Any) -> None:
        entered.pop()

    hooks = []
    for path, module in trial.job.model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(enter, path)))
        hooks.append(module.register_forward_hook(leave))
    try:
        trial.compute()
    finally:
        for hook in hooks:
            hook.remove()
    return entered[-1] if entered else None


def _way_of_layer(module: nn.Module, given: torch.Tensor | None) -> str:
    if given is None or not given.dim():
        return ""
    shape = given.shape
    if isinstance(module, nn.Linear) and len(shape) == 1:
        return f"give it samples of {module.in_features} features: each of these is one number "
    if isinstance(module, nn.Linear) and shape[-1] != module.in_features:
        if math.prod(shape[1:]) == module.in_features:
            return "put nn.Flatten() before it "
        return f"give it in_features={shape[-1]}, or samples of {module.in_features} features "
    channels = getattr(module, "in_channels", None)
    if channels is not None and len(shape) > 1 and shape[1] != channels:
        return f"give it in_channels={shape[1]}, or samples of shape ({channels}, ...) "
    return ""


def _refuse_broadcast(trial: Trial) -> None:
    """Refuse a target that would be held against every output instead of its own."""
    computed = trial.computed
    output, target = computed.output, computed.target
    warned = any(_BROADCAST in text for text in computed.warnings)
    if isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor):
        differ = output.shape != target.shape and output.numel() == target.numel() and output.is_floating_point()
        if not (differ and target.is_floating_point() and (warned or _loss_differs(trial))):
            return
        name = _target_name(trial.batch)
        shape = ", ".join(["-1", *map(str, output.shape[1:])])
        raise ArgumentError(
            f"train's {name} has shape {_of_all(target)} and the output {_of_all(output)}, so that the loss would "
            f"compare every output with every target: give {name}.reshape({shape}), or let the model return "
            f"{'output.squeeze(1)' if output.dim() > target.dim() else 'as many dimensions'}"
        )
    if warned:
        warning = next(text for text in computed.warnings if _BROADCAST in text)
        raise ArgumentError(
            f"step compares tensors of different shapes, every output with every target: {warning.partition('. ')[0]}; "
            "reshape the target to the output's shape"
        )


def _loss_differs(trial: Trial) -> bool:
    """Return True if the loss is another one when the target has the output's shape."""
    computed = trial.computed
    change = _Change(lambda each: each.reshape(computed.output.shape), "")
    try:
        other = _attempt(trial, _target_name(trial.batch), change)
    finally:
        trial.computed = computed
    if other.error is not None or not isinstance(other.loss, torch.Tensor):
        return False
    assert isinstance(computed.loss, torch.Tensor)
    return not torch.allclose(other.loss, computed.loss, rtol=1e-4, atol=1e-6)


def is_misfit(error: BaseException) -> bool:
    """Tell whether torch, and not the user's own code, says that a shape or dtype does not fit."""
    if not isinstance(error, RuntimeError | ValueError | TypeError):
        return False  # an IndexError is of a class or word that is none: the run names sample and engine
    if _MISFIT.search(text_of(error)) is None:
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code = traceback.tb_frame.f_code
    return code.co_filename.startswith(_TORCH) or not _raises(code, traceback.tb_lasti)


def _raises(code: Any, offset: int) -> bool:
    """Return True if an instruction raises by itself, and not in a function that it calls."""
    return any(each.offset == offset and each.opname.startswith("RAISE") for each in dis.get_instructions(code))


def _tensors(batch: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a batch, and their names for people."""
    named = named_parts(batch)
    if named is not None:
        return [(repr(name), part) for name, part in named.items() if isinstance(part, torch.Tensor)]
    if isinstance(batch, torch.Tensor):
        return [("X", batch)]
    if not isinstance(batch, tuple | list):
        return []
    names = _names(len(batch))
    return [(name, part) for name, part in zip(names, batch, strict=True) if isinstance(part, torch.Tensor)]


def _names(number: int) -> list[str]:
    if number <= 2:
        return ["X", "y"][:number]
    return [*(f"X{place}" for place in range(1, number)), "y"]


def _target_name(batch: Any) -> str:
    return _names(len(batch))[-1] if isinstance(batch, tuple | list) else "y"


def _with_changed(batch: Any, name: str, apply: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    named = named_parts(batch)
    if named is not None:
        return with_parts(batch, {key: apply(part) if repr(key) == name else part for key, part in named.items()})
    if isinstance(batch, torch.Tensor):
        return apply(batch)
    names = _names(len(batch))
    parts = [apply(part) if each == name else part for each, part in zip(names, batch, strict=True)]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _as_float32(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.float() if batch.dtype == torch.float64 else batch
    named = named_parts(batch)
    if named is not None:
        return with_parts(batch, {name: _as_float32(part) for name, part in named.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_as_float32(part) for part in batch))
    if type(batch) in (tuple, list):
        return type(batch)(_as_float32(part) for part in batch)
    return batch


def _optional_as_float32(source: DataSource | None) -> DataSource | None:
    return None if source is None else _source_as_float32(source)


def _source_as_float32(source: DataSource) -> DataSource:
    if source.collate is None:
        return replace(source, samples=_as_float32(tuple(source.samples)))
    return replace(source, collate=AsFloat32(source.collate))


def _whom(trial: Trial, computed: Computed) -> str:
    if computed.phase == "loss":
        return "the loss"
    return "step" if trial.job.step is not None else "the model"


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} and shape {_of_all(tensor)}"


def _of_all(tensor: torch.Tensor) -> str:
    """Write a shape, whatever the number of samples."""
    if not tensor.dim():
        return "()"
    rest = "".join(f", {size}" for size in tensor.shape[1:])
    return f"(N{rest or ','})"


def _shown(module: nn.Module) -> str:
    text = repr(module).partition("\n")[0]
    return text if len(text) < 90 else type(module).__name__


def _brief(error: BaseException) -> str:
    return summary_of(error, length=200).replace("\n", " ")
