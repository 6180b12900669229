"""Write text of other people where it cannot act: in a terminal, in HTML, in Markdown.

Names of runs, models, texts and tasks are whatever their authors made them. Each place has one function here, and what
is shown there goes through it.
"""

import html
import re

# control characters but for tab and line feed; what turns the direction of text, or takes no space; halves of a pair
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
PLAIN = re.compile(r"[A-Za-z0-9 ,/.'()-]*")  # what Markdown takes for itself in any place but the beginning of a line
ANGLES = str.maketrans("<>", "‹›")


def visible(text: object) -> str:
    """Return text for a terminal: characters that would move the cursor, hide or turn text are written as `\\x1b`."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """Return `visible` text in one line and without tags, for a value of a model card's front matter."""
    return " ".join(visible(text).split()).translate(ANGLES)


def in_html(text: object, quote: bool = True) -> str:
    """Return text for an element or an attribute of HTML, or for a label of Plotly, which reads a few tags."""
    return html.escape(visible(text), quote)


def in_markdown(text: object) -> str:
    """Return text for one line or one cell of Markdown: as it is where that is plain, else as code, in which no link,
    image or tag is read and no address becomes a link."""
    line = one_line(text)
    return line if PLAIN.fullmatch(line) and "www." not in line.lower() else as_code(line)


def as_code(text: object) -> str:
    """Return text for Markdown as code, whatever is in it."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", "\\|")  # a cell ends at any other, in code too
