"""Every key is described once, in the model; the template and the document are made from there."""

import re

from minitron_search.config.keys import described, fields, section_of
from tests.project.configuration import DOCUMENT, TEMPLATE, document, template


def test_the_template_and_the_document_are_made_from_todays_model() -> None:
    told = "python -m tests.project.configuration writes it"
    assert TEMPLATE.read_text() == template(), told
    assert DOCUMENT.read_text() == document(), told


def test_every_key_is_described_in_sentences() -> None:
    for name, field in fields():
        assert re.fullmatch(r"(true: |[A-Z]).{5,}\.", described(field)), f"{name}: {described(field)!r}"


def test_the_document_has_every_key_and_the_template_every_description() -> None:
    text, comments = DOCUMENT.read_text(), " ".join(re.findall(r"# (.*)", TEMPLATE.read_text()))
    for name, field in fields():
        assert f"| `{name}` |" in text or f"## {name}\n" in text, name
        if "anchors." not in name:
            assert described(field) in comments, name
        assert section_of(field.annotation) is None or f"## {name}\n" in text, name
