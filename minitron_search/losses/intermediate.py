"""L_is: the student's states between the layers against the teacher's (Minitron's poster, best practices 6 and 7).

State k is the residual stream before layer k: 0 is what leaves the embedding, and the last, k = number of layers,
is what the final norm reads. (Hugging Face's `hidden_states` are the same but for the last, which is after that
norm.) The teacher is permuted, so its leading channels are the student's: they are compared as they are, where a
student of another order would need a learned projection (2407.14679).

Shapes: states (n, length, hidden_size), the teacher's hidden_size at least the student's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minitron_search.config.types import IntermediateLoss
from minitron_search.models.families import decoder_layers, family_of

LEAST = 1e-6  # an L_is below this is rounding: alpha `auto` does not balance it


def state_map(kept: Sequence[int], teacher_layers: int, last: int | Literal["all"], embedding: bool) -> dict[int, int]:
    """Return {student's state: the teacher's that it is compared with} for a student of the teacher's layers `kept`.

    These are the outputs of the student's `last` layers (all where it has fewer), with `embedding` its output too.
    The state before a layer is compared with what that same layer read in the teacher. So where a block was dropped,
    the layer before it is asked to stand in for it, those behind it go on reading what they were trained on, and
    where the last layers were dropped the target is still what the teacher's head reads: with each kept layer's own
    output as target L_is would there pull against L_logits. No embedding can stand in for a layer that mixes tokens,
    so the embedding's state is compared with the embedding's, also where the first layers were dropped.
    """
    read = [*kept[1:], teacher_layers]  # states behind the student's layers
    first = 0 if last == "all" else max(0, len(kept) - last)
    outputs = {number + 1: read[number] for number in range(first, len(kept))}
    return {0: 0, **outputs} if embedding else outputs


@contextmanager
def recorded(model: PreTrainedModel, numbers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Yield a {number: state} that every forward pass inside fills, by hooks on the modules that read the states."""
    states: dict[int, Tensor] = {}
    readers = [*decoder_layers(model), model.get_submodule(family_of(model.config).final_norm)]

    def record(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states[number] = inputs[0]

        return hook

    handles = [readers[number].register_forward_pre_hook(record(number)) for number in numbers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def intermediate_loss(kind: IntermediateLoss, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> Tensor:
    """Return L_is, the mean distance of `student`'s states from `teacher`'s over states and tokens; float32 at least.

    mse     |s - t|^2 / |t|^2 of each token: states differ by orders of magnitude between layers and tokens, and
            without the division the largest would be all that counts
    cosine  1 - cos(s, t) of each token
    """
    return torch.stack([_distance(kind, student[number], state) for number, state in teacher.items()]).mean()


def _distance(kind: IntermediateLoss, student: Tensor, teacher: Tensor) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher[..., : student.shape[-1]].to(student.device, dtype)
    if kind == "cosine":
        return (1 - torch.cosine_similarity(student, teacher, dim=-1)).mean()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1)).mean()
