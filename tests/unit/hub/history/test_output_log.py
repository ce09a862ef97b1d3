from pathlib import Path

from dnb.hub.history.backlog import Backlog
from dnb.hub.history.line_file import LineFile
from dnb.hub.history.output_log import OutputLog


def opened(path: Path) -> LineFile:
    return LineFile(path / "output.log", Backlog((), "kept-output"))


def written(path: Path) -> list[str]:
    return (path / "output.log").read_text().splitlines()


def test_a_line_has_its_time_engine_and_step(tmp_path: Path):
    OutputLog(opened(tmp_path)).append(["loss 3"], engine=2, step=7, when=1000.0)
    (line,) = written(tmp_path)
    assert line.endswith(":40 engine 2 step 7: loss 3")


def test_line_feeds_within_a_line_make_no_second_one(tmp_path: Path):
    OutputLog(opened(tmp_path)).append(["a\nb", "c"], engine=0, step=1, when=1000.0)
    assert [line.partition("step 1: ")[2] for line in written(tmp_path)] == ["a b", "c"]


def test_beyond_its_bytes_one_line_says_that_the_rest_is_left_out(tmp_path: Path):
    log = OutputLog(opened(tmp_path), most_bytes=100)
    for number in range(50):
        log.append([f"line {number}"], engine=0, step=1, when=1000.0)
    assert [line.partition("step 1: ")[2] for line in written(tmp_path)] == [
        "line 0",
        "line 1",
        "(more than 100 B of output: the rest is left out)",
    ]


def test_the_next_hub_counts_what_is_there(tmp_path: Path):
    OutputLog(opened(tmp_path), most_bytes=40).append(["x" * 60], engine=0, step=1, when=1000.0)
    OutputLog(opened(tmp_path), most_bytes=40).append(["y"], engine=0, step=1, when=1000.0)
    assert len(written(tmp_path)) == 1


def test_a_line_of_the_hub_bears_its_name(tmp_path: Path):
    OutputLog(opened(tmp_path)).append(["norm 3"], engine=None, step=7, when=1000.0)
    (line,) = written(tmp_path)
    assert line.endswith(":40 hub step 7: norm 3")
