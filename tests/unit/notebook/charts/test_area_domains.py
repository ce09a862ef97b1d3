import pytest

from dnb.notebook.charts.run_figure import figure
from dnb.planning.utilisation import Utilisation
from tests.fake_runs import FakeRun, FakeWorker, usage_rows


@pytest.mark.parametrize("num_engines", range(1, 13))
def test_no_panel_ends_below_the_figure(num_engines):
    engines = tuple(range(num_engines))
    run = FakeRun(step=50, workers=[FakeWorker(engine=engine) for engine in engines])
    run.utilisation = Utilisation(usage_rows(9, engines=engines))
    axes = [axis for name, axis in figure(run)["layout"].items() if name.startswith("yaxis")]
    assert min(axis["domain"][0] for axis in axes if "domain" in axis) == 0.0
