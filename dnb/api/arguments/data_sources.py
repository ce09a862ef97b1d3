"""Data as users bring them: tensors, arrays, frames, lists, data sets and loaders, read or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from dnb.errors import USER_ERRORS, ArgumentError, summary_of
from dnb.job import DataSource
from dnb.planning.sample_order import BatchOrder

WHAT_TO_GIVE = "give a pair (X, y) of tensors or arrays, a map-style Dataset, or a DataLoader"
MOST_SHOWN = 3  # names of columns or keys in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set as the user gave it, read."""

    data: DataSource
    num_samples: int
    order: BatchOrder | None  # of a DataLoader


def read_source(value: Any, *, name: str, seed: int) -> Source:
    """Read tensors, a map-style data set or a `DataLoader`.

    Columns, one for each part of a sample, are a tuple, or a list of two arrays; any other list has one sample per
    element, as for a `DataLoader`.

    Args:
        value: as the user gave it.
        name: of the argument, for messages.
        seed: orders the samples of a loader that shuffles without a generator of its own.

    Raises:
        ArgumentError: it is none of these, is empty, or its parts differ in length.
    """
    if isinstance(value, DataLoader):
        return _read_loader(value, name=name, seed=seed)
    if isinstance(value, tuple | list):
        if _are_columns(value, name=name):
            return _read_tensors(value, name=name)
    elif isinstance(value, torch.Tensor | np.ndarray) or (_is_frame(value) and not hasattr(value, "columns")):
        return _read_tensors((value,), name=name)
    return _read_dataset(value, name=name, collate=default_collate)


def _are_columns(value: Sequence[Any], *, name: str) -> bool:
    """Return True if the elements are parts of all samples, rather than samples."""
    are_arrays = [_is_array(part) for part in value]
    if isinstance(value, tuple):
        return any(are_arrays) or (bool(value) and all(isinstance(part, list) for part in value))
    if len(value) == 2:
        if all(isinstance(part, list) for part in value) and len(value[0]) == len(value[1]) != 2:
            raise ArgumentError(
                f"{name} is a list of two lists, which may be two samples, or all inputs and all targets: give a tuple "
                "(X, y) of tensors"
            )
        return any(are_arrays)
    _refuse_list_of_columns(value, name=name)
    return False


def _refuse_list_of_columns(value: Sequence[Any], *, name: str) -> None:
    """Arrays of one length that differ otherwise are no samples, which must fit into one batch."""
    shapes = {(part.dtype, tuple(part.shape)) for part in value if isinstance(part, torch.Tensor | np.ndarray)}
    lengths = {shape[:1] for _, shape in shapes}
    if len(shapes) > 1 and len(lengths) == 1 and lengths != {()} and all(_is_array(part) for part in value):
        raise ArgumentError(
            f"{name} is a list of {len(value)} arrays of {lengths.pop()[0]} rows that differ in shape or dtype, so "
            "that they are no samples of one kind: give a tuple if they are inputs and target"
        )


def _is_array(part: Any) -> bool:
    return isinstance(part, torch.Tensor | np.ndarray) or _is_frame(part) or _gives_array(part)


def _is_frame(part: Any) -> bool:
    """Return True for a frame or series of pandas, polars or the like."""
    return callable(getattr(part, "to_numpy", None)) and not isinstance(part, type)


def _gives_array(part: Any) -> bool:
    return hasattr(type(part), "__array__") and not isinstance(part, np.generic)


def _read_tensors(values: Sequence[Any], *, name: str) -> Source:
    called = [name] if len(values) == 1 else [f"part {number} of {name}" for number in range(1, len(values) + 1)]
    tensors = tuple(as_tensor(part, name=each) for part, each in zip(values, called, strict=True))
    for tensor, each in zip(tensors, called, strict=True):
        if tensor.dim() == 0:
            raise ArgumentError(f"{each} is a single number: give one entry for each sample")
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise ArgumentError(
            f"the parts of {name} differ in length: {' and '.join(map(str, lengths))} samples; "
            "every sample needs an input and a target"
        )
    _check_not_empty(lengths[0], name=name)
    return Source(data=DataSource(samples=tensors, collate=None), num_samples=lengths[0], order=None)


