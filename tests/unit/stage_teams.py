"""Teams of real processes that compute stages, or parts of layers, over loopback, and models to divide."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import types
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing import forkserver
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dnb.engine.replicas.outcome import WorkResult
from dnb.engine.replicas.pipeline.stage_replica import StageReplica
from dnb.engine.replicas.replica_context import ReplicaContext
from dnb.engine.replicas.tensor.tensor_replica import TensorReplica
from dnb.engine.runtime.run_memory import EngineMemory
from dnb.engine.runtime.telemetry import Stopwatch
from dnb.hub.parameters.master import Master
from dnb.hub.run.execution.rendezvous import Rendezvous, open_rendezvous
from dnb.job import Data, DataSource, Job
from dnb.planning.sample_order import BatchOrder
from dnb.planning.shards import shard_bounds
from dnb.protocol.engine_messages import Diagnose, Load, RankAssignment, WireOffer, Work
from dnb.protocol.memory import PayloadRef
from dnb.protocol.run import Partition, RunSpec
from dnb.transport.layout import slot_views
from tests.models import one_thread

NOTHING = PayloadRef(buffers=(), arrays=(), segment=None)
NUM_SHARDS = 4
ANSWER_SECONDS = 60.0


# Models ---------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    torch.manual_seed(0)
    sizes = (6, 160, 160, 12, 12, 3)  # one weight is large enough to be moved into the slab by a hook
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class SkipNet(nn.Module):
    """A convolutional network in which one value is used by every later layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = torch.relu(self.first(x))
        middle = torch.relu(self.second(early)) + early
        late = self.third(middle) + early
        return self.head((late + middle + early).flatten(1))


class NormNet(nn.Module):
    """BatchNorm in the first stage and in the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.early = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.late = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.late(torch.tanh(self.second(self.early(self.first(x))))))


class Block(nn.Module):
    """A transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, time, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(rows, time, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, time, width))
        return x + self.mlp(x)


