"""Losses over the whole batch, computed on outputs that several engines have given."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dnb.engine.replicas.gathered_loss import GatheringReplica
from dnb.engine.replicas.outcome import WorkResult
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.replicas.whole_batch.output_form import bytes_of
from dnb.engine.runtime.run_memory import EngineMemory, Publisher
from dnb.engine.runtime.telemetry import Stopwatch
from dnb.hub.message_checks import PeerError
from dnb.hub.parameters.master import Contribution, HubSlab, Master
from dnb.hub.run.execution.gathered_batch import MOST_BYTES, CannotGather, Gatherer
from dnb.job import Data, DataSource, Job, Sum
from dnb.planning.sample_order import BatchOrder
from dnb.planning.shards import shard_bounds
from dnb.protocol.engine_messages import Load, OutputLeaf, WireOffer, Work, WorkReport
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import RunSpec, TransportKind
from dnb.transport.sockets.wires import MAX_RECORD_BYTES, MAX_WORK_BYTES, Flat
from dnb.user_code.return_values import ReturnError

pytestmark = [pytest.mark.numeric, pytest.mark.float64]

NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)
NUM_SHARDS = 4
NUM_SAMPLES = 21
STEP = 3
functional = nn.functional

Deal = dict[int, tuple[int, ...]]  # shards by engine
TWO: Deal = {0: (0, 1), 1: (2, 3)}


class Delivery:
    """In place of an outbox and a wire."""

    def __init__(self, slabs: list[HubSlab]) -> None:
        self._slabs = slabs

    def send_pieces(self, slot: int, source: Flat, ranges: Sequence[tuple[int, int]]) -> None:
        for first, last in ranges:
            self._slabs[slot].flat.memory[first:last] = source.memory[first:last]


class Team:
    """A hub's master copy and gatherer, and engines, in one process."""

    def __init__(self, folder: Path, job: Job, data: Data, *, transport: TransportKind, **numbers: Any) -> None:
        self.job, self.data, self.transport = job, data, transport
        self.spec = RunSpec(
            id="0",
            **{
                "name": "run",
                "folder": str(folder),
                "num_samples": NUM_SAMPLES,
                "num_val_samples": NUM_SAMPLES,
                "num_steps": 1,
                "steps_per_epoch": 1,
                "batch_size": NUM_SAMPLES,
                "num_shards": NUM_SHARDS,
                "seed": 5,
                "clip_norm": None,
                "exact": False,
                "transport": {"": transport},
                "telemetry": True,
                "micro_batch": None,
                "precision": "float32",
                "linger_seconds": 1.0,
                "notes": (),
                "sys_path": (),
                "job": NOTHING,
                "data": NOTHING,
                "loss_over": "batch",
                **numbers,
            },
        )
        self.master = Master(copy.deepcopy(job), folders=[folder], prefix="run", clip_norm=None)
        self.gatherer = Gatherer()
        self.engines: dict[int, GatheringReplica] = {}
        self.memories: dict[int, EngineMemory] = {}
        self.bounds = shard_bounds(NUM_SAMPLES, num_shards=NUM_SHARDS)
        self.order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(2))
        self.sizes = tuple(last - first for first, last in self.bounds)

    def engine(self, number: int) -> GatheringReplica:
        if number not in self.engines:
            slabs = self.master.add_slabs(number, NUM_SHARDS if self.spec.exact else 1, kind=self.transport)
            load = Load(
                run="run",
                transport=self.transport,
                wire=WireOffer(url="", token=""),
                parameters=self.master.parameters_ref,
                parameter_layout=self.master.parameter_layout,
                gradient_layout=self.master.gradient_layout,
                buffer_layout=self.master.buffer_layout,
            )
            memory = self.memories[number] = EngineMemory(load)
            memory.add_slabs([slab.ref for slab in slabs])
            publisher = None
            if self.transport == "socket":
                delivery: Any = Delivery(slabs)
                publisher = Publisher(load.gradient_layout, load.buffer_layout.num_bytes, delivery)
                memory.parameters[:] = self.master.parameters_flat.memory
            self.engines[number] = GatheringReplica(
                ReplicaContext(
                    spec=self.spec,
                    job=copy.deepcopy(self.job),
                    data=self.data,
                    load=load,
                    memory=memory,
                    stopwatch=Stopwatch(),
                    publisher=publisher,
                )
            )
        return self.engines[number]

    def compute(self, kind: Any, number: int, shards: tuple[int, ...], *, fresh: bool = True) -> WorkResult:
        parts = [self.order[first:last] for first, last in (self.bounds[shard] for shard in shards)]
        work = Work(
            run="run",
            lease=1,
            kind=kind,
            step=STEP,
            shards=shards,
            shard_sizes=tuple(map(len, parts)),
            slabs=tuple(range(len(shards))) if self.spec.exact else (0,),
            batch_samples=NUM_SAMPLES,
            fresh=fresh,
            gathered=self.gatherer.of(shards) if kind == "step" else None,
        )
        engine = self.engine(number)
        if kind == "step":
            engine.take_gathered(memoryview(self.gatherer.memory))
        return engine.compute(work, torch.cat(parts))

    def gather(self, deal: Deal) -> None:
        """The first half of a step."""
        for number, shards in deal.items():
            outcome = self.compute("outputs", number, shards)
            report = _report(shards, outcome.leaves)
            *pieces, last = bytes_of(outcome.tensors)
            for piece in pieces:
                self.gatherer.add_piece(number, report.lease, memoryview(piece))
            num_samples = sum(self.sizes[shard] for shard in shards)
            self.gatherer.take(number, report, memoryview(last), num_samples=num_samples)
        indices = self.order.numpy().tobytes()
        self.gatherer.gather(sorted(deal.items()), sizes=self.sizes, indices=indices, exact=self.spec.exact)

    def step(self, deal: Deal) -> tuple[float, torch.Tensor]:
        """The second half; the loss, and the gradient as one vector."""
        contributions = []
        for number, shards in deal.items():
            outcome = self.compute("step", number, shards)
            slabs = range(len(outcome.parts))
            contributions += [
                Contribution(number, slab, shard, sums, outcome.is_sum, outcome.unused)
                for slab, shard, sums in zip(slabs, shards, outcome.parts, strict=False)
            ]
        result = self.master.commit(contributions)
        assert result.num_samples == NUM_SAMPLES
        self.metrics = result.metrics
        gradients = [p.grad.flatten() for p in self.master.model.parameters() if p.grad is not None]
        return result.loss, torch.cat(gradients)

    def close(self) -> None:
        self.master.drop_slabs()
        self.master.close()