def as_tensor(part: Any, *, name: str) -> torch.Tensor:
    """Read one part of all samples; the memory of arrays is shared where torch can use it.

    Args:
        part: tensor, array, frame, series, list of numbers or of tensors, or what gives an array.
        name: for messages.

    Raises:
        ArgumentError: no tensor can be made of it; says why.
    """
    if isinstance(part, torch.Tensor):
        return _checked(part, name=name)
    if isinstance(part, np.ndarray):
        return _from_array(part, name=name)
    if isinstance(part, list | tuple):
        return _from_list(part, name=name)
    if _is_frame(part):
        return _from_frame(part, name=name)
    if hasattr(part, "toarray"):
        raise ArgumentError(f"{name} is a sparse {type(part).__name__}: give its .toarray()")
    if _gives_array(part):
        return _from_array(np.asarray(part), name=name)
    raise ArgumentError(f"{name} is a {type(part).__name__}: give tensors or arrays")


def _checked(tensor: torch.Tensor, *, name: str) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise ArgumentError(f"{name} is a tensor of layout {tensor.layout}, which has no rows: give its .to_dense()")
    if tensor.device.type != "cpu":
        raise ArgumentError(f"{name} is on {tensor.device}: give it on the CPU, such as X.cpu()")
    return tensor.detach()


def _from_array(array: np.ndarray[Any, Any], *, name: str) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        num_masked = int(np.ma.getmaskarray(array).sum())
        if num_masked:
            raise ArgumentError(
                f"{name} is a masked array, and {num_masked:,} of its {array.size:,} values are masked: give "
                ".filled(0), or leave those rows out"
            )
        array = array.data
    if array.dtype.names:
        names = _listed(array.dtype.names)
        raise ArgumentError(f"{name} is an array with fields {names}: give one, such as X[{array.dtype.names[0]!r}]")
    array = np.asarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    elif not array.flags.writeable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()  # torch takes none of these
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        way_out = "X.astype('float32') if they are numbers" if array.dtype.kind == "O" else "numbers"
        raise ArgumentError(
            f"{name} is an array of {array.dtype}, and torch has no such tensors: give {way_out}"
        ) from error


def _from_list(values: Sequence[Any], *, name: str) -> torch.Tensor:
    try:
        if values and all(isinstance(value, torch.Tensor) for value in values):
            return _checked(torch.stack(list(values)), name=name)
        if values and all(isinstance(value, np.ndarray) for value in values):
            return _from_array(np.stack(values), name=name)
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(
            f"{name} is a {type(values).__name__} of {len(values)} of which no tensor can be made "
            f"({summary_of(error)}): give numbers, as many for each sample"
        ) from error


def _from_frame(part: Any, *, name: str) -> torch.Tensor:
    """Read the values of a frame or series; columns of several kinds of numbers become the kind that holds all."""
    pandas: Any = sys.modules.get("pandas")
    if pandas is None or not isinstance(part, pandas.DataFrame | pandas.Series):
        return _from_array(np.asarray(part.to_numpy()), name=name)
    is_frame = isinstance(part, pandas.DataFrame)
    dtypes = list(part.dtypes) if is_frame else [part.dtype]
    is_number = pandas.api.types.is_numeric_dtype
    wrong = [each for each, dtype in zip(part.columns, dtypes, strict=True) if not is_number(dtype)] if is_frame else []
    if wrong:
        raise ArgumentError(
            f"{name} is a DataFrame whose column{'s' * (len(wrong) > 1)} {_listed(wrong)} "
            f"{'are' if len(wrong) > 1 else 'is'} not of numbers: leave out or encode, such as pandas.get_dummies"
        )
    if not is_number(dtypes[0] if dtypes else np.dtype(float)):
        raise ArgumentError(
            f"{name} is a Series of {dtypes[0]}, not of numbers: give its .astype('category').cat.codes"
        )
    common = np.result_type(*(getattr(dtype, "numpy_dtype", dtype) for dtype in dtypes)) if dtypes else np.dtype(float)
    if any(not isinstance(dtype, np.dtype) for dtype in dtypes) and bool(part.isna().to_numpy().any()):
        common = np.result_type(common, np.float32)
        return _from_array(part.to_numpy(dtype=common, na_value=np.nan), name=name)
    return _from_array(part.to_numpy(dtype=common), name=name)


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:MOST_SHOWN])
    return f"{shown} and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else shown


