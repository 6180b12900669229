"""The progress of a run, a pure function of its logs: at every prefix of them no counter goes backwards."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron_search.config.loading import parse_config
from minitron_search.progress.facts import Facts
from minitron_search.progress.follow import Followed
from minitron_search.progress.plan import Plan, plan_of
from minitron_search.progress.state import Progress, progress
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import LocalFiles
from tests.runs import ROOT

OLD = ROOT / "tests" / "fixtures" / "old_run"
Line = tuple[float, str | None, dict[str, Any]]  # time, trial (None: an event), line


def lines_of(run_dir: RunDirectory) -> list[Line]:
    """All lines of a run's logs in the order in which they were written: the lines of a trial from its start to its
    end, spread evenly, where they have no time of their own."""
    events = run_dir.events()
    lines: list[Line] = [(event["time"], None, event) for event in events]
    for folder in sorted((run_dir.root / "trials").iterdir()):
        times = [event["time"] for event in events if event.get("trial") == folder.name]
        first, last = (min(times), max(times)) if times else (events[0]["time"], events[0]["time"])
        metrics = run_dir.metrics(folder.name)
        for number, line in enumerate(metrics, 1):
            lines.append((first + (last - first) * number / (len(metrics) + 1), folder.name, line))
    return sorted(lines, key=lambda line: line[0])


def plan_for(run_dir: RunDirectory) -> Plan:
    return plan_of(parse_config(run_dir.read_config()), 100, 150)


def told(plan: Plan, lines: Iterable[Line], forecast: dict[str, float]) -> Iterator[Progress]:
    """The progress after every line."""
    facts, state = Facts(), None
    for now, trial, line in lines:
        if trial is None:
            facts.event(line)
        else:
            facts.metric(trial, line, now)
        state = progress(plan, facts, forecast, now, state)
        yield state


def forecast_of(run_dir: RunDirectory) -> dict[str, float]:
    return {name: stage["seconds"] for name, stage in run_dir.read_forecast().items()}


def check_never_backwards(states: list[Progress]) -> None:
    for before, after in zip(states, states[1:], strict=False):
        for name in ("share", "tried", "elapsed", "trials"):
            assert getattr(after, name) >= getattr(before, name), (name, before, after)
        for old, new in zip(before.stages, after.stages, strict=True):
            assert new.share >= old.share and new.elapsed >= old.elapsed, (old, new)
    for state in states:
        assert 0 <= state.share <= 1 and all(0 <= stage.share <= 1 for stage in state.stages)
        assert (state.ends_at is None) == (state.left is None)
        assert state.left is None or state.left >= 0
        assert state.over or state.share < 1
        assert state.tried <= state.trials


@pytest.fixture(params=["finished", "interrupted", "whole"])
def run_dir(request: pytest.FixtureRequest) -> RunDirectory:
    if request.param == "whole":
        return RunDirectory(request.getfixturevalue("finished_run"))
    return RunDirectory(OLD / request.param)


@pytest.mark.parametrize("with_forecast", [True, False])
def test_at_every_prefix_no_counter_goes_backwards(run_dir: RunDirectory, with_forecast: bool) -> None:
    lines, plan = lines_of(run_dir), plan_for(run_dir)
    states = list(told(plan, lines, forecast_of(run_dir) if with_forecast else {}))
    check_never_backwards(states)
    if with_forecast:
        assert all(state.ends_at is not None for state in states), "the time of its end is told from the first line"
    assert any(0 < stage.share < 1 for state in states for stage in state.stages if stage.name == "search")
    if run_dir.root.name != "interrupted":
        last = states[-1]
        assert last.over and last.share == 1 and last.left == 0 and last.ends_at == lines[-1][0]
        assert all(stage.share == 1 for stage in last.stages)
        assert last.tried == last.trials == parse_config(run_dir.read_config()).search.trials
        assert not last.running


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_run_that_was_killed_goes_on_from_what_is_there(run_dir: RunDirectory, cut: float) -> None:
    """The second session is told all lines of the first, and then those that came after, an hour later; what ran when
    the first was killed starts again, and repeats some lines of its log."""
    lines, plan, forecast = lines_of(run_dir), plan_for(run_dir), forecast_of(run_dir)
    first, rest = lines[: int(cut * len(lines))], lines[int(cut * len(lines)) :]
    *_, killed = told(plan, first, forecast)
    later = 3600.0
    restart: Line = (first[-1][0] + later, None, {"event": "run_started", "time": first[-1][0] + later, "stages": []})
    again = [(time + later, trial, {**line, "time": time + later}) for time, trial, line in rest]
    repeated = [(restart[0], trial, line) for _, trial, line in first[-5:] if trial]
    states = list(told(plan, [*first, restart, *repeated, *again], forecast))
    check_never_backwards(states)
    resumed = states[len(first)]
    assert resumed.elapsed == pytest.approx(killed.elapsed), "the hour in which nothing ran is no time of the run"
    assert resumed.tried == killed.tried and not resumed.running
    assert resumed.share >= killed.share


def test_a_continued_trial_counts_once() -> None:
    plan, facts = Plan("p", {"search": 100.0}, trials=2), Facts()
    counted = []
    for kind, trial in [("started", "a"), ("finished", "a"), ("started", "b"), ("finished", "b"), ("continued", "a"),
                        ("started", "a"), ("finished", "a")]:  # fmt: skip
        facts.event({"time": 1.0, "event": f"trial_{kind}", "trial": f"search-{trial}"})
        counted.append(progress(plan, facts, {"search": 9.0}, 1.0).tried)
    assert counted == [0, 1, 1, 2, 2, 2, 2]


def test_what_a_restarted_trial_repeats_counts_once() -> None:
    plan, facts = Plan("p", {"search": 100.0}), Facts()
    shares = []
    for now, tokens in enumerate((10, 20, 30, 10, 20, 30, 40)):  # from its last checkpoint
        facts.metric("search-a", {"kind": "step", "tokens": tokens, "tokens_per_second": 1.0}, float(now))
        shares.append(progress(plan, facts, {"search": 9.0}, float(now)).stages[0].share)
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.4])


def test_a_stage_that_is_measured_by_time_does_not_go_back_when_it_is_expected_to_take_longer() -> None:
    plan, facts = Plan("p", {"depth": 1.0}), Facts()
    facts.event({"time": 0.0, "event": "run_started", "stages": []})
    facts.event({"time": 0.0, "event": "stage_started", "stage": "depth"})
    before = progress(plan, facts, {"depth": 10.0}, 5.0)
    after = progress(plan, facts, {"depth": 100.0}, 6.0, before)
    assert before.stages[0].share == 0.5 == after.stages[0].share and after.share == before.share
    assert after.stages[0].left == 94


def test_a_search_that_has_not_begun_to_train_needs_most_of_its_forecast_still() -> None:
    plan, facts = Plan("p", {"search": 1000.0}), Facts()
    facts.event({"time": 0.0, "event": "run_started", "stages": []})
    facts.event({"time": 0.0, "event": "stage_started", "stage": "search"})
    state = progress(plan, facts, {"search": 100.0}, 95.0)
    assert state.stages[0].share == 0 and state.left == 50


def test_the_time_left_follows_what_was_measured() -> None:
    """A search that takes four times as long as its forecast: the forecast of the end comes near the truth, and that of
    the retraining after it grows too. Of a stage that stands still the time left does not come to nothing."""
    plan, facts = Plan("p", {"search": 1000.0, "retrain": 1000.0}, trials=1), Facts()
    facts.event({"time": 0.0, "event": "run_started", "stages": []})
    facts.event({"time": 0.0, "event": "stage_started", "stage": "search"})
    forecast, state = {"search": 100.0, "retrain": 100.0}, None
    lefts = []
    for tokens in range(0, 800, 10):
        now = 0.4 * tokens
        facts.metric("search-a", {"kind": "step", "tokens": tokens, "tokens_per_second": 2.5}, now)
        state = progress(plan, facts, forecast, now, state)
        lefts.append({stage.name: stage.left for stage in state.stages})
    assert lefts[0] == {"search": 100, "retrain": 100}
    assert lefts[-1]["search"] == pytest.approx(0.4 * 200, rel=0.25)
    assert 150 < (lefts[-1]["retrain"] or 0) < 400
    stands = progress(plan, facts, forecast, now + 1000, state)
    assert (stands.left or 0) > 100 and stands.ends_at == now + 1000 + (stands.left or 0)


def test_the_best_are_of_the_highest_rung_by_what_ranks(run_dir: RunDirectory) -> None:
    plan = plan_for(run_dir)
    *_, last = told(plan, lines_of(run_dir), forecast_of(run_dir))
    rows = [row for row in run_dir.rungs() if row["arm"] == "search"]
    highest = max(row["rung"] for row in rows)
    reached = sorted((row for row in rows if row["rung"] == highest), key=lambda row: row["lm_loss"])
    assert [trial.name for trial in last.best] == [row["trial"] for row in reached[:3]]
    assert (last.best[0].loss, last.best[0].error) == (reached[0]["lm_loss"], reached[0]["lm_loss_stderr"])
    by_kl = plan._replace(ranks_by="winogrande_margin", sign=-1)
    *_, last = told(by_kl, lines_of(run_dir), {})
    assert last.best[0].name == max(reached, key=lambda row: row["winogrande_margin"])["trial"]


def test_a_growing_run_is_read_once_and_only_what_was_appended(run_dir: RunDirectory, tmp_path: Path) -> None:
    """Written a part at a time, cut anywhere, and looked at after each: it ends as the whole does."""
    files, plan = CountingFiles(), plan_for(run_dir)
    copy = RunDirectory(tmp_path / "run", files)
    growing = Followed(plan, copy, run_dir.events()[0]["time"])
    copy.write_forecast(run_dir.read_forecast())
    sources = [*sorted((run_dir.root / "trials").glob("*/metrics.jsonl")), run_dir.events_log]
    texts = {copy.root / source.relative_to(run_dir.root): source.read_bytes() for source in sources}
    states, last = [], run_dir.events()[-1]["time"]
    for part in range(20):
        for target, text in texts.items():
            target.parent.mkdir(exist_ok=True, parents=True)
            with open(target, "ab") as file:
                file.write(text[len(text) * part // 20 : len(text) * (part + 1) // 20])
        states.append(growing.now(max((event["time"] for event in RunDirectory(copy.root).events()), default=0.0)))
    *_, whole = told(plan, lines_of(run_dir), forecast_of(run_dir))
    check_never_backwards(states)
    assert (states[-1].tried, states[-1].over, states[-1].best) == (whole.tried, whole.over, whole.best)
    read = files.bytes
    assert 0 < read < 4 * sum(map(len, texts.values())), "lines cut short are read again, and nothing else"
    files.listed = 0
    for _ in range(100):
        growing.now(last)
    assert files.bytes == read and files.listed == 0


class CountingFiles(LocalFiles):
    """Counts the bytes that are read, and the folders that are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.listed = 0

    def read(self, path: Path, offset: int = 0) -> bytes:
        text = super().read(path, offset)
        self.bytes += len(text)
        return text

    def names(self, folder: Path) -> list[str]:
        self.listed += 1
        return super().names(folder)
