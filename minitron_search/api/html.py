"""Small tables for notebooks: plain HTML, everything in them escaped."""

from collections.abc import Sequence

from minitron_search.messages.escaping import in_html

CELL = "padding:2px 8px;text-align:right"
BAR = "display:inline-block;height:8px;background:#4c78a8"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], bars: Sequence[float] = ()) -> str:
    """Return an HTML table. `bars`: for each row a share, drawn as a bar at its end."""
    head = "".join(f'<th style="{CELL}">{in_html(str(heading))}</th>' for heading in headings)
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(f'<td style="{CELL}">{in_html(str(cell))}</td>' for cell in row)
        if bars:
            cells += f'<td><span style="{BAR};width:{100 * min(1.0, max(0.0, bars[number])):.0f}px"></span></td>'
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
