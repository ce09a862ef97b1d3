from __future__ import annotations

import inspect
from dataclasses import fields

from dnb.api.pools import PoolRequest, start


def test_a_pool_is_asked_for_with_the_defaults_of_start():
    of_start = {name: each.default for name, each in inspect.signature(start).parameters.items()}
    assert {each.name: each.default for each in fields(PoolRequest)} == of_start
