"""Numbers that are not finite, replaced parameters, too little memory: all are told, and the pool is unharmed."""

import asyncio
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import dnb
from dnb.errors import RunError
from tests.engines.pools import open_small_pool, wait, wait_until
from tests.models import digits, largest_gap, largest_relative_gap, mlp, plain_run, twice

pytestmark = [pytest.mark.engines, pytest.mark.faults]

FAULTY_STEP = 4
FAULTY_PLACE = 40  # in a batch of 64: shard 31 of 48, two samples in each that is not empty, on the second engine


@pytest.fixture
def pool(shared, tmp_path, monkeypatch):
    """The shared pool, which still trains after the test."""
    monkeypatch.chdir(tmp_path)
    pool = shared.of(2)
    yield pool
    shared.calm()
    model, plain = twice(mlp)
    run = wait(pool.fit(model, digits(), loss="cross_entropy", lr=1e-3, steps=3, name="afterwards"))
    assert largest_gap(run.history["loss"], plain_run(plain, digits(), num_steps=3).losses) < 1e-10


class Rooted(nn.Module):
    """A root whose slope at 0 is infinite, of a parameter that only marked samples use.

    Args:
        slope: 0 or 1, times which the infinite slope is taken: NaN, or infinity.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.body = nn.Linear(64, 10)
        self.root = nn.Parameter(torch.zeros(3))
        self.slope = slope

    def forward(self, inputs: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
        output = self.body(inputs)
        if marked.any():
            output = output + (self.root * self.slope).sqrt().sum() * torch.eye(10)[0]
        return output


def marked_digits(num_samples=64 * 8):
    """Inputs, a mark at one sample, targets."""
    inputs, targets = digits(num_samples)
    marks = torch.zeros(num_samples, dtype=torch.bool)
    marks[(FAULTY_STEP - 1) * 64 + FAULTY_PLACE] = True
    return inputs, marks, targets


def unmarked_step(model, batch):
    inputs, _, targets = batch
    return nn.functional.cross_entropy(model.body(inputs), targets)


def train(pool, model, data=None, **options):
    data = marked_digits() if data is None else data
    return pool.fit(model, data, **{"loss": "cross_entropy", "lr": 1e-3, "shuffle": False, **options})


# Numbers that are not finite


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"micro_batch": 5}, {"clip_norm": 1.0}], ids=str)
@pytest.mark.parametrize(
    ("slope", "kind", "transport"), [(0.0, "NaN", "memory"), (1.0, "inf", "memory"), (0.0, "NaN", "socket")]
)
def test_a_gradient_that_is_not_finite_pauses_the_run_before_it_is_applied(pool, slope, kind, transport, options):
    model, plain = Rooted(slope), Rooted(slope)
    plain.load_state_dict(model.state_dict())
    run = train(pool, model, steps=8, transport=transport, **options)
    shard = FAULTY_PLACE * 4 // 64 if "exact" in options else 31
    place = rf"engine {pool.engines[1].id}, shard {shard}: the gradient of 'root' is {kind}"
    with pytest.raises(RunError, match=rf"paused at step {FAULTY_STEP}: .*not finite.*{place}"):
        wait(run)
    assert (run.status, run.step) == ("paused", FAULTY_STEP - 1)
    clip_norm = options.get("clip_norm")
    seen = plain_run(plain, marked_digits(), num_steps=3, step=unmarked_step, shuffle=False, clip_norm=clip_norm)
    assert largest_gap(run.history["loss"], seen.losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


def test_stop_keeps_what_was_trained_before_a_number_was_not_finite(pool):
    model = Rooted(0.0)
    run = train(pool, model, steps=8)
    with pytest.raises(RunError, match=f"paused at step {FAULTY_STEP}"):
        wait(run)
    kept = [parameter.clone() for parameter in model.parameters()]
    run.stop()
    wait_until(run, lambda run: run.status == "stopped", what="the run has stopped")
    assert run.status == "stopped"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))


def test_a_run_that_paused_by_itself_may_be_stopped_and_waited_for(pool):
    run = train(pool, Rooted(0.0), steps=8)
    with pytest.raises(RunError, match=f"paused at step {FAULTY_STEP}"):
        wait(run)
    run.stop()
    assert wait(run).status == "stopped"


def test_a_step_that_is_not_finite_is_tried_again_with_the_same_samples(pool):
    run = train(pool, Rooted(0.0), steps=8)
    for _ in range(2):
        with pytest.raises(RunError, match=rf"paused at step {FAULTY_STEP}: .*shard 31: the gradient of 'root' is NaN"):
            wait(run)
        run.resume()
    with pytest.raises(RunError, match=rf"paused at step {FAULTY_STEP}"):
        wait(run)
    assert run.step == FAULTY_STEP - 1


def test_a_loss_that_is_nan_names_engine_and_shard_and_changes_nothing(pool):
    inputs, targets = digits(64 * 8)
    inputs = inputs.clone()
    inputs[(FAULTY_STEP - 1) * 64 + FAULTY_PLACE] = float("nan")
    model, plain = twice(mlp)
    run = train(pool, model, (inputs, targets), steps=8)
    place = rf"engine {pool.engines[1].id}, shard 31"
    with pytest.raises(RunError, match=rf"paused at step {FAULTY_STEP}: the loss is nan .*{place}"):
        wait(run)
    plain_run(plain, (inputs, targets), num_steps=3, shuffle=False)
    assert largest_relative_gap(model, plain) < 1e-10


# Parameters that user code replaces


class Meddling:
    """Does something to the model at one step, in every engine."""

    def __init__(self, change) -> None:
        self.change = change

    def __call__(self, model, batch):
        inputs, marks, targets = batch
        if marks.any():
            self.change(model)
        return nn.functional.cross_entropy(model(inputs), targets)


def replace_parameter(model):
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def replace_module(model):
    model[0] = nn.Linear(64, 128)


def change_shape(model):
    model[2].weight.data = torch.zeros(7, 128)


def replace_data(model):
    model[0].weight.data = model[0].weight.data.clone()


@pytest.mark.parametrize("transport", ["memory", "socket"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replace_parameter, r"'2\.weight' of shape \(10, 128\) was replaced"),
        (replace_module, r"'0\.(weight|bias)' of shape .* was replaced"),
        (change_shape, r"'2\.weight' of shape \(10, 128\) was replaced .* now has shape \(7, 128\)"),
    ],
)
def test_a_parameter_that_is_replaced_in_mid_run_is_named(pool, transport, change, told):
    run = train(pool, mlp(), loss=None, step=Meddling(change), transport=transport)
    with pytest.raises(RunError, match=rf"paused at step {FAULTY_STEP}: ModelChangedError: parameter {told}"):
        wait(run)


def test_a_parameter_whose_memory_is_replaced_is_told_when_copies_are_compared(pool):
    run = train(pool, mlp(), loss=None, step=Meddling(replace_data), steps=30)
    with pytest.raises(RunError, match=r"0\.weight"):
        wait(run)
    assert run.step < 30


# Memory that does not suffice


class Hungry:
    """In some processes asks for more memory than there is when a batch is larger than so many samples."""

    def __init__(self, limit: int, pids: list[int]) -> None:
        self.limit = limit
        self.pids = pids

    def __call__(self, model, batch):
        *inputs, targets = batch
        loss = nn.functional.cross_entropy(model(*inputs), targets)
        if len(targets) > self.limit and os.getpid() in self.pids and model.training:
            torch.empty(10**15)
        return loss


@pytest.mark.parametrize("options", [{}, {"transport": "socket"}, {"micro_batch": 20}], ids=str)
def test_out_of_memory_in_one_engine_leads_to_smaller_micro_batches_with_the_same_losses(pool, options):
    hungry = pool.engines[1]
    model, plain = twice(mlp)
    run = wait(train(pool, model, digits(), loss=None, step=Hungry(6, [hungry.pid]), steps=6, **options))
    seen = plain_run(plain, digits(), num_steps=6, shuffle=False)
    assert largest_gap(run.history["loss"], seen.losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10
    told = [event.text for event in run.events if event.kind == "memory"]
    most = {20: "10 samples at once: goes on with 5", None: "8 samples at once: goes on with 4"}
    assert told == [f"engine {hungry.id}: out of memory with {most[options.get('micro_batch')]}"]


def test_when_not_even_one_sample_fits_the_run_pauses_with_the_size_that_was_asked_for(pool):
    run = train(pool, mlp(), digits(), loss=None, step=Hungry(0, [pool.engines[0].pid]), steps=6)
    with pytest.raises(RunError, match=r"not even one sample fits: .*8000000000000000 bytes"):
        wait(run)


def test_an_exact_run_that_is_out_of_memory_names_shard_and_size(pool):
    run = train(pool, mlp(), digits(), loss=None, step=Hungry(6, [pool.engines[0].pid]), steps=6, exact=True)
    with pytest.raises(RunError, match=r"shard 0 with 16 samples does not fit: .*8000000000000000 bytes"):
        wait(run)


# Shards that do not divide the batch


class Local(nn.Module):
    """A model whose output depends on the process that computes it: on its environment."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs) * float(os.environ.get("DNB_TEST_SCALE", "1"))


