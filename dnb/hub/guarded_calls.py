"""The user's own code where the hub runs it: optimizer, scheduler, sampler, and what unpickling calls.

It may raise anything. What it raises fails the run; what the hub itself raises ends the hub, and the next one goes on.
So the two are told apart where the one calls the other.
"""

from __future__ import annotations

from types import TracebackType

from dnb.protocol.run import Failure
from dnb.transport.system.failures import describe_error


class UserCodeError(Exception):
    """User code in the hub has raised.

    Args:
        place: for people, such as "in the optimizer".
        error: what it has raised.
    """

    def __init__(self, place: str, error: BaseException) -> None:
        super().__init__(place)
        self.place = place
        self.error = error

    @property
    def failure(self) -> Failure:
        """As text."""
        return describe_error(self.error, place=self.place)


class user_code:  # noqa: N801 - a context manager; a class, as a generator takes three times as long in every step
    """Turns whatever is raised within into `UserCodeError`.

    Args:
        place: for people, such as "in the optimizer".
    """

    __slots__ = ("_place",)

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        """Do nothing: there is nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say where it was raised, unless that is said already."""
        if error is not None and not isinstance(error, UserCodeError):
            raise UserCodeError(self._place, error) from error
