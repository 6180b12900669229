"""Use a student that a run has left (examples/own_text.yaml): any code that loads a Hugging Face model does.

    python examples/use_student.py tiny/runs/own-text/best "The function returns"

The arguments are a folder, or a Hub name, and how a text begins.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

embeddings = sum(weight.numel() for name, weight in model.named_parameters() if "embed" in name or "lm_head" in name)
print(f"{model.num_parameters():,} parameters, {model.num_parameters() - embeddings:,} without embeddings")
print(f"hidden {model.config.hidden_size}, MLP {model.config.intermediate_size}, "
      f"{model.config.num_attention_heads} heads, {model.config.num_hidden_layers} layers")  # fmt: skip

inputs = tokenizer(prompt, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
