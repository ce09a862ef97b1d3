"""A fake run with everything that a chart can show: pace, gradient norms, times, engines' time, events."""

from __future__ import annotations

import numpy as np

from dnb.planning.utilisation import Utilisation
from dnb.protocol.measurements import UsageRow
from tests.fake_runs import FakeEvent, FakeRun, FakeWorker, advance

STEP_SECONDS = 0.02


def full_run(*, num_steps: int = 2000, num_engines: int = 3, step_seconds: float = STEP_SECONDS) -> FakeRun:
    """A run of many steps, with validation every hundredth of it, still going on."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, num_steps + 1)
    losses = 2.2 * np.exp(-steps / (num_steps / 4)) + 0.15 + 0.12 * rng.random(num_steps)
    run = FakeRun(step=num_steps, num_steps=2 * num_steps, elapsed_seconds=num_steps * step_seconds, seconds_left=40.0)
    run.samples_per_second = 64 / step_seconds
    every = max(num_steps // 20, 1)
    run.history.set("loss", losses.tolist())
    run.history.set("lr", (3e-4 * np.minimum(1, steps / 200) * 0.5 * (1 + np.cos(steps / num_steps * 2))).tolist())
    run.history.set("samples_per_second", ((64 / step_seconds) * (0.8 + 0.4 * rng.random(num_steps))).tolist())
    run.history.set("seconds", (steps * step_seconds).tolist())
    run.history.set("val_loss", (losses[every - 1 :: every] + 0.05).tolist(), steps=steps[every - 1 :: every].tolist())
    norms = steps[:: max(num_steps // 400, 1)]
    run.history.set("grad_norm", (4 / (1 + norms / 300) + 0.3 * rng.random(len(norms))).tolist(), steps=norms.tolist())
    run.workers = [
        FakeWorker(
            engine=engine, compute=0.5 + 0.03 * (engine % 5), wait=0.3 - 0.02 * (engine % 5), data=0.1, idle=0.02
        )
        for engine in range(num_engines)
    ]
    run.utilisation = Utilisation(usage(num_steps * step_seconds, num_steps=num_steps, num_engines=num_engines))
    seconds = run.started + num_steps * step_seconds * np.array([0.25, 0.4, 0.7])
    kinds = (("checkpoint", None), ("died", num_engines - 1), ("joined", num_engines - 1))
    run.events = [
        FakeEvent(
            kind=kind, engine=engine, step=round(num_steps * part), time=float(time), text=f"engine {engine} {kind}"
        )
        for (kind, engine), part, time in zip(kinds, (0.25, 0.4, 0.7), seconds, strict=True)
    ]
    return run


def usage(seconds: float, *, num_steps: int, num_engines: int) -> list[UsageRow]:
    """What 200 looks at engines would have counted; the last one is gone from 40 to 70 hundredths of the run."""
    rng = np.random.default_rng(1)
    rows = []
    for place in range(200):
        engines = tuple(e for e in range(num_engines) if not (e == num_engines - 1 > 0 and 80 <= place < 140))
        each = seconds / 200
        compute = each * (0.55 + 0.2 * rng.random(len(engines)))
        data = each * 0.1 * rng.random(len(engines))
        idle = np.full(len(engines), each * 0.03)
        rows.append(
            UsageRow(
                begin_seconds=place * each,
                end_seconds=(place + 1) * each,
                step=round((place + 1) * num_steps / 200),
                engines=engines,
                compute=tuple(compute.tolist()),
                wait=tuple((each - compute - data - idle).tolist()),
                data=tuple(data.tolist()),
                idle=tuple(idle.tolist()),
            )
        )
    return rows


def advance_all(run: FakeRun) -> None:
    """One more step and all that comes with it: everything that a refresh may have to send."""
    advance(run)
    run.elapsed_seconds += STEP_SECONDS
    for key, value in {
        "lr": 1e-4,
        "samples_per_second": 3000.0,
        "seconds": run.elapsed_seconds,
        "grad_norm": 0.5,
    }.items():
        run.history.append(key, run.step, value + 1e-5 * (run.step % 7))
    engines = tuple(worker.engine for worker in run.workers)
    shares = {"compute": 0.012, "wait": 0.006, "data": 0.001, "idle": 0.001}
    run.utilisation.extend(
        [
            UsageRow(
                begin_seconds=run.elapsed_seconds - STEP_SECONDS,
                end_seconds=run.elapsed_seconds,
                step=run.step,
                engines=engines,
                **{name: (share,) * len(engines) for name, share in shares.items()},
            )
        ]
    )
