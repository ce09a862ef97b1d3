from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
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

from dnb.errors import ArgumentError, PlanError
from dnb.inputs import (
    STRATEGIES,
    accuracy,
    check_batch_size,
    check_choice,
    check_loss_fits,
    check_model,
    check_number,
    check_positive,
    loss_names,
    read_loss,
    read_metrics,
    read_source,
    read_transport,
)
from dnb.planning.sample_order import count_batches, iterate_batches
from dnb.transport.job import DataSource

X = torch.arange(20.0).view(10, 2)
Y = torch.arange(10)


class Squares(Dataset):
    def __init__(self, num_samples: int = 10) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index**2


def own_loss(model: Any, batch: Any) -> Any:
    return model(batch).mean()


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


def first_epoch(loader: DataLoader) -> list[list[int]]:
    """The batches of a `read_source`d loader."""
    order = read_source(loader, name="train", seed=0).order
    batches = iterate_batches(order)
    return [next(batches).tolist() for _ in range(count_batches(order))]


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
    with pytest.raises(ArgumentError, match="train"):
        read_source((X, list(range(10))), name="train", seed=0)


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


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ArgumentError, match=r"train is a DataLoader without batches \(batch_size=None\)"):
        read_source(DataLoader(Squares(), batch_size=None), name="train", seed=0)


# models ------------------------------------------------------------------------------------------------


def test_a_model_is_returned():
    model = nn.Linear(2, 1)
    assert check_model(model) is model


def test_what_is_no_module_is_refused():
    with pytest.raises(ArgumentError, match=r"model is a function, not a torch\.nn\.Module"):
        check_model(first_epoch)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ArgumentError, match=r"model has no trainable parameters: set requires_grad_\(True\)"):
        check_model(nn.ReLU())


def test_a_frozen_model_is_refused_with_the_number_of_its_parameters():
    with pytest.raises(ArgumentError, match="model has no trainable parameters, all 2 are frozen"):
        check_model(nn.Linear(2, 1).requires_grad_(False))


def test_a_model_with_lazy_parameters_is_refused():
    with pytest.raises(ArgumentError, match="model has lazy parameters without a shape yet: run one batch through it"):
        check_model(nn.LazyLinear(3))


def test_a_model_on_another_device_is_refused():
    with pytest.raises(ArgumentError, match=r"model is on meta: give it on the CPU, model\.cpu\(\)"):
        check_model(nn.Linear(2, 1, device="meta"))


# numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64", None, 4.0])
def test_a_batch_size_that_is_not_a_positive_integer_is_refused(value: Any):
    with pytest.raises(ArgumentError, match=f"batch_size must be a positive integer, not {value!r}"):
        check_batch_size(value, num_samples=10)


def test_a_batch_size_larger_than_the_data_set_is_refused_with_both():
    with pytest.raises(ArgumentError, match="batch_size=11 is larger than the data set of 10 samples: use at most 10"):
        check_batch_size(11, num_samples=10)


def test_a_batch_of_the_whole_data_set_is_taken():
    assert check_batch_size(10, num_samples=10) == 10


def test_an_integer_of_numpy_is_taken_as_an_integer():
    assert type(check_positive(np.int64(3), name="epochs")) is int


@pytest.mark.parametrize("value", [0, -1e-3, float("inf"), float("nan"), True, "1e-3", None])
def test_a_number_that_is_not_positive_and_finite_is_refused(value: Any):
    with pytest.raises(ArgumentError, match=f"lr must be a positive number, not {value!r}"):
        check_number(value, name="lr")


def test_a_positive_number_is_taken():
    assert check_number(1, name="lr") == 1.0


# words --------------------------------------------------------------------------------------------------


def test_an_unknown_strategy_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match=r"no strategy 'pipelin': did you mean 'pipeline'\? known: auto, data"):
        check_choice("pipelin", name="strategy", known=STRATEGIES, available=("auto", "data"))


@pytest.mark.parametrize("strategy", ["pipeline", "tensor", "hybrid"])
def test_a_strategy_of_a_later_release_is_refused_with_one_of_this(strategy: str):
    with pytest.raises(PlanError, match=f"strategy='{strategy}' is not in this release yet: use strategy='auto'"):
        check_choice(strategy, name="strategy", known=STRATEGIES, available=("auto", "data"))


def test_a_known_strategy_is_taken():
    assert check_choice("data", name="strategy", known=STRATEGIES, available=("auto", "data")) == "data"


def test_one_transport_is_for_every_engine():
    assert read_transport("socket") == {"": "socket"}


def test_a_transport_may_be_chosen_by_engine():
    assert read_transport({0: "memory", 3: "socket"}) == {"0": "memory", "3": "socket"}


def test_no_transport_leaves_the_choice_to_the_hub():
    assert read_transport(None) == {}


