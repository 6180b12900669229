"""Make any teacher that a configuration may name a Hugging Face folder.

A name is the embedded one's, a folder's (here or in storage) or one of the Hub. The files of a folder are checked
against its configuration whenever it is asked for, and has changed since.

Values of weights are read by `fingerprint` and `checked_fingerprint` only. A name is the embedded one before it is
a folder, and a folder before it is a Hub name (`./smollm2-135m` is always a folder).
"""

import copy
import difflib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, copy_files
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from minitron_search.messages.failures import described, first_line
from minitron_search.models.loading import weight_files
from minitron_search.records import cache
from minitron_search.records.cache import content_id, file_hash, stamp_of
from minitron_search.records.paths import is_uri
from minitron_search.records.transfer import WHOLE
from minitron_search.teachers import embedded
from minitron_search.teachers.files import ModelError, check_files, check_small_files, check_values

# What from_pretrained reads, without the copies in other formats that many repositories hold beside it.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.json", "*.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
HUB_FILES = [
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES,
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",  # for the card of its student
]  # fmt: skip
MOST_CONFIG = 2**22  # bytes of config.json
SIZES = {
    "num_hidden_layers": 4_096, "hidden_size": 10**7, "intermediate_size": 10**8, "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5, "vocab_size": 10**9,
}  # fmt: skip
# what classes of configurations make lists of, one entry each, before anything can be asked of them
LISTED, MOST_LISTED = ("num_hidden_layers", "n_layer", "num_labels"), 10**6
PUBLISHED = Path(__file__).parent / "published"  # configurations of the papers' teachers, as on the Hub


def teacher_folder(model: str) -> Path:
    """Return the folder that `from_pretrained` loads; made or downloaded when it is not here yet.

    Raises ValueError for a folder whose files are not those of its configuration and for an unknown name, RuntimeError
    where the embedded teacher cannot be fetched.
    """
    if model == embedded.NAME:
        folder = embedded.folder()
    elif _is_local(model):
        folder = _path(model)
    else:
        folder = _snapshot(model)
    return _checked(model, folder)[0]


