"""Errors as a notebook shows them."""

import linecache
from pathlib import Path

import torch

import dnb
from dnb.errors import ArgumentError, RunError, fold_frames

DNB = Path(dnb.__file__).parent
TORCH = Path(torch.__file__).parent
REMOTE = f"""Traceback (most recent call last):
  File "{DNB}/engine/process/session.py", line 201, in _work
    report, raws = self._computed(work, indices)
                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "{DNB}/engine/replicas/replica.py", line 131, in compute
    outcome = self._with_states(work, self._compute_step(work, indices))
  File "/home/me/losses.py", line 3, in mine
    return other(output)
  File "{TORCH}/nn/functional.py", line 9, in cross_entropy
    return torch._C._nn.cross_entropy_loss(input)
IndexError: Target 12 is out of bounds.
"""


def test_frames_of_dnb_and_torch_stand_in_one_line_and_the_users_own_whole():
    assert fold_frames(REMOTE) == (
        "Traceback (most recent call last):\n"
        "  ... 2 frames of dnb and torch\n"
        '  File "/home/me/losses.py", line 3, in mine\n'
        "    return other(output)\n"
        "  ... 1 frame of dnb and torch\n"
        "IndexError: Target 12 is out of bounds.\n"
    )


def test_a_frame_of_a_cell_gets_its_source_line_from_this_notebook(monkeypatch):
    path = "/tmp/ipykernel_7/1234.py"
    lines = ["def bad(output, target):\n", "    return output / 0\n"]
    monkeypatch.setitem(linecache.cache, path, (40, None, lines, path))
    text = f'Traceback (most recent call last):\n  File "{path}", line 2, in bad\nZeroDivisionError: division by zero\n'
    assert f'  File "{path}", line 2, in bad\n    return output / 0\nZeroDivisionError' in fold_frames(text)


def test_a_folder_of_the_users_that_is_called_dnb_is_the_users_own():
    text = 'Traceback (most recent call last):\n  File "/home/me/dnb/mine.py", line 1, in f\n    x\nKeyError: 1\n'
    assert fold_frames(text) == text


def test_several_tracebacks_are_folded_each():
    both = f"On engine 0:\n{REMOTE}\nOn engine 1:\n{REMOTE}"
    assert fold_frames(both).count("IndexError: Target 12 is out of bounds.") == 2
    assert "On engine 1:" in fold_frames(both)


def test_a_notebook_shows_the_class_in_red_the_sentence_and_the_users_frames():
    shown = RunError("paused at step 1: IndexError", remote_traceback=REMOTE)._render_traceback_()
    assert shown[0] == "\x1b[31mRunError\x1b[39m: paused at step 1: IndexError"
    assert "session.py" not in shown[-1]
    assert ArgumentError("no loss")._render_traceback_() == ["\x1b[31mArgumentError\x1b[39m: no loss"]


def test_the_whole_traceback_is_in_the_text_of_the_error():
    assert "session.py" in str(RunError("paused", remote_traceback=REMOTE))
