"""Names that attack stay text: in a terminal, in HTML, in Markdown as the Hub and GitHub read it."""

from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from minitron_search.messages.console import complain, say
from minitron_search.messages.escaping import UNSEEN, in_html, in_markdown, one_line, visible

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![](https://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "<https://evil.example>",
    "https://evil.example/a and www.evil.example",
    "a | b | c",
    "`code` ``more``",
    "``",
    "`",
    "line\n# heading\n\n---\n- item",
    "\x1b[31mred\x07\x9b2J\x08",
    "\u202egpj.exe\u2066\u200b",
    "**bold** _it_ ~~gone~~ &lt;b&gt; \\`",
    "[x]: https://evil.example",
    "\ud83d half",
    "name' onmouseover='alert(1)' \"",
]


def rendered(markdown: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_name_stays_one_cell_of_text_in_markdown(attack: str) -> None:
    name = in_markdown(attack)
    found = Tags(rendered(f"| | |\n|---|---|\n| name | {name}, held out |\n| next | 1 |\n"))
    assert set(found.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert found.tags.count("td") == 4 and found.tags.count("tr") == 3
    assert found.text.split() == ["name", *f"{one_line(attack)}, held out".split(), "next", "1"]
    assert set(Tags(rendered(f"Taught by {name}.")).tags) <= {"p", "code"}
    assert "www." not in name.lower() or name.startswith("`"), "an address in a line of text becomes a link on the Hub"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_name_stays_text_in_html_and_in_a_terminal(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Tags(f"<p title='{in_html(attack)}'>{in_html(attack)}</p>").tags == ["p"]
    assert Tags(in_html(attack)).text == visible(attack)
    say(attack)
    complain(ValueError(attack), 2)
    printed = capsys.readouterr()
    for shown in (visible(attack), in_html(attack), in_markdown(attack), printed.out, printed.err):
        assert UNSEEN.search(shown) is None
    assert visible(attack) in printed.out.replace("\n", "\n") and visible(attack) in printed.err


@pytest.mark.parametrize(
    "name", ["HuggingFaceTB/SmolLM2-135M", "text.txt", "documentation (of Python's packages)", "日本語", "naïve 🙂"]
)
def test_ordinary_names_are_as_they_were(name: str) -> None:
    assert visible(name) == one_line(name) == name
    assert name in in_markdown(name) and (not name.isascii() or in_markdown(name) == name)
