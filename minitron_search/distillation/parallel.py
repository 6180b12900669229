"""One training on several processes: replicas (DistributedDataParallel), or shards (FSDP2).

`ddp` keeps the student, its gradients and its optimizer whole in every process. `fsdp2` keeps a share of each there
and gathers one decoder layer at a time; embeddings, final norm and head, which the first and the last layer both
need, are one group, gathered for the whole forward and backward pass. Every process still reads its own windows.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

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


def replicated(objective: nn.Module) -> nn.Module:
    return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)


def sharded(objective: nn.Module, student: PreTrainedModel) -> nn.Module:
    """`objective`, whose parameters are those of `student` and are DTensors from now on, on the device of the run.

    The student may come from host memory: layers move to the device one by one, and only a share of each stays.
    """
    mesh = _mesh()
    for layer in decoder_layers(student):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def sharded_teacher(teacher: PreTrainedModel) -> PreTrainedModel:
    """A frozen `teacher`, whose body is gathered layer by layer at every forward pass, which all processes make
    together. Its output head, which every chunk of the loss reads, stays whole."""
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
    """A backward pass in here adds to this process's own gradients; the next one outside exchanges them all."""
    if isinstance(objective, DistributedDataParallel):
        with objective.no_sync():
            yield
    elif isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(False)
        yield
        objective.set_requires_gradient_sync(True)
    else:
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of a sharded tensor all of it, of a sharded norm the norm over all; in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_student(student: PreTrainedModel) -> PreTrainedModel | None:
    """In the first process a plain copy of a sharded `student`, on the device of the run; None in the others, which
    have to call this too. One weight at a time is whole in all of them."""
    first, weights = dist.get_rank() == 0, {}
    for name, parameter in student.named_parameters():
        weight = whole(parameter.detach())
        if first:
            weights[name] = weight.cpu()
    return on_device(student_of(student.config, weights)) if first else None


def agreed(answer: Answer) -> Answer:
    """What the first process answers, in all of them: two that look at a shared file may see different ones."""
    told = [answer]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def leads_node() -> bool:
    """Whether this process is the first of its node; so it is where there is no other process."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _mesh() -> DeviceMesh:
    return init_device_mesh(device().type, (dist.get_world_size(),))