def _report(shards: tuple[int, ...], leaves: tuple[OutputLeaf, ...]) -> WorkReport:
    return WorkReport(
        run="run",
        lease=1,
        kind="outputs",
        step=STEP,
        shards=shards,
        parts=(),
        is_sum=False,
        unused=(),
        telemetry=None,
        outputs=leaves,
    )


@pytest.fixture(params=["memory", "socket"])
def team_of(tmp_path: Path, request: pytest.FixtureRequest):
    made: list[Team] = []

    def make(model: nn.Module, loss: Any, *, samples: Any = None, metrics: Any = None, **numbers: Any) -> Team:
        source = DataSource(samples=samples or embeddings_data(), collate=None)
        job = Job(
            model=model,
            loss=loss,
            step=None,
            metrics=metrics or {},
            optimizer="sgd",
            lr=0.1,
            scheduler=None,
            order=BatchOrder(num_samples=NUM_SAMPLES, batch_size=NUM_SAMPLES),
        )
        made.append(Team(tmp_path, job, Data(train=source, val=source), transport=request.param, **numbers))
        return made[-1]

    yield make
    for team in made:
        team.close()


MakeTeam = Callable[..., Team]


def embeddings_data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(NUM_SAMPLES, 6, generator=generator)
    return pixels, torch.randint(0, 4, (NUM_SAMPLES,), generator=generator)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


