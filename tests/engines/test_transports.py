"""Shared memory, sockets, or both in one run: the same numbers."""

import ipyparallel
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dnb.api.runs.run_folders import RUNS_FOLDER
from dnb.errors import ArgumentError
from dnb.transport.sockets.wire_connections import WIRES_VARIABLE
from tests.engines.pools import open_small_pool, wait
from tests.engines.test_fit import weighted_step
from tests.models import DigitRows, batch_norm_net, digits, mlp, twice

pytestmark = [pytest.mark.engines, pytest.mark.float32]


def train(pool, model, data=None, **options):
    data = digits() if data is None else data
    return wait(pool.fit(model, data, **{"loss": "cross_entropy", "lr": 1e-3, "steps": 12, "shards": 2, **options}))


def large_net():
    """3.2 million parameters: 12.8 MB, so that gradients and parameters travel in several pieces."""
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 3000), nn.ReLU(), nn.Linear(3000, 10))


def same_bits(left, right):
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_every_transport_and_both_together_give_the_same_losses(pool):
    first = pool.engines[0].id
    wishes = ["memory", "socket", {first: "socket"}, {first: "memory", "": "socket"}, None]
    losses = [train(pool, mlp(), transport=wish).history["loss"] for wish in wishes]
    assert losses == [losses[0]] * len(wishes)


@pytest.mark.parametrize("exact", [False, True])
def test_a_model_of_several_pieces_comes_to_the_same_bits_over_a_socket(pool, exact):
    by_memory, by_socket = twice(large_net)
    runs = [
        train(pool, model, steps=4, exact=exact, transport=wish)
        for model, wish in ((by_memory, "memory"), (by_socket, "socket"))
    ]
    assert runs[0].history["loss"] == runs[1].history["loss"]
    assert same_bits(by_memory, by_socket)


def test_micro_batches_of_a_model_of_several_pieces_come_to_the_same_bits_over_a_socket(pool):
    by_memory, by_socket = twice(large_net)
    for model, wish in ((by_memory, "memory"), (by_socket, "socket")):
        train(pool, model, steps=3, micro_batch=13, transport=wish)
    assert same_bits(by_memory, by_socket)


def test_a_data_set_of_the_user_s_own_travels_over_a_socket(pool):
    options = {"loss": None, "step": weighted_step, "steps": 8, "exact": True}
    histories = [
        train(pool, mlp(), DataLoader(DigitRows(), 50, shuffle=True), transport=wish, **options).history
        for wish in ("memory", "socket")
    ]
    assert histories[1]["loss"] == histories[0]["loss"]
    assert histories[1]["half"] == [0.5] * 8


def test_validation_metrics_and_buffers_come_over_a_socket(pool):
    by_memory, by_socket = twice(batch_norm_net)
    options = {"val": digits(201), "metrics": "accuracy", "steps": None, "batch_size": 256, "epochs": 2, "exact": True}
    runs = [
        train(pool, model, transport=wish, **options) for model, wish in ((by_memory, "memory"), (by_socket, "socket"))
    ]
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "digest"):
        assert runs[1].history[name] == runs[0].history[name]
    assert len(runs[1].history["val_loss"]) == 2
    assert same_bits(by_memory, by_socket)


def test_runs_may_change_from_one_transport_to_the_other_and_back(pool):
    model, same = twice(mlp)
    for wish in ("socket", "memory", "socket"):
        train(pool, model, steps=5, transport=wish)
        train(pool, same, steps=5, transport="memory")
    assert same_bits(model, same)


@pytest.mark.parametrize("transport", ["sokcet", {0: "sokcet"}], ids=str)
def test_a_word_that_is_no_transport_is_refused_with_the_nearest(pool, transport):
    with pytest.raises(ArgumentError, match="no transport 'sokcet': did you mean 'socket'"):
        pool.fit(mlp(), digits(), loss="cross_entropy", transport=transport)
    assert not RUNS_FOLDER.exists()


def note_wires():
    """Let an engine remember the wires that it opens."""
    from dnb.engine.process import worker

    worker.opened = []
    connect = worker.connect_wire

    def noted(*arguments, **options):
        worker.opened.append(connect(*arguments, **options))
        return worker.opened[-1]

    worker.connect_wire = noted


def sealed_wires():
    from dnb.engine.process import worker

    return [wire.is_sealed for wire in worker.opened]


@pytest.mark.parametrize("wires", ["tcp", "sealed"])
def test_tcp_carries_the_same_bits_as_the_unix_socket_also_sealed(pool, tmp_path, monkeypatch, wires):
    by_unix, by_tcp = twice(large_net)
    options = {"val": digits(100), "steps": 3, "transport": "socket", "exact": True}
    train(pool, by_unix, **options)
    monkeypatch.setenv(WIRES_VARIABLE, wires)
    with open_small_pool(1, profile_dir=tmp_path / "profile") as far:
        far.client[:].apply_sync(ipyparallel.interactive(note_wires))
        train(far, by_tcp, **options)
        assert far.client[:].apply_sync(ipyparallel.interactive(sealed_wires)) == [[wires == "sealed"]]
    assert same_bits(by_unix, by_tcp)


def hide_shared_memory():
    """As in a container of its own: the hub's memory files are not there."""
    from dnb.engine.runtime import run_memory

    def missing(ref, **_):
        raise FileNotFoundError(2, "No such file or directory", ref.path)

    run_memory.kept = run_memory.open_segment
    run_memory.open_segment = missing


def show_shared_memory():
    from dnb.engine.runtime import run_memory

    run_memory.open_segment = run_memory.kept


def test_an_engine_that_cannot_map_the_hub_s_memory_goes_on_over_a_socket(pool):
    plain = train(pool, mlp(), transport="memory").history["loss"]
    engine = pool.engines[1].id
    view = pool.client[engine]
    view.apply_sync(ipyparallel.interactive(hide_shared_memory))
    try:
        run = train(pool, mlp())
    finally:
        view.apply_sync(ipyparallel.interactive(show_shared_memory))
    assert run.history["loss"] == plain
    told = [event.text for event in run.events if event.kind == "memory"]
    assert len(told) == 1
    assert told[0].startswith(f"engine {engine} gets its data over a socket: ")
    assert len(pool.engines) == 2