def test_engines_whose_forward_differs_are_named_before_anything_is_trained(pool):
    model, before = twice(Local)
    view = pool.client[pool.engines[1].id]
    view.execute("import os; os.environ['DNB_TEST_SCALE'] = '1.01'", block=True)
    try:
        run = pool.fit(model, digits(), loss="cross_entropy", lr=1e-3, steps=5)
        with pytest.raises(RunError, match=r"engines disagree: for the same samples the loss is .* on engine \d+ and"):
            wait(run)
    finally:
        view.execute("del os.environ['DNB_TEST_SCALE']", block=True)
    assert run.step == 0
    assert torch.equal(model.body.weight, before.body.weight)


def spoiled_step(model, batch):
    """Where the environment says so, a frozen parameter is changed in place; not yet when the model is probed."""
    if os.environ.get("DNB_TEST_SPOIL") and torch.is_grad_enabled():
        with torch.no_grad():
            model[0].weight.data.add_(1e-3)  # no version tells it
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_copy_that_is_not_the_hub_s_is_named_by_engine_and_tensor(pool):
    model = mlp()
    model[0].weight.requires_grad_(False)
    engine = pool.engines[1].id
    view = pool.client[engine]
    view.execute("import os; os.environ['DNB_TEST_SPOIL'] = '1'", block=True)
    try:
        run = pool.fit(model, digits(), step=spoiled_step, lr=1e-3, steps=30, transport="socket")
        with pytest.raises(RunError, match=f"engine {engine}'s copy of '0.weight' is not the hub's after step 10"):
            wait(run)
    finally:
        view.execute("del os.environ['DNB_TEST_SPOIL']", block=True)
    assert run.status == "paused"
    assert run.step == 10