class TwoTowers(nn.Module):
    """Two embeddings of each sample, and a temperature that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = encoder(), encoder()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        left, right = self.left(pixels), self.right(pixels.flip(1))
        return {"left": left, "right": right, "scale": self.scale.exp()}


def two_towers() -> nn.Module:
    torch.manual_seed(0)
    return TwoTowers()


def clip_loss(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    left = functional.normalize(output["left"], dim=1)
    right = functional.normalize(output["right"], dim=1)
    logits = output["scale"] * left @ right.t()
    here = torch.arange(len(logits))
    return (functional.cross_entropy(logits, here) + functional.cross_entropy(logits.t(), here)) / 2


def supervised_contrastive(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    near = functional.normalize(output, dim=1)
    logits = near @ near.t() / 0.5
    others = ~torch.eye(len(output), dtype=torch.bool)
    log_shares = logits - logits.masked_fill(~others, -math.inf).logsumexp(1, keepdim=True)
    same = (target[:, None] == target[None]) & others
    return -(log_shares * same).sum(1)[same.any(1)].div(same.sum(1)[same.any(1)]).mean()


def root_mean_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - functional.one_hot(target, 4)).square().mean().sqrt()


def ranking(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    score = output[:, 0]
    is_above = target[:, None] > target[None]
    return functional.softplus(score[None] - score[:, None])[is_above].mean()


def dice(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    shares, wanted = output.softmax(1), functional.one_hot(target, 4)
    return 1 - ((2 * (shares * wanted).sum(0) + 1) / ((shares + wanted).sum(0) + 1)).mean()


def masked(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Over the samples that are among the harder half of the batch."""
    losses = functional.cross_entropy(output, target, reduction="none")
    return losses[losses >= losses.median()].mean()


def changing_its_input(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.sub_(output.mean(0)).square().mean().sqrt()


def weighed(output: torch.Tensor, target: torch.Tensor) -> Sum:
    weights = (output.detach().norm(dim=1) > output.detach().norm(dim=1).mean()).to(output.dtype)
    return Sum((functional.cross_entropy(output, target, reduction="none") * weights).sum(), float(weights.sum()))


LOSSES = {
    "InfoNCE of two towers with a learned temperature": (two_towers, clip_loss),
    "supervised contrastive": (encoder, supervised_contrastive),
    "root of a mean": (encoder, root_mean_square),
    "ranking": (encoder, ranking),
    "Dice": (encoder, dice),
    "a masked batch": (encoder, masked),
    "one that changes what it is given": (encoder, changing_its_input),
    "a Sum over a part of the batch": (encoder, weighed),
}
NAMES = list(LOSSES)


def plain(model: nn.Module, loss: Any, order: torch.Tensor) -> tuple[float, torch.Tensor]:
    """What one process computes for the whole batch."""
    model = copy.deepcopy(model)
    pixels, target = embeddings_data()
    value = loss(model(pixels[order]), target[order])
    value = value.total / value.weight if isinstance(value, Sum) else value
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check_equal(found: tuple[float, torch.Tensor], wanted: tuple[float, torch.Tensor]) -> None:
    assert abs(found[0] - wanted[0]) < 1e-12
    assert float((found[1] - wanted[1]).norm() / wanted[1].norm()) < 1e-10


# one step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_the_whole_batch(team_of: MakeTeam, name: str):
    make, loss = LOSSES[name]
    team = team_of(make(), loss)
    team.gather(TWO)
    check_equal(team.step(TWO), plain(make(), loss, team.order))


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_micro_batches_go_through_forward_twice_and_come_to_the_same(team_of: MakeTeam, name: str, micro_batch: int):
    make, loss = LOSSES[name]
    team = team_of(make(), loss, micro_batch=micro_batch)
    team.gather(TWO)
    check_equal(team.step(TWO), plain(make(), loss, team.order))


@pytest.mark.parametrize(
    "deal",
    [{0: (0, 1, 2, 3)}, {1: (0, 1, 2, 3)}, {0: (2, 3), 1: (0, 1)}, {0: (0, 1, 3), 1: (2,)}, {0: (1, 2), 2: (0, 3)}],
    ids=["one is gone", "the other is gone", "exchanged", "one has lost a part", "nobody has its own"],
)
def test_whoever_gets_shards_whose_outputs_others_gave_computes_them_again(team_of: MakeTeam, deal: Deal):
    team = team_of(two_towers(), clip_loss)
    team.gather(TWO)
    check_equal(team.step(deal), plain(two_towers(), clip_loss, team.order))


def test_an_engine_may_give_outputs_in_two_parts(team_of: MakeTeam):
    team = team_of(encoder(), supervised_contrastive)
    parts = [(0,), (1, 2, 3)]
    for shards in parts:
        outcome = team.compute("outputs", 0, shards, fresh=shards == (0,))
        raw = memoryview(b"".join(bytes_of(outcome.tensors)))
        num_samples = sum(team.sizes[shard] for shard in shards)
        team.gatherer.take(0, _report(shards, outcome.leaves), raw, num_samples=num_samples)
    indices = team.order.numpy().tobytes()
    team.gatherer.gather([(0, shards) for shards in parts], sizes=team.sizes, indices=indices, exact=False)
    found = team.step({0: (0, 1, 2, 3)})
    check_equal(found, plain(encoder(), supervised_contrastive, team.order))


def dropout_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 4))


