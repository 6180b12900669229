"""Read what a student takes over from its teacher's folder: tokenizer, generation defaults, licences.

All of it is read before a run spends anything, so that writing the student reads nothing but its weights.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from minitron_search.data.tokenizer_files import is_own, tokenizer_files
from minitron_search.messages.failures import first_line
from minitron_search.models.loading import weight_files
from minitron_search.teachers.files import DTYPES

LICENCE_FILES = ("license", "licence", "notice", "copying", "use_policy")  # how their names begin, in any case
# endings of what a computer runs, or a browser shows as a page: no such file is taken for a licence
RUN = {".py", ".pyc", ".pyw", ".ipynb", ".sh", ".bat", ".cmd", ".ps1", ".js", ".html", ".htm", ".svg", ".so", ".exe"}
LICENCE_BYTES = 2**20  # above that it is no text that anybody reads
GENERATION = "generation_config.json"
WRITTEN = ("float32", "bfloat16", "float16")  # dtypes of students


class TeacherFiles(NamedTuple):
    """contents: by name in the student's folder. licences: which of the names are licences and notices. left: sentences
    about what is not taken over, and why."""

    contents: dict[str, bytes]
    licences: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def teacher_files(folder: Path) -> TeacherFiles:
    """Read the files of a teacher's folder that go with its students. Raises ValueError for one that cannot be read."""
    left = []
    names, licences = tokenizer_files(folder), _licences(folder)
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not is_own(folder, path) and not _is_weights(path):
            left.append(f"{path.name} is a link that leads out of the teacher's folder, or to no file")
    if (folder / GENERATION).exists():
        reason = generation_problem(folder)
        if reason:
            left.append(f"{GENERATION} is none that transformers loads ({reason})")
        else:
            names.append(GENERATION)
    contents = {name: _read(folder, name) for name in (*names, *licences)}
    return TeacherFiles(contents, tuple(licences), tuple(left))


def check_tokenizer(model: str, folder: Path, files: TeacherFiles, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the files alone make the tokenizer that the run reads text with."""
    with tempfile.TemporaryDirectory() as place:
        write_files(Path(place), {"config.json": _read(folder, "config.json"), **files.contents})
        try:
            alone = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:  # of a dozen types, by what is missing
            alone, reason = None, first_line(error)
    if alone is None or _identity(alone) != _identity(tokenizer):
        why = reason if alone is None else "they make another one"
        beside = "".join(f"; {sentence}" for sentence in files.left)
        raise ValueError(f"teacher.model: {model!r}: its tokenizer does not come of the files that a student can take "
                         f"over, {', '.join(tokenizer_files(folder)) or 'none'} ({why}){beside}; valid: a folder that "
                         "tokenizer.save_pretrained wrote, with regular files")  # fmt: skip


def stored_dtype(folder: Path, config: PretrainedConfig) -> str:
    """Return the dtype that a model is stored in, as its configuration says, or else its first tensor; float32 for one
    that no student is written in."""
    dtype = config.dtype
    if dtype is None:
        with safe_open(str(weight_files(folder)[0]), framework="pt") as tensors:
            dtype = DTYPES.get(tensors.get_slice(min(tensors.keys())).get_dtype())
    name = str(dtype).removeprefix("torch.")
    return name if name in WRITTEN else "float32"


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by their names in a folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def generation_problem(folder: Path) -> str | None:
    """Return why transformers does not load a folder's generation_config.json; None where it does."""
    if not is_own(folder, folder / GENERATION):
        return "no regular file of the folder"
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # OSError, or what its checks of a value raise
        return first_line(error)
    return None


def _licences(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.lower().startswith(LICENCE_FILES)
        and PurePath(path.name).suffix.lower() not in RUN
        and is_own(folder, path)
        and path.stat().st_size <= LICENCE_BYTES
    )


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".gguf") or path.name == "config.json"


def _read(folder: Path, name: str) -> bytes:
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"teacher.model: {folder / name} goes with the student and cannot be read "
                         f"({error.strerror}); valid: a file that can be read, or none") from error  # fmt: skip
    return _without_code(content) if name == "tokenizer_config.json" else content


def _without_code(content: bytes) -> bytes:
    """Return a tokenizer's configuration without the place of code that came with the teacher, which no run uses."""
    try:
        values = json.loads(content)
    except ValueError:
        return content
    if not isinstance(values, dict) or "auto_map" not in values:
        return content
    del values["auto_map"]
    return json.dumps(values, indent=2, ensure_ascii=False).encode()


def _identity(tokenizer: PreTrainedTokenizerBase) -> tuple:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    return type(tokenizer).__name__, content, tokenizer.special_tokens_map, tokenizer.chat_template
