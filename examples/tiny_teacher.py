"""A teacher to try things on: a small Llama with random weights, a tokenizer of bytes and some text, in a second.

    python examples/tiny_teacher.py tiny

It writes tiny/model and tiny/text.txt, which the other examples use as they are. Random weights know nothing: what the
examples show is how a command or a function is called, not what pruning is worth.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path(sys.argv[1])

# every byte is a token, after the two special ones: 258 in all
alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
bytes_as_tokens = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
bytes_as_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_as_tokens.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_as_tokens, bos_token="<s>", eos_token="</s>")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=48, intermediate_size=128, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip
LlamaForCausalLM(config).save_pretrained(folder / "model")
tokenizer.save_pretrained(folder / "model")

# Python's own library is text that every machine has
text = "\n\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
(folder / "text.txt").write_text(text)
print(f"{folder / 'model'}: {config.num_hidden_layers} layers; {folder / 'text.txt'}: {len(text):,} characters")
