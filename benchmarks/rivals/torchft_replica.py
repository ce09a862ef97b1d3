"""A replica of torchft: DDP through its manager over gloo; run by an interpreter that has torchft, one process each.

It writes a line for every committed step: seconds since the epoch, the step, and how many replicas took part.
"""

# No `annotations` from the future: DDP compares those of its hook with the classes themselves.
import argparse
import json
import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

from benchmarks.models import CASES, LEARNING_RATE, Case


class Replicated(DistributedDataParallel):  # type: ignore[misc]
    """torchft's DDP, but a failed exchange gives the manager's error a chance.

    In torchft 0.2.0 the survivors of a kill in mid-exchange end by an assertion in the wrapper's hook.
    """

    @staticmethod
    def _comm_hook(state: Manager, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        work = state.allreduce(bucket.buffer())
        work.wait()  # an error is kept by the manager, which then commits nothing
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


def train(arguments: argparse.Namespace) -> None:
    """Train until killed."""
    torch.set_num_threads(1)
    case = CASES[arguments.case]
    limit = timedelta(seconds=arguments.timeout_seconds)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    model = case.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=limit),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        timeout=limit,
        quorum_timeout=timedelta(seconds=60),
        heartbeat_interval=timedelta(milliseconds=arguments.heartbeat_milliseconds),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=arguments.lighthouse,
        replica_id=f"replica_{arguments.replica}",
        hostname="127.0.0.1",
        init_sync=False,  # the weights are the same everywhere
    )
    _loop(manager, model, optimizer, case, arguments)


def _loop(
    manager: Manager,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    case: Case,
    arguments: argparse.Namespace,
) -> None:
    managed = Replicated(manager, model, gradient_as_bucket_view=True)
    wrapped = Optimizer(manager, optimizer)
    inputs, targets = case.data()
    batches = _batches(case, len(inputs), replica=arguments.replica, num_replicas=arguments.num_replicas)
    with Path(arguments.log).open("a", buffering=1) as log:
        while True:
            before = manager.current_step()
            indices = next(batches)
            wrapped.zero_grad()
            loss = case.loss(managed(inputs[indices]), targets[indices])
            loss.backward()
            wrapped.step()
            if manager.current_step() > before:
                told = time.time(), manager.current_step(), manager.num_participants(), manager.is_participating()
                log.write(json.dumps(told) + "\n")


def _batches(case: Case, num_samples: int, *, replica: int, num_replicas: int) -> Iterator[torch.Tensor]:
    """What torchft's DistributedSampler gives this replica, without a loader."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(num_samples, generator=generator)[replica::num_replicas].split(case.batch_per_engine)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True)
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--num-replicas", type=int, required=True)
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--timeout-seconds", type=float, required=True)
    parser.add_argument("--heartbeat-milliseconds", type=int, required=True)
    logging.disable(logging.INFO)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
