"""Prune a model once, as a library: importance -> trim to one shape -> a Hugging Face folder. No Ray, no search.

    python examples/prune_once.py tiny/model tiny/text.txt tiny/student

The first argument is a folder, a Hub name or smollm2-135m; the second a .txt, .jsonl or .parquet file or glob.
"""

import sys
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from minitron_search.data.corpus import load_corpus
from minitron_search.importance.importance import measure
from minitron_search.models.families import whole
from minitron_search.pruning.trimming import trim
from minitron_search.teachers.sources import load_tokenizer, teacher_folder

model, text, output = sys.argv[1:]
folder, tokenizer = teacher_folder(model), load_tokenizer(model)
teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
corpus = load_corpus(
    text, text, tokenizer, sequence_length=128, calibration_samples=16, validation_samples=8, train_tokens=0, seed=0
)

# 1. One forward pass over the calibration windows ranks hidden channels, MLP neurons and heads, and scores layers.
importance = measure(teacher, corpus.calibration)
print("BI of the layers:", [round(bi, 3) for bi in importance.layer_bi().tolist()])

# 2. A shape: the teacher's own with two thirds of the MLP neurons, and without the layer that changes its input least.
shape = whole(teacher.config)
least = int(importance.layer_bi().argmin())
smaller = replace(
    shape,
    intermediate_size=shape.intermediate_size * 2 // 3,
    layers=tuple(layer for layer in shape.layers if layer != least),
)

# 3. Trim: of every weight what is ranked first.
student = trim(folder, smaller, importance.rankings(shape.num_key_value_heads))
student.save_pretrained(output)
tokenizer.save_pretrained(output)

# 4. What came of it, read back as anybody would. It is untrained: distillation is what a search or a retraining adds.
reloaded = AutoModelForCausalLM.from_pretrained(output).eval()
ids = torch.from_numpy(corpus.validation.astype("int64"))
for name, each in (("teacher", teacher), ("student", reloaded)):
    with torch.no_grad():
        loss = each(ids, labels=ids).loss.item()
    print(f"{name}: {each.num_parameters():,} parameters, LM loss {loss:.3f} nats per token")
