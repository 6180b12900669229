"""The teacher named in the configuration: the embedded one, a folder (here or in storage), or a Hub name -> a Hugging
Face folder.

Weights are read by `fingerprint` only. A name is the embedded one before it is a folder, and a folder before
it is a Hub name (`./smollm2-135m` is always a folder).
"""

import difflib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, copy_files
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from minitron_search.models import embedded
from minitron_search.models.architecture import digest
from minitron_search.records.directory import replace_text
from minitron_search.records.paths import cache_folder, is_uri
from minitron_search.records.transfer import WHOLE

# What from_pretrained reads, without the copies in other formats that many repositories hold beside it.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja")
HUB_FILES = [
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES,
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",  # for the card of its student
]  # fmt: skip
PUBLISHED = Path(__file__).parent / "published"  # configurations of the papers' teachers, as on the Hub


def teacher_folder(model: str) -> Path:
    """The folder that `from_pretrained` loads; made or downloaded when it is not here yet.

    Raises ValueError for a folder without a model in it and for an unknown name, RuntimeError where the
    embedded teacher cannot be fetched.
    """
    if model == embedded.NAME:
        return embedded.folder()
    if _is_local(model):
        return _checked(model, _path(model))
    try:
        return _checked(model, Path(snapshot_download(model, allow_patterns=HUB_FILES)))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise _invalid(model, f"is no folder here, and the Hub did not give it ({_first_line(error)})") from error


def hub_name(model: str) -> str | None:
    """On the Hub, of a model that is there; None for a folder."""
    if model == embedded.NAME:
        return embedded.HUB_NAME
    return None if _is_local(model) else model


def teacher_config(model: str) -> PretrainedConfig:
    """The model's configuration; no weights are fetched. Raises ValueError as `teacher_folder` does."""
    if model == embedded.NAME:
        return embedded.config()
    source: str | Path = _checked(model, _path(model)) if _is_local(model) else model
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        published = PUBLISHED / f"{model.replace('/', '--')}.json"
        if published.is_file():  # the papers' teachers can be planned with where the Hub is not reached
            return AutoConfig.for_model(**json.loads(published.read_text()))
        raise _invalid(model, f"has no configuration that loads ({_first_line(error)})") from error


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises ValueError when there is none."""
    source: str | Path = model
    if model == embedded.NAME:
        source = embedded.folder()
    elif _is_local(model):
        source = _checked(model, _path(model))
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _invalid(model, f"has no tokenizer that loads ({_first_line(error)})") from error


def fingerprint(folder: Path) -> str:
    """Content id of a model folder: 16 hexadecimal digits of its configuration and all bytes of its weights.

    All bytes rather than a sample, because two teachers may differ in one layer and caches are keyed by this.
    """
    config = json.loads((folder / "config.json").read_text())
    for where_from in ("transformers_version", "_name_or_path"):
        config.pop(where_from, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(folder):
        digest.update(f"{path.name} {file_hash(path)}".encode())
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file: read once (a second a gigabyte), then remembered by path, size and time."""
    path = path.resolve()
    status = path.stat()
    key = hashlib.sha256(f"{path} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:32]
    remembered = cache_folder() / "hashes" / key
    if remembered.exists():
        return remembered.read_text()
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    # A file changed in this very moment could change again within its clock's tick and keep its time.
    if time.time() - status.st_mtime > 2:
        replace_text(remembered, content)
    return content


def near_names(path: Path) -> str:
    """', near it: ...' with the names in the path's folder that resemble its last part; '' without any."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, siblings)]
    return f", near it: {', '.join(near)}" if near else ""


def _is_local(model: str) -> bool:
    """Hub names are `owner/name`: what starts or nests as a path is one, though nothing be there."""
    return Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")) or model.count("/") > 1


def _path(model: str) -> Path:
    return stored_model(model) if is_uri(model) else Path(model).expanduser()


def _checked(model: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise _invalid(model, f"is not a folder{near_names(folder)}")
    if not (folder / "config.json").is_file():
        raise _invalid(model, "has no config.json")
    weights = weight_files(folder)
    if not weights:
        raise _invalid(model, "has no weights in safetensors files (save_pretrained writes them)")
    missing = [path.name for path in weights if not path.is_file()]
    if missing:
        raise _invalid(model, f"lacks {len(missing)} of its {len(weights)} weight files ({missing[0]}, ...)")
    return folder.resolve()


def weight_files(folder: Path) -> list[Path]:
    """The files that from_pretrained reads: one, or those that the index names, sorted."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        return []
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _invalid(model: str, why: str) -> ValueError:
    return ValueError(
        f"teacher.model: {model!r} {why}; valid: {embedded.NAME!r} (embedded), a folder with config.json and "
        "safetensors weights, or a Hub name such as 'HuggingFaceTB/SmolLM2-135M'"
    )


def is_stored(address: str) -> bool:
    """Whether a run has put it there, and whole."""
    there, base = FileSystem.from_uri(address)
    return there.get_file_info(base + WHOLE).type == FileType.File


def stored_model(address: str) -> Path:
    """A copy in the cache, made once of what is there; a path where nothing is if nothing is there.

    Raises ValueError where storage does not answer.
    """
    try:
        there, base = FileSystem.from_uri(address)
        found = there.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
        files = sorted((info.path, info.size, str(info.mtime)) for info in found if info.type == FileType.File)
        folder = cache_folder() / "stored" / digest([address.partition("?")[0], files])
        if files and not folder.exists():
            partial = folder.with_name(f".{folder.name}.{os.getpid()}")
            for path, _, _ in files:
                here = partial / Path(path).relative_to(base)
                here.parent.mkdir(parents=True, exist_ok=True)
                copy_files(path, str(here), source_filesystem=there)
            try:
                partial.rename(folder)
            except OSError:  # another process was first: its folder is the same
                shutil.rmtree(partial)
    except (ArrowException, OSError) as error:
        raise ValueError(f"teacher.model: {address!r} could not be read: {str(error).strip().splitlines()[0]}; valid: "
                         "an address that these credentials may read, as s3://BUCKET/NAME/best") from None  # fmt: skip
    return folder
