"""Let the teacher, the untrained trim and the retrained student write on after the same words, for people to read."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from minitron_search.models.device import autocast, on_device, trim_memory
from minitron_search.models.loading import load_model
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.runner import initial_student
from minitron_search.trials.trial import Trial

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 32


def continuations(inputs: TrialInputs, untrained: Trial, student: Path) -> dict[str, Any]:
    """Return token ids by `prompts`, `text` (what the text has there), `teacher`, `untrained` and `retrained`, a list
    for each of the first validation windows; and the seconds that it took.

    student: the folder of the retrained student. `untrained` is its trim. Each writes greedily, so that the same run
    writes the same.
    """
    began = time.monotonic()
    windows = inputs.validation[:PROMPTS]
    first = min(PROMPT_TOKENS, windows.shape[1] // 2)
    prompts, text = np.split(windows[:, : first + NEW_TOKENS], [first], axis=1)
    written = {"prompts": prompts, "text": text}
    writers = {
        "teacher": lambda: load_model(inputs.teacher_folder),
        "untrained": lambda: initial_student(inputs, untrained, trains=False),
        "retrained": lambda: load_model(student),
    }
    for name, load in writers.items():
        model = on_device(load()).eval()
        written[name] = continued(model, prompts, text.shape[1], inputs.precision)
        del model
        trim_memory()
    return {name: ids.tolist() for name, ids in written.items()} | {"seconds": time.monotonic() - began}


@torch.inference_mode()
def continued(model: PreTrainedModel, prompts: np.ndarray, tokens: int, precision: str) -> np.ndarray:
    """Return the likeliest `tokens` after each of `prompts`, (n, length), one after another: (n, tokens).

    Not `generate()`, which a model's own generation_config.json changes.
    """
    ids, cache, found = torch.from_numpy(prompts.astype(np.int64)).to(model.device), None, []
    with autocast(precision, model.device):
        for _ in range(tokens):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values
            found.append(ids)
    return torch.cat(found, dim=1).cpu().numpy()
