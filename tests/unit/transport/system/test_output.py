import io

from dnb.transport.system.output import LossyOutput


def test_a_print_onto_a_full_disk_is_dropped():
    with open("/dev/full", "wb", buffering=0) as full, io.TextIOWrapper(full, write_through=True) as output:
        print("nobody reads this", file=LossyOutput(output), flush=True)


def test_what_there_is_room_for_is_written(tmp_path):
    with open(tmp_path / "log", "w") as file:
        print("here", file=LossyOutput(file))
        assert (tmp_path / "log").read_text() == "here\n"


def test_letters_that_the_encoding_does_not_have_are_dropped(tmp_path):
    with open(tmp_path / "log", "w", encoding="utf-8") as file:
        print("\udcff", file=LossyOutput(file))
        print("here", file=LossyOutput(file))
    assert (tmp_path / "log").read_text() == "\nhere\n"
