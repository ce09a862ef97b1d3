import torch
from torch import nn

from dnb.partitioning.pipeline.memory_estimate import needs_of, num_held, whole_need
from dnb.partitioning.pipeline.stage_builder import divide
from dnb.partitioning.pipeline.tracing import Inputs
from dnb.protocol.run import Partition

BATCH = (torch.zeros(16, 64), torch.zeros(16, dtype=torch.int64))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def pipeline(schedule: str, *, num_stages: int = 2, num_engines: int = 2) -> Partition:
    cuts = ("2",) if num_stages == 2 else ("1", "2", "3")
    return Partition(
        kind="pipeline",
        num_engines=num_engines,
        num_stages=num_stages,
        cuts=cuts,
        schedule=schedule,  # type: ignore[arg-type]
        num_micro_batches=4,
    )


def test_a_whole_model_needs_parameters_gradients_and_what_autograd_keeps():
    need = whole_need(model(), Inputs.of(BATCH))
    parameters = 4 * (64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10)
    # the inputs, and what each ReLU gives
    assert (need.parameter_bytes, need.gradient_bytes) == (parameters, parameters)
    assert need.activation_bytes == 4 * 16 * (64 + 256 + 256)


def test_frozen_parameters_need_no_gradients():
    frozen = model()
    frozen[0].requires_grad_(False)
    need = whole_need(frozen, Inputs.of(BATCH))
    assert need.parameter_bytes - need.gradient_bytes == 4 * (64 * 256 + 256)


def test_the_stages_need_together_what_the_model_needs():
    whole, divided = model(), pipeline("1f1b")
    needs = needs_of(whole, divide(whole, divided, Inputs.of(BATCH)), divided, Inputs.of(BATCH), num_micro_batches=1)
    assert sum(need.parameter_bytes for need in needs) == whole_need(whole, Inputs.of(BATCH)).parameter_bytes
    assert needs[0].activation_bytes == 4 * 16 * (64 + 256)
    assert needs[1].activation_bytes == 4 * 16 * (256 + 256)  # what it is given, and its own ReLU


def test_gpipe_holds_all_micro_batches_and_1f1b_those_that_are_on_their_way():
    whole = model()
    held = {}
    for schedule in ("gpipe", "1f1b"):
        divided = pipeline(schedule)
        parts = divide(whole, divided, Inputs.of(BATCH))
        needs = needs_of(whole, parts, divided, Inputs.of(BATCH), num_micro_batches=4)
        held[schedule] = [need.activation_bytes / (4 * 16) for need in needs]
    assert held["gpipe"] == [4 * 320, 4 * 512]
    assert held["1f1b"] == [2 * 320, 512]


def test_an_interleaved_engine_holds_the_warm_up_of_megatron():
    divided = pipeline("interleaved", num_stages=4)
    assert [num_held(divided, rank, 4) for rank in (0, 1)] == [5, 3]


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x) if x.sum().item() > 0 else self.layer(-x)


def test_a_model_that_looks_at_values_needs_at_least_its_parameters():
    need = whole_need(LooksAtValues(), Inputs.of(BATCH))
    assert need.activation_bytes is None
    assert need.num_bytes == 2 * 4 * (64 * 10 + 10)
