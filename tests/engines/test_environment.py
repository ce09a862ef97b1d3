"""Engines compute with what the notebook has now: its code, its settings, and its modules that pickle refuses."""

import importlib
import os
import sys
import warnings

import ipyparallel
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import Dataset

import dnb
from dnb.errors import ArgumentError
from tests.models import twice

pytestmark = pytest.mark.engines


def data(num_samples=128):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_samples, 6, generator=generator), torch.randint(0, 3, (num_samples,), generator=generator)


def alone(model, train, loss, *, lr=0.1, batch_size=32):
    """The losses of one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    losses = []
    for indices in dnb.batches(train, batch_size=batch_size):
        optimizer.zero_grad()
        value = loss(model(train[0][indices]), train[1][indices])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.fixture
def usernet(tmp_path, monkeypatch):
    """Writes a module beside the notebook, and imports it, or what it has become."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = set()

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        names.add(name)
        return importlib.reload(sys.modules[name]) if name in sys.modules else importlib.import_module(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


SOURCE = """
from torch import nn
SCALE = 1
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, x):
        return self.layer(x) * SCALE * {}
def loss(output, target):
    return nn.functional.cross_entropy(output, target) * {}
"""


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_a_module_that_was_edited_or_set_between_two_runs_trains_as_it_is_now(pool, usernet, transport):
    name = f"usernet_{transport}"
    train = data()

    def check(module):
        model, plain = twice(module.Net)
        run = pool.fit(model, train, loss=module.loss, optimizer="sgd", lr=0.1, batch_size=32, transport=transport)
        expected = alone(plain, train, module.loss)
        assert run.wait(60).history["loss"] == pytest.approx(expected, abs=1e-9)

    check(usernet(name, SOURCE.format(1, 1)))
    check(usernet(name, SOURCE.format(3, 10)))
    sys.modules[name].SCALE = 5
    check(sys.modules[name])


class Drawn(Dataset):
    """Every sample is a number of the data set's own generator; they are written down."""

    def __init__(self, folder):
        self.generator, self.folder = np.random.default_rng(0), str(folder)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        value = self.generator.random()
        with open(f"{self.folder}/{os.getpid()}", "a") as file:
            file.write(f"{index} {value!r}\n")
        return torch.full((6,), value), index % 3


def draws(folder):
    """By index, what engines have drawn; a set, as they all draw the same for the samples on which they must agree."""
    files = [path for path in folder.iterdir() if path.name != str(os.getpid())]
    lines = [line.split() for path in files for line in path.read_text().splitlines()]
    return {(int(index), value) for index, value in lines}


def test_no_two_engines_draw_the_same_numbers_from_a_generator_inside_a_data_set(pool, tmp_path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    pool.fit(nn.Linear(6, 3), Drawn(folder), loss="cross_entropy", batch_size=16).wait(60)
    found = draws(folder)
    # In the run every sample is drawn once, the first 8 once more before it.
    assert len(found) == 64 + 8
    assert len({value for _, value in found}) == 64 + 8


def test_an_exact_run_draws_the_same_whatever_engines_there_are(pool, tmp_path):
    found = []
    for number in range(2):
        folder = tmp_path / f"drawn{number}"
        folder.mkdir()
        torch.manual_seed(0)
        run = pool.fit(
            nn.Linear(6, 3),
            Drawn(folder),
            loss="cross_entropy",
            batch_size=16,
            exact=True,
            shards=4,
            transport={pool.engines[number].id: "socket"},
        )
        found.append((draws(folder) if run.wait(60) else None, run.history["loss"]))
    assert found[0] == found[1]


class Settings(nn.Module):
    """Its answer depends on the settings of its process, which it notes."""

    def __init__(self, path):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.path = path

    def forward(self, x):
        with open("beside.txt") as file:
            scale = float(file.read()) * float(os.environ["SCALE_OF_TEST"])
        action = next(each[0] for each in warnings.filters if each[2] is ImportWarning)
        with open(self.path, "a") as file:
            file.write(f"{torch.are_deterministic_algorithms_enabled()} {action}\n")
        return self.layer(x) @ torch.eye(3) * scale


def read_settings():
    import os

    import torch

    flags = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    return str(flags), os.getcwd(), os.environ.get("SCALE_OF_TEST")


@pytest.fixture
def deterministic(monkeypatch):
    torch.use_deterministic_algorithms(True)
    monkeypatch.setenv("SCALE_OF_TEST", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("once", ImportWarning)
        yield
    torch.use_deterministic_algorithms(False)


def test_settings_of_the_notebook_count_for_the_run_and_for_nothing_behind_it(pool, deterministic, tmp_path):
    (tmp_path / "beside.txt").write_text("2")
    look = ipyparallel.interactive(read_settings)
    before = pool.client[:].apply_sync(look)
    model, plain = twice(lambda: Settings(str(tmp_path / "notes")))
    plain.path = str(tmp_path / "own")
    run = pool.fit(model, data(), loss="cross_entropy", optimizer="sgd", lr=0.1, batch_size=32)
    expected = alone(plain, data(), nn.functional.cross_entropy)  # in float64, by a torch.eye of the default dtype
    assert run.wait(60).history["loss"] == pytest.approx(expected, abs=1e-9)
    assert set((tmp_path / "notes").read_text().splitlines()) == {"True once"}
    assert pool.client[:].apply_sync(look) == before


def test_an_environment_is_not_written_with_a_checkpoint(pool, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKEN_OF_TEST", "a-secret-word")
    pool.fit(nn.Linear(6, 3), data(), loss="cross_entropy", checkpoint_every=1, steps=2, name="kept").wait(60)
    files = [path for path in (tmp_path / ".dnb").rglob("*") if path.is_file()]
    assert any(path.name == "job.pickle" for path in files)
    assert not [path for path in files if b"a-secret-word" in path.read_bytes()]


def test_a_notebook_without_gradients_is_refused_and_the_pool_stays(pool):
    with torch.no_grad(), pytest.raises(ArgumentError, match="gradients are switched off"):
        pool.fit(nn.Linear(6, 3), data(), loss="cross_entropy")
    assert pool.fit(nn.Linear(6, 3), data(), loss="cross_entropy", steps=1).wait(60).status == "finished"


def parametrized():
    first = parametrizations.weight_norm(nn.Linear(6, 16))
    return nn.Sequential(first, nn.Tanh(), parametrizations.orthogonal(nn.Linear(16, 8)), nn.Linear(8, 3))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)))


@pytest.mark.parametrize("make", [parametrized, scripted])
@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_a_model_that_pickle_refuses_trains_and_comes_home(pool, make, transport):
    model, plain = twice(make)
    run = pool.fit(model, data(), loss="cross_entropy", optimizer="sgd", lr=0.1, batch_size=32, transport=transport)
    expected = alone(plain, data(), nn.functional.cross_entropy)
    assert run.wait(60).history["loss"] == pytest.approx(expected, abs=1e-9)
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-9)
    plain.load_state_dict(model.state_dict())