class SmallGPT(nn.Module):
    """Embedding and head are one weight, as in GPT-2."""

    def __init__(self, num_blocks: int = 3, width: int = 16, num_words: int = 20) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(num_words, width)
        self.places = nn.Embedding(12, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        _, time = words.shape
        assert time <= 12
        x = self.words(words) + self.places(torch.arange(time, device=words.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LossNet(nn.Module):
    """Like a transformer of Hugging Face: named inputs, and an output with a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: Any = None, labels: Any = None) -> Any:
        hidden = torch.tanh(self.first(x))
        if mask is not None:
            hidden = hidden * mask
        logits = self.head(hidden)
        return types.SimpleNamespace(loss=cross_entropy(logits, labels), logits=logits)


class Failing(nn.Module):
    """Raises when a file is there, so that tests decide when."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.path.exists(self.path):
            raise ArithmeticError("layer out of order")
        return x


class Dying(nn.Module):
    """Kills its process when a file is there."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.path.exists(self.path):
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def word_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output.flatten(0, 1), target.flatten())


def vectors(num_samples: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_samples, 6, generator=generator),
        torch.randint(0, 3, (num_samples,), generator=generator),
    )


def images(num_samples: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_samples, 1, 6, 6, generator=generator),
        torch.randint(0, 3, (num_samples,), generator=generator),
    )


def sentences(num_samples: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 20, (num_samples, 9), generator=generator)
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


def plain_gradients(
    model: nn.Module, samples: Sequence[torch.Tensor], num_micro_batches: int, loss: Callable[..., Any] = cross_entropy
) -> dict[str, torch.Tensor]:
    """What one process computes with the same micro-batches, and with one thread, as its engines have."""
    model = copy.deepcopy(model)
    number = len(samples[0])
    with one_thread():
        for batch in zip(*[tensor.split(number // num_micro_batches) for tensor in samples], strict=True):
            *inputs, target = batch
            (loss(model(*inputs), target) * (len(target) / number)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Processes ------------------------------------------------------------------------------------------


def serve(pipe: Any) -> None:
    """An engine: does what it is told, and answers with a value or with what was raised."""
    torch.set_num_threads(1)
    replica: StageReplica | TensorReplica | None = None
    while True:
        verb, arguments, named = pickle.loads(pipe.recv_bytes())  # noqa: S301 - of the test process
        try:
            if verb == "end":
                return
            if verb == "begin":
                if replica is not None:
                    replica.close()
                replica = begin(*arguments)
                answer: Any = replica.stages if isinstance(replica, StageReplica) else ()
            else:
                assert replica is not None
                answer = attrgetter(verb)(replica)(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - the test process judges
            place = ""
            if verb == "compute" and replica is not None:
                place = replica.find_place(*arguments, error)
            answer = Raised(type(error).__name__, str(error), place)
        pipe.send_bytes(pickle.dumps(answer))


def begin(
    spec: RunSpec, job: Job, data: Data, load: Load, slabs: Sequence[Any], assignment: RankAssignment
) -> StageReplica | TensorReplica:
    memory = EngineMemory(load)
    memory.add_slabs(slabs)
    kind = TensorReplica if assignment.partition.kind == "tensor" else StageReplica
    load = msgspec.structs.replace(load, assignment=assignment)
    context = ReplicaContext(spec=spec, job=job, data=data, load=load, memory=memory, stopwatch=Stopwatch())
    return kind(context)


class Raised:
    """An exception, as text."""

    def __init__(self, kind: str, message: str, place: str) -> None:
        self.kind, self.message, self.place = kind, message, place

    def __repr__(self) -> str:
        return f"{self.kind}: {self.message} [{self.place}]"


class Engines:
    """Processes that live through many tests; those that died are replaced."""

    def __init__(self) -> None:
        # One process imports torch for all: a fork of it costs nothing, and it has never computed.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._engines: dict[int, tuple[Any, Any]] = {}
        self._rendezvous: dict[int, Rendezvous] = {}
        self._num_teams = 0

    def next_team(self) -> int:
        self._num_teams += 1
        return self._num_teams

    def tell(self, engine: int, verb: str, *arguments: Any, **named: Any) -> None:
        if engine not in self._engines or not self._engines[engine][0].is_alive():
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._engines[engine] = process, ours
        self._engines[engine][1].send_bytes(pickle.dumps((verb, arguments, named)))

    def answer(self, engine: int) -> Any:
        _, pipe = self._engines[engine]
        assert pipe.poll(ANSWER_SECONDS), f"engine {engine} does not answer"
        return pickle.loads(pipe.recv_bytes())  # noqa: S301 - of our own process

    def is_alive(self, engine: int) -> bool:
        return engine in self._engines and self._engines[engine][0].is_alive()

    def wait_for_death(self, engine: int) -> None:
        process, pipe = self._engines.pop(engine)
        process.join(ANSWER_SECONDS)
        assert not process.is_alive()
        pipe.close()

    def rendezvous(self, team: int) -> Rendezvous:
        """Its store."""
        if team not in self._rendezvous:
            self._rendezvous[team] = open_rendezvous()
        return self._rendezvous[team]

    def cancel(self, team: int) -> None:
        """As the hub does when a team is gone, or will never be complete."""
        del self._rendezvous[team]

    def close(self) -> None:
        for process, pipe in self._engines.values():
            if process.is_alive():
                pipe.send_bytes(pickle.dumps(("end", (), {})))
            process.join(ANSWER_SECONDS)
            pipe.close()
        forkserver._forkserver._stop()  # it would end with the session, and be taken for a leftover before


class Team:
    """A master copy and engines that compute its model together."""

    def __init__(
        self,
        engines: Engines,
        folder: Path,
        model: nn.Module,
        partition: Partition,
        *,
        samples: tuple[torch.Tensor, ...],
        loss: Any = cross_entropy,
        step: Any = None,
        metrics: Any = None,
        stages: Sequence[nn.Module] | None = None,
        collate: Any = None,
        rows: Any = None,
        members: Sequence[int] | None = None,
        num_slabs: int = 2,
        **numbers: Any,
    ) -> None:
        self.engines = engines
        self.members = list(members or range(partition.num_engines))
        self.samples = samples
        source = DataSource(samples=rows if rows is not None else samples, collate=collate)
        job = Job(
            model=model,
            loss=loss,
            step=step,
            metrics=metrics or {},
            optimizer="sgd",
            lr=0.1,
            scheduler=None,
            order=BatchOrder(num_samples=len(samples[0]), batch_size=len(samples[0])),
            stages=stages,
        )
        self.job = copy.deepcopy(job)
        self.master = Master(job, folders=[folder], prefix="run", clip_norm=None)
        self.slabs = self.master.add_slabs(0, num_slabs, kind="memory")
        self.spec = spec_of(folder, len(samples[0]), **numbers)
        self.load = Load(
            run="run",
            transport="memory",
            wire=WireOffer(url="", token=""),
            parameters=self.master.parameters_ref,
            parameter_layout=self.master.parameter_layout,
            gradient_layout=self.master.gradient_layout,
            buffer_layout=self.master.buffer_layout,
        )
        self.data = Data(train=source, val=source)
        self.begun = self.begin(partition)

    def begin(self, partition: Partition, members: Sequence[int] | None = None) -> list[Any]:
        """Let the engines form a new group."""
        self.tell_begin(partition, members)
        return [self.engines.answer(member) for member in self.members]

    def tell_begin(self, partition: Partition, members: Sequence[int] | None = None) -> int:
        """Without waiting for them; the team's number."""
        self.members = list(members or self.members)
        team = self.engines.next_team()
        refs = [slab.ref for slab in self.slabs]
        for rank, member in enumerate(self.members):
            assignment = RankAssignment(
                team=team, rank=rank, partition=partition, host="127.0.0.1", port=self.engines.rendezvous(team).port
            )
            self.engines.tell(member, "begin", self.spec, self.job, self.data, self.load, refs, assignment)
        return team

    def ask(self, verb: str, *arguments: Any, **named: Any) -> list[Any]:
        for member in self.members:
            self.engines.tell(member, verb, *arguments, **named)
        return [self.engines.answer(member) for member in self.members]

    def work(self, indices: torch.Tensor, *, kind: Any = "step", step: int = 1, fresh: bool = True) -> Work:
        sizes = tuple(last - first for first, last in shard_bounds(len(indices), num_shards=NUM_SHARDS))
        return Work(
            run="run",
            lease=1,
            kind=kind,
            step=step,
            shards=tuple(range(NUM_SHARDS)),
            shard_sizes=sizes,
            slabs=tuple(range(len(self.slabs))),
            batch_samples=len(indices),
            fresh=fresh,
        )

    def compute(self, number: int | None = None, **named: Any) -> list[Any]:
        """Let all compute the first samples."""
        return self.compute_these(torch.arange(number or len(self.samples[0])), **named)

    def compute_these(self, indices: torch.Tensor, **named: Any) -> list[Any]:
        return self.ask("compute", self.work(indices, **named), indices)

    def tell_compute(self) -> None:
        """Without waiting for it."""
        indices = torch.arange(len(self.samples[0]))
        for member in self.members:
            self.engines.tell(member, "compute", self.work(indices), indices)

    def diagnose(self) -> list[Any]:
        indices = torch.arange(len(self.samples[0]))
        bounds = shard_bounds(len(indices), num_shards=NUM_SHARDS)
        request = Diagnose(
            run="run",
            step=1,
            shards=tuple(range(NUM_SHARDS)),
            shard_sizes=tuple(last - first for first, last in bounds),
            slab=0,
            batch_samples=len(indices),
        )
        return self.ask("diagnose", request, indices)

    def gradients(self) -> dict[str, torch.Tensor]:
        """What the hub adds up."""
        views = [slot_views(self.master.gradient_layout, slab.flat.memory) for slab in self.slabs]
        return {name: sum(view[name] for view in views[1:]) + views[0][name] for name in views[0]}

    def buffers(self) -> dict[str, torch.Tensor]:
        return self.slabs[0].buffers

    def close(self) -> None:
        living = [member for member in self.members if self.engines.is_alive(member)]
        for member in living:
            self.engines.tell(member, "close")
        for member in living:
            self.engines.answer(member)
        self.master.drop_slabs()
        self.master.close()


def spec_of(folder: Path, num_samples: int, **numbers: Any) -> RunSpec:
    return RunSpec(
        id="0",
        **{
            "name": "run",
            "folder": str(folder),
            "num_samples": num_samples,
            "num_val_samples": num_samples,
            "num_steps": 1,
            "steps_per_epoch": 1,
            "batch_size": num_samples,
            "num_shards": NUM_SHARDS,
            "seed": 5,
            "clip_norm": None,
            "exact": False,
            "transport": {"": "memory"},
            "telemetry": True,
            "micro_batch": None,
            "precision": "float32",
            "linger_seconds": 1.0,
            "notes": (),
            "sys_path": (),
            "job": NOTHING,
            "data": NOTHING,
            **numbers,
        },
    )


def last_of(answers: Sequence[Any]) -> WorkResult:
    """The outcome of the engine that has the last stage."""
    (found,) = [answer for answer in answers if answer.parts[0].num_samples]
    return found
