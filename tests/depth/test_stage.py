"""The stage: one table whatever the number of workers, nothing finished computed twice, nothing lost to a kill."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from minitron_search.cli import main
from minitron_search.config.inputs import DepthConfig
from minitron_search.data import winogrande, winogrande_packing
from minitron_search.depth import sweep
from minitron_search.depth.pieces import CHOICES, TAYLOR, TEXT, Job, _streamed, compute, keep, missing_pieces, read
from minitron_search.pipeline import depth as depth_stage
from minitron_search.records.directory import DEPTH_SCHEMA, RunDirectory
from tests import tiny
from tests.runs import in_background, kill_child

ROOT = Path(__file__).parents[2]


def prose(words: int, seed: int) -> str:
    vocabulary = "the quick brown fox jumps over a lazy dog and runs away, then 12 wolves sleep.".split()
    return " ".join(np.random.default_rng(seed).choice(vocabulary, words))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, texts and questions."""
    folder = tmp_path_factory.mktemp("data")
    tiny.teacher_folder(folder / "teacher", num_hidden_layers=5)
    tiny.teacher_folder(folder / "slow", num_hidden_layers=6, hidden_size=256, intermediate_size=512, head_dim=64)
    (folder / "train.txt").write_text(prose(2000, seed=0))
    (folder / "valid.txt").write_text(prose(8000, seed=1))
    tiny.winogrande_file(folder / "questions.jsonl", 40)
    return folder


def arguments(data: Path, output: Path, *more: str, teacher: str = "teacher") -> list[str]:
    return [
        "--stages", "depth", "--precision", "float32", "--output", str(output), "--teacher.model",
        str(data / teacher), "--corpus.train", str(data / "train.txt"), "--corpus.validation",
        str(data / "valid.txt"), "--corpus.sequence_length", "64", "--corpus.validation_samples", "40",
        "--corpus.calibration_samples", "2", "--winogrande.source", str(data / "questions.jsonl"),
        "--depth.lengths", "1,0.4,3", *more,
    ]  # fmt: skip


def job(data: Path, pieces: Path, **given: Any) -> Job:
    windows = np.random.default_rng(0).integers(0, 258, (40, 64)).astype(np.int32)
    examples = winogrande.load_examples(str(data / "questions.jsonl"))
    packed = winogrande_packing.pack(examples, tiny.tokenizer(), row_length=512, max_length=256)
    made = Job(
        folder=data / "teacher", fingerprint="f", depth=5, hidden_size=24, weight_bytes=10**6, precision="float32",
        windows=windows, packed=packed, pieces=pieces,
    )  # fmt: skip
    return replace(made, **given)


def last_event(run: Path) -> dict[str, Any]:
    return [event for event in RunDirectory(run).events() if event["event"] == "depth_finished"][-1]


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory, shared_ray: Path) -> Path:
    """A whole sweep by one worker."""
    output = tmp_path_factory.mktemp("runs") / "one"
    assert main(arguments(data, output, "--depth.workers", "1")) == 0
    return output


def test_the_table_has_the_schema_and_every_cut(swept: Path) -> None:
    table = pq.read_table(swept / "depth.parquet")
    assert table.schema.equals(DEPTH_SCHEMA)
    rows = table.to_pylist()
    blocks = {(row["start"], row["length"]) for row in rows if row["kind"] == "contiguous"}
    assert blocks == {(start, length) for length in (1, 2, 3) for start in range(5 - length + 1)}
    for metric in ("lm_loss", "winogrande_acc", "winogrande_margin"):
        kinds = [row["kind"] for row in rows if row["metric"] == metric]
        assert (kinds.count("teacher"), kinds.count("contiguous"), kinds.count("one_by_one")) == (1, 12, 3)
    assert all(row["n"] == 40 for row in rows)
    single = {row["start"]: row["value"] for row in rows
              if (row["metric"], row["kind"], row["length"]) == ("lm_loss", "contiguous", 1)}  # fmt: skip
    (chosen,) = (row for row in rows
                 if (row["metric"], row["kind"], row["length"]) == ("lm_loss", "one_by_one", 2))  # fmt: skip
    assert chosen["layers"] == ",".join(map(str, sorted(sorted(single, key=lambda layer: single[layer])[:2])))
    assert json.loads((swept / "depth.json").read_text())["words"]


