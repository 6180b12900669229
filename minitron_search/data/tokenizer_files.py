"""List the files of a model's folder that belong to its tokenizer, and those that are its own at all."""

from pathlib import Path

from minitron_search.teachers.sources import TOKENIZER_FILES


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the tokenizer's files in a folder, sorted: `additional_chat_templates/x.jinja` is one."""
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if is_own(folder, path)}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def is_own(folder: Path, path: Path) -> bool:
    """Return whether `path` is a regular file whose content lies in the folder itself, or among the blobs of the same
    model in the Hub's cache, whose snapshots are made of links: no other link is followed out of the folder."""
    try:
        root, target = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to nothing, or a circle of links
        return False
    model = root.parent.parent
    snapshot = root.parent.name == "snapshots" and model.name.startswith("models--")
    inside = target.is_relative_to(root) or (snapshot and target.parent == model / "blobs")
    return inside and target.is_file()
