"""Rotate the hidden axis by PCA (SliceGPT, arXiv:2401.15024, section 3): the teacher in the basis of its hidden states'
principal components, as plain weights.

RMSNorm commutes with a rotation once its gains are folded into the matrices that read it (their theorem 1), so one
rotation of the whole residual stream gives the same function with norms of ones. SliceGPT rotates every layer by
itself and adds a matrix to each residual connection; no stock configuration has a place for those, so here all
layers share one rotation: the eigenvectors of the covariance summed over the norms that feed attention and MLP.
The embedding absorbs no gain and the output head absorbs the final norm's: tied ones are untied, and counted so.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minitron_search.models.architecture import Weight
from minitron_search.models.families import decoder_layers, family_of, final_hidden, vocabulary_tables, weights
from minitron_search.models.loading import load_model, student_of
from minitron_search.records import cache

TOLERANCE = 1e-3  # of the hidden states' size; float32 rounding stays below 1e-4, a wrong fold is of order 1
LARGE = 1e6  # a constant of this size shows a norm's gains: eps adds nothing to its mean square


class Covariance:
    """Sum over norms and tokens of the outer products of the norms' outputs without their gains, fed by hooks."""

    def __init__(self, teacher: PreTrainedModel):
        self.norms = family_of(teacher.config).norms
        self.totals = {"covariance": torch.zeros(())}

    @contextmanager
    def watching(self, teacher: PreTrainedModel) -> Iterator[None]:
        handles = [
            layer.get_submodule(norm).register_forward_pre_hook(self._add)
            for layer in decoder_layers(teacher)
            for norm in self.norms
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            x = x * x.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
            self.totals["covariance"] = self.totals["covariance"].to(x.device) + x.T @ x

    def end_of_rows(self, final: Tensor) -> None:
        """Do nothing: every norm's output was added as it passed."""


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return (eigenvalues, falling, (hidden_size,); eigenvectors, the columns of (hidden_size, hidden_size)), float32.

    Of a vector and its opposite, the one whose largest entry is positive.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values.float(), (vectors * largest.sign()).float()


def rotated_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the rotated teacher: untied. Raises ValueError where a rotation would not be
    exact."""
    family = family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    fed = {f"{family.layers}.{n}.{norm}" for n in range(config.num_hidden_layers) for norm in family.norms}
    for weight in weights(config):
        if not _is_gain(model, weight):
            continue
        name = weight.name.rpartition(".")[0]
        kind = type(model.get_submodule(name)).__name__
        if "RMSNorm" not in kind:
            raise _refused(config, f"{name} is a {kind}, which a rotation of its input changes, unlike RMSNorm")
        if weight.layer is not None and name not in fed:
            raise _refused(config, f"no matrix reads {name}, so none can take over its gains")
    if len(family.norms) > 2:
        raise _refused(config, "it has more than the two norms before attention and MLP")
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    return untied


def rotated(teacher: PreTrainedModel, rotation: Tensor) -> PreTrainedModel:
    """Return the same function, float32, with the residual stream in the basis of `rotation`'s columns.

    Raises ValueError as `rotated_config`, or where a pass through both shows that the function is not the same.
    """
    config = rotated_config(teacher.config)
    family, source = family_of(config), dict(teacher.named_parameters())
    final = next(w.name for w in weights(config) if w.layer is None and w.dims == ("hidden",))
    gains = {name: _gain(teacher, name) for name in source if name == final or name.endswith(_gains_of(family.norms))}
    basis = rotation.double().to(teacher.device)
    tables = vocabulary_tables(weights(config))
    state = {}
    for weight in weights(config):
        tensor = source[weight.name if weight.name in source else tables[0]].detach().double()
        if weight.name in gains:
            tensor = tensor + (1 - gains[weight.name])  # a gain of 1, whether it is the weight or 1 + the weight
        elif "hidden" in weight.dims:
            axis = weight.dims.index("hidden")
            tensor = tensor.movedim(axis, -1)
            norm = final if weight.name == tables[-1] else _norm_before(teacher, family.norms, family.layers, weight)
            tensor = ((tensor if norm is None else tensor * gains[norm]) @ basis).movedim(-1, axis)
        state[weight.name] = tensor.float().contiguous()
    student = student_of(config, state)
    _check(teacher, student)
    return student


def rotate_teacher(folder: Path, rotation: Tensor, into: Path) -> Path:
    """Write the rotated teacher, float32, a stock folder; it appears whole or not at all, and stays if it is there."""

    def write(partial: Path) -> None:
        teacher = load_model(folder, torch.float32).eval()
        rotated(teacher, rotation).save_pretrained(partial)

    cache.make_once(into, write)
    return into


def _is_gain(model: nn.Module, weight: Weight) -> bool:
    """Return True for a weight that scales or shifts the residual stream or a sublayer's output; not a matrix's
    bias."""
    module = model.get_submodule(weight.name.rpartition(".")[0])
    return weight.dims == ("hidden",) and not isinstance(module, nn.Linear | Conv1D)


def _gains_of(norms: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{norm}.weight" for norm in norms)


def _gain(teacher: PreTrainedModel, name: str) -> Tensor:
    norm = teacher.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        return norm(torch.full((teacher.config.hidden_size,), LARGE, device=teacher.device)).double()


def _norm_before(teacher: PreTrainedModel, norms: tuple[str, ...], layers: str, weight: Weight) -> str | None:
    """Return the gain of the norm whose output this weight of a layer multiplies: the first norm before attention, the
    last before the MLP. None for one that writes to the stream: o and down projections, their biases, the embedding."""
    module = teacher.get_submodule(weight.name.rpartition(".")[0])
    if weight.layer is None or len(weight.dims) == 1:
        return None
    reads = 0 if isinstance(module, Conv1D) else 1
    if weight.dims[reads] != "hidden":
        return None
    norm = norms[-1] if weight.dims[1 - reads] == "mlp" else norms[0]
    return f"{layers}.{weight.layer}.{norm}.weight"


def _check(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Refuse a rotation under which a few tokens' logits change."""
    config = teacher.config
    ids = torch.arange(16, device=teacher.device)[None] * 7 % config.vocab_size
    with torch.no_grad():
        before, after = (
            model.get_output_embeddings()(final_hidden(model, ids).to(model.dtype)).float()
            for model in (teacher, nn.Module.to(student, teacher.device))
        )
    if float((before - after).abs().max()) > TOLERANCE * float(before.abs().max()):
        raise _refused(config, "its logits change under a rotation of the hidden axis")


def _refused(config: PretrainedConfig, why: str) -> ValueError:
    return ValueError(f"importance.method: pca is not exact for this {config.model_type}: {why}; "
                      "valid: activation, or another method that does not rotate the teacher")  # fmt: skip
