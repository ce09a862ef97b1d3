import pytest

from dnb.api.runs.history import History
from dnb.errors import ArgumentError


def history() -> History:
    held = History()
    held.append("loss", [1, 2, 3], [3.0, 2.0, 1.0])
    held.append("val_loss", [3], [1.5])
    held.append("lr", [1, 2, 3], [0.1, 0.1, 0.05])
    return held


def test_a_history_draws_its_losses():
    figure = history().plot()
    assert [(trace.name, list(trace.x)) for trace in figure.data] == [("loss", [1, 2, 3]), ("val_loss", [3])]


def test_columns_are_drawn_by_name():
    assert [trace.name for trace in history().plot("lr").data] == ["lr"]


def test_a_column_that_was_not_measured_is_refused_with_the_nearest():
    with pytest.raises(ArgumentError, match="'los' was not measured; did you mean 'loss'"):
        history().plot("los")


def test_of_nothing_there_is_an_empty_figure_and_no_column():
    assert list(History().plot().data) == []
    with pytest.raises(ArgumentError, match="'loss' was not measured; nothing was yet"):
        History().plot("loss")
