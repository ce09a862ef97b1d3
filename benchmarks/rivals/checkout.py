"""A pool of another checkout of dnb: reads `CASE STEPS` lines, and answers each with the mean step time of such a run.

Run by its path, with that checkout first in PYTHONPATH: what it imports is of there.
"""

from __future__ import annotations

import sys

from benchmarks.models import CASES
from benchmarks.ours import open_side
from benchmarks.rows.step import train_ours


def main() -> None:
    """Serve turns until there are no more lines."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with open_side(int(sys.argv[1])) as side:
        answers.write("ready\n")
        answers.flush()
        for line in sys.stdin:
            name, steps = line.split()
            answers.write(f"{train_ours(side, CASES[name], steps=int(steps))!r}\n")
            answers.flush()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
