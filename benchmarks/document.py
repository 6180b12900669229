"""A benchmark's section of a document: what stands between its two markers is written anew, all else is left."""


def replaced(text: str, section: str, name: str, title: str) -> str:
    """`text` with `section` between the markers of `name`, which are added under `title` where they are missing."""
    begin, end = (f"<!-- {name}: {where} -->" for where in ("begin", "end"))
    if begin not in text:
        text = f"{text.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n"
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{section}\n{end}{after}"
