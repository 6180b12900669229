"""A teacher of another shape than the embedded one's, trained from random weights on a text: no weights to download.

    python -m benchmarks.qwen_like_teacher TEXT.txt FOLDER

Shaped like Qwen2: 14 query heads in 2 groups, biases on queries, keys and values, a head of its own, 151,936 rows in
embedding and head, as many as Qwen2 has; 153M parameters, of which 136M are the two tables. Its tokenizer is byte-level
BPE with as many merges as occur in TEXT twice; the rows beyond are padding, as in Qwen2. The training is the project's
own loop with the loss `ce`. The default of 400K tokens takes about an hour of a processor; the same text, tokens and
threads give the same weights. Stopped, the same command goes on from its last checkpoint (12 bytes a parameter).
FOLDER/model is what `--teacher.model` takes: it shows that shapes and paths hold, not what pruning is worth.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from minitron_search.config.types import as_number
from minitron_search.data.corpus import Corpus, load_corpus
from minitron_search.distillation.checkpoints import CheckpointFolder
from minitron_search.distillation.loop import train
from minitron_search.distillation.settings import LoopSettings

END = "<|endoftext|>"
ROWS = 151_936
SHAPE = {"vocab_size": ROWS, "hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8}


def trained_tokenizer(text: Path, folder: Path) -> PreTrainedTokenizerFast:
    """Return byte-level BPE of the text, trained once."""
    if not (folder / "tokenizer.json").exists():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train([str(text)], trainers.BpeTrainer(
            vocab_size=ROWS, min_frequency=2, special_tokens=[END], initial_alphabet=alphabet, show_progress=False,
        ))  # fmt: skip
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def windows_of(text: Path, tokenizer: PreTrainedTokenizerFast, tokens: int, length: int) -> Corpus:
    return load_corpus(
        str(text), str(text), tokenizer, sequence_length=length, calibration_samples=1, validation_samples=16,
        train_tokens=tokens, seed=0,
    )  # fmt: skip


def untrained(tokenizer: PreTrainedTokenizerFast, length: int, shape: dict[str, Any]) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        **shape, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, max_position_embeddings=8 * length,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def lm_loss(model: Qwen2ForCausalLM, corpus: Corpus) -> float:
    """Return the mean loss on the validation windows, nats per token."""
    with torch.no_grad():
        each = [model(input_ids=ids[None], labels=ids[None]).loss for ids in torch.from_numpy(corpus.validation).long()]
    return float(torch.stack(each).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=as_number, default=400_000)
    parser.add_argument("--checkpoint-tokens", type=as_number, default=65_536)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", type=str, default="", help="hidden_size=448,num_hidden_layers=8, ...")
    chosen = parser.parse_args()
    shape = {**SHAPE, **{key: int(value) for key, _, value in
                         (part.partition("=") for part in chosen.shape.split(",") if part)}}  # fmt: skip
    torch.set_num_threads(chosen.threads)
    began = time.monotonic()
    tokenizer = trained_tokenizer(chosen.text, chosen.folder / "model")
    corpus = windows_of(chosen.text, tokenizer, chosen.tokens, chosen.length)
    model = untrained(tokenizer, chosen.length, shape)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in {shape['vocab_size']:,} rows, "
          f"{corpus.train.size:,} tokens to train on", flush=True)  # fmt: skip
    settings = LoopSettings(
        total_tokens=chosen.tokens, loss="ce", learning_rate=1e-3, min_learning_rate=1e-4, schedule="cosine",
        batch_tokens=2048, micro_batch_tokens=2048, checkpoint_tokens=chosen.checkpoint_tokens, log_steps=2,
        threads=chosen.threads,
    )  # fmt: skip
    checkpoints = CheckpointFolder(chosen.folder / "checkpoints")

    def said(record: dict[str, float]) -> None:
        print(f"{record['tokens']:,} tokens: LM loss {record['lm_loss']:.3f}, "
              f"{(time.monotonic() - began) / 60:.1f} minutes", flush=True)  # fmt: skip

    train(model, corpus.train, settings, None, log=said, checkpoints=checkpoints, resume=checkpoints.latest())
    print(f"validation: LM loss {lm_loss(model.eval(), corpus):.3f} on {corpus.validation.size:,} tokens, "
          f"{(time.monotonic() - began) / 60:.1f} minutes of this call: {chosen.folder / 'model'}")  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(chosen.folder / "model")


if __name__ == "__main__":
    main()
