from __future__ import annotations

import pytest
import torch

from dnb.transport.layout import dtype_name, dtype_named, plan_layout, region_views, slot_views

MIXED = [
    ("a", torch.ones(3)),
    ("b", torch.ones(2, dtype=torch.float64)),
    ("c", torch.ones(2, 2)),
    ("d", torch.tensor(5)),
]


def places(tensors: list[tuple[str, torch.Tensor]], **options: int) -> dict[str, int]:
    return {slot.name: slot.offset_bytes for slot in plan_layout(tensors, **options).slots}


def test_tensors_of_one_dtype_are_neighbours():
    assert [slot.name for slot in plan_layout(MIXED).slots] == ["a", "c", "b", "d"]


def test_every_tensor_is_aligned_to_a_cache_line():
    assert places(MIXED) == {"a": 0, "c": 64, "b": 128, "d": 192}


def test_a_tensor_of_one_and_a_half_lines_takes_two():
    assert places([("a", torch.ones(24)), ("b", torch.ones(1))]) == {"a": 0, "b": 128}


def test_a_layout_may_start_behind_another():
    assert places([("a", torch.ones(1))], start_bytes=100) == {"a": 128}


def test_the_size_of_a_layout_counts_from_the_start_of_the_buffer():
    assert plan_layout([("a", torch.ones(1))], start_bytes=128).num_bytes == 192


def test_a_layout_of_nothing_is_as_large_as_what_lies_before():
    assert plan_layout([], start_bytes=128).num_bytes == 128


def test_there_is_one_region_per_dtype():
    regions = [(region.dtype, region.offset_bytes, region.num_elements) for region in plan_layout(MIXED).regions]
    assert regions == [("float32", 0, 32), ("float64", 128, 8), ("int64", 192, 8)]


def test_views_have_shape_and_dtype_of_their_tensors():
    layout = plan_layout(MIXED)
    views = slot_views(layout, bytearray(layout.num_bytes))
    assert {name: (view.shape, view.dtype) for name, view in views.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in MIXED
    }


def test_views_of_one_buffer_share_it():
    layout = plan_layout(MIXED)
    memory = bytearray(layout.num_bytes)
    slot_views(layout, memory)["c"].fill_(3.0)
    assert slot_views(layout, memory)["c"].tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_views_do_not_overlap():
    layout = plan_layout(MIXED)
    views = slot_views(layout, bytearray(layout.num_bytes))
    for value, view in enumerate(views.values()):
        view.fill_(value)
    assert [view.flatten()[0].item() for view in views.values()] == [0, 1, 2, 3]


def test_a_region_is_all_tensors_of_its_dtype():
    layout = plan_layout(MIXED)
    memory = bytearray(layout.num_bytes)
    region_views(layout, memory)[0].fill_(2.0)
    views = slot_views(layout, memory)
    assert (views["a"].sum().item(), views["c"].sum().item(), views["b"].sum().item()) == (6.0, 8.0, 0.0)


def test_a_tensor_without_elements_has_a_view():
    layout = plan_layout([("a", torch.empty(0, 3)), ("b", torch.ones(2))])
    assert slot_views(layout, bytearray(layout.num_bytes))["a"].shape == (0, 3)


def test_a_region_without_elements_has_a_view():
    layout = plan_layout([("a", torch.empty(0, 3))])
    assert region_views(layout, bytearray(1))[0].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_a_dtype_is_found_by_its_name(dtype: torch.dtype):
    assert dtype_named(dtype_name(dtype)) is dtype


@pytest.mark.parametrize("name", ["float33", "nn", "Tensor"])
def test_a_name_that_is_no_dtype_is_refused(name: str):
    with pytest.raises(ValueError, match=f"'{name}' is not a torch dtype"):
        dtype_named(name)