@pytest.mark.parametrize("deal", [{0: (0, 1, 2, 3)}, {0: (3, 1), 1: (0, 2)}, TWO], ids=str)
def test_exact_bits_do_not_depend_on_who_computes_what(team_of: MakeTeam, deal: Deal):
    first = team_of(dropout_net(), supervised_contrastive, exact=True)
    first.gather(TWO)
    wanted = first.step(TWO)
    team = team_of(dropout_net(), supervised_contrastive, exact=True)
    team.gather({0: (0, 2), 1: (1, 3)})
    found = team.step(deal)
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])
    mine, theirs = team.master.model.state_dict(), first.master.model.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_a_forward_that_is_computed_again_draws_the_same_random_numbers(team_of: MakeTeam):
    results = []
    for deal in (TWO, {0: (0,), 1: (1, 2, 3)}):
        team = team_of(nn.Sequential(encoder(), nn.Dropout(0.5)), root_mean_square)
        team.gather(TWO)
        results.append(team.step(deal))
    check_equal(results[1], results[0])


def test_buffers_are_written_once(team_of: MakeTeam):
    team = team_of(dropout_net(), supervised_contrastive)
    team.gather(TWO)
    team.step(TWO)
    assert team.master.model[1].num_batches_tracked.item() == 1
    pixels, _ = embeddings_data()
    hidden = dropout_net()[0](pixels[team.order])
    halves = [hidden[: team.bounds[2][0]], hidden[team.bounds[2][0] :]]
    mean = sum(len(half) * half.mean(0) for half in halves) / NUM_SAMPLES
    assert torch.allclose(team.master.model[1].running_mean, 0.1 * mean)


def test_metrics_are_of_the_whole_batch(team_of: MakeTeam):
    def spread(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.std()

    team = team_of(encoder(), root_mean_square, metrics={"spread": spread})
    team.gather(TWO)
    team.step(TWO)
    assert team.metrics["spread"] == pytest.approx(encoder()(embeddings_data()[0]).std().item(), rel=1e-12)


def test_too_little_memory_for_a_half_takes_smaller_pieces_of_it(team_of: MakeTeam):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if len(pixels) > 6:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return self.inner(pixels)

    team = team_of(Small(), supervised_contrastive)
    team.gather(TWO)
    check_equal(team.step(TWO), plain(encoder(), supervised_contrastive, team.order))


def test_a_validation_batch_has_a_loss_of_its_own(team_of: MakeTeam):
    team = team_of(encoder(), root_mean_square, batch_size=8, micro_batch=3)
    engine = team.engine(0)
    work = Work(
        run="run",
        lease=1,
        kind="evaluation",
        step=1,
        shards=(0, 1),
        shard_sizes=(8, 13),
        slabs=(0,),
        batch_samples=NUM_SAMPLES,
        fresh=True,
    )
    sums = engine.compute(work, torch.arange(NUM_SAMPLES)).parts[0]
    pixels, target = embeddings_data()
    losses = [
        root_mean_square(encoder()(pixels[a:b]), target[a:b]).item() * (b - a) for a, b in ((0, 8), (8, 16), (16, 21))
    ]
    assert sums.loss_total == pytest.approx(sum(losses), rel=1e-12)


# what cannot be gathered -----------------------------------------------------------------------------


def test_views_one_after_the_other_are_refused_as_their_rows_would_be_mixed_up(team_of: MakeTeam):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.cat([pixels, pixels.flip(1)]))

    team = team_of(Views(), lambda output, _: output.std())
    with pytest.raises(ReturnError, match=r"of shape \(6, 4\).* of shape \(4, 4\).*\(samples, views, features\)"):
        team.gather(TWO)


