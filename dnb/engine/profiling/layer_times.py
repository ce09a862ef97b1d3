"""The seconds that each layer of a model takes, forward and backward."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

import torch

from dnb.engine.profiling.layers import Layer, entering

# At least so many of each size are done, whatever they take; besides the first.
LEAST_REPETITIONS = 3
MOST_REPETITIONS = 15
# What takes longer is not slowed by being watched.
UNDISTURBED_SECONDS = 0.03


def time_layers(
    layers: list[Layer], attempt: Callable[[], torch.Tensor], *, budget_seconds: float
) -> tuple[list[float], list[float]]:
    """Return the median seconds of each layer, forward and backward.

    Watching takes time, too: what was seen of the layers is scaled to what goes by when nobody watches.
    """
    deadline = time.perf_counter() + budget_seconds
    plain: list[tuple[float, float]] = []
    watched: list[tuple[list[float], list[float]]] = []
    for repetition in range(MOST_REPETITIONS):
        if repetition > LEAST_REPETITIONS and time.perf_counter() > deadline:
            break
        if not plain or sum(plain[-1]) < UNDISTURBED_SECONDS:
            plain.append(_time_plain(attempt))
        watched.append(_time_watched(layers, attempt))
    forward, backward = zip(*watched[1:], strict=True)  # the first one meets new pages
    there, back = _medians(forward), _medians(backward)
    if len(plain) < len(watched):
        return there, back
    return _scaled(there, median(each for each, _ in plain[1:])), _scaled(back, median(each for _, each in plain[1:]))


def _medians(repetitions: Iterable[list[float]]) -> list[float]:
    return [median(each) for each in zip(*repetitions, strict=True)]


def _scaled(parts: list[float], whole: float) -> list[float]:
    seen = sum(parts)
    return [part * whole / seen for part in parts] if seen else parts


def _time_plain(attempt: Callable[[], torch.Tensor]) -> tuple[float, float]:
    began = time.perf_counter()
    loss = attempt()
    middle = time.perf_counter()
    loss.backward()
    return middle - began, time.perf_counter() - middle


def _time_watched(layers: list[Layer], attempt: Callable[[], torch.Tensor]) -> tuple[list[float], list[float]]:
    """Time forward between the beginnings of layers, and backward by the nodes of the graph that each has added.

    So it does not matter how layers are connected, and what is between two of them counts with the first.
    """
    times = [0.0] * (len(layers) + 1)
    numbers = [0] * len(layers)  # of the first node of each layer

    def enter(number: int) -> None:
        times[number] = time.perf_counter()
        numbers[number] = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    with entering(layers, enter):
        enter(0)
        loss = attempt()
        times[-1] = time.perf_counter()
    seconds = [0.0] * len(layers)
    time_nodes(loss, numbers, seconds)
    loss.backward()
    return [end - begin for begin, end in itertools.pairwise(times)], seconds


def time_nodes(loss: torch.Tensor, numbers: list[int], seconds: list[float]) -> None:
    """Let every node of the graph add what it takes to the seconds of its layer."""
    assert loss.grad_fn is not None
    pending: list[tuple[Any, int]] = [(loss.grad_fn, len(numbers) - 1)]
    seen = set()
    while pending:
        node, layer = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        own = _layer_of(node, numbers, behind=layer)
        began = [0.0]
        node.register_prehook(partial(_begin, began))
        node.register_hook(partial(_end, began, seconds, own))
        pending += [(each, own) for each, _ in node.next_functions if each is not None]


def _layer_of(node: Any, numbers: list[int], *, behind: int) -> int:
    """Return a node's layer, by its number; those that add to a parameter's gradient have no number of their own."""
    if not hasattr(node, "_sequence_nr") or node.name().endswith("AccumulateGrad"):
        return behind
    return max(0, bisect.bisect_right(numbers, node._sequence_nr()) - 1)


def _begin(began: list[float], *_: Any) -> None:
    began[0] = time.perf_counter()


def _end(began: list[float], seconds: list[float], layer: int, *_: Any) -> None:
    seconds[layer] += time.perf_counter() - began[0]
