"""The page in a real browser: every figure is drawn, nothing complains, nothing of the run runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from analysis.ablation_report import write_ablation_report
from analysis.page.static_figures import write_figures
from analysis.report import main, write_report
from minitron_search.records.directory import RunDirectory
from tests.analysis.browser import BASH, CHROMIUM, Browser
from tests.analysis.conftest import HOSTILE, write_ablation

pytestmark = pytest.mark.skipif(CHROMIUM is None or BASH is None, reason="no Chromium on this machine")

FIGURES = 25  # of a finished run
DRAWN = "[...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('.main-svg').length > 0)"
CELLS = "[...document.querySelectorAll('table.trials tbody tr')].map((row) => row.cells[COLUMN].dataset.key)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def check(browser: Browser, page: Path, figures: int) -> None:
    """All figures are drawn, nothing complains, and the page asks for nothing but itself."""
    assert browser.evaluate(DRAWN) == [True] * figures
    assert browser.complaints() == []
    assert browser.loaded() == [page.resolve().as_uri()]


def test_every_figure_is_drawn_in_both_schemes_and_again_when_the_scheme_changes(browser: Browser, finished_page: Path):
    ink = "getComputedStyle(document.querySelector('.plot .annotation-text, .legendtext')).fill"
    light, dark = "rgb(28, 33, 38)", "rgb(232, 234, 236)"
    for scheme, now, other, then in (("dark", dark, "light", light), ("light", light, "dark", dark)):
        browser.open(finished_page, scheme=scheme)
        check(browser, finished_page, FIGURES)
        assert browser.evaluate(ink) == now, scheme
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": other}])
        browser.wait_until("performance.getEntriesByName('all drawn').length > 1")
        assert browser.evaluate(ink) == then, other
        assert browser.complaints() == []


def test_a_phone_scrolls_down_and_not_sideways(browser: Browser, finished_page: Path):
    browser.open(finished_page, width=390)
    check(browser, finished_page, FIGURES)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_nothing_of_a_run_of_several_or_of_an_ablation_is_executed(
    browser: Browser, hostile: RunDirectory, hostile_page: Path, tmp_path: Path
):
    browser.ask("Page.addScriptToEvaluateOnNewDocument", source="window.alert = () => { window.ran = true; }")
    other = tmp_path / "comparison.html"
    assert main([str(hostile.root), str(hostile.root), "--output", str(other)]) == 0
    ablation = write_ablation_report(write_ablation(tmp_path / "ablation", hostile=HOSTILE.replace("/", "∕")))
    for page, figures in ((hostile_page, FIGURES), (other, 13), (ablation, 3)):
        browser.open(page, width=390)
        check(browser, page, figures)
        assert browser.evaluate("window.ran === undefined && document.querySelectorAll('img').length === 0")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_run_that_is_going_draws_what_it_has(browser: Browser, going: RunDirectory):
    page = write_report(going)
    browser.open(page)
    check(browser, page, 6)


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(
    browser: Browser, finished: RunDirectory, finished_page: Path, tmp_path: Path
):
    several = tmp_path / "several.html"
    assert main([str(finished.root)] * 2 + ["--output", str(several)]) == 0
    for page in (finished_page, several):
        browser.open(page)
        click_and_click_again(browser)


def click_and_click_again(browser: Browser) -> None:
    heading = (
        "[...document.querySelectorAll('table.trials th')].findIndex((th) => th.textContent.startsWith('LM loss'))"
    )
    column = browser.evaluate(heading)
    for down in (False, True):
        browser.evaluate(f"document.querySelectorAll('table.trials button')[{column}].click()")
        order = browser.evaluate(CELLS.replace("COLUMN", str(column)))
        losses = [float(key) for key in order if key]
        assert len(losses) > 10 and losses == sorted(losses, reverse=down)
        assert order[-1] == ""  # the failed trial, whichever way
        sort = browser.evaluate(f"document.querySelectorAll('table.trials th')[{column}].ariaSort")
        assert sort == ("descending" if down else "ascending")
    assert browser.complaints() == []


def test_a_script_that_is_not_the_pages_own_does_not_run(browser: Browser, finished_page: Path, tmp_path: Path):
    page = tmp_path / "injected.html"
    text = finished_page.read_text()
    page.write_text(text.replace("</body>", "<script>document.title = 'ran'</script></body>"))
    browser.open(page)
    assert browser.evaluate("document.title") != "ran"
    complaints = browser.complaints()
    assert complaints and all("Content Security Policy" in line for line in complaints)


def test_500_trials_are_drawn_each_figure_once_and_weigh_less_than_10_mb(
    browser: Browser, make_run: Callable[..., RunDirectory], tmp_path: Path
):
    page = write_report(make_run(tmp_path / "run", trials=500))
    assert page.stat().st_size < 10_000_000
    browser.open(page)
    check(browser, page, FIGURES)
    assert browser.evaluate("performance.getEntriesByName('figure drawn').length") == FIGURES, "each was drawn once"


def test_every_figure_is_written_as_svg_and_png(hostile: RunDirectory, capsys: pytest.CaptureFixture[str]):
    assert main([str(hostile.root), "--figures"]) == 0
    folder = hostile.root / "report_figures"
    assert f"{folder}: {2 * FIGURES} files" in capsys.readouterr().out
    for path in folder.iterdir():
        begins = b"<svg" if path.suffix == ".svg" else b"\x89PNG"
        assert path.read_bytes().startswith(begins), path
    assert "<script" not in (folder / "loss_curves.svg").read_text()


def test_a_browser_that_draws_nothing_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: RunDirectory
):
    from analysis.run_cards import make_cards
    from analysis.run_data import load_run

    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    written, reason = write_figures(make_cards(load_run(finished)), tmp_path / "none")
    assert written == [] and "/bin/false drew none" in reason and not (tmp_path / "none").exists()
