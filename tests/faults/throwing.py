"""A hub that raises where it is told to, in a pool that is otherwise like any other.

`python -m tests.faults.throwing` is its supervisor; a controller that starts it: `python -m tests.faults.throwing
controller`. A place throws when its file is in the folder that the environment names: once, as the file is taken away,
or, if "always" is its first word, as long as it is there.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "DNB_TEST_THROWS"


class ThrownError(RuntimeError):
    """What a test wants."""


def throw_if_asked(place: str) -> None:
    """Raise, if a test has put a file there for this place."""
    armed = Path(os.environ[FOLDER_VARIABLE]) / place
    try:
        if armed.read_text().startswith("always"):
            (armed.parent / f"{place}.thrown").touch()
            raise ThrownError(f"thrown at {place}")
        armed.rename(armed.parent / f"{place}.thrown")
    except FileNotFoundError:
        return
    raise ThrownError(f"thrown at {place}")


def throw_around(owner: Any, name: str, *, key: int | None = None, label: str = "") -> None:
    """Let a function throw before and after it has done its work.

    Args:
        owner: class of the function.
        name: of the function.
        key: which of its arguments says, by its class, what kind of event it is.
        label: begins the name of the place.
    """
    inner = getattr(owner, name)
    label = label or f"{owner.__name__}.{name}"

    @functools.wraps(inner)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        place = label if key is None else f"{label}.{type(arguments[key]).__name__}"
        throw_if_asked(f"{place}.before")
        result = inner(*arguments, **options)
        throw_if_asked(f"{place}.after")
        return result

    setattr(owner, name, wrapped)


def arm_everything() -> None:
    """Wrap whatever the hub's loop does."""
    from dnb.hub.parameters import chunked_adam, durability, journal, master
    from dnb.hub.run import active_run, recorder
    from dnb.hub.run.execution import deferred_work, task_executor
    from dnb.hub.scheduling import coordinator
    from dnb.hub.server import connection_poller, connections, pool_records, run_slot, service
    from dnb.hub.server.members import engine_lifecycle

    throw_around(service.Service, "_tick", label="tick")
    throw_around(connections.Connections, "accept", label="accept")
    throw_around(connection_poller.ConnectionPoller, "_attach", label="attach")
    throw_around(connection_poller.ConnectionPoller, "_drop_connection", label="drop_line")
    throw_around(engine_lifecycle.EngineLifecycle, "_join", label="join")
    throw_around(engine_lifecycle.EngineLifecycle, "_hear", label="beat")
    throw_around(engine_lifecycle.EngineLifecycle, "take_message", key=2, label="engine")
    throw_around(service.Service, "_serve_request", key=2, label="request")
    throw_around(run_slot.RunSlot, "_take_over_run", label="take_over")
    throw_around(pool_records.PoolRecords, "write_pool_file", label="pool_file")
    throw_around(pool_records.PoolRecords, "write_handovers", label="memos")
    throw_around(active_run.ActiveRun, "start", label="run_start")
    throw_around(active_run.ActiveRun, "tick", label="run_tick")
    throw_around(task_executor.TaskExecutor, "assign", label="run_assign")
    throw_around(task_executor.TaskExecutor, "commit", label="run_commit")
    throw_around(task_executor.TaskExecutor, "_prepare", label="run_prepare")
    throw_around(task_executor.TaskExecutor, "_take_digest", label="run_take_digest")
    throw_around(deferred_work.DeferredWork, "run", label="run_do_chores")
    throw_around(recorder.RunRecorder, "record", label="run_record")
    throw_around(recorder.RunRecorder, "add_event", label="run_note")
    throw_around(coordinator.Coordinator, "handle", key=1, label="coordinator")
    throw_around(master.Master, "_reduce", label="reduce")
    throw_around(durability.UpdateLog, "_roll_forward", label="roll_forward")
    throw_around(durability.UpdateLog, "_roll_back", label="roll_back")
    throw_around(durability.UpdateLog, "_copy_aside", label="copy_aside")
    throw_around(durability.UpdateLog, "finish_deferred", label="settle")
    throw_around(durability.UpdateLog, "recover", label="recover")
    throw_around(chunked_adam.ChunkedAdam, "_raise_steps", label="raise_steps")
    throw_around(chunked_adam.ChunkedAdam, "_update", label="update")
    throw_around(journal.Journal, "write_intent", label="intent")
    throw_around(journal.Journal, "publish", label="publish")
    throw_around(journal.Journal, "write_state", label="state")


def main() -> None:
    """Be the controller, or the supervisor."""
    if sys.argv[1:2] == ["controller"]:
        from dnb.hub.process.controller import DnbController, HubChild

        HubChild.module = "tests.faults.throwing"
        DnbController.launch_instance(sys.argv[2:])
        return
    from dnb.hub.process import supervisor

    warm_up = supervisor.warm_up

    def warm_up_and_arm(**options: Any) -> None:
        warm_up(**options)
        arm_everything()  # in the supervisor, of which every hub is a fork

    supervisor.warm_up = warm_up_and_arm
    supervisor.main()


if __name__ == "__main__":
    main()
