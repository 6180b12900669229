"""Importance by the loss's first-order Taylor term (LLM-Pruner, arXiv:2305.11627, section 3.2)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from minitron_search.importance.weights import Scores, SliceSums, of_elements, slice_sums
from minitron_search.losses.output_loss import next_tokens, output_loss
from minitron_search.models.architecture import Weight
from minitron_search.models.device import autocast
from minitron_search.models.families import final_hidden, sizes, weights
from minitron_search.models.output_head import output_head


def gradient_sums(teacher: PreTrainedModel, windows: np.ndarray, precision: str) -> SliceSums:
    """Return the sums over `windows` (samples, length) of every slice's sum of weight x gradient of the window's LM
    loss."""
    dims, sums = sizes(teacher.config), {}  # type: ignore[var-annotated]

    def add(window: int, weight: Weight, product: Tensor) -> None:
        for key, total in slice_sums(weight, product, dims).items():
            sums[key] = sums.get(key, 0) + total

    each_gradient(teacher, windows, precision, add)
    return {key: total.cpu() for key, total in sums.items()}


def of_layers(teacher: PreTrainedModel, windows: np.ndarray, precision: str) -> np.ndarray:
    """Return the sum over a layer's weights of |weight x gradient of a window's LM loss|, nats: (samples, layers)
    float64 (depth by Taylor: Shortened LLaMA, arXiv:2402.02834, section 2.2)."""
    sums = np.zeros((len(windows), teacher.config.num_hidden_layers))

    def add(window: int, weight: Weight, product: Tensor) -> None:
        if weight.layer is not None:
            sums[window, weight.layer] += float(product.abs().sum())

    each_gradient(teacher, windows, precision, add)
    return sums


def each_gradient(
    teacher: PreTrainedModel, windows: np.ndarray, precision: str, add: Callable[[int, Weight, Tensor], None]
) -> None:
    """Call `add` with the window's index, a weight, and weight x gradient of that window's LM loss, for each of both.

    The teacher's weights are float32. One window at a time, and no gradient outlives the backward pass's step that
    made it: what is held beside the weights is one window's activations and one weight's gradient.
    """
    parameters, handles, index = dict(teacher.named_parameters()), [], 0
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())

    def hook_of(weight: Weight) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            with torch.no_grad():
                add(index, weight, parameter * parameter.grad)
            parameter.grad = None

        return hook

    try:
        for weight in weights(teacher.config):
            handles.append(parameters[weight.name].register_post_accumulate_grad_hook(hook_of(weight)))
        for index, window in enumerate(windows):  # noqa: B007  # the hooks read it
            ids = torch.from_numpy(window.astype(np.int64))[None].to(teacher.device)
            with torch.enable_grad(), autocast(precision, teacher.device):
                hidden = final_hidden(teacher, ids).flatten(0, 1)
                loss = output_loss("ce", hidden, output_head(teacher), next_tokens(ids).flatten()).loss
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        teacher.zero_grad(set_to_none=True)


def taylor(config: PretrainedConfig, sums: SliceSums, samples: int) -> Scores:
    """Return |sum over a slice of weight x gradient of the mean LM loss|, in nats, summed over an element's slices:
    their vector-wise importance, aggregated by summation."""
    return of_elements(config, {key: (total / samples).abs() for key, total in sums.items()})
