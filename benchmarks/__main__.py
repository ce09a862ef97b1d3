"""`python -m benchmarks [ROW ...]`: measure, print each row as it is ready, and keep the results."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback

from benchmarks.workspace import workspace

GROUPS = {
    "reduce": "mean of a gradient, against gloo",
    "step": "the whole training step, against DDP over gloo",
    "exact": "exact=True, against the default mode and DDP",
    "gathered": "a loss over the whole batch, against DDP over gloo with an all-gather by hand",
    "socket": 'transport="socket", against DDP over gloo',
    "memory": "bytes per parameter of the whole tree, against DDP",
    "stage_memory": "peak memory of an engine with one of two stages, against one process",
    "warm": "a second fit to its first step, against a fresh torchrun",
    "cold": "a fresh process to its first step, against a fresh torchrun",
    "watching": "telemetry and live view, against a run that nobody watches",
    "view": "the dashboard in kernel and browser: CPU, bytes, memory, how soon it shows",
    "faults": "engines killed, stopped, slowed and added, against torchft",
    "goodput": "a run under steady fire, and its ledger",
    "overhead": "what being ready for faults costs while there is none",
    "hub": "the hub's CPU time as engines are added",
    "pipelines": "a model divided over engines, against torchrun and bare torch.distributed.pipelining",
    "stages": "a pipeline whose stages are killed",
    "predictions": "what plans predict, against what runs take",
    "dividing": "what it costs the notebook to begin a run on a divided model",
    "rehearsal": "CPU time of the samples that fit computes in the notebook's process",
    "planning": "cuts that dnb.plan chooses, against every cut there is",
    "earlier": "the training step, against that of an earlier commit: --against COMMIT",
}
LEAST_PAIRS = 5


def main() -> int:
    """Measure what was asked for; exit code 1 if some of it failed or was interrupted."""
    arguments = _parser().parse_args()
    if arguments.list:
        print("\n".join(f"{name:10} {text}" for name, text in GROUPS.items()))
        return 0
    with workspace():
        try:
            return _measure_all(
                arguments.rows or [name for name in GROUPS if name != "earlier" or arguments.against],
                pairs=arguments.pairs,
                is_quick=arguments.quick,
                against=arguments.against,
            )
        except KeyboardInterrupt:
            print("interrupted: a group that was not complete is not kept", file=sys.stderr)
            return 1


def _known(name: str) -> str:
    if name not in GROUPS:
        raise argparse.ArgumentTypeError(f"there is no {name!r}: {', '.join(GROUPS)}")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", type=_known, help=", ".join(GROUPS))
    parser.add_argument("--pairs", type=int, default=LEAST_PAIRS, help="turns of each side (at least 5 for claims)")
    parser.add_argument("--quick", action="store_true", help="short turns, for trying things out; nothing is kept")
    parser.add_argument("--against", default="", metavar="COMMIT", help="of the group earlier")
    parser.add_argument("--list", action="store_true", help="say what there is")
    return parser


def _measure_all(groups: list[str], *, pairs: int, is_quick: bool, against: str) -> int:
    """Every group; one that fails keeps no other from being measured."""
    failed = 0
    for group in groups:
        try:
            _measure(group, pairs=pairs, is_quick=is_quick, against=against)
        except Exception:  # noqa: BLE001 - told, and in the exit code
            traceback.print_exc()
            failed = 1
    return failed


def _measure(group: str, *, pairs: int, is_quick: bool, against: str) -> None:
    # After the workspace is set up: torch reads the number of threads when it is imported.
    import torch

    from benchmarks import table
    from benchmarks.settings import Settings

    torch.set_num_threads(1)
    facts = table.machine_facts(is_quick=is_quick)
    began = time.monotonic()
    print(f"\n{group}: {GROUPS[group]}\n{table.describe(facts)}\n{table.header_line()}", flush=True)
    rows = []
    settings = Settings(pairs=pairs, is_quick=is_quick, against=against)
    for row in importlib.import_module(f"benchmarks.rows.{group}").rows(settings):
        rows.append(row)
        print(table.row_line(row), flush=True)
    print(f"({time.monotonic() - began:.0f} s)", flush=True)
    if not is_quick and pairs >= LEAST_PAIRS:
        table.write_result(group, facts, rows)
        table.update_readme(list(GROUPS))


if __name__ == "__main__":
    sys.exit(main())