@pytest.mark.parametrize(
    "options", [{"shards": 7}, {"shards": 5, "exact": True}, {"shards": 1}, {"shards": 64}], ids=str
)
def test_shards_that_do_not_divide_the_batch_are_weighed_by_their_samples(pool, options):
    model, plain = twice(mlp)
    run = wait(train(pool, model, digits(), steps=30, **options))  # the 29th batch has 5 samples
    assert largest_gap(run.history["loss"], plain_run(plain, digits(), num_steps=30, shuffle=False).losses) < 1e-10
    assert largest_relative_gap(model, plain) < 1e-10


# A run that was stopped while an engine was still loading it


class SlowToOpen(Dataset):
    """On the first engine that opens its payload, comes out of it only when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notebook = os.getpid()
        os.mkfifo(folder / "reached")
        os.mkfifo(folder / "answer")

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        if os.getpid() == self.notebook:  # the rehearsal's copy
            return
        try:
            (self.folder / "opened").touch(exist_ok=False)
        except FileExistsError:
            return
        (self.folder / "reached").write_text("")
        (self.folder / "answer").read_text()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(64), 0


@pytest.mark.parametrize("name", ["same", "other"])
def test_the_late_word_of_a_stopped_run_is_not_taken_for_that_of_the_next(pool, tmp_path, monkeypatch, name):
    stopped = train(pool, mlp(), SlowToOpen(tmp_path), name="same")
    (tmp_path / "reached").read_text()
    stopped.stop()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, plain = twice(mlp)
    run = train(pool, model, digits(), steps=3, name=name)
    (tmp_path / "answer").write_text("")
    wait(run)
    assert run.status == "finished"
    assert largest_gap(run.history["loss"], plain_run(plain, digits(), num_steps=3, shuffle=False).losses) < 1e-10


# Whatever user code raises


class PanicException(BaseException):
    """Of a Rust library."""


class Mute(RuntimeError):  # noqa: N818 - short, as it is looked for in texts
    def __str__(self):
        raise PanicException("no text")


ODD = "cannot read scan\udcff.png"  # as os.fsdecode gives of a name in another encoding
LONG = "begin" + "x" * 5_000_000 + "end"
RAISED = {
    "panic": (lambda: PanicException("a Rust library panicked"), "PanicException: a Rust library panicked"),
    "cancelled": (asyncio.CancelledError, r"CancelledError:  \("),
    "interrupt": (KeyboardInterrupt, r"KeyboardInterrupt:  \("),
    "exit": (GeneratorExit, r"GeneratorExit:  \("),
    "surrogate": (lambda: ValueError(ODD), r"ValueError: cannot read scan\\udcff\.png"),
    "nul": (lambda: ValueError("a\0b"), r"ValueError: a\\x00b"),
    "mute": (Mute, r"Mute: \(its text cannot be had: __str__ raised PanicException\)"),
    "group": (lambda: BaseExceptionGroup("two", [PanicException(), Mute()]), r"BaseExceptionGroup: two \(2 sub-"),
    "long": (lambda: ValueError(LONG), r"ValueError: begin.*4,996,058 characters left out"),
}


class Raising(Dataset):
    """Digits, one of which cannot be read."""

    def __init__(self, make, sample: int) -> None:
        self.make = make
        self.sample = sample
        self.inputs, self.targets = digits(640)

    def __len__(self) -> int:
        return 640

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == self.sample and self.make is not None:
            raise self.make()
        return self.inputs[index], self.targets[index]


BAD_SAMPLE = (FAULTY_STEP - 1) * 64 + FAULTY_PLACE


def pids(pool):
    return [engine.pid for engine in pool.engines]


@pytest.mark.parametrize("transport", ["memory", "socket"])
@pytest.mark.parametrize(("make", "told"), RAISED.values(), ids=RAISED)
def test_whatever_a_sample_raises_pauses_the_run_at_it(pool, make, told, transport):
    before = pids(pool)
    run = train(pool, mlp(), Raising(make, BAD_SAMPLE), transport=transport)
    place = rf"engine {pool.engines[1].id}: shard 31, sample {BAD_SAMPLE}"
    with pytest.raises(RunError, match=rf"(?s)paused at step {FAULTY_STEP}: {told}.*{place}") as caught:
        wait(run)
    assert (run.status, run.step, pids(pool)) == ("paused", FAULTY_STEP - 1, before)
    assert len(str(caught.value)) < 60_000
    assert "__getitem__" in caught.value.remote_traceback


def test_the_whole_of_a_long_text_lies_in_the_folder_of_the_run(pool):
    run = train(pool, mlp(), Raising(RAISED["long"][0], BAD_SAMPLE))
    with pytest.raises(RunError) as caught:
        wait(run)
    (path,) = (Path(".dnb") / "runs" / run.name / "errors").iterdir()
    assert path.name == f"step-{FAULTY_STEP:06d}-engine-{pool.engines[1].id}.txt"
    assert f"the whole text is in {path.absolute()}" in str(caught.value)
    assert LONG in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


class Fragile:
    """A step function that raises at one step; a mended one does not."""

    def __init__(self, make) -> None:
        self.make = make

    def __call__(self, model, batch):
        inputs, marks, targets = batch
        if marks.any() and self.make is not None:
            raise self.make()
        return nn.functional.cross_entropy(model(inputs), targets)


def test_a_run_goes_on_with_a_mended_function_whatever_the_one_before_raised(pool):
    model, plain = twice(mlp)
    before = pids(pool)
    run = train(pool, model, loss=None, step=Fragile(RAISED["panic"][0]), steps=8)
    for name in ("interrupt", "surrogate", "mute"):
        with pytest.raises(RunError, match=f"paused at step {FAULTY_STEP}"):
            wait(run)
        run.resume(step=Fragile(RAISED[name][0]))
    with pytest.raises(RunError, match=f"paused at step {FAULTY_STEP}: Mute"):
        wait(run)
    run.resume(step=Fragile(None))
    assert wait(run).status == "finished"
    inputs, _, targets = marked_digits()
    assert (
        largest_gap(run.history["loss"], plain_run(plain, (inputs, targets), num_steps=8, shuffle=False).losses) < 1e-10
    )
    assert pids(pool) == before


class Hooked(nn.Module):
    """A model whose backward raises what is no Exception."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, inputs):
        output = self.body(inputs)
        if output.requires_grad:
            output.register_hook(panic)
        return output


