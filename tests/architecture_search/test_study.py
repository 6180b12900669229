"""The study on disk: what Optuna reads there, and that a reader never sees half of it."""

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from minitron_search.architecture_search import study as module
from minitron_search.architecture_search.samplers import Observation
from minitron_search.architecture_search.study import LiveStudy
from tests.architecture_search.test_samplers import observe, searched, space

ONE, TWO = ("lm_loss",), ("winogrande_margin", "params")
STATES = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "running": TrialState.RUNNING,
          "failed": TrialState.FAIL}  # fmt: skip


def load(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="a search", storage=f"sqlite:///{folder / 'study.db'}")


def live(folder: Path, tested: Any, objectives: tuple[str, ...] = ONE) -> LiveStudy:
    return LiveStudy(folder / "study.db", "a search", tested, objectives)


def of(study: optuna.Study) -> list[tuple]:
    """All that a trial says but when."""
    return [(t.number, t.state, t.values, t.params, t.distributions, t.user_attrs, t.intermediate_values, t.constraints)
            for t in study.trials]  # fmt: skip


def test_the_study_opens_and_says_what_was_observed(tmp_path: Path) -> None:
    tested = space(anchors=[{"hidden_size": 9}, {}])  # no multiple of 4; and the whole teacher, outside the budget
    observed = [replace(o, seeds=(0, 1)) for o in searched(tested, 15)]
    live(tmp_path, tested).write(observed)
    study = load(tmp_path)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE and study.metric_names == ["lm_loss"]
    assert len(study.trials) == 15 and len({trial.state for trial in study.trials}) == 4
    for trial, observation in zip(study.trials, observed, strict=True):
        assert trial.state == STATES[observation.state]
        assert trial.intermediate_values == dict(enumerate(observation.values))
        assert trial.value == (observation.values[-1] if observation.state == "complete" else None)
        coordinates, measures = tested.coordinates(observation.architecture), tested.measures(observation.architecture)
        assert trial.user_attrs == {
            "architecture": observation.architecture.id, **coordinates, "params": measures.params,
            "non_embedding_params": measures.non_embedding_params, "memory_bytes": measures.memory_bytes,
            "seeds": [0, 1],
        }  # fmt: skip
        assert trial.params.items() <= coordinates.items()
        assert ("drop_block_start" in trial.params) is (coordinates["drop_block_length"] > 0)
        assert trial.params["hidden_size"] == observation.architecture.hidden_size
        assert list(trial.constraints) == ["params"]
        assert (trial.constraints["params"] <= 0) is (abs(measures.params - 12_000) <= 0.6 * 12_000)
    assert study.trials[1].constraints["params"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_the_best_is_within_the_budget_and_at_full_tokens(tmp_path: Path) -> None:
    tested = space(tolerance=0.3, anchors=[{}])
    first, second, third = list(tested.architectures())[:3]
    live(tmp_path, tested).write(
        [
            Observation(tested.anchors[0], (0.2, 0.1), "complete"),  # the least of all, outside the budget
            Observation(first, (5.0, 4.0), "complete"),
            Observation(second, (1.0,), "stopped"),  # less, at fewer tokens
            Observation(third, (0.5,), "running"),
        ]
    )
    assert [trial.number for trial in load(tmp_path).best_trials] == [1] and load(tmp_path).best_value == 4.0


def test_several_objectives_have_names_directions_and_a_front(tmp_path: Path) -> None:
    tested = space()
    made = list(tested.architectures())[:5]
    values = [(-0.5, 900.0), (-0.1, 500.0), (-0.2, 950.0)]  # a margin is minimised with its sign turned
    observed = [Observation(a, (0.0, v[0]), "complete", ((v[1],),) * 2) for a, v in zip(made, values, strict=False)]
    observed += [Observation(made[3], (-9.0,), "stopped", ((1.0,),)), Observation(made[4], (), "running")]
    live(tmp_path, tested, TWO).write(observed)
    study = load(tmp_path)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == list(TWO)
    assert [trial.number for trial in study.best_trials] == [0, 1]
    assert study.trials[0].values == [0.5, 900.0]
    pruned = study.trials[3]
    assert pruned.state == TrialState.PRUNED and pruned.values is None and pruned.intermediate_values == {}
    assert pruned.user_attrs["rungs"] == [{"winogrande_margin": 9.0, "params": 1.0}]
    # Optuna's own samplers go on from it
    study.sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=0)
    assert study.ask(study.trials[0].distributions).params


