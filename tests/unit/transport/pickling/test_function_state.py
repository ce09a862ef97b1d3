"""What functions keep, walked on two sides: what has changed on one is put into its place on the other."""

import copy
from collections import deque
from functools import partial

import cloudpickle
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dnb.transport.pickling.function_state import KeptState
from dnb.transport.state_trees import put_together, take_apart


def sent(function, model):
    """Function and model as another process has them."""
    return cloudpickle.loads(cloudpickle.dumps((function, model)))


def brought_home(function, model, *, calls=3):
    """Call the copy of a function so many times, and bring home what it keeps."""
    theirs, their_model = sent(function, model)
    own, other = KeptState({"f": function}, known=[model]), KeptState({"f": theirs}, known=[their_model])
    for _ in range(calls):
        theirs(their_model)
    tree, tensors = take_apart(other.read(), root="kept")
    own.give(put_together(tree, tensors))


class Average:
    """As people write one."""

    def __init__(self, model, decay=0.5):
        self.decay, self.num_updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def __call__(self, model):
        self.num_updates += 1
        self.late = [self.num_updates]
        for name, parameter in model.named_parameters():
            self.shadow[name] = self.decay * self.shadow[name] + (1 - self.decay) * (parameter.detach() + 1)


def test_an_object_of_the_user_s_class_keeps_tensors_numbers_and_what_it_makes_later():
    model = nn.Linear(2, 2)
    mine, expected = Average(model), Average(model)
    shadow = mine.shadow
    brought_home(mine, model)
    for _ in range(3):
        expected(model)
    assert mine.num_updates == 3
    assert mine.late == [3]
    assert mine.shadow is shadow
    assert all(torch.equal(mine.shadow[name], expected.shadow[name]) for name in shadow)


def test_closures_hold_modules_lists_and_counts():
    model, seen, last, count = nn.Linear(2, 2), [], deque(maxlen=2), 0
    average = AveragedModel(model)

    def after(model):
        nonlocal count
        count += 1
        seen.append(count)
        last.append(float(count))
        with torch.no_grad():
            model.weight.add_(1)
        average.update_parameters(model)

    before = model.weight.detach().clone()
    brought_home(after, model)
    assert (count, seen, list(last)) == (3, [1, 2, 3], [2.0, 3.0])
    assert average.n_averaged == 3
    assert torch.allclose(average.module.weight, before + 2)
    assert torch.equal(model.weight, before)  # the model's own state is not of the function


@pytest.mark.parametrize("form", ["method", "partial"])
def test_bound_methods_and_partials_are_looked_into(form):
    model = nn.Linear(2, 2)
    average = AveragedModel(model)
    brought_home(
        average.update_parameters if form == "method" else partial(AveragedModel.update_parameters, average), model
    )
    assert average.n_averaged == 3


def test_globals_that_a_function_names_are_kept_and_constants_are_left_alone():
    scope = {"__name__": "__main__", "total": 0, "rate": 0.5, "other": 1}
    exec("def after(model):\n    global total\n    total += rate", scope)  # noqa: S102 - as a kernel runs a cell
    model = nn.Linear(1, 1)
    theirs, their_model = sent(scope["after"], model)
    own, other = KeptState({"f": scope["after"]}, known=[model]), KeptState({"f": theirs}, known=[their_model])
    theirs(their_model)
    scope["rate"] = 0.25  # a cell has set it meanwhile
    own.give(other.read())
    assert (scope["total"], scope["rate"]) == (0.5, 0.25)


def test_a_generator_goes_on():
    generator, model, drawn = torch.Generator().manual_seed(1), nn.Linear(1, 1), []

    def after(_):
        drawn.append(torch.rand(1, generator=generator).item())

    expected = copy.deepcopy(torch.rand(4, generator=torch.Generator().manual_seed(1)).tolist())
    brought_home(after, model)
    after(model)
    assert drawn == pytest.approx(expected)


def test_what_cannot_be_written_down_is_left_out():
    model, lock = nn.Linear(1, 1), [object()]

    def after(_):
        return lock

    assert KeptState({"f": after}, known=[model]).read() == {}
