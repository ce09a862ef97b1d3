"""A script as a user would write it; says when its first step was committed. Run by the row `cold`."""

from __future__ import annotations

import sys

from benchmarks.models import CASES
from benchmarks.ours import open_side


def main(case: str, num_engines: int) -> None:
    """Start, fit, and print the seconds since the epoch at the first commit."""
    with open_side(num_engines) as side:
        print(side.train(CASES[case], steps=1).first_commit, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
