"""The view in JupyterLab and Voila: what survives, and what it answers to."""

import nbformat
import pytest

from tests.browser.lab import PATIENCE_SECONDS, write_notebook
from tests.browser.test_quickstart import LONG_FIT, POINTS, SETUP, keep_picture

pytestmark = [pytest.mark.browser, pytest.mark.engines]

# What a curve holds that is drawn under a cell: first and last step of the run's raw losses, and how far it is zoomed.
CURVE = """
    const plot = document.querySelectorAll('.jp-Notebook .jp-Cell')[index]?.querySelector('.js-plotly-plot');
    const steps = Array.from(plot?.data?.find(trace => trace.type === 'scatter' && trace.x?.length > 1)?.x ?? []);
"""
# Remembers the picture that stands for a chart while its code is loaded, however short that is; tells how wide it is.
WATCH_STILL = """
    new MutationObserver(() => { window.still ??= document.querySelector('img.dnb-still')?.src; })
        .observe(document, {childList: true, subtree: true});
"""
STILL = "const image = new Image(); image.src = window.still; return image.decode().then(() => image.naturalWidth);"
# As in a frame that belongs to nobody, which is where some front ends show outputs.
NO_STORAGE = """
    Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('denied', 'SecurityError'); }});
"""
STEPS = 120
SHORT_FIT = f"%dtrain fit model train --val val --loss cross_entropy --steps {STEPS} --name closed"
SAVED_CHART = "img.plot-img"  # Lab shows its own picture of a saved chart, and the chart itself at a click


def wait_for_curve(page, index, *, step):
    """Until the curve under a cell begins with the run and reaches a step."""
    page.wait_for_function(
        f"([index, step]) => {{ {CURVE} return steps[0] <= 1 && steps[steps.length - 1] >= step; }}",
        arg=[index, step],
    )


def last_step(page, index):
    return page.evaluate(f"index => {{ {CURVE} return steps[steps.length - 1] ?? 0; }}", index)


def open_live(lab, notebook_folder, name, *, cells):
    """A notebook whose fourth cell shows a run that goes on."""
    cells = ["%load_ext dnb", "%dtrain start -n 2", SETUP, "run = " + LONG_FIT, *cells, "%dtrain shutdown"]
    write_notebook(notebook_folder / name, cells)
    lab.open(name)
    for index in range(4):
        lab.run_and_wait(index)
    lab.output_area(3).locator(POINTS).first.wait_for()
    return len(cells) - 1


def test_the_chart_grows_and_a_reloaded_page_and_a_second_tab_have_all_of_it_and_its_buttons(lab, notebook_folder):
    shutdown = open_live(lab, notebook_folder, "survives.ipynb", cells=["print(run.step)", "%dtrain wait"])
    lab.save()
    lab.page.add_init_script(WATCH_STILL)
    lab.reload()
    wait_for_curve(lab.page, 3, step=int(lab.run_and_wait(4)[0]["text"]))
    assert lab.evaluate(STILL) > 500
    lab.wait_for("return !document.querySelector('img.dnb-still');")
    tab = lab.another()
    wait_for_curve(tab.page, 3, step=last_step(lab.page, 3))
    tab.output_area(3).get_by_role("button", name="Pause").click()
    lab.output_area(3).get_by_text("paused").first.wait_for()  # the other tab tells it, too
    lab.output_area(3).get_by_role("button", name="Resume").click()
    step = last_step(tab.page, 3)
    wait_for_curve(tab.page, 3, step=step + 1)
    keep_picture(tab, "view-second-tab")
    lab.output_area(3).get_by_role("button", name="Stop").click()
    lab.output_area(3).get_by_text("stopped").first.wait_for()
    lab.run_and_wait(5)
    lab.wait_for_picture(5)  # the reloaded page cannot put it in the fourth cell
    lab.run_and_wait(shutdown)
    assert (lab.problems, tab.problems) == ([], [])


def test_a_tab_that_was_closed_before_the_end_has_the_finished_chart_when_it_is_opened_again(lab, notebook_folder):
    cells = ["%load_ext dnb", "%dtrain start -n 2", SETUP, f"run = {SHORT_FIT}", "%dtrain wait", "%dtrain shutdown"]
    write_notebook(notebook_folder / "closed.ipynb", cells)
    lab.open("closed.ipynb")
    for index in range(4):
        lab.run_and_wait(index)
    lab.output_area(3).locator(".dnb-row").first.wait_for()
    lab.run(4)
    lab.save()
    lab.command("application:close")
    lab.wait_for("return !document.querySelector('.jp-Notebook');")
    lab.wait_until_idle()
    lab.open("closed.ipynb")
    wait_for_curve(lab.page, 3, step=STEPS)
    lab.output_area(3).get_by_text(f"finished after {STEPS} steps").first.wait_for()
    keep_picture(lab, "view-opened-after-the-end", index=3)
    lab.run_and_wait(4)
    lab.wait_for_picture(4)  # the closed page cannot put it in the fourth cell
    lab.run_and_wait(5)
    assert lab.problems == []


def test_a_restarted_kernel_attaches_and_the_saved_notebook_shows_the_chart_without_one(lab, notebook_folder):
    again = ["%load_ext dnb\nrun = %dtrain attach", "%dtrain stop"]
    shutdown = open_live(lab, notebook_folder, "restarted.ipynb", cells=again)
    step = last_step(lab.page, 3)
    lab.restart_kernel()
    lab.run_and_wait(4)
    wait_for_curve(lab.page, 4, step=step)
    keep_picture(lab, "view-attached", index=4)
    for index in (5, shutdown):
        lab.run_and_wait(index)
    lab.wait_for_picture(4)
    saved = lab.save()
    assert len(nbformat.writes(saved)) < 300_000
    lab.forget_kernel()
    lab.output_area(4).locator(f"{SAVED_CHART}, {POINTS}").first.wait_for()
    assert "stopped at step" in saved.cells[4].outputs[0].data["text/plain"]
    assert lab.problems == []


def test_voila_shows_a_live_view_also_where_a_page_may_keep_nothing(browser, notebook_folder, voila):
    cells = ["%load_ext dnb", "%dtrain start -n 1", SETUP, LONG_FIT]
    write_notebook(notebook_folder / "voila.ipynb", cells)
    url = voila(notebook_folder / "voila.ipynb")
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE_SECONDS)
    page.add_init_script(NO_STORAGE)
    page.goto(url)
    page.locator(POINTS).first.wait_for()
    page.get_by_role("button", name="Stop").first.click()
    page.get_by_text("stopped at step").first.wait_for()
    page.close()
