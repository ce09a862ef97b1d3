"""The verbs of `%dtrain` that make, tell, change and end a pool, and that harm its engines on purpose."""

from __future__ import annotations

from typing import Any

from dnb.api import pools
from dnb.api.launching import Pool
from dnb.errors import ArgumentError, PoolError
from dnb.notebook.commands.engine_arguments import describe_act, read_chaos, read_ids
from dnb.notebook.commands.verbs import entry_of, verb
from dnb.notebook.formatting import one_line
from dnb.notebook.live.display import warm_up
from dnb.notebook.live.frontend import choose_display
from dnb.notebook.output import say
from dnb.pool.doctor import describe_findings, examine_host
from dnb.pool.engines import describe_added, describe_engines, describe_restarts

NEXT_AFTER_START = """\
next: %dtrain fit model train --loss cross_entropy    train on these engines
      %px import os; os.getpid()                      run a line on every engine
      %dtrain status    %dtrain shutdown"""


@verb("start", group="pool", flags_of=pools.start, operand="n", example="%dtrain start -n 2")
def _start(shell: Any, **options: Any) -> None:
    """Start a pool of engines, or use the one that runs already."""
    if choose_display(shell=shell) == "widget":
        warm_up()
    pool, notices = pools.open_pool(pools.PoolRequest(**options))
    view = pool.client.direct_view("all")
    view.block = True
    view.activate()  # registers %px
    say("\n".join([*notices, describe_engines(pool.engines), NEXT_AFTER_START]))


@verb("status", group="pool")
def _status() -> None:
    """Tell the pool's engines, its run, and what troubles it."""
    pool = pools.current_pool()
    if pool is None:
        say(_without_pool())
        return
    facts = pool.facts
    held = "no run" if facts.run is None else f"run {facts.run!r} is {facts.run_status}: %dtrain attach shows it"
    lines = [describe_engines(pool.engines), str(held if pool.run is None else pool.run), pool.trouble]
    lines.append(one_line(describe_restarts(facts.restarts), limit=400))
    say("\n".join(line for line in lines if line))


@verb("shutdown", group="pool")
def _shutdown() -> None:
    """End the pool and all its processes."""
    say("the pool is shut down" if pools.shutdown() else "no pool was running")


@verb("add", group="pool", flags_of=Pool.add, operand="n", example="%dtrain add 2")
def _add(**options: Any) -> None:
    """Add engines to the pool; a run under way gives them their share."""
    pool = require_pool()
    new = pool.add(**options)
    say(describe_added(pool.engines, new))


@verb("remove", group="pool", args_of=[Pool.remove], rest="ids", example="%dtrain remove 1,3-4")
def _remove(ids: list[str], *, force: bool = False) -> None:
    """Remove engines from the pool, such as `1,3-4`, once they have finished what they have.

    Args:
        ids: engines and ranges of them, as 1,3-4.
    """
    pool = require_pool()
    if not ids:
        raise ArgumentError("%dtrain remove needs engine ids: %dtrain remove 1,3-4")
    known = [engine.id for engine in pool.engines]
    leaving = read_ids(",".join(ids), known=known, example="%dtrain remove 1,3-4")
    options = {"force": True} if force else {}
    pool.remove(leaving, **options)
    say(f"engine{'s' if len(leaving) > 1 else ''} {', '.join(map(str, leaving))} left the pool")


@verb("spares", group="pool", flags_of=Pool.keep_spares, operand="n", example="%dtrain spares 1")
def _spares(**options: Any) -> None:
    """Keep so many engines out of the run, ready to take a lost one's place."""
    pool = require_pool()
    pool.keep_spares(**options)
    spares = [str(engine.id) for engine in pool.engines if engine.state == "spare"]
    say(f"spares: {', '.join(spares) or 'none'}")


@verb("chaos", group="pool", rest="words", example="%dtrain chaos kill 1")
def _chaos(words: list[str]) -> None:
    """Harm engines or the hub on purpose: `kill 1`, `stop 1 5s`, `slow 2 4x`, `hub`.

    Args:
        words: kill ENGINE, stop ENGINE SECONDS as 5s, slow ENGINE FACTOR as 4x, where 1x ends it, or hub.
    """
    pool = require_pool()
    act = read_chaos(words, known=[engine.id for engine in pool.engines])
    if act.verb == "hub":
        pool.chaos.hub()
    for engine in act.engines:
        match act.verb:
            case "kill":
                pool.chaos.kill(engine)
            case "stop":
                pool.chaos.stop(engine, act.amount)
            case "slow":
                pool.chaos.slow(engine, act.amount)
    say(describe_act(act))


@verb("doctor", group="pool")
def _doctor() -> None:
    """Tell all that decides if a pool can live on this machine: for a bug report."""
    say(describe_findings(examine_host()))


def _run_cell(shell: Any, cell: str, on: str = "all", *, local: bool = False) -> None:
    """Run a cell on the engines, and with `--local` in this kernel, too.

    Args:
        on: ids of engines, such as 0,2-3; all of them if left out.
        local: also in this kernel.
    """
    pool = require_pool()
    known = [engine.id for engine in pool.engines]
    targets = known if on == "all" else read_ids(on, known=known, example="--on 0,2-3")
    view = pool.client[targets]
    result = view.execute(cell, silent=False, block=False)
    if local:
        shell.run_cell(cell)
    result.wait()
    result.display_outputs()
    result.get()


# The cell magic, which has no verb.
CELL = entry_of("(cell)", _run_cell, left_out={"cell"})


def require_pool() -> Pool:
    """Return the pool.

    Raises:
        PoolError: there is none.
    """
    pool = pools.current_pool()
    if pool is None:
        raise PoolError(_without_pool())
    return pool


def _without_pool() -> str:
    """Say that this kernel has no pool, and where there is one that goes on."""
    others = pools.describe_others()
    return f"this kernel has no pool, but {others}" if others else "no pool is running: %dtrain start -n 2"
