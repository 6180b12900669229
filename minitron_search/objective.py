"""What a distillation minimises, as one module: whoever wraps it (DistributedDataParallel) sees every gradient."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minitron_search.distillation_loss import OutputHead, TopK, next_tokens, output_loss
from minitron_search.families import final_hidden
from minitron_search.loop_settings import LoopSettings
from minitron_search.precision import autocast
from minitron_search.teacher_source import TeacherBatch, output_head


class Objective(nn.Module):
    """The student's body, head and loss in one forward pass."""

    def __init__(self, student: PreTrainedModel, settings: LoopSettings, teacher_head: OutputHead | None) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        self.teacher_head = teacher_head

    def forward(self, ids: Tensor, teacher: TeacherBatch | None) -> tuple[Tensor, Tensor]:
        """(loss, [loss, ce, kl]) of `ids` (n, length), given what the teacher says of them."""
        with autocast(self.settings.precision, ids.device):
            states = final_hidden(self.student, ids)
            loss = output_loss(
                self.settings.loss, states.flatten(0, 1), output_head(self.student), next_tokens(ids).flatten(),
                None if teacher is None or teacher.hidden is None else teacher.hidden.to(ids.device).flatten(0, 1),
                self.teacher_head,
                teacher_topk=None if teacher is None or teacher.topk is None
                else TopK(*(part.to(ids.device).flatten(0, 1) for part in teacher.topk)),
                temperature=self.settings.temperature,
            )  # fmt: skip
        kl = torch.zeros_like(loss.ce) if loss.kl is None else loss.kl
        return loss.loss, torch.stack([loss.loss.detach(), loss.ce, kl])
