import random

import numpy as np
import pytest
import torch

from dnb.transport.pickling.generators import OwnGenerators
from dnb.transport.pickling.payloads import adopt, pickle_payload


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.rand(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.random() for _ in range(3)]
    return generator.standard_normal(3).tolist()


@pytest.fixture
def arrived(tmp_path):
    def arrived(obj):
        pickled, payload, segment = pickle_payload(obj, name="payload", folders=[tmp_path])
        try:
            return adopt(pickled, payload)
        finally:
            if segment is not None:
                segment.unlink()

    return arrived


KINDS = {
    "default_rng": lambda: np.random.default_rng(0),
    "MT19937": lambda: np.random.Generator(np.random.MT19937(0)),
    "RandomState": lambda: np.random.RandomState(0),
    "RandomState of PCG64": lambda: np.random.RandomState(np.random.PCG64(0)),
    "random.Random": lambda: random.Random(0),
    "torch": lambda: torch.Generator().manual_seed(0),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_numbers_depend_on_the_seed_alone_wherever_a_generator_hides(make, arrived):
    generator = make()

    def hides():
        return generator

    one, found = arrived({"deep": [hides]})
    other, others = arrived({"deep": [hides]})
    own, another = one["deep"][0](), other["deep"][0]()
    draw(own)  # one more number than of the other: nothing is left of it
    found.seed(1)
    others.seed(1)
    first = draw(own)
    assert first == draw(another)
    others.seed(2)
    assert draw(another) != first


def test_generators_that_begin_alike_stay_alike_and_others_do_not(arrived):
    found, generators = arrived([np.random.default_rng(0), np.random.default_rng(0), np.random.default_rng(1)])
    generators.seed(5)
    image, mask, other = map(draw, found)
    assert image == mask
    assert image != other


def test_a_bound_method_brings_its_generator_along(arrived):
    found, generators = arrived(random.Random(0).random)
    generators.seed(1)
    first = found()
    generators.seed(1)
    assert found() == first


def test_the_system_s_own_randomness_has_no_state(arrived):
    assert len(arrived([1, "two"])[1]) == 0
    assert len(OwnGenerators()) == 0