def _read_dataset(value: Any, *, name: str, collate: Callable[..., Any]) -> Source:
    if isinstance(value, IterableDataset):
        raise ArgumentError(
            f"{name} is an IterableDataset, whose samples have no index, so that none could be done again when "
            "an engine dies: give a map-style Dataset (with __len__ and __getitem__)"
        )
    _refuse_what_has_no_samples(value, name=name)
    num_samples = _length_of(value, name=name)
    _check_not_empty(num_samples, name=name)
    if type(value) is TensorDataset and collate is default_collate:
        return _read_tensors(value.tensors, name=name)
    return Source(data=DataSource(samples=value, collate=collate), num_samples=num_samples, order=None)


def _refuse_what_has_no_samples(value: Any, *, name: str) -> None:
    if isinstance(value, str | bytes) or not hasattr(value, "__getitem__") or not hasattr(value, "__len__"):
        raise ArgumentError(f"{name} is a {type(value).__name__}: {WHAT_TO_GIVE}")
    if _is_frame(value) and hasattr(value, "columns"):
        raise ArgumentError(
            f"{name} is a {type(value).__name__}, in which columns have names and rows no index: give "
            "(df[columns], df['target']), its inputs and its target"
        )
    if isinstance(value, Mapping) and 0 not in value:
        raise ArgumentError(
            f"{name} is a {type(value).__name__} of {_listed(list(value)) or 'nothing'}, which has no sample 0: give "
            f"one of them, or several as a tuple such as (train[{next(iter(value), 'x')!r}], ...)"
        )


def _length_of(value: Any, *, name: str) -> int:
    try:
        return len(value)
    except USER_ERRORS as error:
        raise ArgumentError(
            f"{name} does not say how many samples it has ({summary_of(error)}): {WHAT_TO_GIVE}"
        ) from error


def _read_loader(loader: DataLoader[Any], *, name: str, seed: int) -> Source:
    source = _read_dataset(loader.dataset, name=f"{name}'s dataset", collate=loader.collate_fn)
    common: dict[str, Any] = {
        "num_samples": source.num_samples,
        "drop_last": loader.drop_last,
        "seed": seed,
    }
    sampler: Any = loader.sampler
    is_whole = type(sampler) in (SequentialSampler, RandomSampler) and len(sampler) == source.num_samples
    is_random = type(sampler) is RandomSampler and not sampler.replacement
    has_own_generator = is_random and sampler.generator is not None and sampler.generator is not loader.generator
    if loader.batch_size is None:
        if loader.batch_sampler is None:
            raise ArgumentError(f"{name} is a DataLoader without batches (batch_size=None): give it a batch_size")
        order = BatchOrder(
            batch_size=_usual_batch_size(loader.batch_sampler, num_samples=source.num_samples),
            batch_sampler=loader.batch_sampler,
            generator=loader.generator,
            **common,
        )
    elif is_whole and type(sampler) is SequentialSampler:
        order = BatchOrder(batch_size=loader.batch_size, shuffle=False, **common)
    elif is_whole and is_random and not has_own_generator:
        order = BatchOrder(batch_size=loader.batch_size, shuffle=True, generator=loader.generator, **common)
    else:
        order = BatchOrder(batch_size=loader.batch_size, sampler=sampler, generator=loader.generator, **common)
    return Source(data=source.data, num_samples=source.num_samples, order=order)


def _usual_batch_size(batch_sampler: Any, *, num_samples: int) -> int:
    """Return the size that a batch sampler states, else the mean over an epoch; else 1, as there is no length."""
    size = getattr(batch_sampler, "batch_size", None)
    if isinstance(size, int):
        return size
    try:
        return max(1, num_samples // max(1, len(batch_sampler)))
    except (TypeError, NotImplementedError):
        return 1


def _check_not_empty(num_samples: int, *, name: str) -> None:
    if num_samples == 0:
        raise ArgumentError(f"{name} has no samples")
