"""Every private name of Ray that this project uses, and why each is needed."""

from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from ray.tune.execution import tune_controller
from ray.tune.utils.object_cache import _ObjectCache


class KeptActors(_ObjectCache):
    """No more than Tune started, which is no more than run at once."""

    def cache_object(self, key: Any, obj: Any) -> bool:
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Generator[Any, None, None]:
        if force_all:
            yield from super().flush_cached_objects(force_all=True)


def kept_actors() -> AbstractContextManager:
    """While a Tuner fits in this process."""
    return patch.object(tune_controller, "_ObjectCache", KeptActors)