@pytest.mark.parametrize("objectives", [ONE, TWO])
def test_what_was_brought_up_to_date_is_what_is_written_at_once(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    """Over a search in which trials end out of turn, one that was stopped goes on, and seeds join."""
    tested = space()
    several = len(objectives) > 1
    final = searched(tested, 9, several=several)
    kept = live(tmp_path, tested, objectives)
    observed: list[Observation] = []
    for turn, observation in enumerate(final):
        observed.append(replace(observation, state="running", values=(), others=()))
        if turn >= 2:
            observed[turn - 2] = replace(final[turn - 2], seeds=(0,))
        kept.write(observed)
    (tmp_path / "again").mkdir()
    live(tmp_path / "again", tested, objectives).write(observed)
    assert of(load(tmp_path)) == of(load(tmp_path / "again"))
    stopped = next(index for index, o in enumerate(observed) if o.state == "stopped")
    for state in ("running", "complete"):
        old = observed[stopped]
        values = (*old.values[:1], 0.25) if state == "complete" else old.values
        observed[stopped] = replace(old, state=state, values=values, others=old.others[:1] * len(values))
        kept.write(observed)
        assert load(tmp_path).trials[stopped].state == STATES[state]
    live(tmp_path / "again", tested, objectives).write(observed)
    assert of(load(tmp_path)) == of(load(tmp_path / "again"))


def test_one_that_has_the_file_open_sees_the_new_trials(tmp_path: Path) -> None:
    """A file that is renamed into place would leave it with the old one for ever."""
    tested = space()
    observed = searched(tested, 8)
    kept = live(tmp_path, tested)
    kept.write([])
    study = load(tmp_path)
    assert study.trials == []
    for count in (3, 8):
        kept.write(observed[:count])
        assert len(study.trials) == count


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    tested = space()
    architectures = list(tested.architectures())[:6]
    kept = live(tmp_path, tested)
    kept.write([])
    seen, done, problems = set(), threading.Event(), []

    def read() -> None:
        connection = sqlite3.connect(tmp_path / "study.db", timeout=10)
        while not done.is_set():
            try:
                with connection:  # every trial of a state has as many attributes as any other
                    connection.execute("BEGIN")
                    trials = connection.execute("SELECT count(*) FROM trials").fetchone()[0]
                    attributes = connection.execute(
                        "SELECT count(*) FROM trial_user_attributes WHERE key = 'architecture'"
                    ).fetchone()[0]
                seen.add(trials)
                if trials != attributes:
                    problems.append((trials, attributes))
            except sqlite3.Error as error:
                problems.append(error)
        connection.close()

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(4):
        for count in (6, 0, 3):
            kept.write([observe(a, turn) for turn, a in enumerate(architectures[:count])])
    done.set()
    reader.join()
    assert not problems and len(seen) > 1


def test_a_reader_that_does_not_let_go_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    monkeypatch.setattr(module, "SHARE", 1.0)
    tested = space()
    observed = searched(tested, 4)
    kept = live(tmp_path, tested)
    assert kept.refresh(observed[:1])
    reader = sqlite3.connect(tmp_path / "study.db")
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM trials").fetchone() == (1,)
    assert kept.refresh(observed) is False
    with pytest.raises(TimeoutError, match=r"study.db: a reader did not let go of it within 0.1 s"):
        kept.write(observed)
    assert reader.execute("SELECT count(*) FROM trials").fetchone() == (1,)
    reader.close()
    assert kept.refresh(observed) and len(load(tmp_path).trials) == 4


def test_refreshes_take_their_share_of_the_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    tested = space()
    kept = live(tmp_path, tested)
    written = []

    def slowly(observed: Any) -> None:
        written.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(kept, "write", slowly)
    assert kept.refresh([])
    while now[0] < 1100:
        now[0] += 0.5
        kept.refresh([])
    assert 2.0 * len(written) <= module.SHARE * 1000 + 2.0 and len(written) > 5
    assert kept.refresh([], at_once=True) and not kept.refresh([])  # a search that ends does not wait


def test_what_was_cut_off_before_its_first_write_is_written_over(tmp_path: Path) -> None:
    tested = space()
    (tmp_path / "study.db").write_bytes(b"")
    live(tmp_path, tested).write(searched(tested, 6))
    assert len(load(tmp_path).trials) == 6
