"""The form of outputs that are gathered: which tensors are in them, which have a row for each sample, as bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dnb.protocol.engine_messages import OutputLeaf
from dnb.user_code.return_values import ReturnError

# A tensor without rows is computed by every engine, by the same kernels, from the same parameters.
TOLERANCE = 1e-3
# What stands behind one record, see `dnb.transport.sockets.wires.MAX_RECORD_BYTES`; and all that is gathered of one
# batch.
PART_BYTES = 16 << 20
MOST_OUTPUT_BYTES = (1 << 30) - (64 << 20)
# May stand among outputs and targets, if they are the same for all samples.
PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True, slots=True)
class OutputForm:
    """The form of outputs and target, whatever the samples are."""

    spec: pytree.TreeSpec  # of (output, target)
    plain: tuple[Any, ...]  # leaves that are no tensors
    is_tensor: tuple[bool, ...]  # of all leaves
    num_outputs: int  # tensors of the output, the others are of the target
    has_rows: tuple[bool, ...] | None  # of each tensor; None: not known


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of outputs and target, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def form_of(output: Any, target: Any) -> OutputForm:
    """Find the tensors in what is to be gathered.

    Raises:
        ReturnError: there is something else in it.
    """
    num_outputs = sum(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(output))
    leaves, spec = pytree.tree_flatten((output, target))
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, *PLAIN)) or (isinstance(leaf, torch.Tensor) and leaf.is_sparse):
            raise ReturnError(
                "this loss looks at the whole batch, and what the model and the data set give it must be dense "
                f"tensors, in tuples, lists or dictionaries, to be gathered: not {type(leaf).__name__}"
            )
    plain = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
    return OutputForm(spec, plain, is_tensor, num_outputs, has_rows=None)


def tree_of(form: OutputForm, tensors: Sequence[torch.Tensor]) -> tuple[Any, Any]:
    """Return output and target of these tensors."""
    rest = iter(tensors)
    leaves = [next(rest) if is_one else plain for plain, is_one in zip(form.plain, form.is_tensor, strict=True)]
    output, target = pytree.tree_unflatten(leaves, form.spec)
    return output, target


def has_rows(more: torch.Tensor, fewer: torch.Tensor, num_samples: int) -> bool:
    """Return whether a tensor has a row for each of `num_samples` samples, and for one fewer.

    Raises:
        ReturnError: it depends on the number of samples in another way.
    """
    lengths = more.shape[:1], fewer.shape[:1]
    if lengths == ((num_samples,), (num_samples - 1,)):
        return True
    if more.shape == fewer.shape:
        return False
    raise ReturnError(
        f"this loss looks at the whole batch, and for {num_samples} samples there is a tensor of shape "
        f"{tuple(more.shape)} among outputs and targets, for {num_samples - 1} of shape {tuple(fewer.shape)}: it "
        "can be gathered if it has a row for each sample, such as (samples, views, features) instead of (views * "
        "samples, features), or is the same for all"
    )


def rows_of(tensors: Sequence[torch.Tensor], form: OutputForm | None, *, num_samples: int) -> tuple[bool, ...]:
    """Return which tensors have a row for each sample, as their form says or their lengths do."""
    known = None if form is None else form.has_rows
    if known is not None and len(known) == len(tensors):
        return known
    return tuple(tensor.dim() > 0 and len(tensor) == num_samples for tensor in tensors)


def join_rows(
    parts: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int], *, form: OutputForm | None
) -> list[torch.Tensor]:
    """Return the rows of several forwards, one after the other.

    Args:
        parts: the tensors of each.
        sizes: the samples of each.
        form: of the outputs; None: not known.
    """
    if len(parts) < 2:
        return list(parts[0]) if parts else []
    rows = [rows_of(tensors, form, num_samples=size) for tensors, size in zip(parts, sizes, strict=True)]
    columns = zip(*parts, strict=True)
    have_rows = [all(each) for each in zip(*rows, strict=True)]
    return [torch.cat(column) if are else column[0] for column, are in zip(columns, have_rows, strict=True)]


def join_pairs(pairs: Sequence[tuple[Any, Any]], sizes: Sequence[int], *, form: OutputForm | None) -> tuple[Any, Any]:
    """Return outputs and targets of several pieces as those of one.

    Args:
        pairs: output and target of each.
        sizes: the samples of each.
        form: of the outputs; None: not known.
    """
    if len(pairs) == 1:
        return pairs[0]
    forms = [form_of(*pair) for pair in pairs]
    return tree_of(forms[0], join_rows([tensors_in(pair) for pair in pairs], sizes, form=form))


def check_constant(own: torch.Tensor, gathered: torch.Tensor) -> None:
    """Refuse a tensor without rows that is another one on another engine.

    Raises:
        ReturnError: it is.
    """
    if own.shape == gathered.shape and torch.allclose(own.detach(), gathered.detach(), rtol=TOLERANCE, equal_nan=True):
        return
    raise ReturnError(
        f"this loss looks at the whole batch, and an output of shape {tuple(own.shape)}, which has no row for each "
        "sample, depends on the samples: return one row for each, so that it can be gathered"
    )


def compared_form(more: tuple[Any, Any], fewer: tuple[Any, Any], *, num_samples: int) -> OutputForm:
    """Find out which tensors have a row for each sample.

    Args:
        more: output and target of some samples.
        fewer: the same of one sample fewer.
        num_samples: of `more`.

    Raises:
        ReturnError: they cannot be gathered.
    """
    form, other = form_of(*more), form_of(*fewer)
    tensors, others = tensors_in(more), tensors_in(fewer)
    if form.spec != other.spec or len(tensors) != len(others):
        raise ReturnError(
            "this loss looks at the whole batch, and what the model gives has another structure for "
            f"{num_samples} samples than for {num_samples - 1}: it can be gathered if it is one, with a row for each "
            "sample"
        )
    rows = tuple(has_rows(one, two, num_samples) for one, two in zip(tensors, others, strict=True))
    return dataclasses.replace(form, has_rows=rows)


def leaf_of(tensor: torch.Tensor, *, has_rows: bool) -> OutputLeaf:
    """Describe a tensor that is sent."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return OutputLeaf(dtype=dtype, shape=tuple(tensor.shape), has_rows=has_rows)


def read_leaf(leaf: OutputLeaf, memory: bytearray, offset: int) -> torch.Tensor:
    """Return a tensor that was sent, where its bytes lie.

    Args:
        leaf: describes it.
        memory: with the bytes.
        offset: where they begin.
    """
    dtype = getattr(torch, leaf.dtype)
    count = prod(leaf.shape)
    if not count:
        return torch.empty(leaf.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(leaf.shape)


def bytes_of(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Return the elements of some tensors, one after the other, in parts that a record can carry.

    Raises:
        ReturnError: they are more than can be gathered.
    """
    if sum(tensor.nbytes for tensor in tensors) > MOST_OUTPUT_BYTES:
        raise ReturnError(
            f"this loss looks at the whole batch, and outputs and targets of a part of it are "
            f"{sum(tensor.nbytes for tensor in tensors) / 1e9:.2f} GB, of which at most "
            f"{MOST_OUTPUT_BYTES / 1e9:.2f} GB can be gathered: a smaller batch_size, or fewer outputs"
        )
    whole = b"".join(_raw(tensor) for tensor in tensors)
    return [whole[begin : begin + PART_BYTES] for begin in range(0, max(len(whole), 1), PART_BYTES)]


def _raw(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
