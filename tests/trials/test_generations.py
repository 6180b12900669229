"""What models write after the same words: the likeliest token each time, whatever a model's own defaults are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minitron_search.records.directory import RunDirectory
from minitron_search.trials.generations import NEW_TOKENS, PROMPTS, continued
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_token_is_the_likeliest_after_all_before_it(family: str) -> None:
    model = tiny.model(tiny.config(family)).eval()
    model.generation_config.repetition_penalty = 5.0  # of which nothing here knows
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 7)).astype(np.int32)
    ids = torch.from_numpy(prompts.astype(np.int64))
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert np.array_equal(continued(model, prompts, 6, "float32"), ids[:, 7:].numpy())


def test_a_run_has_what_its_teacher_its_trim_and_its_student_write(finished_run: Path) -> None:
    run = RunDirectory(finished_run)
    written, windows = run.read_generations(), 4  # of validation
    assert {len(written[name]) for name in ("prompts", "text", "teacher", "untrained", "retrained")} == {PROMPTS}
    assert windows >= PROMPTS and written["student"].startswith("retrained-")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "best")
    assert all(len(tokenizer(text).input_ids) >= min(NEW_TOKENS, 16) for text in written["text"])
    assert len({json.dumps(written[name]) for name in ("teacher", "untrained", "retrained")}) == 3
