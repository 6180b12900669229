"""The teacher in the basis of its principal components is the same function, and says when it cannot be."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_search.config.inputs import ImportanceConfig
from minitron_search.importance import pca
from minitron_search.importance.importance import measure
from minitron_search.importance.pca import principal_components, rotate_teacher, rotated, rotated_config
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import decoder_layers, family_of, sizes, weights, whole
from minitron_search.pruning.trimming import permute_teacher, trim
from tests import tiny

SEEDS = range(8)
PCA = ImportanceConfig(method="pca")


def turned(seed: int, size: int) -> torch.Tensor:
    """A random rotation."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def same(left: PreTrainedModel, right: PreTrainedModel) -> None:
    tokens = tiny.tokens(left.config, rows=3)
    expected = tiny.logits(left, tokens)
    scale = float(expected.abs().max())
    torch.testing.assert_close(tiny.logits(right, tokens), expected, rtol=0, atol=1e-4 * scale)


@tiny.over(SEEDS)
def test_a_rotated_teacher_is_the_same_function_in_plain_weights(seed: int, tmp_path: Path) -> None:
    model = tiny.model(tiny.random_config(seed), seed)
    model.save_pretrained(tmp_path / "teacher")
    basis = turned(seed, model.config.hidden_size)
    folder = rotate_teacher(tmp_path / "teacher", basis, tmp_path / "rotated")
    stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    same(model, stock.eval())
    for layer in decoder_layers(stock):
        for norm in family_of(stock.config).norms:
            torch.testing.assert_close(layer.get_submodule(norm).weight, torch.ones(model.config.hidden_size))


@tiny.over(SEEDS)
def test_the_rotated_stream_is_the_stream_in_the_new_basis(seed: int) -> None:
    model = tiny.model(tiny.random_config(seed), seed)
    basis = turned(seed, model.config.hidden_size)
    tokens = tiny.tokens(model.config)
    with torch.no_grad():
        before, after = (
            m(tokens, output_hidden_states=True).hidden_states[:-1] for m in (model, rotated(model, basis))
        )
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y, x @ basis, rtol=1e-3, atol=1e-3)


@tiny.over([True, False])
def test_an_untied_head_is_counted(tied: bool) -> None:
    config = tiny.config(tie_word_embeddings=tied)
    untied = rotated_config(config)
    made = rotated(tiny.model(config), turned(0, config.hidden_size))
    assert config.tie_word_embeddings == tied and not untied.tie_word_embeddings
    counted = parameter_count(weights(untied), sizes(untied))
    assert counted == made.num_parameters()
    assert counted - parameter_count(weights(config), sizes(config)) == tied * config.vocab_size * config.hidden_size


@tiny.over(SEEDS)
def test_components_are_the_variances_of_the_norms_outputs_without_gains(seed: int) -> None:
    config = tiny.random_config(seed)
    model = tiny.model(config, seed)
    windows = tiny.tokens(config, rows=5).numpy()
    found = measure(model, windows, PCA)
    assert found.rotation is not None
    torch.testing.assert_close(found.rotation.T @ found.rotation, torch.eye(config.hidden_size), atol=1e-5, rtol=0)
    assert (found.hidden.diff() <= 0).all()
    outputs: list[torch.Tensor] = []
    plain = rotated(model, torch.eye(config.hidden_size))  # gains folded, nothing turned
    for layer in decoder_layers(plain):
        for norm in family_of(config).norms:
            layer.get_submodule(norm).register_forward_hook(lambda m, i, o: outputs.append(o.flatten(0, 1)))
    with torch.no_grad():
        plain(torch.from_numpy(windows), use_cache=False)
    along = torch.cat(outputs) @ found.rotation
    # eps of up to 1e-2 is part of a norm's output and not of the direction that is measured
    if config.rms_norm_eps < 1e-5:
        torch.testing.assert_close(along.square().sum(0), found.hidden, rtol=1e-2, atol=1e-2 * float(found.hidden[0]))


def test_principal_components_of_a_known_covariance() -> None:
    basis = turned(5, 7)
    variances = torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0, 1.0, 0.0])
    values, vectors = principal_components(basis @ torch.diag(variances) @ basis.T)
    torch.testing.assert_close(values, variances, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((vectors * basis).sum(0).abs(), torch.ones(7), atol=1e-4, rtol=0)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_channels_that_carry_nothing_are_cut_without_loss(tmp_path: Path) -> None:
    """A teacher whose stream lives in half its dimensions, in no channel's direction: the other half goes for free."""
    config = tiny.config(hidden_size=24, rms_norm_eps=1e-6)
    model = tiny.model(config)
    basis = turned(1, 24)
    half = basis[:, :12] @ basis[:, :12].T
    with torch.no_grad():
        for weight in weights(config):
            if "hidden" in weight.dims and len(weight.dims) == 2:
                tensor = model.get_parameter(weight.name)
                axis = weight.dims.index("hidden")
                tensor.copy_((tensor.movedim(axis, -1) @ half).movedim(-1, axis))
            elif weight.dims == ("hidden",):
                model.get_parameter(weight.name).fill_(1.0)
    model.save_pretrained(tmp_path / "teacher")
    found = measure(model, tiny.tokens(config, rows=8).numpy(), PCA)
    assert found.rotation is not None and float(found.hidden[12:].max()) < 1e-3 * float(found.hidden[11])
    folder = rotate_teacher(tmp_path / "teacher", found.rotation, tmp_path / "rotated")
    permuted = permute_teacher(folder, found.rankings(2), tmp_path / "permuted")
    trimmed = trim(permuted, type(whole(config))(**{**vars(whole(config)), "hidden_size": 12}))
    tokens = tiny.tokens(config)
    with torch.no_grad():  # the mean square over half the channels is twice as large
        for module in trimmed.modules():
            if hasattr(module, "variance_epsilon"):
                module.weight.mul_(2**0.5)
    torch.testing.assert_close(tiny.logits(trimmed, tokens), tiny.logits(model, tokens), rtol=1e-2, atol=1e-2)


def test_a_teacher_whose_norms_subtract_a_mean_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    class LlamaLayerNorm(torch.nn.LayerNorm):
        def __init__(self, size: int, eps: float = 1e-6):
            super().__init__(size, eps, bias=False)

    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", LlamaLayerNorm)
    with pytest.raises(ValueError, match="importance.method: pca is not exact.*is a LlamaLayerNorm.*valid: activation"):
        rotated_config(tiny.config())


def test_a_norm_that_no_matrix_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandwich norm, on a sublayer's output, is one: here the second of Llama's, declared to feed nothing."""
    family = family_of(tiny.config())
    monkeypatch.setattr(pca, "family_of", lambda config: SimpleNamespace(layers=family.layers, norms=family.norms[:1]))
    with pytest.raises(ValueError, match="no matrix reads model.layers.0.post_attention_layernorm"):
        rotated_config(tiny.config())


def test_what_is_no_rotation_is_found_out() -> None:
    model = tiny.model(tiny.config())
    with pytest.raises(ValueError, match="its logits change"):
        rotated(model, torch.eye(24) + 0.1 * torch.ones(24, 24))


def test_a_second_writer_finds_the_same_folder(tmp_path: Path) -> None:
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path / "teacher")
    for _ in range(2):
        assert rotate_teacher(tmp_path / "teacher", turned(0, 24), tmp_path / "rotated") == tmp_path / "rotated"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rotated", "teacher"]
