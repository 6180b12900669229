"""Put cards into one HTML file that loads nothing, and in which no word of the run can act as code.

Three walls: text is escaped, data is JSON with every `<` written as \\u003c, and the page's own policy runs
only the two scripts whose hashes it carries and forbids every request.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from plotly.offline import get_plotlyjs

from analysis.page import palette
from analysis.page.card import Card, Panel
from minitron_search.messages.escaping import in_html

TEMPLATE = Path(__file__).with_name("report_template.html")


def page(name: str, facts: list[str], cards: list[Card], made: str, kind: str = "report of a run") -> str:
    """Return the HTML. facts: short lines under the name; made: one sentence for the foot; all plain text."""
    template = fill(TEMPLATE.read_text(encoding="utf-8"), {"plotly": get_plotlyjs().replace("\r\n", "\n")})
    sections = [(f"card-{place}", card) for place, card in enumerate(cards, 1)]
    return fill(
        template,
        {
            "policy": policy(template),
            "name": in_html(name),
            "kind": in_html(kind),
            "facts": "".join(f"<li>{in_html(fact)}</li>" for fact in facts if fact),
            "links": "".join(f'<a href="#{anchor}">{in_html(card.title)}</a>' for anchor, card in sections),
            "cards": "\n".join(section(anchor, card) for anchor, card in sections),
            "made": in_html(made),
            "dark": embedded(json.dumps(palette.DARK)),
        },
    )


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace each `{{key}}` of `values` in one pass, so what is filled in is never a placeholder."""
    keys = "|".join(map(re.escape, values))
    return re.sub(r"\{\{(" + keys + r")\}\}", lambda match: values[match[1]], template)


def policy(template: str) -> str:
    """Return the content security policy: the template's own scripts by their hash, inline style, no request at all."""
    scripts = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def section(anchor: str, card: Card) -> str:
    read = f'<p class="read">{in_html(card.how_to_read)}</p>' if card.how_to_read else ""
    head = f'<section class="card" id="{anchor}"><h2>{in_html(card.title)}</h2>{read}'
    if card.reason:
        return f'{head}<p class="reason">{in_html(card.reason)}</p></section>'
    many = " many" if len(card.panels) > 1 else ""
    figures = "".join(map(panel_html, card.panels))
    panels = f'<div class="panels{many}">{figures}</div>' if figures else ""
    links = [csv_link(name, data) for name, data in card.data]
    links += [csv_link(panel.name, panel.data) for panel in card.panels if not panel.heading]
    foot = f"<span>{in_html(card.sample)}</span>{''.join(links)}" if card.sample or links else ""
    return head + card.body + panels + (f'<p class="foot">{foot}</p>' if foot else "") + "</section>"


def panel_html(panel: Panel) -> str:
    caption = ""
    if panel.heading:
        caption = f"<figcaption>{in_html(panel.heading)}{csv_link(panel.name, panel.data)}</figcaption>"
    height = panel.figure.layout.height
    return (
        f'<figure data-columns="{panel.columns}">{caption}'
        f'<div class="plot" id="{panel.name}" style="height:{height}px"></div>'
        f'<script type="application/json">{embedded(panel.figure.to_json())}</script></figure>'
    )


def embedded(text: str) -> str:
    """Return JSON that an HTML parser reads as data whatever is in it."""
    return text.replace("<", "\\u003c")


def csv_link(name: str, data: pd.DataFrame) -> str:
    """Return a link that downloads `data`, in which no text of the run can be a spreadsheet's formula."""
    safe = data.copy()
    for column in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[column]):
            safe[column] = safe[column].map(no_formula)
    safe.columns = [no_formula(column) for column in safe.columns]
    encoded = base64.b64encode(safe.to_csv(index=False, float_format="%.7g").encode()).decode()
    address = f"data:text/csv;charset=utf-8;base64,{encoded}"
    return f'<a class="csv" download="{name}.csv" href="{address}">download CSV</a>'


def no_formula(cell: object) -> object:
    return f"'{cell}" if str(cell).startswith(("=", "+", "-", "@", "\t", "\r")) else cell
