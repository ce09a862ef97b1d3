"""Hubs that are killed while they commit: forked from a process that has torch and a single thread.

Reads one order a line from its input and answers each with one line: empty, or what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnb.hub.parameters import chunked_adam, durability, thread_team
from dnb.hub.parameters.journal import Unrecoverable
from dnb.hub.parameters.master import Contribution, Master
from dnb.hub.parameters.optimizers import warm_up
from dnb.hub.parameters.recovery import recover_master
from dnb.job import Job
from dnb.planning.sample_order import BatchOrder
from dnb.protocol.measurements import Sums
from dnb.protocol.memory import SegmentRef

NUM_STEPS = 4


class Wandering(torch.optim.Optimizer):
    """Replaces its tensors, counts in Python, and keeps a number in the options of its group."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["seen"] = state.get("seen", 0) + 1
                state["kinds"] = {"last": [state["seen"], float(group["calls"])]}
                state["mean"] = state.get("mean", 0) * 0.9 + parameter.grad
                parameter.sub_(state["mean"] / state["seen"], alpha=group["lr"] / group["calls"])


class Switching(nn.Module):
    """Layers of two dtypes, BatchNorm, tied and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 40)
        self.norm = nn.BatchNorm1d(40)
        self.second = nn.Linear(40, 16)
        self.tied = nn.Linear(40, 16, bias=False)
        self.tied.weight = self.second.weight
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.rough = nn.Linear(9, 9).bfloat16()
        self.fine = nn.Linear(9, 9).double()
        self.rare = nn.Linear(5, 5)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3))


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=50)


def grouped(params: Any) -> Any:
    params = list(params)
    groups = [{"params": params[::2], "lr": 0.02, "weight_decay": 0.3}, {"params": params[1::2], "amsgrad": True}]
    return torch.optim.AdamW(groups, lr=0.01, fused=True)


@dataclass(frozen=True)
class Case:
    optimizer: Any
    model: Any = Plain
    scheduler: Any = None
    clip_norm: float | None = None
    num_slabs: int = 2
    num_threads: int = 1
    unused: Callable[[int, str], bool] | None = None
    kind: str = "memory"
    shadow_bytes: int = durability.SHADOW_BYTES
    thaws: dict[int, tuple[str, ...]] = field(default_factory=dict)  # parameters, by the step that trains them first


def rare(step: int, name: str) -> bool:
    """Not used at first, then used, then not again."""
    return name.startswith("rare") and step != 3


CASES = {
    "adamw": Case("adamw"),
    "adam with two threads": Case("adam", num_threads=2),
    "every kind of tensor": Case("adamw", Switching, clip_norm=0.5, unused=rare, num_threads=2),
    "scheduler": Case("adamw", scheduler=one_cycle),
    "groups": Case(grouped, scheduler=one_cycle, num_threads=2),
    "many slabs": Case("adamw", num_slabs=5),
    "over a wire": Case("adamw", kind="socket"),
    "plain adam": Case(lambda params: torch.optim.Adam(params, lr=0.01, foreach=False, fused=False), clip_norm=0.5),
    "momentum": Case(
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        Switching,
        scheduler=lambda each: torch.optim.lr_scheduler.ExponentialLR(each, 0.9),
        unused=rare,
    ),
    "user's optimizer": Case(Wandering, scheduler=lambda each: torch.optim.lr_scheduler.StepLR(each, 2)),
    "thawed": Case("adamw", Switching, unused=rare, num_threads=2, thaws={2: ("frozen.weight",), 3: ("frozen.bias",)}),
    "thawed momentum": Case(
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), Switching, thaws={2: ("frozen.weight",)}
    ),
    "no room for a copy": Case(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), shadow_bytes=0),
}


class Hub:
    """One hub's life."""

    def __init__(self, case: Case, folder: Path, *, is_plain: bool = False) -> None:
        self.case = case
        durability.SHADOW_BYTES = case.shadow_bytes
        self._folder = folder
        torch.manual_seed(0)
        self.job = Job(
            model=case.model(),
            loss=None,
            step=None,
            metrics={},
            optimizer=case.optimizer,
            lr=0.01 if isinstance(case.optimizer, str) else None,
            scheduler=case.scheduler,
            order=BatchOrder(num_samples=8, batch_size=4),
        )
        self._is_plain = is_plain
        self.master: Any = None

    def begin(self) -> None:
        self.master = Master(
            self.job,
            folders=[self._folder],
            prefix="run",
            clip_norm=self.case.clip_norm,
            num_threads=self.case.num_threads,
        )
        if not self._is_plain:
            self.master.keep_journal(step=0, evaluated=0)
            ref = self.master.journal_ref
            replace(self._folder / "log", "0")
            replace(self._folder / "ref", json.dumps([ref.path, ref.num_bytes]))

    def recover(self) -> Any:
        path, num_bytes = json.loads((self._folder / "ref").read_text())
        ref = SegmentRef(path=path, num_bytes=num_bytes)
        self.master, last = recover_master(self.job, journal=ref, folders=[self._folder], prefix="run")
        return last

    def commit(self, step: int) -> dict[str, float]:
        if thawed := set(self.case.thaws.get(step, ())) - self.master.freezing.placed:
            self.master.thaw(thawed)
        generator = torch.Generator().manual_seed(step)
        contributions = []
        names = [slot.name for slot in self.master.gradient_layout.slots]
        unused = tuple(place for place, name in enumerate(names) if self.case.unused and self.case.unused(step, name))
        for number in range(self.case.num_slabs):
            self.master.add_slabs(number // 2, number % 2 + 1, kind=self.case.kind)
            slab = self.master.slabs_of(number // 2)[number % 2]
            for gradient in slab.gradients:
                gradient.copy_(torch.randn(gradient.shape, generator=generator))
            for name, buffer in slab.buffers.items():
                if "batches" in name:
                    buffer.fill_(step)
                else:
                    buffer.copy_(torch.rand(buffer.shape, generator=generator))
            sums = Sums(
                loss_total=4.0 * step,
                loss_weight=4,
                metric_totals={"accuracy": 1.0 + number},
                metric_weights={"accuracy": 4.0},
                num_samples=4 + number,
            )
            contributions.append(Contribution(number // 2, number % 2, number, sums, False, unused))
        return self.master.commit(contributions).values

    def state(self) -> str:
        """Every bit that a later step depends on."""
        self.master.finish_deferred()
        master = self.master
        parts: list[Any] = [
            {name: _raw(each) for name, each in master.model.state_dict().items()},
            _plain(master.optimizer.state_dict()),
            _plain({} if master.scheduler is None else master.scheduler.state_dict()),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _raw(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _raw(value)
    if isinstance(value, dict):
        return sorted((str(key), _plain(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return repr(value)


def replace(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    aside = path.with_suffix(".new")
    aside.write_text(text)
    aside.replace(path)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def scripted(hub: Hub, order: dict[str, Any]) -> None:
    """Let the hub die at one of its stores, or in the middle of one of its changes."""
    die_at_stores(hub.master._update_log.journal, order)
    die_in_kernels(order)
    die_in_optimizers(hub, order)
    die_in_schedulers(hub, order)


def die_at_stores(journal: Any, order: dict[str, Any]) -> None:
    mark, count = journal.mark, 0

    def marked(place: int, value: int) -> None:
        nonlocal count
        count += 1
        if order.get("before") == count:
            die()
        mark(place, value)
        if order.get("after") == count:
            die()

    journal.mark = marked


def die_in_kernels(order: dict[str, Any]) -> None:
    update, count = chunked_adam.update_adam, 0

    def updated(optimizer: Any, options: Any, part: Any) -> None:
        nonlocal count
        count += 1
        if order.get("update") == count:
            for tensor in (tensor for place in (0, 2, 3, 4) for tensor in part[place]):
                tensor.view(-1)[: 1 + tensor.numel() // 2].fill_(77)
            die()
        update(optimizer, options, part)

    chunked_adam.update_adam = updated


def die_in_optimizers(hub: Hub, order: dict[str, Any]) -> None:
    stepper = hub.master._stepper
    step = stepper.step

    def stepped() -> None:
        if order.get("step") == hub.master._update_log.step + 1:
            for parameter in hub.master.model.parameters():
                parameter.data.fill_(77)
            for value in (value for state in hub.master.optimizer.state.values() for value in state.values()):
                if isinstance(value, torch.Tensor):
                    value.fill_(77)
            die()
        step()

    stepper.step = stepped


def die_in_schedulers(hub: Hub, order: dict[str, Any]) -> None:
    scheduler = hub.master.scheduler
    if scheduler is None or "scheduler" not in order:
        return
    step = scheduler.step

    def stepped() -> None:
        step()
        if hub.master._update_log.step + 1 == order["scheduler"]:
            die()

    scheduler.step = stepped


def fork(task: Callable[[], Any], *, seconds: float | None = None) -> tuple[int, Any]:
    """Signal that ended a child, and what it returned; killed after so many seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = task()
        except BaseException:  # noqa: BLE001 - told to the parent
            answer = traceback.format_exc()
        with open(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    if seconds is not None:
        select.select([reading], [], [], seconds)
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), (pickle.loads(answer) if answer else None)  # noqa: S301


def undisturbed(case: Case, folder: Path) -> Any:
    """States and values after every step, without a journal."""

    def run() -> Any:
        hub = Hub(case, folder, is_plain=True)
        hub.begin()
        states, values = [hub.state()], [{}]
        for step in range(1, NUM_STEPS + 1):
            values.append(hub.commit(step))
            states.append(hub.state())
        hub.master.drop_slabs()
        hub.master.close()
        return states, values

    return fork(run)[1]


def generation(case: Case, folder: Path, order: dict[str, Any], wanted: Any) -> Callable[[], str]:
    """A hub's life: what is wrong with what it found."""

    def run() -> str:
        hub = Hub(case, folder)
        log = folder / "log"
        if (folder / "ref").exists():
            fault = revive(hub, int(log.read_text()), wanted)
            if fault:
                return fault
        else:
            for path in folder.iterdir():
                path.unlink()  # of a hub that was killed before it had a journal
            hub.begin()
        replace(log, str(hub.master._update_log.step))
        scripted(hub, order)
        return live(hub, log, order, wanted)

    return run


def revive(hub: Hub, noted: int, wanted: Any) -> str:
    """Take a run over from the hub before."""
    try:
        last = hub.recover()
    except Unrecoverable as verdict:
        return "torn" if "no copy" in str(verdict) else str(verdict)
    if last.step not in (noted, noted + 1):
        return f"step {noted} was committed, and {last.step} was found"
    if hub.state() != wanted[0][last.step]:
        return f"the state is not that after step {last.step}: {last.note}"
    if last.values != wanted[1][last.step]:
        return f"the values of step {last.step} are {last.values}"
    return ""


def live(hub: Hub, log: Path, order: dict[str, Any], wanted: Any) -> str:
    """Go on to the last step."""
    for step in range(hub.master._update_log.step + 1, NUM_STEPS + 1):
        if hub.commit(step) != wanted[1][step]:
            return f"the values of step {step}"
        replace(log, str(step))
        if order.get("settles", True):
            hub.master.finish_deferred()
    if hub.state() != wanted[0][NUM_STEPS]:
        return "the last state is another"
    (log.parent / "ref").rename(log.parent / "ended")
    hub.master.drop_slabs()
    hub.master.close()
    left = {path.name for path in log.parent.iterdir()} - {"ended", "log"}
    return f"left over: {left}" if left else ""


def lives(case: Case, folder: Path, orders: list[dict[str, Any]], wanted: Any) -> str:
    """Hubs that follow each other; the last one is not disturbed."""
    (folder / "ref").unlink(missing_ok=True)
    for order in [*orders, {}]:
        killed, answer = fork(generation(case, folder, order, wanted), seconds=order.get("seconds"))
        if not killed or (folder / "ended").exists():
            killed = 0
            break
    for path in folder.iterdir():
        path.unlink()
    answer = answer or ""
    return "killed in the end" if killed else answer


def obey(order: dict[str, Any], folder: Path) -> str:
    case = CASES[order["case"]]
    wanted = undisturbed(case, folder)
    if not isinstance(wanted, tuple):
        return str(wanted)
    rng = random.Random(order["case"])
    faults = []
    for orders in scripts(order, rng):
        fault = lives(case, folder, orders, wanted)
        if fault != order.get("wanted", ""):
            faults.append(f"{orders}: {fault}")
    return " | ".join(faults[:3])


def scripts(order: dict[str, Any], rng: random.Random) -> list[list[dict[str, Any]]]:
    """The lives' orders, one list for each run."""
    match order["how"]:
        case "not at all":
            return [[]]
        case "at a store":
            kinds = order.get("kinds", ("before", "after"))
            return [[{kind: number, "settles": number % 2}] for number in order["stores"] for kind in kinds]
        case "again and again":
            return [
                [{rng.choice(["before", "after", "update"]): rng.randint(1, 25)} for _ in range(6)]
                for _ in range(order["times"])
            ]
        case "in the update":
            return [[{name: number}] for name in order["in"] for number in (1, 2, 3)]
        case "at random moments":
            return [[{"seconds": rng.uniform(0.004, 0.04)} for _ in range(10)] for _ in range(order["times"])]
    raise ValueError(order["how"])


def main() -> None:
    chunked_adam.CHUNK_BYTES = 1024
    thread_team.LEAST_ELEMENTS = 256
    thread_team.PART_ELEMENTS = 64
    torch.set_num_threads(1)
    warm_up()
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        try:
            answer = obey(json.loads(line), folder)
        except Exception:  # noqa: BLE001 - told to the test
            answer = traceback.format_exc()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
