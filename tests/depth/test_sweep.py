"""The sweep is exact, shares what can be shared, and its numbers are those of stock models without the layers."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_search.data import winogrande, winogrande_packing
from minitron_search.depth import sweep
from minitron_search.depth.sweep import TEACHER, Cut, block
from minitron_search.evaluation import winogrande as evaluation_winogrande
from minitron_search.importance import importance
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import final_hidden, whole
from minitron_search.models.layerwise import LayerwiseModel
from minitron_search.models.output_head import output_head
from minitron_search.pruning.trimming import trim
from tests import tiny

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.teacher_folder(tmp_path_factory.mktemp("teacher"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return tiny.tokens(tiny.config(vocab_size=258), rows=6, length=20).numpy().astype(np.int32)


def student_without(folder: Path, cut: Cut):  # type: ignore[no-untyped-def]
    shape = whole(AutoConfig.from_pretrained(folder)).to_dict()
    kept = [layer for layer in shape["layers"] if layer not in cut]
    return trim(folder, Architecture.from_dict({**shape, "layers": kept}))


def losses_of(model, windows: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.inference_mode():
        logits = output_head(model).logits(final_hidden(model, ids))[:, :-1]
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return ce.view(len(ids), -1).double().mean(1).numpy()


def test_lm_loss_is_that_of_a_stock_model_without_the_layers(folder: Path, windows: np.ndarray) -> None:
    cuts = [TEACHER, *sweep.blocks([1, 2, 4], 5), (0, 2), (1, 3, 4)]
    found = sweep.text_values(LayerwiseModel(folder, "float32"), windows, cuts)["lm_loss"]
    assert list(found) == cuts
    for cut in cuts:
        np.testing.assert_allclose(found[cut], losses_of(student_without(folder, cut), windows), atol=1e-5)


def test_winogrande_is_that_of_a_stock_model_without_the_layers(folder: Path, tmp_path: Path) -> None:
    examples = winogrande.load_examples(str(tiny.winogrande_file(tmp_path / "w.jsonl", 30)))
    packed = winogrande_packing.pack(examples, tiny.tokenizer(), max_length=256)
    cuts, walk = [TEACHER, *sweep.blocks([2], 5), (0, 4)], LayerwiseModel(folder, "float32")
    found = {cut: np.zeros(2 * len(examples)) for cut in cuts}
    chunks = packed.batches(300)
    assert len(chunks) > 1
    for rows in chunks:
        for cut, values in sweep.winogrande_values(walk, packed, rows, cuts).items():
            found[cut] += values
    for cut in cuts:
        expected = evaluation_winogrande.evaluate(student_without(folder, cut), packed)
        np.testing.assert_allclose(found[cut].reshape(-1, 2), expected.log_likelihoods, atol=1e-4)
        correct, margin = evaluation_winogrande.by_example(found[cut].reshape(-1, 2), packed.answers)
        assert correct.mean() == expected.accuracy
        np.testing.assert_allclose(margin.mean(), expected.margin, atol=1e-4)


def test_bi_is_that_of_the_importance_pass_taken_before_the_final_norm(folder: Path, windows: np.ndarray) -> None:
    blocks = sweep.blocks([1, 2, 4], 5)
    found = sweep.text_values(LayerwiseModel(folder, "float32"), windows, [], blocks)["bi"]
    expected = importance.measure(trim(folder, whole(AutoConfig.from_pretrained(folder))), windows).block_bi
    for cut in blocks:
        assert found[cut].shape == (len(windows),)
        assert found[cut].mean() == pytest.approx(float(expected[cut[0], cut[-1] + 1]), abs=1e-5)


def test_the_angular_distance_of_a_block_is_the_angle_at_the_last_position(folder: Path, windows: np.ndarray) -> None:
    """Gromov et al., equation for d(x^l, x^(l+n)): arccos of the cosine over pi, at the final token."""
    blocks = sweep.blocks([1, 2, 4], 5)
    found = sweep.text_values(LayerwiseModel(folder, "float32"), windows, [], blocks)["angular"]
    model = trim(folder, whole(AutoConfig.from_pretrained(folder)))
    ids = torch.from_numpy(windows.astype(np.int64))
    stream: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0][:, -1]))
    model.model.layers[-1].register_forward_hook(lambda module, inputs, output: stream.append(output[:, -1]))
    with torch.no_grad():
        model(ids, use_cache=False)
    for cut in blocks:
        cosine = torch.cosine_similarity(stream[cut[0]].double(), stream[cut[-1] + 1].double(), dim=-1)
        np.testing.assert_allclose(found[cut], np.arccos(cosine.numpy()) / np.pi, atol=1e-5)


def test_taylor_of_a_layer_is_the_sum_of_its_weights_times_gradients(folder: Path, windows: np.ndarray) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = sweep.taylor_values(model, windows[:3], "float32")
    assert sorted(found) == sweep.blocks([1], 5)
    for index, window in enumerate(windows[:3]):
        ids = torch.from_numpy(window.astype(np.int64))[None]
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        for layer, module in enumerate(model.model.layers):
            expected = sum(float((weight * weight.grad).detach().abs().sum()) for weight in module.parameters())
            assert found[layer,][index] == pytest.approx(expected, rel=1e-3)


def test_an_angle_is_exact_however_small() -> None:
    for angle in (0.0, 1e-6, 0.3, np.pi / 2, 3.0, np.pi):
        x, y = torch.tensor([[2.0, 0.0]]).double(), 5 * torch.tensor([[np.cos(angle), np.sin(angle)]])
        assert sweep._angle(x, y)[0] == pytest.approx(angle / np.pi, rel=1e-6, abs=1e-12), angle


def test_a_cuts_numbers_do_not_depend_on_the_cuts_beside_it(folder: Path, windows: np.ndarray) -> None:
    walk, cuts = LayerwiseModel(folder, "float32"), [TEACHER, *sweep.blocks([1, 3], 5)]
    together = sweep.text_values(walk, windows, cuts, cuts[1:])
    for cut in cuts:
        alone = sweep.text_values(walk, windows, [cut], [cut] if cut else [])
        assert np.array_equal(alone["lm_loss"][cut], together["lm_loss"][cut])
        assert not cut or np.array_equal(alone["bi"][cut], together["bi"][cut])


def test_layers_before_a_block_are_computed_once_for_all_blocks(folder: Path, windows: np.ndarray) -> None:
    walk, calls = LayerwiseModel(folder, "float32"), Counter[int]()
    for index, layer in enumerate(walk.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
    cuts = [TEACHER, *sweep.blocks([1, 3], 5)]
    sweep.text_values(walk, windows, cuts, cuts[1:])
    # one teacher pass, and of every cut only the layers after its block
    expected = Counter(layer for cut in cuts for layer in range(cut[-1] + 1 if cut else 0, 5))
    assert calls == expected


def test_sets_that_begin_alike_share_their_beginning(folder: Path, windows: np.ndarray) -> None:
    walk, calls = LayerwiseModel(folder, "float32"), Counter[int]()
    for index, layer in enumerate(walk.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
    sweep.text_values(walk, windows, [(0, 3), (0, 4)])
    assert calls == {1: 1, 2: 1, 3: 1, 4: 1}  # layer 3 by the second alone, layer 4 by the first alone


def test_fractions_of_the_depth_are_lengths_too() -> None:
    assert sweep.in_layers([0.5, 1, 2, 0.1, 15], 30) == [1, 2, 3, 15]
    with pytest.raises(ValueError, match="depth.lengths: 30 of the teacher's 30 layers; valid: at most 29"):
        sweep.in_layers([1, 30], 30)


def test_every_start_of_every_length() -> None:
    cuts = sweep.blocks([1, 2, 8, 15], 30)
    assert len(cuts) == len(set(cuts)) == 98
    assert block(15, 15) in cuts and block(0, 15) in cuts


def test_one_by_one_takes_the_layers_that_each_hurt_least() -> None:
    losses = {(layer,): np.array([value, value]) for layer, value in enumerate([9.0, 3.0, 5.0, 3.0, 4.0])}
    losses[(0, 1)] = np.zeros(2)  # not a single layer: no candidate
    assert sweep.one_by_one(losses, 1) == (1,)
    assert sweep.one_by_one(losses, 3) == (1, 3, 4)


def test_the_streams_of_one_chunk_have_a_budget() -> None:
    assert sweep.cuts_at_once(1024, 576) > 98  # SmolLM2: all cuts at once
    assert 20 < sweep.cuts_at_once(1024, 4096) < 40
    assert sweep.cuts_at_once(10**6, 8192) == 1


def test_the_table_has_every_row_once(folder: Path, windows: np.ndarray) -> None:
    cuts = sweep.blocks([1, 2], 5)
    values = sweep.text_values(LayerwiseModel(folder, "float32"), windows, [TEACHER, *cuts, (0, 2)], cuts)
    rows = sweep.table_rows(values, [1, 2], 5, {1: (2,), 2: (0, 2)})
    kinds = Counter((row["metric"], row["kind"], row["length"]) for row in rows)
    assert kinds == {
        ("lm_loss", "teacher", 0): 1, ("lm_loss", "contiguous", 1): 5, ("lm_loss", "contiguous", 2): 4,
        ("lm_loss", "one_by_one", 1): 1, ("lm_loss", "one_by_one", 2): 1,
        ("bi", "contiguous", 1): 5, ("bi", "contiguous", 2): 4,
        ("angular", "contiguous", 1): 5, ("angular", "contiguous", 2): 4,
    }  # fmt: skip
    assert {row["n"] for row in rows} == {6}
    (chosen,) = (row for row in rows if row["kind"] == "one_by_one" and row["length"] == 2)
    assert chosen["layers"] == "0,2" and chosen["start"] == 0
    assert chosen["value"] == values["lm_loss"][(0, 2)].mean()
    assert chosen["stderr"] == pytest.approx(values["lm_loss"][(0, 2)].std(ddof=1) / 6**0.5)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the reference numbers are not here")
def test_the_reference_cuts_of_smollm2_are_reproduced() -> None:
    """Half the depth at every fifth start; the single layers that hurt most, least and in the middle; in float32."""
    from minitron_search.teachers.sources import load_tokenizer, teacher_folder

    reference = json.loads((SHARED / "reference/smollm2_depth_lm_loss.json").read_text())
    text = (SHARED / "data/wikitext2_valid.txt").read_text()
    tokens = load_tokenizer("smollm2-135m")(text[:40_000], add_special_tokens=False)["input_ids"][: 8 * 256]
    windows = np.array(tokens, np.int32).reshape(8, 256)
    walk = LayerwiseModel(teacher_folder("smollm2-135m"), "float32")
    asked = {block(cut["start"], cut["length"]): cut["lm_loss"] for cut in reference["cuts"]}
    asked = {
        cut: loss for cut, loss in asked.items() if len(cut) == 15 and cut[0] % 5 == 0 or cut in ((0,), (11,), (29,))
    }
    asked[TEACHER] = reference["teacher_loss"]
    parts = [
        sweep.text_values(walk, windows[rows], list(asked))["lm_loss"]
        for rows in sweep.text_chunks(windows, walk.device)
    ]
    for cut, loss in asked.items():
        assert np.concatenate([part[cut] for part in parts]).mean() == pytest.approx(loss, abs=1e-4), cut


def test_a_state_before_a_block_is_let_go_when_its_last_block_has_ended() -> None:
    """512 windows of a large teacher are gigabytes a state."""
    watch, held = sweep._BlockImportance([(1,), (1, 2), (3, 4)]), []
    for index in range(6):
        watch(index, torch.rand(1, 2, 4))
        held.append(sorted(watch.before))
    assert held == [[], [1], [1], [3], [3], []]
