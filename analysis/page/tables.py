"""A plain table of the page, every cell escaped, and links to the rows of trials."""

from collections.abc import Iterable, Sequence

from minitron_search.messages.escaping import in_html


def plain_table(heads: Sequence[str], lines: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """Return a table. text: places of the columns that hold words; the others are numbers, to the right. The first cell
    heads its row."""

    def cell(place: int, content: str, tag: str, scope: str) -> str:
        number = "" if place in text else ' class="number"'
        return f"<{tag}{scope}{number}>{in_html(content)}</{tag}>"

    top = "".join(cell(place, head, "th", ' scope="col"') for place, head in enumerate(heads))
    rows = ""
    for line in lines:
        first = cell(0, line[0], "th", ' scope="row"')
        others = "".join(cell(place, content, "td", "") for place, content in enumerate(line) if place)
        rows += f"<tr>{first}{others}</tr>"
    return f'<div class="scroll"><table class="plain"><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def row_anchor(trial: str) -> str:
    """Return the id, escaped, of a trial's row in the table of all trials."""
    return in_html(f"trial-{trial}")


def trial_link(trial: str) -> str:
    """Return a link to a trial's row."""
    return f'<a href="#{row_anchor(trial)}">{in_html(trial)}</a>'
