"""The verbs of `%dtrain` that change which engines a pool has, and that harm them on purpose."""

from __future__ import annotations

from typing import Any

from dnb import training
from dnb.errors import ArgumentError, PoolError
from dnb.notebook.arguments import bind, split_line
from dnb.notebook.engine_words import read_chaos, read_ids
from dnb.notebook.outlet import say
from dnb.pool.engine_pool import describe_added


class PoolVerbs:
    """Mixed into the magics, whose verbs are the methods `_do_<verb>`."""

    def _names(self) -> dict[str, Any]:
        raise NotImplementedError

    def _do_add(self, line: str) -> None:
        options = self._bind_number(training.Pool.add, line, verb="add")
        pool = _require_pool()
        new = pool.add(**options)
        say(describe_added(pool.engines, new))

    def _do_remove(self, line: str) -> None:
        words = [word.text for word in split_line(line)]
        flags = " ".join(word for word in words if word.startswith("-"))
        options = bind(_remove_flags, flags, names=self._names(), verb="remove")
        pool = _require_pool()
        text = ",".join(word for word in words if not word.startswith("-"))
        if not text:
            raise ArgumentError("%dtrain remove needs engine ids: %dtrain remove 1,3-4")
        leaving = read_ids(text, known=[engine.id for engine in pool.engines], example="%dtrain remove 1,3-4")
        pool.remove(leaving, **options)
        say(f"engine{'s' if len(leaving) > 1 else ''} {', '.join(map(str, leaving))} left the pool")

    def _do_spares(self, line: str) -> None:
        options = self._bind_number(training.Pool.keep_spares, line, verb="spares")
        pool = _require_pool()
        pool.keep_spares(**options)
        spares = [str(engine.id) for engine in pool.engines if engine.state == "spare"]
        say(f"spares: {', '.join(spares) or 'none'}")

    def _do_chaos(self, line: str) -> None:
        pool = _require_pool()
        words = [word.text for word in split_line(line)]
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

    def _bind_number(self, function: Any, line: str, *, verb: str) -> dict[str, Any]:
        """Bind a line whose first word may be the number `n` without its flag."""
        flagged = f"-n {line}" if line.strip() and not line.strip().startswith("-") else line
        return bind(function, flagged, names=self._names(), verb=verb, left_out=frozenset({"self"}))


def _remove_flags(*, force: bool = False) -> None:
    """The flags of `%dtrain remove`."""


def _require_pool() -> training.Pool:
    pool = training.current_pool()
    if pool is None:
        raise PoolError("no pool is running: %dtrain start -n 2")
    return pool
