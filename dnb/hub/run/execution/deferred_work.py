"""Work that is put off while engines wait for the hub, and done once they compute again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from dnb.hub.guarded_calls import UserCodeError
from dnb.protocol.run import Failure


class DeferredWork:
    """A queue of what is still to be done after a commit, before the next.

    Args:
        keep_whole: puts a failure whose text was cut into a file.
    """

    def __init__(self, keep_whole: Callable[[Failure], Failure]) -> None:
        self._keep_whole = keep_whole
        self._tasks: deque[Callable[[], None]] = deque()
        self.fault: Failure | None = None  # of user code; the next step is not taken

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def append(self, task: Callable[[], None]) -> None:
        """Put something off."""
        self._tasks.append(task)

    def run(self) -> None:
        """Do all of it, in order; what user code raises is kept as `fault`."""
        while self._tasks:
            try:
                self._tasks.popleft()()
            except UserCodeError as error:  # the state of the user's scheduler, say
                self.fault = self.fault or self._keep_whole(error.failure)
