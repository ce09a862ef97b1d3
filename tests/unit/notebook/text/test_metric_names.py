import math

from dnb.notebook.text.metric_names import best_of, metric_names


def test_a_value_that_is_no_number_is_not_the_best():
    assert best_of("val_accuracy", [math.nan, 0.5, math.inf]) == 1
    assert best_of("accuracy", [math.nan]) is None


def test_columns_that_are_no_metrics_are_left_to_their_own_charts():
    assert metric_names(["loss", "val_loss", "lr", "seconds", "digest", "grad_norm", "samples_per_second"]) == []
    assert metric_names(["loss", "val_f1", "f1", "accuracy"]) == ["f1", "accuracy"]
