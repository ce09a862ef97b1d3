from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from dnb.errors import HubError, ShippingError, SpaceError
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.memory import PayloadRef
from dnb.transport.pickling.payloads import MOVED_MODULES, explain_unpicklable, pickle_payload, sign, unpack, verify

NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)


@pytest.fixture
def upload(tmp_path: Path):
    """Packs and unpacks, as from the kernel to an engine."""

    def round_trip(obj: Any) -> Any:
        pickled, ref, segment = pickle_payload(obj, name="payload", folders=[tmp_path])
        try:
            return unpack(pickled, ref)
        finally:
            if segment is not None:
                segment.unlink()

    return round_trip


# tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5, -2.0, float("inf")]),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([1.5, -2.0], dtype=torch.float64),
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([True, False, True]),
        torch.tensor(7),
        torch.tensor([1 + 2j, 3 - 4j]),
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(10.0)[4:9],
        torch.arange(12.0)[::2],
        torch.ones(1, 3).expand(4, 3),
        torch.empty(0, 3),
        torch.arange(5.0)[:0],
    ],
    ids=[
        "float32",
        "bfloat16",
        "float64",
        "int64",
        "bool",
        "scalar",
        "complex",
        "transposed",
        "offset",
        "strided",
        "expanded",
        "no elements",
        "no elements of something",
    ],
)
def test_a_tensor_arrives_equal(upload, tensor: torch.Tensor):
    arrived = upload(tensor)
    assert arrived.dtype == tensor.dtype
    assert arrived.shape == tensor.shape
    assert torch.equal(arrived, tensor)


def test_a_lazily_conjugated_tensor_arrives_conjugated(upload):
    assert torch.equal(upload(torch.tensor([1 + 2j]).conj()), torch.tensor([1 - 2j]))


def test_a_lazily_negated_tensor_arrives_negated(upload):
    assert torch.equal(upload(torch.tensor([1 + 2j]).conj().imag), torch.tensor([-2.0]))


def test_a_tensor_that_requires_grad_still_does(upload):
    assert upload(torch.ones(2, requires_grad=True)).requires_grad


def test_a_result_of_a_computation_arrives_equal(upload):
    result = torch.ones(2, requires_grad=True) * 3
    assert upload(result).tolist() == [3.0, 3.0]


def test_a_parameter_stays_a_parameter(upload):
    arrived = upload(nn.Parameter(torch.ones(2), requires_grad=False))
    assert type(arrived) is nn.Parameter
    assert not arrived.requires_grad


def test_tensors_that_share_memory_are_shipped_once(tmp_path: Path):
    base = torch.arange(1000.0)
    _, ref, segment = pickle_payload([base, base.view(10, 100)], name="payload", folders=[tmp_path])
    segment.unlink()
    assert [buffer.num_bytes for buffer in ref.buffers] == [4000]


def test_tensors_that_share_memory_still_do(upload):
    base = torch.zeros(4)
    first, second = upload([base, base.view(2, 2)])
    first[0] = 5.0
    assert second[0, 0] == 5.0


def test_a_small_view_does_not_ship_the_large_tensor_behind_it(tmp_path: Path):
    large = torch.zeros(1_000_000)
    pickled, ref, segment = pickle_payload(large[10:20], name="payload", folders=[tmp_path])
    segment.unlink()
    assert sum(buffer.num_bytes for buffer in ref.buffers) == 40
    assert len(pickled) < 1000


def test_a_small_array_view_does_not_ship_the_large_array_behind_it(tmp_path: Path):
    large = np.zeros(1_000_000)
    pickled, ref, segment = pickle_payload(large[10:20], name="payload", folders=[tmp_path])
    segment.unlink()
    assert sum(buffer.num_bytes for buffer in ref.buffers) == 80
    assert len(pickled) < 1000


def test_the_elements_of_a_tensor_are_not_in_the_pickle(tmp_path: Path):
    pickled, _, segment = pickle_payload(nn.Linear(500, 500), name="payload", folders=[tmp_path])
    segment.unlink()
    assert len(pickled) < 5000


def test_every_buffer_is_aligned_to_a_cache_line(tmp_path: Path):
    _, ref, segment = pickle_payload([torch.ones(3), torch.ones(5), np.ones(7)], name="payload", folders=[tmp_path])
    segment.unlink()
    assert [buffer.offset_bytes for buffer in ref.buffers] == [0, 64, 128]


# arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5.0),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(12)[::3],
        np.zeros((0, 2)),
        np.array(["a", "bc"]),
        np.array([{"a": 1}, None], dtype=object),
    ],
    ids=["contiguous", "fortran", "strided", "no elements", "text", "objects"],
)
def test_an_array_arrives_equal(upload, array: np.ndarray):
    arrived = upload(array)
    assert arrived.dtype == array.dtype
    assert arrived.tolist() == array.tolist()


def test_arrays_and_tensors_keep_their_places(upload):
    assert [list(part) for part in upload([np.ones(2), torch.zeros(3), np.full(1, 7.0)])] == [
        [1.0, 1.0],
        [0.0, 0.0, 0.0],
        [7.0],
    ]


# models and optimizers -----------------------------------------------------------------------------


def test_a_model_arrives_with_equal_parameters(upload):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    arrived = upload(model).state_dict()
    assert all(torch.equal(arrived[name], value) for name, value in model.state_dict().items())


def test_tied_parameters_stay_one_parameter(upload):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    arrived = upload(model)
    assert arrived[1].weight is arrived[0].weight


def test_an_optimizer_on_the_models_parameters_arrives_on_the_models_parameters(upload):
    model = nn.Linear(3, 1)
    arrived, optimizer = upload((model, torch.optim.Adam(model.parameters())))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in arrived.parameters()]


def test_the_state_of_an_optimizer_arrives_with_it(upload):
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.tensor([[1.0, 2.0]])).sum().backward()
    optimizer.step()
    arrived, arrived_optimizer = upload((model, optimizer))
    assert arrived_optimizer.state[arrived.weight]["momentum_buffer"].tolist() == [[1.0, 2.0]]


def test_a_scheduler_arrives_on_its_optimizer(upload):
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer, scheduler = upload((optimizer, scheduler))
    assert scheduler.optimizer is optimizer


def test_a_generator_arrives_with_its_state(upload):
    generator = torch.Generator().manual_seed(3)
    torch.randperm(10, generator=generator)
    arrived = upload(BatchOrder(num_samples=10, batch_size=2, generator=generator)).generator
    assert torch.equal(torch.randperm(10, generator=arrived), torch.randperm(10, generator=generator))


def test_a_function_of_the_notebook_travels_by_value(upload):
    scale = 3
    assert upload(lambda value: scale * value)(2) == 6


# the other side --------------------------------------------------------------------------------------


def test_what_is_written_to_an_unpacked_tensor_is_not_seen_by_others(tmp_path: Path):
    pickled, ref, segment = pickle_payload(torch.zeros(3), name="payload", folders=[tmp_path])
    unpack(pickled, ref).fill_(9.0)
    second = unpack(pickled, ref)
    segment.unlink()
    assert second.tolist() == [0.0, 0.0, 0.0]


def test_an_unpacked_tensor_outlives_the_name_of_its_segment(tmp_path: Path):
    pickled, ref, segment = pickle_payload(torch.arange(3.0), name="payload", folders=[tmp_path])
    arrived = unpack(pickled, ref)
    segment.unlink()
    assert arrived.tolist() == [0.0, 1.0, 2.0]


def test_an_object_without_tensors_needs_no_segment(tmp_path: Path):
    assert pickle_payload({"lr": 0.1}, name="payload", folders=[tmp_path])[1:] == (NOTHING, None)


def test_no_room_for_the_tensors_is_told(tmp_path: Path):
    with pytest.raises(SpaceError, match=r"payload needs 4\.0 MB of shared memory"):
        pickle_payload(torch.zeros(1_000_000), name="payload", folders=[])


# signatures ------------------------------------------------------------------------------------------


def test_a_signed_parcel_is_let_in():
    verify(b"key", [b"spec", b"job"], sign(b"key", [b"spec", b"job"]))


