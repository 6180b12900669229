"""A model that nothing trained goes with its last name: `trim_memory` looks for none that holds itself."""

import gc
import weakref

import numpy as np
import pytest

from minitron_search.evaluation.scoring import throughput
from minitron_search.trials.generations import continued
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_that_was_only_asked_is_freed_with_its_name(family: str) -> None:
    model = tiny.model(tiny.config(family)).eval()
    windows = np.zeros((2, 6), dtype=np.int32)
    gc.disable()
    try:
        throughput(model, windows, "float32", 2)
        continued(model, windows, 2, "float32")
        left = weakref.ref(model)
        del model
        assert left() is None
    finally:
        gc.enable()
