"""Every place where transformers is made to do what it does not by itself; nothing else in this project patches it.

patch                        version of transformers that makes it unnecessary
windows_are_not_packed       none yet (5.23 looks for packed sequences in every forward pass)
llama_as_mistral             none yet (huggingface/transformers#46082)
dequantised                  none yet (5.23 saves a converted GGUF as if it were still quantised)
recompute_activations        6, which renames what 5 warns of
generation_defaults          none yet (5.23 loads no weights beside a generation_config.json that it refuses)
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from transformers import GenerationConfig, MistralConfig, PretrainedConfig, PreTrainedModel, masking_utils


@contextmanager
def windows_are_not_packed() -> Iterator[None]:
    """Skip the search for position ids that begin anew inside a window: every forward pass asks, and waits for the
    device to answer, and windows here are one sequence each or come with a mask of their own. Also a decorator."""
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield


def llama_as_mistral(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the same function under a name that may have hidden_size 448 with 6 heads of 64.

    transformers 5 refuses that of `llama` even with `head_dim` written; without biases and without a sliding window
    Mistral is Llama, weight names included.
    """
    known = {key: value for key, value in config.to_dict().items() if key in MistralConfig.__dataclass_fields__}
    known |= {"model_type": "mistral", "sliding_window": None, "architectures": ["MistralForCausalLM"]}
    return MistralConfig(**known)


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """Return `model`, loaded from a GGUF file and plain float32 by now, without what tells save_pretrained that its
    weights are quantised."""
    model.is_quantized, model.hf_quantizer = False, None  # type: ignore[assignment]
    del model.config.quantization_config
    return model


def recompute_activations(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on: activations inside a layer are computed again in the backward pass."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model.gradient_checkpointing_enable({"use_reentrant": False})


_stock = GenerationConfig.from_pretrained.__func__  # type: ignore[attr-defined]


def generation_defaults(cls: type[GenerationConfig], *where: Any, **options: Any) -> GenerationConfig:
    """Load generation defaults. Raises OSError for any that are refused: transformers then looks for them in
    config.json, whose own have no effect if they are refused too."""
    try:
        return _stock(cls, *where, **options)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if options.get("_from_model_config"):
            return cls(_from_model_config=True)
        raise OSError(f"{error}") from error


# in every process that loads a model: nothing here generates, and old models have defaults that 5 refuses
GenerationConfig.from_pretrained = classmethod(generation_defaults)  # type: ignore[assignment]
