"""Kernels of other versions of dnb at a hub: each is told both versions and the way out, and the pool goes on."""

import pytest

from dnb.errors import HubError, PoolError
from dnb.protocol.base import Message
from dnb.protocol.client_messages import Done, Hello, PoolState
from dnb.protocol.versions import VERSION, name_this_dnb
from dnb.transport.system.processes import this_process
from tests.engines.pools import until

pytestmark = pytest.mark.engines


class GetWeather(Message, frozen=True):
    """A request of a dnb that does not exist yet."""


class GetPool(Message, frozen=True):
    """One that does, with a field more."""

    new_option: int = 1


@pytest.mark.parametrize(
    ("request_", "reason"),
    [(GetWeather(), "'GetWeather' is not known"), (GetPool(), "the field 'new_option' is not known")],
    ids=["a request", "a field"],
)
@pytest.mark.parametrize("is_hub_new", [False, True], ids=["", "after a hub's death"])
def test_a_request_of_a_newer_kernel_is_refused_with_both_versions(pool, request_, reason, is_hub_new):
    if is_hub_new:
        hub = pool.facts.hub.pid
        pool.chaos.hub()
        until(lambda: pool.facts.hub.pid != hub, what="another hub is there")
    with pytest.raises(HubError) as caught:
        pool.hub.ask(request_, PoolState)
    name = type(request_).__name__
    assert str(caught.value) == (
        f"the hub is {name_this_dnb()}, and cannot read the request {name!r} of this kernel, {name_this_dnb()} "
        f"({reason}): use one version of dnb for both, or %dtrain shutdown and %dtrain start open a pool of the "
        "kernel's own"
    )
    assert len(pool.engines) == 2


def test_a_kernel_that_speaks_another_format_is_not_let_in(pool):
    with pytest.raises(PoolError) as caught:
        pool.hub.ask(Hello(owner=this_process(), mode="watch", format=2, version="9.9.9"), Done)
    assert str(caught.value) == (
        f"the pool's hub is {name_this_dnb()}, and this kernel dnb 9.9.9 (format 2): attach with the hub's version of "
        "dnb, or end the pool with it and %dtrain start one of this version"
    )


def test_a_pool_s_record_and_its_connection_file_say_the_version(pool):
    assert (pool.facts.version, pool.facts.format) == (VERSION, 1)
