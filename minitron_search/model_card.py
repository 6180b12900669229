"""The README of a student: what was pruned, from what, trained on how much, and how it scores."""

from typing import Any

from minitron_search.trial import Trial


def model_card(teacher: str, taught_by: str, trial: Trial, row: dict[str, Any]) -> str:
    """`row` is the student's row of `trials.parquet`; `taught_by` says which model the distillation was from."""
    architecture, settings = trial.architecture, trial.settings
    kept = ", ".join(map(str, architecture.layers))
    return f"""---
base_model: {teacher}
library_name: transformers
tags: [pruning, distillation, minitron]
---
# {teacher}, pruned and distilled to {row["params"] / 1e6:.1f}M parameters

Made with minitron_search by structured pruning of the teacher `{teacher}` and distillation from {taught_by}
(the Minitron approach, arXiv:2407.14679 and arXiv:2408.11796). The teacher's licence applies.

| | |
|---|---|
| parameters | {row["params"]:,} ({row["non_embedding_params"]:,} without embeddings) |
| hidden_size | {architecture.hidden_size} |
| intermediate_size | {architecture.intermediate_size} |
| num_attention_heads | {architecture.num_attention_heads} ({architecture.num_key_value_heads} key-value heads) |
| teacher layers kept | {kept} |
| distillation | {row["tokens"]:,} tokens, loss {settings.loss}, temperature {settings.temperature:g}, seed {trial.seed} |

| score | value | standard error | n |
|---|---|---|---|
| LM loss (nats per token, validation) | {row["lm_loss"]:.4f} | {row["lm_loss_stderr"]:.4f} | {row["lm_loss_n"]} windows |
| KL from the teacher (nats per token) | {row["kl"]:.4f} | {row["kl_stderr"]:.4f} | {row["lm_loss_n"]} windows |
| Winogrande accuracy | {row["winogrande_acc"]:.4f} | {row["winogrande_acc_stderr"]:.4f} | {row["winogrande_n"]} examples |
| Winogrande margin (nats) | {row["winogrande_margin"]:.4f} | {row["winogrande_margin_stderr"]:.4f} | {row["winogrande_n"]} examples |

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
