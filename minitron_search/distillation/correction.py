"""Teacher correction: the model that teaches is lightly fine-tuned on the distillation's text (2408.11796, section 3).

Before distillation it is a training like any other, with plain LM loss, of the teacher itself (Figure 4). In parallel
(Figure 5) the teacher takes a step of its own on every batch that it is asked about, after it has answered.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_search.distillation.loop import learning_rate_of, make_optimizer
from minitron_search.distillation.objective import Objective
from minitron_search.distillation.settings import LoopSettings, Method
from minitron_search.distillation.teacher import TeacherBatch, TeacherSource
from minitron_search.models.output_head import output_head

# The papers correct all weights; these are usual for peft, on all linear layers but the output head.
LORA_RANK, LORA_ALPHA = 16, 32


def float32_of(folder: Path) -> PreTrainedModel:
    """Load the model of a stock folder in float32, to be trained."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


def trainable(model: PreTrainedModel, method: Method, seed: int) -> PreTrainedModel:
    """Return `model` itself, float32, with gradients for only what `method` trains.

    LoRA's adapters are put into its linear layers and begin as the identity; `merged` takes them out. Raises ValueError
    as `norm_weights` does.
    """
    if method == "norms":
        model.requires_grad_(False)
        for parameter in norm_weights(model):
            parameter.requires_grad_(True)
    if method == "lora":
        from peft import LoraConfig, LoraModel  # takes seconds to import

        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", bias="none")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            LoraModel(model, {"default": config}, "default")  # works on the model in place
    return model


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return `model` itself with plain weights: LoRA's products are added to the weights beside them."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):  # a layer that peft has put around one of the model's
            module.merge()
            model.set_submodule(name, module.base_layer)
    return model.requires_grad_(True)


def norm_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return gains and biases of every norm. Raises ValueError for a model whose norms have none."""
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    if not parameters:
        raise ValueError("teacher.correction.method: norms, but this teacher's norms have no weights; "
                         "valid: full or lora")  # fmt: skip
    return parameters


def correcting_teacher(
    live: TeacherSource, model: PreTrainedModel, settings: LoopSettings, *, share: int, steps: int, world_size: int = 1
) -> TeacherSource:
    """Return `live`, which runs `model` (float32, see `trainable`), correcting it in place on every batch that it is
    asked about.

    `settings` are those of the teacher's own steps. `share`: windows of a step that this process is asked about, in
    parts; `steps` of the whole training. A step is taken when the next batch is asked for, so that the student's loss
    on this one meets the head that answered; its gradient is the mean over all processes, each of which takes it alike.
    """
    corrected = CorrectedTeacher(live, model, settings, share, steps, world_size)
    return live._replace(ask=corrected.ask, correction=corrected)


class CorrectedTeacher:
    """A live teacher with an optimizer. Its state goes into the student's checkpoints."""

    def __init__(
        self,
        live: TeacherSource,
        model: PreTrainedModel,
        settings: LoopSettings,
        share: int,
        steps: int,
        world_size: int,
    ) -> None:
        self.live, self.model, self.settings = live, model, settings
        self.share, self.steps, self.world_size = share, steps, world_size
        self.objective = Objective(model, settings, None)
        self.optimizer = make_optimizer(model, settings)
        self.step, self.seen = 0, 0  # steps taken; windows of this step whose gradient is there

    def ask(self, indices: np.ndarray, tokens: np.ndarray) -> TeacherBatch:
        """Answer as the live teacher does, and add this batch to the gradient of its own next step."""
        self._finish_step()
        answer = self.live.ask(indices, tokens)
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)
        loss, _ = self.objective(ids, None)
        (loss * (len(indices) / self.share)).backward()
        self.seen += len(indices)
        if self.seen == self.share and self.world_size > 1:  # here, where every process is at the same point
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world_size
        return answer

    def _finish_step(self) -> None:
        if self.seen < self.share:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_of(self.settings, self.step, self.steps)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.seen = self.step + 1, 0
        self._copy_head()

    @torch.no_grad()
    def _copy_head(self) -> None:
        """Update the head that students' losses read, a copy in the dtype of the products."""
        head = output_head(self.model)
        assert self.live.head is not None
        self.live.head.weight.copy_(head.weight)
        if self.live.head.bias is not None and head.bias is not None:
            self.live.head.bias.copy_(head.bias)

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer between two steps of the student; finishes the teacher's own last step."""
        self._finish_step()
        assert self.seen == 0, self.seen
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {"step": self.step, "weights": trained, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a checkpoint's weights and optimizer in place, and update the head that students' losses read."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seen = state["step"], 0
        self._copy_head()
