"""One training on several processes: replicas (DistributedDataParallel), or shards (FSDP2).

`ddp` keeps the student, its gradients and its optimizer whole in every process. `fsdp2` keeps a share of each there
and gathers one decoder layer at a time; embeddings, final norm and head, which the first and the last layer both
need, are one group, gathered for the whole forward and backward pass. Every process still reads its own windows.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from minitron_search.models.device import device, on_device
from minitron_search.models.families import decoder_layers
from minitron_search.models.loading import student_of

Answer = TypeVar("Answer")


class Processes(NamedTuple):
    """The processes that train one student together, and which of them this is."""

    world_size: int = 1
    rank: int = 0


ALONE = Processes()


def replicated(objective: nn.Module) -> nn.Module:
    """Return `objective`, its parameters whole in every process and its gradients averaged over them."""
    return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)


def sharded(objective: nn.Module, student: PreTrainedModel) -> nn.Module:
    """Return `objective`, whose parameters, those of `student`, are DTensors from now on, on the device of the run.

    The student may come from host memory: layers move to the device one by one, and only a share of each stays.
    """
    mesh = _mesh()
    for layer in decoder_layers(student):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def sharded_teacher(teacher: PreTrainedModel) -> PreTrainedModel:
    """Return `teacher`, frozen, its body gathered layer by layer at every forward pass.

    All processes make a forward pass together. The output head, which every chunk of the loss reads, stays whole.
    """
    mesh = _mesh()
    teacher.requires_grad_(False)
    for layer in decoder_layers(teacher):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # its lm_head is no part of what is sharded, so a tied head keeps the whole table
    fully_shard(teacher.base_model, mesh=mesh, reshard_after_forward=True)
    teacher.get_output_embeddings().to(device())
    return teacher


@contextmanager
def gradients_kept(objective: nn.Module) -> Iterator[None]:
    """Make a backward pass inside add to this process's own gradients; the next one outside exchanges them all."""
    if isinstance(objective, DistributedDataParallel):
        with objective.no_sync():
            yield
    elif isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(False)
        yield
        objective.set_requires_gradient_sync(True)
    else:
        yield


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a sharded tensor, and of a sharded norm the norm over all, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_student(student: PreTrainedModel) -> PreTrainedModel | None:
    """Return a plain copy of a sharded `student`, on the device of the run, in the first process; None in the others.

    Called by every process. One weight at a time is whole in all of them.
    """
    first, weights = dist.get_rank() == 0, {}
    for name, parameter in student.named_parameters():
        weight = gathered(parameter.detach())
        if first:
            weights[name] = weight.cpu()
    return on_device(student_of(student.config, weights)) if first else None


def agreed(answer: Answer) -> Answer:
    """Return the first process's answer in all of them: two that look at a shared file may see different ones."""
    answers = [answer]
    dist.broadcast_object_list(answers, src=0)
    return answers[0]


def first_error(message: str | None) -> str | None:
    """Return in every process the first message that any of them has; None if none has one."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next((each for each in messages if each is not None), None)


def leads_node() -> bool:
    """Return whether this process is the first of its node, as it is where there is no other."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _mesh() -> DeviceMesh:
    return init_device_mesh(device().type, (dist.get_world_size(),))