def test_an_output_without_rows_that_depends_on_the_samples_is_refused(team_of: MakeTeam):
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output = self.inner(pixels)
            return output, output.mean()

    team = team_of(Mean(), lambda output, _: output[0].std() + output[1])
    team.gather(TWO)
    with pytest.raises(ReturnError, match="which has no row for each sample, depends on the samples"):
        team.step(TWO)


def test_what_is_no_tensor_is_refused_by_its_kind(team_of: MakeTeam):
    class Box:
        pass

    class Boxed(nn.Module):
        def forward(self, pixels: torch.Tensor) -> Any:
            return Box()

    model = nn.Sequential(encoder(), Boxed())
    with pytest.raises(ReturnError, match=r"must be dense tensors.*not Box"):
        team_of(model, root_mean_square).gather(TWO)


# the hub's part --------------------------------------------------------------------------------------


def leaf(*shape: int, dtype: str = "float64", has_rows: bool = True) -> OutputLeaf:
    return OutputLeaf(dtype=dtype, shape=shape, has_rows=has_rows)


def raw_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(b"".join(bytes_of([tensor])))


def test_rows_come_into_the_order_of_shards_whoever_had_which():
    gatherer = Gatherer()
    rows = torch.arange(8.0).view(4, 2)
    gatherer.take(0, _report((1,), (leaf(1, 2),)), raw_of(rows[1:2]), num_samples=1)
    gatherer.take(1, _report((0, 2), (leaf(3, 2),)), raw_of(rows[[0, 2, 3]]), num_samples=3)
    gatherer.gather([(0, (1,)), (1, (0, 2))], sizes=(1, 1, 2), indices=bytes(32), exact=False)
    assert torch.equal(torch.frombuffer(bytearray(gatherer.memory)[64:], dtype=torch.float64).view(4, 2), rows)
    assert gatherer.of((2,)).groups == ((0, 2),)
    assert gatherer.of((1, 2)).leaves == (leaf(4, 2),)


def test_parts_of_different_shape_are_refused_with_the_way_out():
    gatherer = Gatherer()
    gatherer.take(0, _report((0,), (leaf(1, 2),)), raw_of(torch.zeros(1, 2)), num_samples=1)
    gatherer.take(1, _report((1,), (leaf(1, 3),)), raw_of(torch.zeros(1, 3)), num_samples=1)
    with pytest.raises(CannotGather, match=r"shape \(1, 2\).*shape \(1, 3\).*Pad all samples to one length"):
        gatherer.gather([(0, (0,)), (1, (1,))], sizes=(1, 1), indices=bytes(16), exact=False)


@pytest.mark.parametrize(
    "told",
    [leaf(2, 2), leaf(1, 3), leaf(1, 2, dtype="object"), leaf(-1, -2, has_rows=False)],
    ids=["rows", "bytes", "dtype", "shape"],
)
def test_outputs_that_cannot_be_are_refused(told: OutputLeaf):
    with pytest.raises(PeerError):
        Gatherer().take(0, _report((0,), (told,)), raw_of(torch.zeros(1, 2)), num_samples=1)


def test_what_is_gathered_fits_behind_the_records_that_carry_it():
    assert MOST_BYTES < MAX_WORK_BYTES
    parts = bytes_of([torch.zeros(5 << 20)])
    assert sum(map(len, parts)) == 40 << 20
    assert max(map(len, parts)) < MAX_RECORD_BYTES
