"""A benchmark's section of a document: what stands between its two markers is written anew, all else is left."""


def between(text: str, name: str) -> str:
    """What stands between the markers of `name`; "" where they are missing."""
    begin, end = _markers(name)
    return text.split(begin)[1].split(end)[0] if begin in text else ""


def replaced(text: str, section: str, name: str, title: str) -> str:
    """`text` with `section` between the markers of `name`, which are added under `title` where they are missing."""
    begin, end = _markers(name)
    if begin not in text:
        text = f"{text.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n"
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{section}\n{end}{after}"


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