def panic(*_):
    raise PanicException("in backward")


def test_a_hook_that_panics_in_backward_pauses_the_run(pool):
    run = train(pool, Hooked(), digits())
    with pytest.raises(RunError, match=r"paused at step 1: PanicException: in backward \(engine"):
        wait(run)
    assert run.status == "paused"


class Sealed(Dataset):
    """Comes out of no payload."""

    def __getstate__(self):
        return {"text": "x" * 5_000_000}

    def __setstate__(self, state):
        raise PanicException(state["text"])

    def __len__(self) -> int:
        return 640

    def __getitem__(self, index: int):
        return torch.zeros(64), 0


def test_data_that_panic_when_they_are_unpickled_fail_the_run_with_their_text(pool):
    run = train(pool, mlp(), Sealed())
    with pytest.raises(RunError, match=r"loading on engines .*: PanicException: xxx") as caught:
        wait(run)
    assert run.status == "failed"
    assert "/errors/step-000000-engine-" in str(caught.value)


def test_a_listener_that_panics_does_not_end_what_follows_the_run(pool):
    run = train(pool, mlp(), digits(), steps=20)
    run.add_listener(panic)
    assert wait(run).status == "finished"
    assert len(run.history["loss"]) == 20


# Whatever user code returns


def returning(change):
    def step(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return change(loss)

    return step


NO_LOSSES = [
    (lambda _: None, "not None"),
    (lambda loss: loss.item(), "not the float"),
    (lambda loss: loss.detach(), "without a gradient"),
    (lambda loss: loss * torch.ones(64), r"shape \(64,\): take its mean"),
    (lambda loss: (loss, loss), "in which it cannot be told"),
    (lambda loss: (loss, {"loss": 7.0}), "by other names: 'loss' cannot be the name of a metric"),
    (lambda loss: (loss, {"grad_norm": 7.0}), "by other names: 'grad_norm' cannot be the name of a metric"),
    (lambda loss: (loss, {"a\ud800": 7.0}), r"by other names: 'a\\ud800' cannot be the name of a metric"),
    (lambda loss: (loss, {("a", 1): 7.0}), "by name, such as .*, not a tuple"),
    (lambda loss: (loss, {"recall": "high"}), "metric 'recall' must be a number, not the str 'high'"),
]


@pytest.mark.parametrize("transport", ["memory", "socket"])
def test_what_a_step_may_not_return_is_told_in_words_and_nothing_is_applied(pool, transport):
    model, plain = twice(mlp)
    changes = [*NO_LOSSES, (lambda loss: loss, "")]
    run = train(pool, model, digits(), loss=None, step=returning(changes[0][0]), steps=4, transport=transport)
    for (_, told), (change, _) in itertools.pairwise(changes):
        with pytest.raises(RunError, match=rf"paused at step 1: ReturnError: .*{told}"):
            wait(run)
        assert run.step == 0
        run.resume(step=returning(change))
    assert wait(run).status == "finished"
    assert largest_gap(run.history["loss"], plain_run(plain, digits(), num_steps=4, shuffle=False).losses) < 1e-10


@pytest.mark.parametrize("shape", [lambda loss: (torch.ones(64, 10), loss), lambda loss: {"loss": loss}], ids=range(2))
def test_a_step_may_return_its_loss_as_models_do(pool, shape):
    model, plain = twice(mlp)
    run = wait(train(pool, model, digits(), loss=None, step=returning(shape), steps=4))
    assert largest_gap(run.history["loss"], plain_run(plain, digits(), num_steps=4, shuffle=False).losses) < 1e-10


def test_metrics_named_by_class_and_those_of_some_steps_only_are_in_the_history(pool):
    def step(model, batch):
        inputs, marks, targets = batch
        loss = nn.functional.cross_entropy(model(inputs), targets)
        return loss, {3: 0.5, **({"marked": 1.0} if marks.any() else {})}

    run = wait(train(pool, mlp(), loss=None, step=step, steps=6))
    assert run.history["3"] == [0.5] * 6
    assert np.isnan(run.history["marked"]).tolist() == [True, True, True, False, True, True]


def test_a_loss_that_is_no_mean_and_a_metric_that_is_no_number_are_told(pool):
    run = train(pool, mlp(), digits(), loss=lambda output, target: (output[:, 0] - target).square())
    with pytest.raises(RunError, match=r"paused at step 1: ReturnError: loss must return a tensor of one number"):
        wait(run)
    run.stop()
    run = train(pool, mlp(), digits(), metrics={"rows": lambda output, _: output.argmax(1)})
    with pytest.raises(
        RunError, match=r"paused at step 1: ReturnError: metric 'rows' must be a number, not a tensor of"
    ):
        wait(run)


def sum_on_one_engine(model, batch):
    loss = model(batch[0]).square().mean()
    return dnb.Sum(loss * len(batch[0]), len(batch[0])) if os.environ.get("DNB_TEST_SUM") else loss


def test_a_sum_on_one_engine_and_a_mean_on_another_are_not_added_up(pool):
    view = pool.client[pool.engines[1].id]
    view.execute("import os; os.environ['DNB_TEST_SUM'] = '1'", block=True)
    try:
        run = train(pool, mlp(), digits(), loss=None, step=sum_on_one_engine)
        told = f"or for none: it did on engine {pool.engines[1].id}, and not on engine {pool.engines[0].id}"
        with pytest.raises(RunError, match=rf"paused at step 1: step must return dnb\.Sum.*{told}"):
            wait(run)
    finally:
        view.execute("del os.environ['DNB_TEST_SUM']", block=True)
    assert run.step == 0


# Pipelines


def test_a_stage_that_panics_is_told_with_its_place_and_a_mended_loss_goes_on(pool):
    def bad_loss(output, target):
        raise PanicException("in the last stage") from ValueError("a cause of its own")

    before = pids(pool)
    run = train(pool, mlp(), digits(), loss=bad_loss, strategy="pipeline", steps=4)
    with pytest.raises(RunError, match=r"paused at step 1: PanicException: in the last stage .*stage 1.*samples 0, 1"):
        wait(run)
    run.resume(step=sum_on_one_engine)
    with pytest.raises(RunError, match=r"paused at step 1: PlanError: a pipeline cannot call a step function"):
        wait(run)
    run.resume(loss=lambda output, target: (output[:, 0] - target).square())
    with pytest.raises(RunError, match=r"paused at step 1: ReturnError: loss must return a tensor of one number, the"):
        wait(run)
    run.resume(loss="cross_entropy")
    assert wait(run).status == "finished"
    assert pids(pool) == before


# An error of dnb itself


def break_at(number):
    """Let the thread of this engine end with the message of a run that has this number."""
    from dnb.engine.process.session import Session

    plain, count = Session.handle_message, itertools.count(1)

    def handle_message(self, packed, raw):
        if next(count) == number:
            raise ZeroDivisionError("no user's fault")
        plain(self, packed, raw)

    Session.handle_message = handle_message


def test_an_engine_that_ends_of_an_error_of_dnb_itself_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_small_pool(2) as pool:
        broken = pool.engines[1].id
        pool.client[broken].apply_sync(break_at, 10)
        model, plain = twice(mlp)
        run = wait(train(pool, model, digits(640), steps=30))
        told = [event.text for event in run.events if event.kind == "died"]
        assert told == [f"engine {broken} ended of an error of dnb itself: ZeroDivisionError: no user's fault"]
        assert (
            largest_gap(run.history["loss"], plain_run(plain, digits(640), num_steps=30, shuffle=False).losses) < 1e-10
        )
