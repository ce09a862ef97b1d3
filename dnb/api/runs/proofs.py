"""The proof of a run: its first steps, computed in this process, too."""

from __future__ import annotations

from dnb.api.hub_requests import seen_gradients
from dnb.api.proof.comparison import Proof
from dnb.api.proof.proving import Submission, known_submission, prove
from dnb.api.runs.run_follower import RunFollower
from dnb.errors import HubError
from dnb.progress import long_work


def prove_run(name: str, number: int, submission: Submission | None, follower: RunFollower) -> Proof:
    """Compare the first steps of a run, once it has done them, with those of a plain loop.

    Args:
        name: of the run.
        number: so many first steps, or all if it has fewer.
        submission: what it began with.
        follower: of the run.

    Raises:
        ArgumentError: this kernel did not start the run, or the pool does not hold it any more.
    """
    known = known_submission(submission, run=name)
    number = min(number, known.spec.num_steps)
    with long_work(f"waiting until run {name!r} has done {number} steps"):
        follower.wait_for_step(number)
    try:
        gradients, notes = seen_gradients(follower.hub, name, number, events=lambda: list(follower.snapshot.events))
    except HubError as error:
        raise known.given_up from error
    return prove(known, gradients, notes=notes)
