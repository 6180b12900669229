"""The page in a real browser: every figure is drawn, nothing complains, nothing of the run runs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis.report import write_report
from minitron_search.run_directory import RunDirectory

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    "--disable-component-update --virtual-time-budget=8000 --window-size=1400,3000 "
    "--enable-logging=stderr --v=0 --dump-dom"
).split()


def open_page(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The DOM after its scripts ran, and what they wrote to the console."""
    command = [str(CHROMIUM), *FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def drawn(dom: str) -> list[bool]:
    """Of each figure in turn, whether Plotly drew it."""
    return ["main-svg" in figure for figure in re.findall(r"<figure>(.*?)</figure>", dom, re.DOTALL)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_in_both_schemes(finished: RunDirectory, tmp_path: Path, scheme: str):
    flags = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    dom, console = open_page(write_report(finished), tmp_path, *flags)
    assert console == []
    assert drawn(dom) == [True] * 16
    ink = {"light": "rgb(28, 33, 38)", "dark": "rgb(232, 234, 236)"}[scheme]
    assert f"fill: {ink}" in dom


def test_nothing_of_a_run_is_executed(hostile: RunDirectory, tmp_path: Path):
    page = write_report(hostile)
    dom, console = open_page(page, tmp_path)
    assert console == [] and drawn(dom) == [True] * 16


def test_a_run_that_is_going_draws_what_it_has(going: RunDirectory, tmp_path: Path):
    dom, console = open_page(write_report(going), tmp_path)
    assert console == [] and drawn(dom) == [True] * 2


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(finished: RunDirectory, tmp_path: Path):
    text = re.sub(r"<meta http-equiv=[^>]*>", "", write_report(finished).read_text())  # to let the clicks in
    script = "const loss = document.querySelectorAll('table.trials button')[5]; loss.click(); "
    orders = []
    for clicks in ("", "loss.click();"):
        page = tmp_path / "clicked.html"
        page.write_text(text.replace("</body>", f"<script>{script}{clicks}</script></body>"))
        dom, console = open_page(page, tmp_path)
        assert console == []
        table = dom[dom.index('<table class="trials">') :]
        orders.append([key for key in re.findall(r"<tr>(?:.*?data-key=\"([^\"]*)\"){3}", table)])
    for order, down in zip(orders, (False, True), strict=True):
        losses = [float(key) for key in order if key]
        assert len(losses) > 10 and losses == sorted(losses, reverse=down)
        assert order[-1] == ""  # the failed trial, whichever way


def test_a_script_that_is_not_the_pages_own_does_not_run(finished: RunDirectory, tmp_path: Path):
    page = tmp_path / "injected.html"
    text = write_report(finished).read_text()
    page.write_text(text.replace("</body>", "<script>document.title = 'ran'</script></body>"))
    dom, console = open_page(page, tmp_path)
    assert "<title>ran</title>" not in dom
    assert console and all("Content Security Policy" in line for line in console)
