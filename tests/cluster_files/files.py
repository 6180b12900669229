"""The cluster files as their readers see them."""

from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config

ROOT = Path(__file__).resolve().parents[2]
CLOUDS = ("cluster.yaml", "clusters/gcp.yaml")
RAY_UP = (*CLOUDS, "clusters/on-prem.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def prepared(name: str) -> dict[str, Any]:
    """With Ray's defaults, as `ray up` checks it."""
    return prepare_config(read(name))


def commands(config: dict[str, Any]) -> list[str]:
    return [line for key, lines in config.items() if key.endswith("_commands") for line in lines]
