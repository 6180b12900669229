"""The objective of a distillation, `L_CLM + L_logits + alpha * L_is`, as one module: DistributedDataParallel and FSDP2,
which wrap it, see every gradient."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher import TeacherBatch
from minitron_search.losses.divergences import has_ce
from minitron_search.losses.intermediate import LEAST, intermediate_loss, recorded
from minitron_search.losses.output_loss import TopK, next_tokens, output_loss
from minitron_search.models.device import autocast
from minitron_search.models.families import final_hidden
from minitron_search.models.output_head import OutputHead, output_head


class Objective(nn.Module):
    """The student's body, head and losses in one forward pass.

    With alpha `auto` L_is weighs as much as L_logits in every call (2407.14679: the two differ by orders of magnitude
    and drift apart). A call sees one micro-batch of one process: how a batch is split then decides the weights of its
    parts, which a fixed alpha leaves alone.
    """

    def __init__(self, student: PreTrainedModel, settings: LoopSettings, teacher_head: OutputHead | None) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        self.teacher_head = teacher_head

    def forward(self, ids: Tensor, teacher: TeacherBatch | None) -> tuple[Tensor, Tensor]:
        """Return (loss, [loss, ce, kl, intermediate]) of `ids` (n, length), given the teacher's answer about them.

        The intermediate loss is before alpha.
        """
        targets = {} if teacher is None else teacher.states
        assert targets or not self.settings.intermediate, "a teacher without the states that L_is compares"
        with autocast(self.settings.precision, ids.device), recorded(self.student, targets) as states:
            hidden = final_hidden(self.student, ids)
            output = output_loss(
                self.settings.loss, hidden.flatten(0, 1), output_head(self.student), next_tokens(ids).flatten(),
                None if teacher is None or teacher.hidden is None else teacher.hidden.to(ids.device).flatten(0, 1),
                self.teacher_head,
                teacher_topk=None if teacher is None or teacher.topk is None
                else TopK(*(part.to(ids.device).flatten(0, 1) for part in teacher.topk)),
                temperature=self.settings.temperature,
            )  # fmt: skip
        kl = torch.zeros_like(output.ce) if output.kl is None else output.kl
        loss, intermediate = output.loss, torch.zeros_like(output.ce)
        if targets:
            difference = intermediate_loss(self.settings.intermediate_loss, states, targets)
            intermediate = difference.detach()
            alpha: float | Tensor
            if self.settings.intermediate == "auto":
                logits = loss.detach() - (output.ce if has_ce(self.settings.loss) else 0)
                alpha = logits / intermediate.clamp(min=LEAST)
            else:
                alpha = self.settings.intermediate
            loss = loss + alpha * difference
        return loss, torch.stack([loss.detach(), output.ce, kl, intermediate])
