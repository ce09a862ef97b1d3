import math
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dnb.notebook.control_panel import choices as panel_choices


class Squares(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, index**2


class Broken(Squares):
    def __len__(self):
        raise SystemExit("no length")


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def words(choices) -> list[str]:
    return [choice.words for choice in choices]


def pair(size: int = 12):
    return torch.zeros(size, 3), torch.zeros(size, dtype=torch.long)


def offered_losses(**own) -> list[str]:
    return [word for word in words(panel_choices.losses(own, names=own)) if word.split()[-1] in own]


def test_private_names_modules_classes_and_what_is_ipythons_are_not_offered():
    names = {"_": 1, "_i1": 2, "__x": 3, "In": [], "Out": {}, "math": math, "Squares": Squares, "mine": 4}
    assert panel_choices.own_names(names, hidden={}) == {"mine": 4}


def test_what_was_there_before_the_first_cell_is_offered_once_it_is_changed():
    names = {"before": 1, "changed": 2}
    assert panel_choices.own_names(names, hidden={"before": 1, "changed": object()}) == {"changed": 2}


def test_models_are_what_can_be_trained():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    own = {"net": nn.Linear(3, 2), "frozen": frozen, "lazy": nn.LazyLinear(2), "loss": nn.MSELoss(), "number": 3}
    assert words(panel_choices.models(own)) == ["net"]


def test_a_model_is_told_with_its_type_and_size():
    assert panel_choices.models({"net": nn.Linear(3, 2)})[0].label == "net (Linear, 8 parameters)"


@pytest.mark.parametrize(
    "value",
    [
        pair(),
        [np.zeros((4, 2)), np.zeros(4, dtype=np.int64)],
        Squares(),
        TensorDataset(*pair()),
        DataLoader(TensorDataset(*pair()), batch_size=4),
    ],
    ids=["tensors", "arrays", "data-set", "tensor-data-set", "loader"],
)
def test_data_that_fit_takes_is_offered(value):
    assert words(panel_choices.data_sets({"data": value})) == ["data"]


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3),
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(0), torch.zeros(0)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (np.array(["a"]), np.array(["b"])),
        "text",
        [1, 2],
        {"a": 1},
        nn.Sequential(nn.Linear(2, 2)),
        Endless(),
        Broken(),
        DataLoader(Endless()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_that_fit_refuses_is_not_offered(value):
    assert panel_choices.data_sets({"data": value}) == []


def test_inputs_and_targets_of_their_own_are_offered_as_a_pair():
    X, y = pair()
    found = panel_choices.data_sets({"X_train": X, "y_train": y, "X_test": X, "y": y})
    assert words(found) == ["{(X_train, y_train)}"]


def test_a_function_of_output_and_target_is_a_loss():
    def mine(output, target):
        return (output - target).sum()

    assert offered_losses(mine=mine) == ["--loss mine"]


def test_a_function_of_a_model_and_a_batch_is_a_step():
    def mine(model, batch):
        return model(batch)

    assert offered_losses(mine=mine) == ["--step mine"]


def test_a_function_whose_parameters_say_nothing_may_be_both():
    assert offered_losses(mine=lambda a, b: a - b) == ["--loss mine", "--step mine"]


def test_functions_of_other_numbers_of_values_are_no_losses():
    assert offered_losses(one=math.sqrt, three=nn.functional.triplet_margin_loss) == []


def test_a_loss_module_and_a_partial_are_losses():
    smooth = partial(nn.functional.cross_entropy, label_smoothing=0.1)
    assert offered_losses(criterion=nn.MSELoss(), smooth=smooth) == ["--loss criterion", "--loss smooth"]


def test_a_loss_of_each_sample_is_not_offered_as_read_loss_refuses_it():
    assert offered_losses(criterion=nn.MSELoss(reduction="none")) == []


def test_models_and_classes_are_no_losses_although_they_can_be_called():
    assert offered_losses(net=nn.Bilinear(2, 2, 2), number=3) == []


def test_a_loss_whose_name_the_notebook_took_for_something_else_is_quoted():
    found = words(panel_choices.losses({}, names={"mse_loss": 3}))
    assert "--loss {'mse_loss'}" in found
    assert "--loss mse_loss" not in found


def test_an_optimizer_on_the_models_parameters_is_offered_and_no_other():
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    own = {"mine": torch.optim.SGD(net.parameters(), lr=0.1), "strange": torch.optim.SGD(other.parameters(), lr=0.1)}
    found = words(panel_choices.optimizers(own, model=net, names=own))
    assert found[:3] == ["", "--optimizer mine", "--optimizer sgd"]
    assert "--optimizer strange" not in found


def test_without_a_model_optimizers_go_by_name():
    own = {"mine": torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)}
    assert "--optimizer mine" not in words(panel_choices.optimizers(own, model=None, names=own))


def test_metrics_are_functions_by_name():
    function = nn.functional.l1_loss
    own = {"good": {"error": function}, "bad": {"loss": function}, "settings": {"lr": 1}}
    assert words(panel_choices.metrics(own, names=own)) == ["", "--metrics accuracy", "--metrics good"]


def test_an_object_that_fails_when_it_is_looked_at_is_not_offered():
    class Angry(nn.Module):
        def parameters(self, recurse=True):
            raise RuntimeError("leave me alone")

    own = {"angry": Angry(), "space": types.SimpleNamespace()}
    assert panel_choices.models(own) == []


@pytest.mark.parametrize(
    ("data", "loss"),
    [
        ((torch.zeros(3, 2), torch.zeros(3).long()), "cross_entropy"),
        ((np.zeros((3, 2)), np.zeros(3, dtype=np.uint8)), "cross_entropy"),
        ((torch.zeros(3, 2), torch.zeros(3, 1)), "mse_loss"),
        ((torch.zeros(3, 2), torch.zeros(3, 2).long()), ""),
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool)), ""),
        (torch.zeros(3, 2), ""),
        (DataLoader(TensorDataset(torch.zeros(3, 2), torch.zeros(3).long())), "cross_entropy"),
        ({"x": 1}, ""),
        (None, ""),
    ],
)
def test_a_loss_is_guessed_from_targets_that_tell(data, loss):
    assert panel_choices.guess_loss(data) == loss


class OwnLoss(nn.Module):
    def forward(self, x, y):
        return (x.sum() - y.sum()) ** 2


def test_no_loss_is_guessed_for_a_model_that_wants_the_targets():
    data = (torch.zeros(3, 2), torch.zeros(3).long())
    assert panel_choices.guess_loss(data, model=nn.Linear(2, 2)) == "cross_entropy"
    assert panel_choices.guess_loss(data, model=OwnLoss()) == ""
