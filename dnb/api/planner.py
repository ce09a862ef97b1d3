"""`dnb.plan`: how a model is best divided over the engines, before anything runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dnb.api.arguments.checks import (
    STRATEGIES,
    USUAL_BATCH_SIZE,
    check_choice,
    check_model,
    check_positive,
    read_bytes,
)
from dnb.api.arguments.data_sources import read_source
from dnb.api.arguments.losses import read_loss
from dnb.api.pools import MOST_BY_DEFAULT, current_pool
from dnb.api.strategy.measurement import profile_here, profile_on, site_of, site_without_pool, working_engines
from dnb.api.submission import own_path
from dnb.engine.profiling.profiler import ProfileInput, count_samples
from dnb.errors import PlanError
from dnb.partitioning.pipeline.partitions import read_mesh
from dnb.planning.search.plans import Plan, draw_up
from dnb.planning.search.prediction import Question
from dnb.planning.search.profiles import Site
from dnb.pool.engine_pool import EnginePool
from dnb.protocol.run import ENDED
from dnb.user_code.loader import fetch_batch

SCHEDULES = ("1f1b", "gpipe")
STRATEGIES_PLANNED = ("auto", "data", "pipeline", "hybrid")


def plan(  # noqa: PLR0913 - the user's own words, each a flag of %dtrain
    model: torch.nn.Module,
    batch: Any,
    *,
    loss: str | Callable[..., Any] | None = None,
    step: Callable[..., Any] | None = None,
    optimizer: Any = "adamw",
    batch_size: int | None = None,
    strategy: str = "auto",
    mesh: str | None = None,
    num_micro_batches: int | None = None,
    schedule: str | None = None,
    memory_limit: int | str | None = None,
    num_engines: int | None = None,
    hosts: int | None = None,
    pool: EnginePool | None = None,
) -> Plan:
    """Say how to divide a model over engines, and predict seconds, bytes and memory; nothing is trained.

    A batch goes through the model a few times on one of the pool's engines (without a pool: in this process, which
    leaves the model as it was), layer by layer. Then all small numbers of teams, stages and micro-batches are tried,
    each with the best cuts there are.

    Args:
        model: a module on the CPU; it can be cut between modules that it runs one after the other.
        batch: a tensor, a tuple (inputs..., target) of tensors or arrays, or a dictionary of the model's arguments; of
            a Dataset or DataLoader the first samples, which draws nothing from a generator.
        loss: callable(output, target) or a name, as for `fit`; the mean of the outputs stands for it if left out.
        step: instead of loss: callable(model, batch), as for `fit`.
        optimizer: its name; of others the update is taken to cost what AdamW's does.
        batch_size: samples of the global batch; those of `batch` if left out.
        strategy: "auto", or "data", "pipeline" or "hybrid" to choose among those only.
        mesh: engines along each axis, such as "data=2,pipeline=2"; an axis that is not named is open.
        num_micro_batches: parts of a batch that follow each other through a pipeline; open if left out.
        schedule: order of a pipeline's work: "1f1b" or "gpipe"; 1F1B if left out, which is as fast and needs less
            memory.
        memory_limit: bytes per engine for parameters, gradients, activations and input, a number or such as "2GB";
            never more than the engine's share of what its host has free.
        num_engines: plan for so many, whether or not the pool has them.
        hosts: without a pool, over how many hosts like this one these are spread; as many as give every engine
            a core of its own if left out.
        pool: whose engines to use; the kernel's own if left out, and if there is none, none.

    Raises:
        ArgumentError: an argument is wrong.
        PlanError: it cannot be divided so, or does not fit; with the figure and the way out.
    """
    check_model(model)
    check_choice(strategy, name="strategy", known=STRATEGIES, available=STRATEGIES_PLANNED)
    if schedule is not None:
        check_choice(schedule, name="schedule", known=SCHEDULES, available=SCHEDULES)
    batch = _as_batch(batch, batch_size=batch_size)
    trial = ProfileInput(model=model, batch=batch, loss=read_loss(loss, step=step), step=step)
    num_samples = count_samples(batch)
    axes = read_mesh(mesh)
    if axes.get("tensor", 1) > 1:
        raise PlanError("a tensor axis cannot be predicted in this release: leave it out of the mesh")
    question = Question(
        batch_size=num_samples if batch_size is None else check_positive(batch_size, name="batch_size"),
        strategy=strategy,
        data=axes.get("data"),
        num_stages=axes.get("pipeline"),
        num_micro_batches=None
        if num_micro_batches is None
        else check_positive(num_micro_batches, name="num_micro_batches"),
        schedule=schedule,  # type: ignore[arg-type]
        optimizer=optimizer if isinstance(optimizer, str) else "adamw",
    )
    limit = read_bytes(memory_limit)
    wanted = None if num_engines is None else check_positive(num_engines, name="num_engines")
    spread = None if hosts is None else check_positive(hosts, name="hosts")
    pool = pool or current_pool()
    if pool is None:
        site = site_without_pool(num_engines=wanted or _usual_engines(), memory_limit=limit, hosts=spread)
        profile = profile_here(trial, num_threads=site.engines[0].threads)
    else:
        site = site_of(pool, memory_limit=limit, num_engines=wanted)
        profile = profile_on(pool, trial, sys_path=own_path())
    return draw_up(profile, site, question, notes=_notes(pool, site))


def _as_batch(batch: Any, *, batch_size: int | None) -> Any:
    """Return the batch as it is; of data that `fit` takes, the first samples."""
    if isinstance(batch, Dataset | DataLoader):
        source = read_source(batch, name="batch", seed=0)
        size = source.order.batch_size if source.order is not None else batch_size or USUAL_BATCH_SIZE
        first = torch.arange(min(check_positive(size, name="batch_size"), source.num_samples))
        return fetch_batch(source.data, first)
    if isinstance(batch, tuple | list) and any(isinstance(part, np.ndarray) for part in batch):
        return tuple(read_source(part, name="batch", seed=0).data.samples[0] for part in batch)
    return batch


def _usual_engines() -> int:
    """Return the number of engines that `start` would start."""
    return min(os.cpu_count() or 1, MOST_BY_DEFAULT)


def _notes(pool: EnginePool | None, site: Site) -> list[str]:
    """Name the sources of the figures."""
    num_hosts = len({engine.host for engine in site.engines})
    notes = []
    if pool is None:
        where = "this host" if num_hosts == 1 else f"{num_hosts} hosts like this one"
        notes.append(f"for {len(site.engines)} engines on {where} that do not run yet: profiled in this process")
    elif len(site.engines) > len(working_engines(pool)):
        notes.append(
            f"for {len(site.engines)} engines, of which {len(working_engines(pool))} are there: the others are taken "
            "to be like the last, on further hosts like this one"
        )
    if not site.exchange.is_measured:
        notes.append("the exchange between engines was not probed: usual figures of a small machine stand for it")
    elif num_hosts > 1:
        notes.append("what passes between hosts is taken to be as fast as within this one")
    if pool is not None and pool.facts.run is not None and pool.facts.run_status not in ENDED:
        notes.append(f"run {pool.facts.run!r} was active: engines had less than their cores, and all figures are high")
    return notes