def talking_step(model, batch):
    sys.stdout.write(f"hello from {len(batch[0])}\n")
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_what_user_code_prints_on_engines_is_shown_by_who_waits(pool, capsys, transport):
    run = pool.fit(nn.Linear(6, 3), data(), step=talking_step, batch_size=32, steps=3, shards=2, transport=transport)
    run.wait(60)
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("engine")] == run.output
    assert run.output.count(f"engine {pool.engines[0].id}: hello from 16") >= 3
    assert {event.kind for event in run.events if "hello" in event.text} == {"output", "repeated"}
    written = (run.folder / "output.log").read_text().splitlines()
    assert [
        f"{line.split(' ', 2)[2].partition(' step ')[0]}: {line.split(': ', 1)[1]}" for line in written
    ] == run.output


def test_an_optimizer_of_an_edited_module_is_in_the_hub_as_it_is_now(pool, usernet):
    source = "import torch\nRATE = {}\ndef make(parameters):\n    return torch.optim.SGD(parameters, RATE)"
    for rate in (0.1, 0.5):
        make = usernet("user_optimizer", source.format(rate)).make
        run = pool.fit(nn.Linear(6, 3), data(), loss="cross_entropy", optimizer=make, steps=2)
        assert run.wait(60).history["lr"] == [rate, rate]
