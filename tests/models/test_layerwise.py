"""A model taken apart computes what it computed whole, and a streamed one holds one layer at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron_search.models.device import autocast
from minitron_search.models.families import final_hidden
from minitron_search.models.layerwise import LayerwiseModel
from minitron_search.models.output_head import output_head
from tests import tiny


def walked(walk: LayerwiseModel, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(final hidden states, logits) of the whole model, layer by layer."""
    with walk.computing():
        begun = walk.begin(*inputs)
        stream = begun.stream
        for index in range(len(walk.layers)):
            with walk.layer(index, begun) as layer:
                stream = layer(stream)
        hidden = walk.final_norm(stream)
        with walk.head() as head:
            return hidden, head.logits(hidden)


def test_a_walk_gives_the_models_own_numbers_to_the_last_bit(tmp_path: Path) -> None:
    drawn = [(name, seed) for number, name in enumerate(tiny.FAMILIES) for seed in (number % 2, 2 + number % 2)]
    for model_type, seed in drawn:  # tied or not, biased or not, with a sliding window or not
        config = tiny.random_config(seed, model_type=model_type)
        model, folder, ids = tiny.model(config, seed), tmp_path / f"{model_type}-{seed}", tiny.tokens(config)
        model.save_pretrained(folder)
        for precision in ("float32", "bfloat16"):
            with torch.inference_mode(), autocast(precision, model.device):
                hidden = final_hidden(model, ids)
                logits = output_head(model).logits(hidden)
            for streamed in (False, True):
                found = walked(LayerwiseModel(folder, precision, streamed=streamed), ids)
                case = model_type, seed, precision, streamed
                assert torch.equal(found[0], hidden) and torch.equal(found[1], logits), case


def test_positions_and_masks_reach_every_layer(tmp_path: Path) -> None:
    length = 12
    positions = torch.arange(length).flip(0)[None].repeat(2, 1)
    mask = torch.zeros(2, 1, length, length).masked_fill_(~torch.ones(length, length).tril().bool(), -1e9)
    mask[1, :, 5:, :3] = -1e9
    for model_type in tiny.FAMILIES:
        config = tiny.config(model_type)
        model, folder, ids = tiny.model(config), tmp_path / model_type, tiny.tokens(config)
        model.save_pretrained(folder)
        with torch.inference_mode():
            expected = final_hidden(model, ids, positions, mask)
        assert torch.equal(walked(LayerwiseModel(folder, "float32"), ids, positions, mask)[0], expected), model_type


def test_weights_stored_in_bfloat16_are_computed_with_around_float32_sums(tmp_path: Path) -> None:
    for model_type in tiny.FAMILIES:
        config, folder = tiny.config(model_type), tmp_path / model_type
        model = tiny.model(config).to(torch.bfloat16)
        model.save_pretrained(folder)
        whole = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        ids = tiny.tokens(config)
        with torch.inference_mode():
            expected = final_hidden(whole, ids)
        for streamed in (False, True):
            found = walked(LayerwiseModel(folder, "float32", streamed=streamed), ids)[0]
            assert torch.equal(found, expected), (model_type, streamed)


def test_a_streamed_walk_lets_go_of_what_it_has_used(tmp_path: Path) -> None:
    config = tiny.config()
    tiny.model(config).save_pretrained(tmp_path)
    walk = LayerwiseModel(tmp_path, "float32", streamed=True)
    with walk.computing():
        begun = walk.begin(tiny.tokens(config))
        for index in range(len(walk.layers)):
            with walk.layer(index, begun):
                held = [place for place, layer in enumerate(walk.layers) if not is_meta(layer)]
                assert held == [index]
    assert all(is_meta(layer) for layer in walk.layers) and is_meta(walk.embedding)


def is_meta(module: torch.nn.Module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())


PEAK = """
import sys
from pathlib import Path
import numpy as np
from minitron_search.depth.sweep import text_values
from minitron_search.models.layerwise import LayerwiseModel

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

before = peak()
walk = LayerwiseModel(Path(sys.argv[1]), "float32", streamed=True)
windows = np.arange(4 * 32, dtype=np.int32).reshape(4, 32) % 97
text_values(walk, windows, [(), (0,), (3, 4)], [(3, 4)])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_streamed_sweep_needs_one_layer_of_a_model_not_all_of_it(tmp_path: Path) -> None:
    config = tiny.config(
        vocab_size=1000, hidden_size=640, intermediate_size=2560, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, head_dim=80,
    )  # fmt: skip
    tiny.model(config).save_pretrained(tmp_path)
    weights = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert weights > 300e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert int(done.stdout) < weights / 3
