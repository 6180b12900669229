"""Prune a model once: importance -> trim to one shape -> a Hugging Face folder. No Ray, no search.

    python examples/prune_once.py tiny/model tiny/text.txt tiny/student

The first argument is a folder, a Hub name or smollm2-135m; the second a .txt, .jsonl or .parquet file or glob.
"""

import sys

import minitron_search as ms

model, text, output = sys.argv[1:]
teacher = ms.load(model)
windows = ms.corpus(text, teacher, length=128, calibration=16, validation=8, tokens=0)

# 1. One forward pass over the calibration windows ranks hidden channels, MLP neurons and heads, and scores layers.
importance = ms.measure_importance(teacher, windows.calibration)
print("BI of the layers:", [round(bi, 3) for bi in importance.layer_bi().tolist()])

# 2. A shape: the teacher's own with two thirds of the MLP neurons, and without the layer that changes its input least.
neurons = teacher.shape.architecture.intermediate_size
shape = teacher.shape.smaller(intermediate_size=neurons * 2 // 3, drop=[int(importance.layer_bi().argmin())])

# 3. Trim: of every weight what is ranked first.
student = ms.trim(teacher, shape, importance)
student.save(output)

# 4. What came of it, read back as anybody would. It is untrained: `ms.distill` trains it, and a search finds a better.
for name, each in (("teacher", teacher), ("student", ms.load(output))):
    scores = ms.score(each, windows.validation)
    print(f"{name}: {each.shape.params:,} parameters, {scores} nats per token")