@pytest.mark.parametrize(
    ("key", "frames", "signature"),
    [
        pytest.param(b"key", [b"spec", b"other job"], sign(b"key", [b"spec", b"job"]), id="another job"),
        pytest.param(b"key", [b"spec"], sign(b"key", [b"spec", b"job"]), id="a part left out"),
        pytest.param(b"key", [b"spec", b"job"], sign(b"other", [b"spec", b"job"]), id="another key"),
        pytest.param(b"key", [b"spec", b"job"], b"", id="no signature"),
        pytest.param(b"", [b"spec", b"job"], b"", id="no key"),
    ],
)
def test_a_parcel_without_the_clusters_signature_is_refused(key: bytes, frames: list[bytes], signature: bytes):
    with pytest.raises(HubError, match="a payload without this cluster's signature was refused"):
        verify(key, frames, signature)


# what cannot be sent -----------------------------------------------------------------------------------


class LockedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.lock = threading.Lock()


class PrivatelyLockedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self._lock = threading.Lock()


class LockedData(Dataset):
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1)


def test_the_attribute_of_a_model_that_cannot_be_sent_is_named():
    error = explain_unpicklable(LockedModel(), name="model")
    assert str(error).startswith("model.lock (a lock) cannot be sent to the engines: TypeError: cannot pickle")


def test_a_private_attribute_of_a_model_that_cannot_be_sent_is_named():
    error = explain_unpicklable(PrivatelyLockedModel(), name="model")
    assert str(error).startswith("model._lock (a lock) cannot be sent")


def test_the_attribute_of_a_submodule_that_cannot_be_sent_is_named():
    error = explain_unpicklable(nn.Sequential(nn.Linear(2, 2), LockedModel()), name="model")
    assert str(error).startswith("model.1.lock (a lock) cannot be sent")


def test_the_attribute_of_a_nested_data_set_that_cannot_be_sent_is_named():
    error = explain_unpicklable(Subset(LockedData(), [1, 2]), name="train")
    assert str(error).startswith("train.dataset.lock (a lock) cannot be sent")


def test_the_place_in_a_list_that_cannot_be_sent_is_named():
    error = explain_unpicklable([(1, 2), (3, threading.Lock())], name="train")
    assert str(error).startswith("train[1][1] (a lock) cannot be sent")


def test_the_key_of_a_dictionary_that_cannot_be_sent_is_named():
    error = explain_unpicklable({"accuracy": len, "f1": threading.Lock()}, name="metrics")
    assert str(error).startswith("metrics['f1'] (a lock) cannot be sent")


def test_the_way_out_of_what_cannot_be_sent_is_told():
    error = explain_unpicklable(LockedModel(), name="model")
    assert str(error).endswith("Remove it from model, or create it inside the method that uses it")


def test_what_cannot_be_sent_is_a_shipping_error():
    assert type(explain_unpicklable(threading.Lock(), name="loss")) is ShippingError


def test_nothing_is_explained_about_what_can_be_sent():
    assert explain_unpicklable(nn.Linear(2, 2), name="model") is None


# earlier versions ------------------------------------------------------------------------------------


NAMED_BY_PICKLES = {
    "dnb.inputs": ["accuracy"],
    "dnb.planning.calling": ["arguments_of"],
    "dnb.planning.sample_order": ["BatchOrder"],
    "dnb.rehearsal.fitting": ["AsFloat32"],
    "dnb.transport.hooks": ["GradientHooks", "set_gradient_hooks", "set_optimizer"],
    "dnb.transport.job": ["Data", "DataSource", "Job", "Sum"],
    "dnb.transport.module_reducers": ["_fill", "_load_script", "_make_unfilled"],
    "dnb.transport.own_code": [
        "_attribute_of", "_globals_of", "_imported", "_make_lru_cache", "_module_of", "_set_class_state",
    ],
    "dnb.transport.own_generators": ["OwnGenerators"],
    "dnb.transport.parcels": ["_rebuild_tensor"],
    "dnb.transport.returned": ["ReturnError"],
    "dnb.transport.stateful_metrics": ["StatefulMetric"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in NAMED_BY_PICKLES for name in NAMED_BY_PICKLES[module]]
)
def test_what_a_pickle_of_before_names_is_found_where_it_is_now(module: str, name: str):
    found = unpack(f"c{module}\n{name}\n.".encode(), NOTHING)
    assert found.__name__ == name


def test_every_module_that_has_moved_is_looked_at():
    assert NAMED_BY_PICKLES.keys() - MOVED_MODULES.keys() == {"dnb.planning.sample_order"}
    assert MOVED_MODULES.keys() <= NAMED_BY_PICKLES.keys()
