"""The report of every moment of a run: what is there is shown, and what is not yet there says so."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.page.page import section
from analysis.run_cards import CARDS, make_cards
from analysis.run_data import load_run
from minitron_search.records.directory import RunDirectory

OLD = Path(__file__).parents[1] / "fixtures" / "old_run" / "finished"
# What a run has once a stage has ended
MADE = {
    "importance": ("importance.safetensors",),
    "depth": ("depth.parquet", "depth.json"),
    "search": ("evidence.json",),
    "retrain": ("best", "generations.json"),
}
ALWAYS = ("config.yaml", "environment.json", "forecast.json")


class Balanced(HTMLParser):
    """Raises where a tag is closed that is not open."""

    EMPTY = ("br", "input", "img", "hr", "meta")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def at_moment(folder: Path, count: int) -> RunDirectory:
    """The run as it was after its first `count` events."""
    lines = (OLD / "events.jsonl").read_text().splitlines(keepends=True)[:count]
    events = [json.loads(line) for line in lines]
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(lines))
    ended = {event["stage"] for event in events if event["event"] == "stage_finished"}
    for name in (*ALWAYS, *(name for stage in MADE if stage in ended for name in MADE[stage])):
        if (OLD / name).is_dir():
            shutil.copytree(OLD / name, folder / name)
        elif (OLD / name).exists():
            shutil.copy(OLD / name, folder / name)
    rows = pq.read_table(OLD / "trials.parquet").to_pylist()
    reached = {(event["trial"], event["rung"]) for event in events if event["event"] == "rung_finished"}
    started = {event["trial"] for event in events if event["event"] == "trial_started"}
    whole = {event["trial"] for event in events if event["event"] == "trial_finished"}
    for row in rows:  # of what runs beside the search no event says when it reached a rung
        if (row["trial"] in whole and row["arm"] == "retrained") or (row["arm"] == "teacher" and "teacher" in ended):
            started.add(row["trial"])
            reached.add((row["trial"], row["rung"]))
    table = [row for row in rows if (row["trial"], row["rung"]) in reached]
    if "search" in ended:
        pq.write_table(pa.Table.from_pylist(table, pq.read_schema(OLD / "trials.parquet")), folder / "trials.parquet")
    for trial in started:
        shutil.copytree(OLD / "trials" / trial, folder / "trials" / trial)
        log = folder / "trials" / trial / "metrics.jsonl"
        kept = [
            line
            for line in log.read_text().splitlines(keepends=True)
            if json.loads(line).get("rung", -1) <= max((rung for of, rung in reached if of == trial), default=-1)
        ]
        log.write_text("".join(kept))
    return RunDirectory(folder)


def test_the_report_of_every_moment_is_whole(tmp_path: Path) -> None:
    total = len((OLD / "events.jsonl").read_text().splitlines())
    filled: list[set[str]] = []
    for count in range(1, total + 1):
        cards = make_cards(load_run(at_moment(tmp_path / str(count), count)))
        assert len(cards) == len(CARDS)
        for card in cards:
            assert "could not be made" not in card.reason, f"{count} events: {card.title}: {card.reason}"
            Balanced(section("card", card))
            for panel in card.panels:
                axes = [axis for name, axis in panel.figure.to_dict()["layout"].items() if name[1:5] == "axis"]
                assert not axes or any(axis.get("title", {}).get("text") or axis.get("ticktext") for axis in axes), (
                    f"{count}: {panel.name} has no label"
                )
        filled.append({card.title for card in cards if not card.reason})
    assert "Summary" not in filled[0] and filled[-1] >= {"Summary", "Shape", "Depth", "Importance", "Trials"}
    for before, after in zip(filled, filled[1:], strict=False):
        assert before <= after, f"a card that was filled is empty again: {before - after}"
