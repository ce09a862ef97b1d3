"""News of a disk: that it takes nothing, takes all again, or has lost files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# A disk that is full, free and full again says so no more often.
QUIET_SECONDS = 60.0


class DiskNews:
    """Sentences for people, no more of one kind than one in a while.

    Args:
        path: of the folder that is written.
        was_behind: whether a hub before has told that something waits for the disk.
    """

    def __init__(self, path: Path, *, was_behind: bool) -> None:
        self._path = path
        self._trouble = "as a hub before has told" if was_behind else ""  # that was told and is not over
        self._quiet_until = 0.0  # of disks that fail, and of files that are removed
        self._quiet_until_again = 0.0
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        """Add a sentence."""
        self._texts.append(text)

    def add_removed(self, names: Sequence[str], now: float) -> None:
        """Tell that files were gone, and are there again."""
        if names and now >= self._quiet_until_again:
            self._quiet_until_again = now + QUIET_SECONDS
            self.add(f"{', '.join(names)} in {self._path} had been removed or replaced: written anew")

    def add_faults(self, faults: Sequence[OSError], now: float, *, is_over: bool) -> None:
        """Tell that the disk has begun to fail, or that nothing waits for it any more."""
        if faults and not self._trouble and now >= self._quiet_until:
            self._trouble = faults[0].strerror or str(faults[0])
            self._quiet_until = now + QUIET_SECONDS
            self.add(
                f"{self._path} cannot be written ({self._trouble}): training goes on, and what is missing there is "
                "written as soon as it can be"
            )
        elif is_over and self._trouble:
            self._trouble = ""
            self.add(f"{self._path} is whole again: all that waited for the disk is there")

    def take(self) -> list[str]:
        """Return, once, what is new."""
        texts, self._texts = self._texts, []
        return texts
