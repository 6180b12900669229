"""Importance by the loss's first-order Taylor term (LLM-Pruner, arXiv:2305.11627, section 3.2)."""

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from minitron_search.distillation import output_head
from minitron_search.distillation_loss import IGNORE, output_loss
from minitron_search.families import final_hidden, sizes, weights
from minitron_search.precision import autocast
from minitron_search.weight_importance import Scores, SliceSums, of_elements, slice_sums


def gradient_sums(teacher: PreTrainedModel, windows: np.ndarray, precision: str) -> SliceSums:
    """Sums over `windows` (samples, length) of every slice's sum of weight x gradient of the window's LM loss.

    The teacher's weights are float32. One window at a time, and no gradient outlives the backward pass's step that
    made it: what is held beside the weights is one window's activations and one weight's gradient.
    """
    listed, head_dim = weights(teacher.config), sizes(teacher.config)["head_dim"]
    parameters, sums, handles = dict(teacher.named_parameters()), {}, []  # type: ignore[var-annotated]
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())

    def adding(weight):  # type: ignore[no-untyped-def]
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            with torch.no_grad():
                for key, total in slice_sums(weight, parameter * parameter.grad, head_dim).items():
                    sums[key] = sums.get(key, 0) + total
            parameter.grad = None

        return hook

    try:
        for weight in listed:
            handles.append(parameters[weight.name].register_post_accumulate_grad_hook(adding(weight)))
        for window in windows:
            ids = torch.from_numpy(window.astype(np.int64))[None].to(teacher.device)
            targets = torch.full_like(ids, IGNORE)
            targets[:, :-1] = ids[:, 1:]
            with torch.enable_grad(), autocast(precision, teacher.device):
                hidden = final_hidden(teacher, ids).flatten(0, 1)
                loss = output_loss("ce", hidden, output_head(teacher), targets.flatten()).loss
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        teacher.zero_grad(set_to_none=True)
    return {key: total.cpu() for key, total in sums.items()}


def taylor(config: PretrainedConfig, sums: SliceSums, samples: int) -> Scores:
    """|sum over a slice of weight x gradient of the mean LM loss|, in nats, summed over an element's slices: their
    vector-wise importance, aggregated by summation."""
    return of_elements(config, {key: (total / samples).abs() for key, total in sums.items()})
