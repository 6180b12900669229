"""A hook of MkDocs: links of the documents that lead out of docs/ become plain words, for the site holds docs/ only."""

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with its links inside the site, and the words of the others."""
    here = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[2]))
        return link[1] if target.startswith("..") else link[0]

    return LINK.sub(inside, markdown)
