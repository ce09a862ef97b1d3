from dnb.notebook.text.output_words import output_lines
from tests.fake_runs import FakeEvent


def printed(engine: int, step: int, text: str) -> FakeEvent:
    return FakeEvent(kind="output", text=text, step=step, engine=engine)


def test_without_output_nothing_is_said():
    assert output_lines([FakeEvent(kind="joined", text="engine 0 joined", step=0, engine=0)]) == []


def test_lines_that_differ_in_numbers_are_one_kind_and_the_first_is_shown():
    events = [printed(1, 3, "loss 0.25"), printed(0, 4, "loss 0.125\ncareful"), printed(1, 5, "loss 1e-05")]
    assert output_lines(events) == [
        "output of engine 1 after step 3: loss 0.25 (2 more like it)",
        "output of engine 0 after step 4: careful",
        "output: 4 lines of 2 kinds: run.output, or output.log in the run's folder",
    ]


def test_of_many_kinds_three_are_shown():
    lines = output_lines([printed(0, 1, "a\nb\nc\nd")])
    assert len(lines) == 4
    assert lines[-1] == "output: 4 lines of 4 kinds: run.output, or output.log in the run's folder"


def test_lines_that_were_only_counted_are_added_to_their_kind():
    events = [
        printed(1, 3, "loss 0.25"),
        FakeEvent(kind="repeated", text="loss 0.5\nloss 0.75", step=4, engine=1),
        printed(0, 4, "f.py:1: UserWarning: careful\n  warn()"),
        FakeEvent(kind="counted", text="18,233 more like loss 0.25\n7 more lines of other kinds", step=9),
    ]
    assert output_lines(events) == [
        "output of engine 1 after step 3: loss 0.25 (18,235 more like it)",
        "output of engine 0 after step 4: f.py:1: UserWarning: careful",
        "output: 18,244 lines of 2 kinds and more: run.output, or output.log in the run's folder",
    ]


def test_what_the_hub_prints_bears_its_name():
    events = [FakeEvent(kind="output", text="norm 3", step=2)]
    assert output_lines(events)[0] == "output of the hub after step 2: norm 3"