@pytest.mark.parametrize("transport", ["sockets", {0: "memory", 1: "sockets"}], ids=["for all", "for one"])
def test_an_unknown_transport_is_refused_with_the_nearest(transport: Any):
    message = r"no transport 'sockets': did you mean 'socket'\? known: memory, socket"
    with pytest.raises(ArgumentError, match=message):
        read_transport(transport)


@pytest.mark.parametrize("transport", [True, {0: None}, 3], ids=repr)
def test_what_is_no_word_is_no_transport(transport: Any):
    with pytest.raises(ArgumentError, match="no transport"):
        read_transport(transport)


# losses --------------------------------------------------------------------------------------------------


def test_a_loss_is_known_by_its_name():
    assert read_loss("cross_entropy", step=None) is nn.functional.cross_entropy


def test_an_unknown_loss_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match=r"no loss 'cross_entropie': did you mean 'cross_entropy'\? known: "):
        read_loss("cross_entropie", step=None)


def test_a_function_that_is_no_loss_is_refused_by_name():
    with pytest.raises(ArgumentError, match="no loss 'relu'"):
        read_loss("relu", step=None)


def test_loss_and_step_together_are_refused():
    with pytest.raises(ArgumentError, match="give loss or step, not both"):
        read_loss("mse_loss", step=own_loss)


def test_a_step_that_cannot_be_called_is_refused():
    with pytest.raises(ArgumentError, match=r"step is a int: give a callable\(model, batch\)"):
        read_loss(None, step=3)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # kl_div's own advice
def test_every_named_loss_compares_an_output_with_a_target():
    output, target = torch.rand(4, 4), torch.rand(4, 4).round()
    classes = torch.tensor([0, 1, 2, 3])
    failed = []
    for name in loss_names():
        function = getattr(nn.functional, name)
        for candidate in (target, classes, target.long()):
            try:
                function(output, candidate)
                break
            except (RuntimeError, ValueError, TypeError):
                continue
        else:
            failed.append(name)
    assert failed == []


def test_neither_loss_nor_step_is_refused_for_pairs():
    with pytest.raises(ArgumentError, match="say what to minimise: loss='cross_entropy'"):
        check_loss_fits(None, step=None, data=DataSource(samples=(X, Y), collate=None))


def test_samples_without_a_target_are_refused():
    with pytest.raises(ArgumentError, match=r"the samples have no target: give pairs \(X, y\)"):
        check_loss_fits(nn.functional.mse_loss, step=None, data=DataSource(samples=(X,), collate=None))


def test_samples_of_a_data_set_without_a_target_are_refused():
    with pytest.raises(ArgumentError, match="the samples have no target"):
        check_loss_fits(nn.functional.mse_loss, step=None, data=DataSource(samples=X, collate=default_collate))


def test_dictionaries_with_a_loss_are_refused():
    data = DataSource(samples=[{"x": X[0], "labels": Y[0]}], collate=default_collate)
    with pytest.raises(ArgumentError, match=r"the samples are dictionaries.*leave loss out"):
        check_loss_fits(nn.functional.mse_loss, step=None, data=data)


def test_dictionaries_without_a_loss_are_taken():
    check_loss_fits(None, step=None, data=DataSource(samples=[{"x": X[0]}], collate=default_collate))


def test_a_step_function_says_what_the_loss_is_for_any_samples():
    check_loss_fits(None, step=own_loss, data=DataSource(samples=(X,), collate=None))


# metrics ---------------------------------------------------------------------------------------------------


def test_the_word_accuracy_is_a_metric():
    assert read_metrics("accuracy") == {"accuracy": accuracy}


def test_no_metrics_is_an_empty_dictionary():
    assert read_metrics(None) == {}


def test_an_unknown_metric_is_refused():
    with pytest.raises(ArgumentError, match=r"no metric 'f1': give 'accuracy', or \{'name': callable"):
        read_metrics(["accuracy", "f1"])


@pytest.mark.parametrize("name", ["loss", "lr", "samples_per_second", "step", "digest", "val_accuracy", 3])
def test_a_name_that_the_history_uses_is_refused_for_a_metric(name: Any):
    with pytest.raises(ArgumentError, match=f"{name!r} cannot be the name of a metric"):
        read_metrics({name: accuracy})


def test_a_metric_that_cannot_be_called_is_refused():
    with pytest.raises(ArgumentError, match=r"metric 'f1' is a float: give a callable\(output, target\)"):
        read_metrics({"f1": 0.5})


def test_a_metric_with_a_state_of_its_own_is_refused():
    class Meter:
        def update(self, output: Any, target: Any) -> None: ...

        def compute(self) -> float:
            return 0.0

        def __call__(self, output: Any, target: Any) -> float:
            return 0.0

    with pytest.raises(ArgumentError, match="metric 'f1' keeps a state of its own"):
        read_metrics({"f1": Meter()})


def test_accuracy_is_the_share_of_samples_whose_largest_output_is_the_target():
    output = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    assert accuracy(output, torch.tensor([0, 1, 1, 0])).item() == 0.75
