"""The opening of runs in the hub: those that a client has submitted, and what the hub before has left of one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dnb.errors import DnbError, HubError, RunError
from dnb.hub.guarded_calls import UserCodeError, user_code
from dnb.hub.handover import STATS_FILE, RunHandover, StatsHandover, read_handover
from dnb.hub.run.pool_links import PoolLinks
from dnb.protocol.pool import EngineFacts
from dnb.protocol.run import Failure, RunSpec

if TYPE_CHECKING:  # torch takes seconds to import: the sockets are bound first
    from dnb.hub.run.active_run import ActiveRun
    from dnb.hub.run.initial_state import InitialState
    from dnb.transport.system.process_settings import AppliedSettings
    from dnb.user_code.captured_output import CapturedOutput


class RunOpener:
    """Unpickles runs, and makes their master copies, after the settings of their notebook.

    Args:
        key: signs runs.
        folders: of the pool's memory.
        links: to the pool.
        generation: how many hubs the pool had before.
    """

    def __init__(self, *, key: str, folders: Sequence[Path], links: PoolLinks, generation: int) -> None:
        self._key = key.encode()
        self._folders = folders
        self._links = links
        self._generation = generation
        self._settings: AppliedSettings | None = None  # of the notebook, for the run that was opened last

    def verified_spec(self, frames: Sequence[bytes]) -> RunSpec:
        """Return the numbers of a run whose frames a client of this pool has signed."""
        from dnb.transport.pickling.payloads import verify

        spec_bytes, job_bytes, data_bytes, signature = frames
        verify(self._key, [spec_bytes, job_bytes, data_bytes], signature)
        return msgspec.msgpack.decode(spec_bytes, type=RunSpec)

    def verify_functions(self, frames: Sequence[bytes]) -> tuple[bytes, bytes]:
        """Return the pickle and the signature of other functions for a run.

        Raises:
            HubError: they are not signed, or something else.
        """
        from dnb.transport.pickling.payloads import verify

        if len(frames) != 2:
            raise HubError(f"what is mended comes in 2 frames, not {len(frames)}")
        pickled, signature = frames
        verify(self._key, [pickled], signature)
        return pickled, signature

    def open(self, frames: Sequence[bytes], spec: RunSpec, *, engines: Sequence[EngineFacts]) -> ActiveRun:
        """Unpickle a new run and make its master copy: whatever the user's code raises, the pool has no run then.

        Raises:
            RunError: with what was raised, and its traceback.
        """
        from dnb.hub.run.initial_state import new_run

        try:
            self._apply_settings(spec)
            with _captured_output() as output:
                initial_state = new_run(spec, _unpickle_job(frames, spec), folders=self._folders)
                return self._make_run(spec, frames, initial_state, engines=engines, output=output)
        except OSError as error:
            raise HubError(str(error)) from error
        except UserCodeError as error:
            if isinstance(error.error, DnbError):
                raise error.error from error
            failure = error.failure
            raise RunError(
                f"{failure.kind}: {failure.message} ({failure.place})", remote_traceback=failure.traceback
            ) from error

    def reopen(
        self,
        handover: RunHandover,
        spec: RunSpec,
        *,
        engines: Sequence[EngineFacts],
        reason: str = "",
        failure: Failure | None = None,
    ) -> ActiveRun:
        """Take over the run of the hub before.

        Args:
            handover: what that has left of it.
            spec: as it was submitted.
            engines: those that are to come back.
            reason: what has ended that hub.
            failure: what the run has failed of, if it has by that.
        """
        from dnb.hub.run.initial_state import recovered_run

        self._apply_settings(spec)
        spec = msgspec.structs.replace(spec, clip_norm=handover.clip_norm)

        def make_job() -> Any:
            return _unpickle_job(handover.frames, spec)

        with _captured_output() as output:
            initial_state = recovered_run(
                spec, handover, make_job, folders=self._folders, reason=reason, failure=failure
            )
            stats = read_handover(self._folders, STATS_FILE, StatsHandover)
            return self._make_run(
                spec, handover.frames, initial_state, engines=engines, engine_stats=stats, output=output
            )

    def _apply_settings(self, spec: RunSpec) -> None:
        from dnb.transport.system.process_settings import AppliedSettings

        if self._settings is not None:  # of the run before
            self._settings.take_back()
        # The user's files and warnings are the engines' business.
        self._settings = AppliedSettings(spec.settings, everything=False)
        sys.path.extend(path for path in spec.sys_path if path not in sys.path)

    def _make_run(
        self,
        spec: RunSpec,
        frames: Sequence[bytes],
        initial_state: InitialState,
        *,
        engines: Sequence[EngineFacts],
        output: CapturedOutput,
        engine_stats: StatsHandover | None = None,
    ) -> ActiveRun:
        from dnb.hub.run.active_run import ActiveRun

        return ActiveRun(
            spec,
            frames,
            initial_state,
            engines=engines,
            pool=self._links,
            generation=self._generation,
            departed=() if engine_stats is None else engine_stats.departed,
            output=output,
        )


@contextmanager
def _captured_output() -> Iterator[CapturedOutput]:
    """Take what user code prints from now on; given to a run, which closes it, or closed if there is none."""
    from dnb.user_code.captured_output import CapturedOutput

    output = CapturedOutput(of_all_threads=True)
    try:
        yield output
    except BaseException:
        output.close()
        raise


def _unpickle_job(frames: Sequence[bytes], spec: RunSpec) -> Any:
    from dnb.transport.pickling.payloads import adopt

    with user_code("where the run's objects are unpickled"):
        return adopt(frames[1], spec.job)[0]
