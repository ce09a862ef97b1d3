import pytest

from dnb.user_code.output_kinds import kind_of_line, read_count, write_count


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("step 3: loss 0.25", "step 12,400: loss -1e-05"),
        ("tensor([ 0.1, -0.2])", "tensor([-0.1,  0.2])"),
        ("<Net object at 0x7f2a>", "<Net object at 0x1b3c>"),
        ("  0%|          | 0/10 [00:00<?, ?it/s]", " 50%|█████     | 5/10 [00:01<00:01,  3.20it/s]"),
        ("3it [00:00, ?it/s]", "17it [00:20, 1.20s/it]"),
    ],
)
def test_lines_that_differ_in_numbers_are_of_one_kind(one, other):
    assert kind_of_line(one) == kind_of_line(other)


@pytest.mark.parametrize(
    ("one", "other"), [("loss 0.25", "loss nan"), ("a.py:3: UserWarning: one", "a.py:3: UserWarning: two")]
)
def test_lines_that_differ_in_words_are_of_two_kinds(one, other):
    assert kind_of_line(one) != kind_of_line(other)


def test_a_count_is_read_as_it_was_written():
    assert read_count(write_count(18_233, "more like 3")) == (18_233, "more like 3")
    assert read_count(write_count(7, "")) == (7, "")


def test_a_line_that_is_no_count_counts_nothing():
    assert read_count("something") == (0, "")
