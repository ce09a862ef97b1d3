"""Data as users bring them: what is read, and what is refused by name."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from dnb.api.arguments.data_sources import read_source
from dnb.errors import ArgumentError
from dnb.planning.sample_order import count_batches, iterate_batches
from dnb.user_code.loader import fetch_batch

X = torch.arange(20.0).view(10, 2)
Y = torch.arange(10)


class Squares(Dataset):
    def __init__(self, num_samples: int = 10) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index**2


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


def first_epoch(loader: DataLoader) -> list[list[int]]:
    """The batches of a `read_source`d loader."""
    order = read_source(loader, name="train", seed=0).order
    batches = iterate_batches(order)
    return [next(batches).tolist() for _ in range(count_batches(order))]


def parts(value: Any) -> list[torch.Tensor]:
    """What `fit` makes of columns."""
    source = read_source(value, name="train", seed=0)
    assert source.data.collate is None
    return list(source.data.samples)


def refused(value: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        read_source(value, name="train", seed=0)


# data ------------------------------------------------------------------------------------------------


def test_a_pair_of_tensors_is_indexed_at_once():
    source = read_source((X, Y), name="train", seed=0)
    assert source.data.collate is None
    assert source.num_samples == 10


def test_a_list_of_arrays_is_read_as_tensors():
    source = read_source([np.ones((10, 2)), np.arange(10)], name="train", seed=0)
    assert [type(part) for part in source.data.samples] == [torch.Tensor, torch.Tensor]


def test_an_array_shares_its_memory():
    array = np.zeros((4, 2), dtype=np.float32)
    source = read_source((array, np.arange(4)), name="train", seed=0)
    array[0, 0] = 3.0
    assert source.data.samples[0][0, 0] == 3.0


def test_a_read_only_array_is_taken():
    array = np.ones((4, 2), dtype=np.float32)
    array.flags.writeable = False
    assert read_source((array, np.arange(4)), name="train", seed=0).num_samples == 4


def test_a_reversed_array_is_taken():
    source = read_source((np.arange(4.0)[::-1], np.arange(4)), name="train", seed=0)
    assert source.data.samples[0].tolist() == [3.0, 2.0, 1.0, 0.0]


def test_an_array_of_text_is_refused():
    with pytest.raises(ArgumentError, match="train"):
        read_source((np.ones((2, 2)), np.array(["cat", "dog"])), name="train", seed=0)


def test_a_tensor_that_requires_grad_is_detached():
    source = read_source((X.clone().requires_grad_(True), Y), name="train", seed=0)
    assert not source.data.samples[0].requires_grad


def test_a_single_tensor_is_a_source_of_one_part():
    assert len(read_source(X, name="train", seed=0).data.samples) == 1


def test_a_tensor_data_set_is_read_as_its_tensors():
    assert read_source(TensorDataset(X, Y), name="train", seed=0).data.collate is None


def test_a_subset_is_asked_for_its_samples():
    source = read_source(Subset(TensorDataset(X, Y), [1, 3]), name="train", seed=0)
    assert source.num_samples == 2
    assert source.data.collate is default_collate


def test_a_map_style_data_set_is_asked_for_its_samples():
    source = read_source(Squares(7), name="train", seed=0)
    assert source.num_samples == 7
    assert source.order is None


def test_parts_of_different_lengths_are_refused_with_the_lengths():
    with pytest.raises(ArgumentError, match="the parts of train differ in length: 10 and 9 samples"):
        read_source((X, Y[:9]), name="train", seed=0)


@pytest.mark.parametrize(
    "value", [(X[:0], Y[:0]), Squares(0), [], DataLoader(Squares(0), batch_size=2)], ids=lambda v: type(v).__name__
)
def test_data_without_samples_is_refused(value: Any):
    with pytest.raises(ArgumentError, match=r"val('s dataset)? has no samples"):
        read_source(value, name="val", seed=0)


def test_an_iterable_data_set_is_refused_with_the_way_out():
    with pytest.raises(ArgumentError, match=r"train is an IterableDataset.*give a map-style Dataset"):
        read_source(Stream(), name="train", seed=0)


def test_a_loader_of_an_iterable_data_set_is_refused():
    with pytest.raises(ArgumentError, match="train's dataset is an IterableDataset"):
        read_source(DataLoader(Stream()), name="train", seed=0)


@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (None, "NoneType"), (iter([1]), "list_iterator")])
def test_what_is_no_data_is_refused(value: Any, kind: str):
    with pytest.raises(ArgumentError, match=rf"train is a {kind}: give a pair \(X, y\) of tensors or arrays"):
        read_source(value, name="train", seed=0)


def test_a_pair_of_a_tensor_and_a_list_is_not_taken_for_a_data_set_of_two_samples():
    assert parts((X, list(range(10))))[1].tolist() == Y.tolist()


# arrays that torch does not take as they are


def test_a_big_endian_array_is_read_in_the_machine_s_order():
    assert parts((X.numpy().astype(">f4"), Y.numpy()))[0].equal(X)


def test_a_column_of_a_structured_array_is_copied():
    rows = np.zeros(10, dtype=[("a", "f4"), ("b", "u1")])
    rows["a"] = np.arange(10)
    assert parts((rows["a"], Y))[0].tolist() == list(range(10))


def test_a_structured_array_is_refused_by_its_fields():
    refused(
        (np.zeros(10, dtype=[("a", "f4"), ("b", "u1")]), Y), r"part 1 of train is an array with fields 'a', 'b': give"
    )


def test_a_masked_array_is_refused_with_the_number_of_masked_values():
    masked = np.ma.masked_array(X.numpy(), mask=X.numpy() > 16)
    refused((masked, Y), r"part 1 of train is a masked array, and 3 of its 20 values are masked: give \.filled\(0\)")


def test_a_masked_array_in_which_nothing_is_masked_is_taken():
    assert parts((np.ma.masked_array(X.numpy()), Y))[0].equal(X)


def test_an_array_of_objects_is_refused_with_the_way_out():
    refused((X.numpy().astype(object), Y), r"part 1 of train is an array of object.*X\.astype\('float32'\)")


def test_a_single_number_is_no_part_of_samples():
    refused((X, np.array(3.0)), "part 2 of train is a single number")


def test_a_sparse_tensor_is_refused_with_the_way_out():
    refused((X.to_sparse(), Y), r"part 1 of train is a tensor of layout torch\.sparse_coo.*to_dense\(\)")


def test_a_tensor_on_another_device_is_refused():
    refused((X.to("meta"), Y), r"part 1 of train is on meta: give it on the CPU")


def test_part_of_what_is_no_data_is_refused_by_its_number():
    refused((X, None), "part 2 of train is a NoneType: give tensors or arrays")


# frames


FRAME = pd.DataFrame(X.numpy(), columns=["a", "b"])


@pytest.mark.parametrize("frame", [FRAME, pd.DataFrame(X.numpy())], ids=["named", "numbered"])
def test_a_frame_and_a_series_are_inputs_and_target(frame: Any):
    inputs, target = parts((frame, pd.Series(Y.numpy(), name="y")))
    assert inputs.dtype is torch.float32
    assert inputs.equal(X)
    assert target.equal(Y)


def test_columns_of_several_kinds_of_numbers_become_the_kind_that_holds_all():
    frame = pd.DataFrame({"flag": [True, False], "count": [1, 2], "size": np.array([0.5, 1.5], dtype=np.float32)})
    assert parts((frame, [0, 1]))[0].tolist() == [[1.0, 1.0, 0.5], [0.0, 2.0, 1.5]]


def test_missing_integers_of_a_frame_become_nan():
    frame = pd.DataFrame({"a": pd.array([1, None], dtype="Int64")})
    assert parts((frame, [0, 1]))[0].isnan().tolist() == [[False], [True]]


def test_columns_of_words_are_refused_by_name():
    frame = FRAME.assign(kind="cat", place="home")
    refused((frame, Y), "part 1 of train is a DataFrame whose columns 'kind', 'place' are not of numbers: leave out")


def test_a_series_of_words_is_refused():
    refused((X, pd.Series(["cat"] * 10)), "part 2 of train is a Series of (str|object), not of numbers")


def test_a_frame_alone_is_refused_as_its_target_is_not_known():
    refused(FRAME, r"train is a DataFrame, in which columns have names.*give \(df\[columns\], df\['target'\]\)")


def test_a_series_alone_is_one_part():
    assert parts(FRAME["a"])[0].tolist() == X[:, 0].tolist()


def test_a_loader_of_a_frame_is_refused():
    refused(DataLoader(FRAME), "train's dataset is a DataFrame")


# lists, dictionaries, and what else has a length and elements


def test_a_tuple_of_lists_of_numbers_is_inputs_and_target():
    inputs, target = parts((X.tolist(), Y.tolist()))
    assert (inputs.dtype, target.dtype) == (torch.float32, torch.int64)
    assert inputs.equal(X)


def test_a_list_of_two_lists_is_refused_as_it_may_be_either():
    refused([X.tolist(), Y.tolist()], r"train is a list of two lists.*give a tuple \(X, y\)")


def test_lists_of_different_lengths_are_refused():
    refused(([[1.0], [1.0, 2.0]], [0, 1]), "part 1 of train is a list of 2 of which no tensor can be made")


def test_a_list_of_words_is_refused():
    refused((["a", "b"], [0, 1]), "part 1 of train is a list of 2 of which no tensor can be made")


def test_a_list_of_tensors_has_one_sample_per_tensor():
    source = read_source([torch.full((4,), float(k)) for k in range(6)], name="train", seed=0)
    assert source.num_samples == 6
    assert fetch_batch(source.data, torch.arange(1)).shape == (1, 4)


def test_a_list_of_three_arrays_that_differ_is_refused_as_no_samples():
    refused([X, X[:, :1], Y], "train is a list of 3 arrays of 10 rows that differ.*give a tuple")


def test_a_list_of_pairs_has_one_sample_per_pair():
    assert read_source([(X[0], 0), (X[1], 1)], name="train", seed=0).num_samples == 2


@pytest.mark.parametrize("value", [{"x": X, "y": Y}, UserDict(train=X)], ids=lambda value: type(value).__name__)
def test_a_mapping_of_columns_or_splits_is_refused_by_its_keys(value: Any):
    refused(value, rf"train is a {type(value).__name__} of '.*', which has no sample 0: give one of them")


def test_words_are_no_samples():
    refused("digits", r"train is a str: give a pair \(X, y\)")


# loaders ---------------------------------------------------------------------------------------------


def test_a_loader_gives_its_batch_size_and_collate_function():
    def collate(rows: list[Any]) -> list[Any]:
        return rows

    source = read_source(DataLoader(Squares(), batch_size=3, collate_fn=collate), name="train", seed=0)
    assert source.order.batch_size == 3
    assert source.data.collate is collate


def test_a_loader_that_does_not_shuffle_keeps_its_order():
    assert first_epoch(DataLoader(Squares(5), batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_a_loader_that_drops_its_last_batch_still_does():
    assert first_epoch(DataLoader(Squares(5), batch_size=2, drop_last=True)) == [[0, 1], [2, 3]]


def test_a_loader_that_shuffles_without_a_generator_is_seeded():
    loader = DataLoader(Squares(), batch_size=4, shuffle=True)
    seeded = DataLoader(range(10), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert first_epoch(loader) == [batch.tolist() for batch in seeded]


def test_the_generator_of_a_loader_orders_its_samples():
    loader = DataLoader(Squares(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(11))
    same = DataLoader(range(10), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(11))
    assert first_epoch(loader) == [batch.tolist() for batch in same]


def test_the_generator_of_a_loaders_own_sampler_orders_its_samples():
    def sampler() -> RandomSampler:
        return RandomSampler(range(10), generator=torch.Generator().manual_seed(11))

    loader = DataLoader(Squares(), batch_size=4, sampler=sampler())
    same = DataLoader(range(10), batch_size=4, sampler=sampler())
    assert first_epoch(loader) == [batch.tolist() for batch in same]


@pytest.mark.parametrize("kind", [SequentialSampler, RandomSampler])
def test_a_sampler_over_fewer_samples_than_the_data_set_draws_only_those(kind: Any):
    loader = DataLoader(Squares(10), batch_size=2, sampler=kind(range(4)))
    assert sorted(index for batch in first_epoch(loader) for index in batch) == [0, 1, 2, 3]


def test_a_sampler_of_a_loader_is_asked():
    sampler = WeightedRandomSampler([0.0, 1.0, 0.0], 4)
    assert first_epoch(DataLoader(Squares(3), batch_size=2, sampler=sampler)) == [[1, 1], [1, 1]]


def test_a_batch_sampler_of_a_loader_is_asked():
    assert first_epoch(DataLoader(Squares(6), batch_sampler=[[5, 0], [1], [2, 3, 4]])) == [[5, 0], [1], [2, 3, 4]]


def test_the_batch_size_of_a_batch_sampler_is_known():
    loader = DataLoader(Squares(), batch_sampler=BatchSampler(SequentialSampler(range(10)), 4, drop_last=False))
    assert read_source(loader, name="train", seed=0).order.batch_size == 4


def test_a_batch_sampler_without_a_length_is_read():
    class Endless:
        def __iter__(self) -> Any:
            return iter([[0, 1]])

    order = read_source(DataLoader(Squares(), batch_sampler=Endless()), name="train", seed=0).order
    with pytest.raises(ArgumentError, match="the batch sampler Endless does not say how long an epoch is"):
        count_batches(order)


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ArgumentError, match=r"train is a DataLoader without batches \(batch_size=None\)"):
        read_source(DataLoader(Squares(), batch_size=None), name="train", seed=0)
