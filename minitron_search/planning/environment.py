"""Describe what would have to be the same for the same numbers: versions, git, hardware, seeds, data."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron_search.planning.prepare import Prepared
from minitron_search.version import __version__

VERSIONS = ("torch", "transformers", "ray", "optuna", "numpy", "datasets", "lm_eval")


def environment(prepared: Prepared) -> dict[str, Any]:
    """Return versions, git, hardware, seeds and data ids: what would have to be the same for the same numbers."""
    return {
        "python": platform.python_version(),
        "versions": {"minitron_search": __version__, **{name: version(name) for name in VERSIONS}},
        "git": _git(),
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_bytes": _memory(),
        },
        "seed": prepared.config.seed,
        "teacher": {"folder": str(prepared.pruned.folder), "fingerprint": prepared.pruned.fingerprint},
        "distillation_teacher": {"folder": str(prepared.teacher.folder), "fingerprint": prepared.teacher.fingerprint},
        "corrected_teacher": prepared.corrected and {"id": prepared.corrected.name, "folder": str(prepared.corrected)},
        "corpus": prepared.corpus.id,
        "winogrande_examples": len(prepared.packed.answers),
        "command": sys.argv,
    }


def _git() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True)
    return described.stdout.strip() or None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