def test_two_workers_and_streamed_weights_give_the_same_bytes(data: Path, swept: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"
    assert main(arguments(data, output, "--depth.workers", "2", "--depth.weights", "streamed")) == 0
    assert (output / "depth.json").read_bytes() == (swept / "depth.json").read_bytes()
    assert pq.read_table(output / "depth.parquet").equals(pq.read_table(swept / "depth.parquet"))


def test_more_workers_than_chunks_share_a_chunk_and_change_nothing(data: Path, tmp_path: Path) -> None:
    cuts = [sweep.TEACHER, *sweep.blocks([1, 2], 5)]
    few, many = job(data, tmp_path / "few"), job(data, tmp_path / "many")
    for made, workers in ((few, 1), (many, 7)):
        pieces = missing_pieces(made, {TEXT: (cuts, cuts[1:]), CHOICES: (cuts, [])}, workers)
        for piece in pieces:
            keep(made, *compute(made, piece))
        for kind in (TEXT, CHOICES):
            chunks = len(made.chunks(kind))
            assert sum(piece.kind == kind for piece in pieces) == (chunks if workers == 1 else chunks * (7 // chunks))
        assert missing_pieces(made, {TEXT: (cuts, cuts[1:]), CHOICES: (cuts, [])}, 1) == []
    for kind in (TEXT, CHOICES):
        one, other = read(few, kind), read(many, kind)
        assert one.keys() == other.keys()
        for metric, of in one.items():
            assert of.keys() == other[metric].keys()
            assert all(np.array_equal(values, other[metric][cut]) for cut, values in of.items())


def test_what_is_kept_is_for_the_same_content_only(data: Path, tmp_path: Path) -> None:
    made, cuts = job(data, tmp_path), [sweep.TEACHER, (1,)]
    for piece in missing_pieces(made, {TEXT: (cuts, [])}, 1):
        keep(made, *compute(made, piece))
    assert missing_pieces(made, {TEXT: (cuts, [])}, 1) == []
    more = missing_pieces(made, {TEXT: ([*cuts, (2,)], [(1,)])}, 1)
    assert {(piece.cuts, piece.bi_blocks) for piece in more} == {(((2,),), ((1,),))}
    other_windows = made.windows.copy()
    other_windows[-1, -1] += 1
    for changed in (
        {"fingerprint": "g"}, {"precision": "bfloat16"}, {"threads": 2}, {"windows": other_windows[::-1]},
    ):  # fmt: skip
        assert len(missing_pieces(replace(made, **changed), {TEXT: (cuts, [])}, 1)) == len(made.chunks(TEXT))
    # one token of the last window: the other chunks still hold
    assert len(missing_pieces(replace(made, windows=other_windows), {TEXT: (cuts, [])}, 1)) == 1


def test_taylor_is_one_piece_a_chunk_for_all_layers_and_is_kept(data: Path, tmp_path: Path) -> None:
    made, layers = job(data, tmp_path), sweep.blocks([1], 5)
    pieces = missing_pieces(made, {TAYLOR: (layers, [])}, workers=64)
    assert [piece.rows for piece in pieces] == made.chunks(TAYLOR)
    for piece in pieces:
        keep(made, *compute(made, piece))
    assert missing_pieces(made, {TAYLOR: (layers, [])}, workers=64) == []
    found = read(made, TAYLOR)["taylor"]
    assert sorted(found) == layers and all(values.shape == (40,) and (values > 0).all() for values in found.values())
    assert missing_pieces(made, {TEXT: (layers, [])}, 1) != []  # another kind's pieces are no answer


class Here:
    """A pool that computes every piece in this process."""

    def __init__(self, made: Job, workers: int):
        self.job, self.workers, self.computed = made, workers, 0

    def complete(self, wanted: dict[str, Any]) -> None:
        for piece in missing_pieces(self.job, wanted, self.workers):
            keep(self.job, *compute(self.job, piece))
            self.computed += 1


def test_every_metric_is_a_value_of_one_key_and_only_those_asked_are_in_the_table(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth_stage, "_Pool", Here)
    made = job(data, tmp_path / "pieces")
    for metrics in (("angular",), ("taylor",), ("bi", "taylor"), ("lm_loss", "bi", "angular", "taylor")):
        run = RunDirectory(tmp_path / "-".join(metrics))
        run.root.mkdir()
        depth_stage.sweep(made, run, DepthConfig(lengths=(1, 2), metrics=metrics), 1)
        rows = pq.read_table(run.depth).to_pylist()
        assert {row["metric"] for row in rows} == set(metrics)
        of_blocks = [row for row in rows if row["metric"] != "lm_loss"]
        assert all(row["kind"] == "contiguous" and row["n"] == 40 for row in of_blocks)
        found = json.loads(run.depth_recommendation.read_text())
        assert set(found["by_length"]["2"]["best"]) == set(metrics) and found["words"]
        taylor = {row["layers"]: row["value"] for row in rows if row["metric"] == "taylor"}
        for layers, value in taylor.items():
            assert value == pytest.approx(sum(taylor[layer] for layer in layers.split(",")))


def test_a_stopped_sweep_computes_only_what_is_missing(data: Path, swept: Path) -> None:
    before = (swept / "depth.json").read_bytes()
    pieces = sorted((swept / "depth_pieces").iterdir())
    total = last_event(swept)["pieces"]
    assert len(pieces) == total > 3
    times = {path: path.stat().st_mtime_ns for path in pieces[1:]}
    pieces[0].unlink()
    (swept / "depth.json").unlink()
    assert main([*arguments(data, swept, "--depth.workers", "1"), "--resume"]) == 0
    assert last_event(swept)["pieces"] == 1
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (swept / "depth.json").read_bytes() == before


def test_a_length_that_leaves_no_layer_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(data, tmp_path / "run", "--depth.lengths", "5")) == 2
    assert "depth.lengths: 5 of the teacher's 5 layers; valid: at most 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_that_would_fill_a_workers_memory_are_streamed(data: Path, tmp_path: Path) -> None:
    made = job(data, tmp_path, weight_bytes=100)
    assert not _streamed(replace(made, memory_bytes=200.0)) and _streamed(replace(made, memory_bytes=199.0))
    assert _streamed(replace(made, weights="streamed"))
    assert not _streamed(replace(made, weights="resident", memory_bytes=1.0))


def test_seeds_from_a_sweep_that_is_not_there_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeded = ["--stages", "importance,search", "--space.axes.drop_block.seeds", "sweep"]
    assert main(arguments(data, tmp_path / "run", *seeded)) == 2
    assert "space.axes.drop_block.seeds: sweep needs the depth stage" in capsys.readouterr().err


def test_bi_alone_needs_no_suffix_and_has_no_one_by_one_line(data: Path, tmp_path: Path, shared_ray: Path) -> None:
    assert main(arguments(data, tmp_path / "run", "--depth.metrics", "bi")) == 0
    rows = RunDirectory(tmp_path / "run").read_depth()
    assert {(row["metric"], row["kind"]) for row in rows} == {("bi", "contiguous")}


def test_winogrande_alone_still_chooses_one_by_one_by_lm_loss(data: Path, swept: Path, tmp_path: Path) -> None:
    assert main(arguments(data, tmp_path / "run", "--depth.metrics", "winogrande")) == 0
    alone = RunDirectory(tmp_path / "run").read_depth()
    both = [row for row in RunDirectory(swept).read_depth() if row["metric"].startswith("winogrande")]
    assert alone == both


# Kills: of a driver with a process of its own, then of a worker of the sweep that goes on


def until_pieces(run: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(list((run / "depth_pieces").glob("*.npz"))) < count:
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kept(run: Path) -> dict[Path, int]:
    """Every finished piece, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in (run / "depth_pieces").glob("*.npz")}


@pytest.mark.slow
def test_a_killed_driver_and_a_killed_worker_cost_only_the_pieces_they_were_at(
    data: Path, tmp_path: Path, shared_ray: Path
) -> None:
    run = tmp_path / "run"
    asked = arguments(data, run, "--corpus.validation_samples", "160", teacher="slow")
    process = subprocess.Popen([sys.executable, "-m", "minitron_search.run", *asked], cwd=ROOT, start_new_session=True)
    until_pieces(run, 3, process)
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(left, timeout=30)
    before = kept(run)
    assert len(before) >= 3 and not (run / "depth.json").exists()

    at_the_kill: list[dict[Path, int]] = []

    def kill_a_worker() -> None:
        """Behind the first piece of the second driver. Ray calls a worker by its task only while it has one."""
        while len(kept(run)) == len(before) or not kill_child("ray::compute"):
            time.sleep(0.002)
        at_the_kill.append(kept(run))

    in_background(kill_a_worker)
    assert main([*asked, "--resume"]) == 0
    assert at_the_kill, "the sweep ended before a worker could be killed"
    after = kept(run)
    assert after == {**after, **before, **at_the_kill[0]}, "a finished piece was computed again"
    assert last_event(run)["pieces"] == len(after) - len(before) > len(at_the_kill[0]) - len(before)


def test_a_piece_that_is_torn_is_computed_again(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, cuts = job(data, tmp_path), [sweep.TEACHER, (1,)]
    for piece in missing_pieces(made, {TEXT: (cuts, [])}, 1):
        keep(made, *compute(made, piece))
    for torn, content in zip(sorted(tmp_path.glob("*.npz")), (b"", b"PK"), strict=False):
        torn.write_bytes(content)
        assert len(missing_pieces(made, {TEXT: (cuts, [])}, 1)) == 1 and not torn.exists()
        assert f"{torn.name} is made again: cannot be read" in capsys.readouterr().out
        for piece in missing_pieces(made, {TEXT: (cuts, [])}, 1):
            keep(made, *compute(made, piece))
