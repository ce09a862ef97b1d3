"""The harness itself, on a notebook that needs no dnb."""

import pytest

from tests.browser.lab import write_notebook

pytestmark = pytest.mark.browser


def test_a_page_runs_saves_reloads_and_shows_and_a_failing_cell_fails_the_wait(lab, notebook_folder, tmp_path):
    write_notebook(notebook_folder / "harness.ipynb", ["n = 0", "n += 1; print(n)", "1 / 0", "print('never')"])
    lab.open("harness.ipynb")
    lab.run_and_wait(0)
    lab.run_and_wait(1)
    assert lab.save().cells[1].outputs[0].text == "1\n"
    lab.reload()
    assert lab.run_and_wait(1)[0]["text"] == "2\n"
    assert lab.text(1).strip() == "2"
    lab.screenshot(tmp_path / "output.png", index=1)
    assert (tmp_path / "output.png").read_bytes().startswith(b"\x89PNG")
    lab.run_all()
    with pytest.raises(AssertionError, match=r"(?s)cell 2 failed:.*ZeroDivisionError"):
        lab.wait(3)
