"""Every figure as SVG and PNG, drawn by a Chromium or Chrome of this machine in one go.

The browser opens a page with Plotly and the figures, none of which loads anything, and prints them as text. That is
what kaleido does with the same browser; one dependency less, and one start of the browser for all of them.
"""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from plotly.offline import get_plotlyjs

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.page.page import embedded
from minitron_search.messages.escaping import in_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
WIDTH = 900  # pixels; of a PNG, twice as many
SCALE = 2
PATIENCE_S = 300
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-sync", "--disable-component-update", "--virtual-time-budget=200000", "--dump-dom")  # fmt: skip
SCRIPT = """
(async () => {
  for (const [name, figure] of JSON.parse(document.getElementById("figures").textContent)) {
    for (const format of ["svg", "png"]) {
      const drawn = document.createElement("pre");
      drawn.id = `${name}.${format}`;
      const size = { format, width: WIDTH, height: figure.layout.height, scale: format === "png" ? SCALE : 1 };
      try { drawn.textContent = await Plotly.toImage(figure, size); }
      catch (error) { drawn.textContent = `failed: ${error}`; }
      document.body.append(drawn);
    }
  }
})();
"""


def browser() -> str | None:
    """Return the first browser found; BROWSER_PATH names one elsewhere, as for kaleido."""
    named = os.environ.get("BROWSER_PATH")
    return named or next((program for name in BROWSERS if (program := shutil.which(name))), None)


def write_beside(report: Path, cards: Iterable[Card]) -> None:
    """Write every figure of `report` into the folder `<report>_figures` beside it, and say what was written, or why
    nothing was."""
    folder = report.with_name(f"{report.stem}_figures")
    drawn, reason = write_figures(cards, folder)
    if drawn:
        print(f"{folder}: {f.plural(len(drawn), 'file')}")
    else:
        print(f"no static figures: {reason}", file=sys.stderr)


def write_figures(cards: Iterable[Card], folder: Path) -> tuple[list[Path], str]:
    """Write `<panel>.svg` and `.png` of every figure into `folder`, and return (files written, why there are none; ''
    where there are)."""
    panels = [panel for card in cards for panel in card.panels]
    if not panels:
        return [], "there is no figure to draw yet"
    program = browser()
    if program is None:
        return [], (
            "they need Chromium or Chrome, and none was found (BROWSER_PATH names one elsewhere). Without, every "
            "figure of the page has a button that saves it, and its data as CSV"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        source = Path(scratch, "figures.html")
        source.write_text(_page(panels), encoding="utf-8")
        command = [program, *FLAGS, f"--user-data-dir={scratch}/profile", source.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return [], f"{program} did not draw them: {error}"
    written = []
    for name, address in re.findall(r'<pre id="([\w.-]+)">(data:image/[^<]*)</pre>', done.stdout):
        path = folder / name
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_bytes(html.unescape(address)))
        written.append(path)
    if not written:
        complaint = done.stderr.strip().splitlines()
        return [], f"{program} drew none{f': {complaint[-1]}' if complaint else ''}"
    return written, ""


def _page(panels: Iterable[Panel]) -> str:
    figures = [(panel.name, still(panel)) for panel in panels]
    script = SCRIPT.replace("WIDTH", str(WIDTH)).replace("SCALE", str(SCALE))
    return (
        '<!doctype html><meta charset="utf-8"><body>'
        f'<script type="application/json" id="figures">{embedded(json.dumps(figures))}</script>'
        f"<script>{get_plotlyjs()}</script><script>{script}</script>"
    )


def still(panel: Panel) -> dict[str, object]:
    """Return a figure that stands alone: with its heading, its legend, and paper under it."""
    figure = json.loads(panel.figure.to_json())
    layout = figure["layout"]
    layout |= {"paper_bgcolor": palette.SURFACE, "plot_bgcolor": palette.SURFACE, "height": layout["height"] + 60}
    layout["margin"] |= {"t": 52, "l": 20, "r": 24, "b": 24}
    layout["title"] = {"text": in_html(panel.heading, quote=False), "x": 0.5}
    if len(figure["data"]) > 1:
        layout["showlegend"] = True
    return figure


def _bytes(address: str) -> bytes:
    """Decode a data: address, percent-encoded or base64."""
    head, _, body = address.partition(",")
    return base64.b64decode(body) if head.endswith("base64") else urllib.parse.unquote_to_bytes(body)
