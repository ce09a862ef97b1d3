"""Profile a model: one micro-batch, layer by layer, forward and backward, at several sizes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from dnb.engine.process.session import adopt_path
from dnb.engine.process.worker import has_run
from dnb.engine.profiling.layer_times import time_layers, time_nodes
from dnb.engine.profiling.layers import ForwardFlow, Layer, find_beginnings, watch_flow
from dnb.engine.profiling.untouched_model import model_as_before, torch_threads
from dnb.engine.runtime.allocator import release_freed_memory
from dnb.errors import USER_ERRORS, PlanError, summary_of
from dnb.job import Sum
from dnb.planning.search.profiles import LayerProfile, ParameterShape, Profile, SharedParameter
from dnb.progress import Report
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import Settings
from dnb.transport.encoding import encode_record
from dnb.transport.pickling.payloads import adopt
from dnb.transport.system.process_settings import AppliedSettings
from dnb.user_code.model_call import arguments_of, named_parts, plain_batch, takes_positional, with_parts
from dnb.user_code.return_values import ReturnError, read_loss, read_step

# All repetitions of all sizes together; some of each size are done anyway.
BUDGET_SECONDS = 2.0
# A pass through a large model takes seconds, which swing little: such sizes are not measured, but for the smallest,
# once, and what is known of it counts by samples.
DEAR_SECONDS = 0.5
# A pass of the smallest size that takes less is mostly what does not depend on the samples.
CHEAP_SECONDS = 0.1
# Sizes to measure, as shares of the batch: a layer's time has a part that does not depend on the samples.
SHARES = (16, 4, 1)
# Some layers, such as BatchNorm, refuse a single sample.
LEAST_SAMPLES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileInput:
    """The model and batch of a profile; without loss and step, the mean of the outputs is minimised."""

    model: nn.Module
    batch: Any  # tensor, (inputs..., target), or mapping of the model's arguments
    loss: Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None


def profile_payload(
    pickled: bytes, payload: bytes, *, sizes: tuple[int, ...] | None, sys_path: tuple[str, ...], settings: bytes
) -> bytes:
    """Profile in an engine; runs in its main thread by ipyparallel's `apply`.

    Args:
        pickled: a packed `ProfileInput`, from the client, in a message signed with the cluster's key.
        payload: an encoded `PayloadRef`: where its tensors lie.
        sizes: samples of the micro-batches, or None.
        sys_path: where the kernel imports from.
        settings: encoded `Settings` of the kernel; those of a run stay, if the engine has one.

    Returns:
        The encoded `Profile`: the kernel unpickles nothing.
    """
    adopt_path(sys_path)
    trial: ProfileInput | None = None
    applied = AppliedSettings(None if has_run() else msgspec.msgpack.decode(settings, type=Settings))
    try:
        trial, _ = adopt(bytes(pickled), msgspec.msgpack.decode(payload, type=PayloadRef))
        return encode_record(profile_trial(trial, sizes=sizes))
    except (PlanError, KeyboardInterrupt):
        raise
    except USER_ERRORS as error:  # also what ipyparallel could not send
        raise PlanError(f"the model could not be measured: {summary_of(error)}") from None
    finally:
        applied.take_back()
        del trial
        release_freed_memory()


def profile_trial(
    trial: ProfileInput,
    *,
    sizes: tuple[int, ...] | None = None,
    num_threads: int | None = None,
    report: Report | None = None,
) -> Profile:
    """Measure every layer; the model, its gradients, and the states of random numbers are then as they were.

    Args:
        trial: what to measure.
        sizes: samples of the micro-batches; the batch, a quarter and a sixteenth of it if left out.
        num_threads: for torch; as it is if left out.
        report: told how many sizes were timed.

    Raises:
        PlanError: the model fails on the batch.
    """
    began = time.perf_counter()
    samples = count_samples(trial.batch)
    sizes = sizes or choose_sizes(samples)
    with model_as_before(trial.model), torch_threads(num_threads):
        parts = [take_samples(trial.batch, size, of=samples) for size in sizes]
        tries = [partial(_loss_of, trial, part) for part in parts]
        layers, first = _first_try(trial, tries[0], num_samples=sizes[0])
        if len(_affordable(sizes, seconds=_total(first))) < len(sizes):  # it may only have been the first
            layers, first = min((layers, first), _first_try(trial, tries[0], num_samples=sizes[0]), key=_total_of_try)
        sizes = _affordable(sizes, seconds=_total(first))
        is_dear = len(sizes) == 1 and _total(first) > DEAR_SECONDS
        tries, parts = tries[: len(sizes)], parts[: len(sizes)]
        flows = [
            watch_flow(trial.model, layers, attempt, inputs=plain_batch(part))
            for attempt, part in zip(tries, parts, strict=True)
        ]
        times: list[tuple[list[float], list[float]]] = [first] if is_dear else []
        for attempt in tries if not is_dear else ():
            if report is not None:
                report(f"{len(times)} of {len(sizes)} sizes of batch are timed, {len(layers)} layers each")
            times.append(time_layers(layers, attempt, budget_seconds=BUDGET_SECONDS / len(sizes)))
        threads = torch.get_num_threads()
    return Profile(
        model=type(trial.model).__name__,
        sizes=tuple(sizes),
        layers=_layer_profiles(trial.model, layers, flows, times),
        shared=_shared_parameters(trial.model, flows[0]),
        parameters=shapes_of(trial.model),
        num_threads=threads,
        measuring_seconds=time.perf_counter() - began,
    )


def shapes_of(model: nn.Module) -> tuple[ParameterShape, ...]:
    """Return the shapes of the parameters, by which a model is known again."""
    return tuple(
        ParameterShape(name=name, shape=tuple(parameter.shape), dtype=str(parameter.dtype).removeprefix("torch."))
        for name, parameter in model.named_parameters()
    )


def choose_sizes(num_samples: int) -> tuple[int, ...]:
    """Return the micro-batches that are measured, ascending."""
    return tuple(sorted({max(min(LEAST_SAMPLES, num_samples), num_samples // share) for share in SHARES}))


# the batch


def count_samples(batch: Any) -> int:
    """Count the samples of a batch: the length of its first tensor.

    Raises:
        PlanError: there is no tensor with samples in it.
    """
    leaves = tree_leaves(batch if (named := named_parts(batch)) is None else named)
    lengths = [len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not lengths or not lengths[0]:
        raise PlanError(
            f"the batch is a {type(batch).__name__} without samples: give a tensor, a tuple (inputs, target) of "
            "tensors, or a dictionary of the model's arguments"
        )
    return lengths[0]


def take_samples(batch: Any, num_samples: int, *, of: int) -> Any:
    """Return the first samples of every tensor that has one entry per sample."""

    def take(leaf: Any) -> Any:
        has_samples = isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == of
        return leaf[:num_samples] if has_samples else leaf

    named = named_parts(batch)
    return tree_map(take, batch) if named is None else with_parts(batch, tree_map(take, named))


def _loss_of(trial: ProfileInput, batch: Any) -> torch.Tensor:
    model = trial.model
    if trial.step is not None:
        return _total_of(read_step(trial.step(model, batch), needs_gradient=True)[0])
    if trial.loss is None:
        is_named = named_parts(batch) is not None
        if is_named or takes_positional(model, len(batch) if isinstance(batch, tuple | list) else 1):
            given = arguments_of(model, batch, has_target=False)
            with suppress(*(() if is_named else USER_ERRORS)):  # what is behind the inputs may be a target
                output = model(*given.positional, **given.keywords)
                return _own_loss_or_mean(output)
    *inputs, target = batch if isinstance(batch, tuple | list) and len(batch) > 1 else (batch, None)
    output = model(*inputs[0]) if isinstance(inputs[0], tuple | list) else model(*inputs)
    if trial.loss is None:
        return _mean_of(output)
    return _total_of(read_loss(trial.loss(output, target), needs_gradient=True))


def _own_loss_or_mean(output: Any) -> torch.Tensor:
    try:
        return _total_of(read_step(output, needs_gradient=True, by="model")[0])
    except ReturnError:
        return _mean_of(output)


def _total_of(loss: torch.Tensor | Sum) -> torch.Tensor:
    return loss.total if isinstance(loss, Sum) else loss


def _mean_of(output: Any) -> torch.Tensor:
    """Sum the means of all outputs, in place of a loss that is not given."""
    values = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not values:
        raise PlanError("no output of the model depends on its parameters, so that there is nothing to minimise")
    return torch.stack([value.float().mean() for value in values]).sum()


def _total(seconds: tuple[list[float], list[float]]) -> float:
    """Sum the seconds of forward and backward."""
    return sum(seconds[0]) + sum(seconds[1])


def _total_of_try(tried: tuple[list[Layer], tuple[list[float], list[float]]]) -> float:
    return _total(tried[1])


def _affordable(sizes: tuple[int, ...], *, seconds: float) -> tuple[int, ...]:
    """Return the sizes of which one pass takes no more than is well spent, the smallest in any case.

    Args:
        sizes: samples, ascending.
        seconds: that one pass of the smallest took.
    """
    if seconds <= CHEAP_SECONDS:
        return sizes
    return (sizes[0], *(size for size in sizes[1:] if seconds * size / sizes[0] <= DEAR_SECONDS))


def _first_try(
    trial: ProfileInput, attempt: Callable[[], torch.Tensor], *, num_samples: int
) -> tuple[list[Layer], tuple[list[float], list[float]]]:
    """Find the layers, make sure that forward and backward work, and time them once."""
    losses: list[torch.Tensor] = []
    try:
        found = find_beginnings(trial.model, lambda: losses.append(attempt()))
        end, began = time.perf_counter(), [begin for _, begin in found]
        times = [begin.seconds for begin in began] + [end]
        backward = [0.0] * len(found)
        time_nodes(losses[0], [0, *(begin.node for begin in began[1:])], backward)
        losses[0].backward()
    except (PlanError, KeyboardInterrupt):
        raise
    except USER_ERRORS as error:
        raise PlanError(f"the model fails on {num_samples} samples of the batch: {summary_of(error)}") from error
    forward = [later - earlier for earlier, later in itertools.pairwise(times)]
    return [layer for layer, _ in found], (forward, backward)


# records


def _layer_profiles(
    model: nn.Module,
    layers: list[Layer],
    flows: list[ForwardFlow],
    times: list[tuple[list[float], list[float]]],
) -> tuple[LayerProfile, ...]:
    parameters = dict(model.named_parameters())
    own = [[parameters[name] for name, users in flows[0].users.items() if users[0] == n] for n in range(len(layers))]
    return tuple(
        LayerProfile(
            name=layer.name,
            kind=layer.kind,
            parameter_bytes=sum(_bytes(each) for each in own[number]),
            gradient_bytes=sum(_bytes(each) for each in own[number] if each.requires_grad),
            forward_seconds=tuple(forward[number] for forward, _ in times),
            backward_seconds=tuple(backward[number] for _, backward in times),
            kept_bytes=tuple(flow.kept_bytes[number] for flow in flows),
            cut_bytes=tuple(flow.cut_bytes[number] for flow in flows),
            cut_gradient_bytes=tuple(flow.cut_gradient_bytes[number] for flow in flows),
        )
        for number, layer in enumerate(layers)
    )


def _shared_parameters(model: nn.Module, flow: ForwardFlow) -> tuple[SharedParameter, ...]:
    parameters = dict(model.named_parameters())
    return tuple(
        SharedParameter(
            name=name,
            parameter_bytes=_bytes(parameters[name]),
            gradient_bytes=_bytes(parameters[name]) if parameters[name].requires_grad else 0,
            layers=tuple(users),
        )
        for name, users in flow.users.items()
        if len(users) > 1
    )


def _bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()