def _snapshot(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise _invalid(model, f"is not a folder here, and the Hub did not return it ({described(error)})") from error


def hub_name(model: str) -> str | None:
    """Return the name on the Hub of a model that is there; None for a folder."""
    if model == embedded.NAME:
        return embedded.HUB_NAME
    return None if _is_local(model) else model


def teacher_config(model: str) -> PretrainedConfig:
    """Return the model's configuration; no weights are fetched, and of a folder here the files are checked. Raises
    ValueError as `teacher_folder` does."""
    if model == embedded.NAME:
        return embedded.config()
    if _is_local(model):
        return _checked(model, _path(model))[1]
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # of a configuration that is not one, transformers raises whatever comes
        published = PUBLISHED / f"{model.replace('/', '--')}.json"
        if published.is_file():  # the papers' teachers can be planned with where the Hub is not reached
            return AutoConfig.for_model(**json.loads(published.read_text()))
        raise _invalid(model, f"has no configuration that can be loaded ({described(error)})") from error
    if wrong := _impossible(config):
        raise _invalid(model, f"has {wrong} in config.json")
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer. Raises ValueError when there is none."""
    source: str | Path = model
    if model == embedded.NAME:
        source = embedded.folder()
    elif _is_local(model):
        source = _checked(model, _path(model))[0]
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # as above, and the Rust of tokenizers has an error of its own
        raise _invalid(model, f"has no tokenizer that can be loaded ({described(error)})") from error


def fingerprint(folder: Path) -> str:
    """Return the content id of a model folder: 16 hexadecimal digits of its configuration and all its weights.

    All bytes rather than a sample, because two teachers may differ in one layer and caches are keyed by this.
    """
    config = json.loads((folder / "config.json").read_text())
    for origin in ("transformers_version", "_name_or_path"):
        config.pop(origin, None)
    weights = "".join(f"{path.name} {file_hash(path)}" for path in weight_files(folder))
    return content_id((json.dumps(config, sort_keys=True) + weights).encode(), digits=16)


def checked_fingerprint(model: str, folder: Path) -> str:
    """Return the fingerprint of a model's folder, whose values are read too. Raises ValueError for one that is not a
    number or infinite."""
    found = fingerprint(folder)
    try:
        check_values(folder)
    except ModelError as error:
        raise _invalid(model, str(error)) from error
    return found


def near_names(path: Path) -> str:
    """Return ', near it: ...' with the names in the path's folder that resemble its last part; '' without any."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, siblings)]
    return f", near it: {', '.join(near)}" if near else ""


def _is_local(model: str) -> bool:
    """Tell a path from a Hub name, `owner/name`: what starts or nests like a path is one, even if nothing is there."""
    return Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")) or model.count("/") > 1


def _path(model: str) -> Path:
    return stored_model(model) if is_uri(model) else Path(model).expanduser()


def _checked(model: str, folder: Path) -> tuple[Path, PretrainedConfig]:
    """Return the folder, resolved, and its configuration. Raises ValueError unless its files are those of a model."""
    if not folder.is_dir():
        raise _invalid(model, f"is not a folder{near_names(folder)}")
    if not os.path.lexists(folder / "config.json"):
        raise _invalid(model, "has no config.json")
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_file() and not file.is_dir():  # a pipe: whoever opens it waits
            raise _invalid(model, f"holds {file.name}, which is not a regular file")
    file = folder / "config.json"
    if file.is_file() and (size := file.stat().st_size) > MOST_CONFIG:
        raise _invalid(model, f"has a config.json of {size:,} bytes")
    try:
        config = copy.deepcopy(_of_whole_files(folder, _state(folder)))
    except ModelError as error:
        raise _invalid(model, str(error)) from error
    if wrong := _impossible(config):
        raise _invalid(model, f"has {wrong} in config.json")
    return folder.resolve(), config


def _state(folder: Path) -> tuple:
    """Return what tells a folder from a later state of it: the files that it holds, and the ctime of each."""
    files = [(path.name, path.stat() if path.exists() else path.lstat()) for path in sorted(folder.iterdir())]
    return tuple((name, status.st_mode, *stamp_of(status)) for name, status in files)


@lru_cache(maxsize=32)  # a start asks five times, and Gemma's tokenizer.json alone has 33 MB
def _of_whole_files(folder: Path, state: tuple) -> PretrainedConfig:
    """Return a folder's configuration, once its files, in this state, are checked against it."""
    check_small_files(folder)
    config = _configuration(folder)
    check_files(folder, config)
    return config


def _configuration(folder: Path) -> PretrainedConfig:
    for name, size in json.loads((folder / "config.json").read_bytes()).items():
        if name in LISTED and isinstance(size, int | float) and size > MOST_LISTED:
            raise ModelError(f"has {name} {size:,} in config.json (possible: at most {MOST_LISTED:,})")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and the classes of its configurations raise all types
        reason = described(error)
        if "multiple of the number of attention heads" in reason:  # of a Llama, and of no other family that is pruned
            reason += "; model_type mistral is the same function and may have any head_dim"
        raise ModelError(f"has a config.json that transformers refuses ({reason})") from error


def _impossible(config: PretrainedConfig) -> str:
    """Return which size of a configuration no model has, '' if all are possible. Every layer is listed, many times."""
    for name, most in SIZES.items():
        size = getattr(config, name, None)
        if isinstance(size, int) and not 1 <= size <= most:
            return f"{name} {size:,} (possible: 1 to {most:,})"
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        return f"num_attention_heads {heads}, no multiple of its num_key_value_heads {groups},"
    if getattr(config, "return_dict", True) is False:
        return "return_dict false (possible: true, or none)"
    return _out_of_range(vars(config))


def _out_of_range(values: Mapping[str, Any]) -> str:
    """Return which setting would make every number of a model NaN, or its forward pass fail; '' if none would."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            if wrong := _out_of_range(value):
                return f"{name}: {wrong}"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if name.endswith(("_eps", "_epsilon")) and value < 0:
                return f"{name} {value:g} (possible: 0 and above)"
            if name.endswith(("dropout", "pdrop")) and not 0 <= value < 1:
                return f"{name} {value:g} (possible: 0 to 1)"
            if name in ("rope_theta", "factor") and value <= 0:
                return f"{name} {value:g} (possible: above 0)"
    return ""


def _invalid(model: str, why: str) -> ValueError:
    return ValueError(
        f"teacher.model: {model!r} {why}; valid: {embedded.NAME!r} (embedded), a folder with config.json and "
        "safetensors weights, or a Hub name such as 'HuggingFaceTB/SmolLM2-135M'"
    )


def is_stored(address: str) -> bool:
    """Return True where a run has put all of a model at the address."""
    storage, base = FileSystem.from_uri(address)
    return storage.get_file_info(base + WHOLE).type == FileType.File


def stored_model(address: str) -> Path:
    """Copy a model from storage into the cache, once, and return the copy's path; nothing is there if storage has none.

    Raises ValueError where storage does not answer.
    """
    try:
        storage, base = FileSystem.from_uri(address)
        listed = storage.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
        files = sorted((info.path, info.size, str(info.mtime)) for info in listed if info.type == FileType.File)
        folder = cache.entry("stored", content_id([address.partition("?")[0], files]))
        if files:
            cache.make_once(folder, lambda into: _copy(storage, base, [path for path, *_ in files], into))
    except (ArrowException, OSError) as error:
        raise ValueError(f"teacher.model: {address!r} could not be read: {first_line(error)}; valid: "
                         "an address that these credentials may read, as s3://BUCKET/NAME/best") from None  # fmt: skip
    return folder


def _copy(storage: FileSystem, base: str, paths: list[str], into: Path) -> None:
    for path in paths:
        here = into / Path(path).relative_to(base)
        here.parent.mkdir(parents=True, exist_ok=True)
        copy_files(path, str(here), source_filesystem=storage)
