"""Columns of numbers as curves that a browser can be given: few points, small types.

Pure functions of arrays. Nothing here knows of runs or of plotly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dnb.notebook.views import HistoryView

MAX_POINTS = 1000
# The smooth line and the validation line need fewer points than the raw one: three full traces would break 20 kB.
MAX_SMOOTH_POINTS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One column of a history, in types that travel to the browser as raw bytes.

    int64 and lists would go as text: some hundred times slower.
    """

    steps: NDArray[np.int32]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last_step(self) -> int:
        """The last step with a value; 0 if there is none yet."""
        return int(self.steps[-1]) if len(self) else 0

    def at(self, indices: NDArray[np.intp]) -> Curve:
        """Return only the points at `indices`."""
        return Curve(steps=self.steps[indices], values=self.values[indices])


def curve(history: HistoryView, key: str) -> Curve:
    """Read a column as a curve; a value beyond float32 becomes infinite, as a plot shows it."""
    steps, values = history.column(key)
    with np.errstate(over="ignore"):
        return Curve(steps=steps.astype(np.int32), values=values.astype(np.float32))


def decimate(values: NDArray[Any], *, limit: int = MAX_POINTS) -> NDArray[np.intp]:
    """Choose points to keep so that spikes and gaps stay visible.

    Args:
        values: one number per step.
        limit: the most points to keep.

    Returns:
        Ascending indices: the first, the last, and of each bucket between them the lowest, the highest and, where there
        is one, a value that is not finite, so that a line drawn through the points still breaks there.
    """
    size = len(values)
    if size <= limit:
        return np.arange(size)
    is_whole = bool(np.isfinite(values).all())
    width = -(-(size - 2) // ((limit - 2) // (2 if is_whole else 3)))
    if is_whole:
        lowest, highest = _extremes(values[1:-1], width=width)
        kept = np.concatenate([[0], 1 + lowest, 1 + highest, [size - 1]])
        return np.unique(kept)
    buckets = _in_rows(values[1:-1], width=width)
    finite = np.isfinite(buckets)
    starts = 1 + width * np.arange(len(buckets))
    lowest = starts + np.where(finite, buckets, np.inf).argmin(axis=1)
    highest = starts + np.where(finite, buckets, -np.inf).argmax(axis=1)
    gaps = (starts + (~finite).argmax(axis=1))[~finite.all(axis=1)]
    kept = np.concatenate([[0], lowest, highest, gaps, [size - 1]])
    # The padding of the last bucket looks like a gap that is not there.
    return np.unique(kept[kept < size])


def running_mean(curve: Curve, *, limit: int = MAX_SMOOTH_POINTS) -> tuple[Curve, int]:
    """Return the means of the values around, at no more than `limit` of the steps, and of how many values.

    That many is a power of two, about a thirtieth of the run; at both ends half of them are missing. A mean of the
    last values would lag, and draw a falling training loss above the validation loss. Only values inside a window
    count for it: one huge loss leaves no trace in later means, as it would in a running sum. Values that are not
    finite are left out of a mean; where a whole stride of them is not finite the mean is NaN.
    """
    size = len(curve)
    if not size:
        return curve, 1
    stride = _power_of_two_from(size / limit)
    window = max(stride, _power_of_two_from(size / 40))
    finite = np.isfinite(curve.values)
    values = curve.values if finite.all() else np.where(finite, curve.values, 0.0)
    firsts = np.arange(0, size, stride)
    counts = np.add.reduceat(finite, firsts, dtype=np.int64)
    sums = _sums_around(np.add.reduceat(values, firsts, dtype=np.float64), num=window // stride)
    nums = _sums_around(counts, num=window // stride)
    means = np.where(counts > 0, sums / np.maximum(nums, 1), np.nan)
    ends = np.minimum(firsts + stride, size) - 1
    return Curve(steps=curve.steps[ends], values=means.astype(np.float32)), window


def _extremes(values: NDArray[Any], *, width: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the indices of each bucket's lowest and highest value; the last bucket may be shorter."""
    whole = len(values) // width * width
    rows = values[:whole].reshape(-1, width)
    starts = width * np.arange(len(rows))
    lowest, highest = starts + rows.argmin(axis=1), starts + rows.argmax(axis=1)
    rest = values[whole:]
    if not len(rest):
        return lowest, highest
    return np.append(lowest, whole + rest.argmin()), np.append(highest, whole + rest.argmax())


def _in_rows(values: NDArray[Any], *, width: int) -> NDArray[Any]:
    """Return rows of `width` values, the last one filled up with NaN."""
    num_rows = -(-len(values) // width)
    padded = np.full(num_rows * width, np.nan, dtype=values.dtype)
    padded[: len(values)] = values
    return padded.reshape(num_rows, width)


def _sums_around(values: NDArray[Any], *, num: int) -> NDArray[Any]:
    """Return for each value the sum of the `num` values around it, as far as there are any."""
    before = num // 2
    padded = np.pad(values, (before, num - 1 - before))
    sums: NDArray[Any] = sliding_window_view(padded, num).sum(axis=1)
    return sums


def _power_of_two_from(value: float) -> int:
    """Return the smallest power of two that is at least `value`; powers keep a growing curve from trembling."""
    return 1 << max(0, int(np.ceil(np.log2(max(value, 1.0)))))
