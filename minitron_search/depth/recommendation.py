"""Recommend which block to drop, by each metric, how certain that is, and where the metrics disagree: depth.json.

Certainty is a paired test: two cuts are scored on the same windows (or Winogrande examples), so what is tested is the
mean of their differences, by Fisher's randomisation: under "no difference" each difference is as likely to have the
other sign. No distribution is assumed, which matters for a handful of windows and for accuracies.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minitron_search.depth.sweep import OF_BLOCKS, TEACHER, Cut, Values, block
from minitron_search.evaluation.statistics import LEVEL, chance_bar, mean_and_error, paired
from minitron_search.records.metrics import METRICS

RANKING = (
    "lm_loss",
    "winogrande_margin",
    "bi",
    "angular",
    "taylor",
)  # what decides where accuracy does not: the first measured


def recommendation(values: Values, lengths: Sequence[int], depth: int, sets: Mapping[int, Cut]) -> dict[str, Any]:
    """Return what depth.json holds.

    metrics -> the teacher's value; at_chance: whether the teacher's Winogrande accuracy is at chance (null where it
    was not measured); by_length -> per metric the best block, its runner-up and the paired test between them, the
    one-by-one set against the best block, the block that is recommended and by which metric; words: all in sentences.
    """
    at_chance = None
    if "winogrande_acc" in values:
        correct = values["winogrande_acc"][TEACHER]
        at_chance = bool(correct.mean() <= chance_bar(len(correct)))
    by_length = {str(length): _of_length(values, length, depth, sets.get(length), at_chance) for length in lengths}
    return {
        "teacher": {metric: _described(of[TEACHER], TEACHER) for metric, of in values.items() if TEACHER in of},
        "at_chance": at_chance,
        "by_length": by_length,
        "words": [*_warnings(values, at_chance), *(line for of in by_length.values() for line in of["words"])],
    }


def best_blocks(depth_json: Mapping[str, Any], objective: str) -> dict[int, int]:
    """Return length -> start of the best block for a search's `objective`, from what depth.json holds."""
    metric = "winogrande_margin" if objective == "winogrande_margin" else "lm_loss"
    of_lengths = depth_json["by_length"].items()
    return {int(length): of["best"][metric]["start"] for length, of in of_lengths if metric in of["best"]}


def _of_length(
    values: Values, length: int, depth: int, one_by_one: Cut | None, at_chance: bool | None
) -> dict[str, Any]:
    best: dict[str, Any] = {}
    against_set: dict[str, Any] = {}
    for metric, of in values.items():
        sign = METRICS[metric].sign
        cuts = [cut for start in range(depth - length + 1) if (cut := block(start, length)) in of]
        order = sorted(cuts, key=lambda cut: (sign * of[cut].mean(), cut))
        if not order:
            continue
        best[metric] = _described(of[order[0]], order[0])
        if len(order) > 1:
            test = paired(sign * of[order[0]], sign * of[order[1]])
            best[metric] |= {"runner_up": _described(of[order[1]], order[1]), "against_runner_up": test}
        if one_by_one in of and metric not in OF_BLOCKS and length > 1:
            # positive where the block is better
            test = paired(sign * of[order[0]], sign * of[one_by_one])
            against_set[metric] = {**_described(of[one_by_one], one_by_one), "against_best_block": test}
    trusted = "winogrande_acc" in best and not at_chance
    by = "winogrande_acc" if trusted else next((m for m in RANKING if m in best), None)
    starts = {metric: of["start"] for metric, of in best.items() if metric != "winogrande_acc" or trusted}
    summary = {
        "best": best,
        "one_by_one": against_set,
        "recommended": by and {"by": by, **{key: best[by][key] for key in ("start", "length", "layers")}},
        "agree": len(set(starts.values())) <= 1,
    }
    return {**summary, "words": _words(length, summary, starts, trusted)}


def _described(of_cut: np.ndarray, cut: Cut) -> dict[str, Any]:
    mean, stderr, n = mean_and_error(of_cut)
    place = {"start": cut[0] if cut else 0, "length": len(cut), "layers": list(cut)}
    return {**place, "value": mean, "stderr": stderr, "n": n}


def _words(length: int, summary: dict[str, Any], starts: Mapping[str, int], trusted: bool) -> list[str]:
    layers = "1 layer" if length == 1 else f"{length} layers"
    lines = []
    for metric, best in summary["best"].items():
        if metric == "winogrande_acc" and not trusted:
            continue
        value = f"{_plus_minus(best)} {METRICS[metric].unit}".rstrip()
        text = f"{layers}, by {METRICS[metric].name}: drop {_range(best)} ({value}, n = {best['n']})"
        if "runner_up" in best:
            test = best["against_runner_up"]
            certain = "told apart from" if test["p"] < LEVEL else "not told apart from"
            text += (f"; {certain} the runner-up, {_range(best['runner_up'])} "
                     f"(difference {_plus_minus(test, 'difference')}, p = {test['p']:.2g})")  # fmt: skip
        lines.append(text + ".")
    for metric, of_set in summary["one_by_one"].items():
        if metric == "winogrande_acc" and not trusted:
            continue
        test = of_set["against_best_block"]
        which = "worse than" if test["difference"] > 0 else "better than"
        if test["p"] >= LEVEL:
            which = "not told apart from"
        lines.append(f"{layers} chosen one by one ({_list(of_set['layers'])}): {METRICS[metric].name} "
                     f"{_plus_minus(of_set)}, {which} the best block (difference "
                     f"{_plus_minus(test, 'difference')}, p = {test['p']:.2g}, n = {test['n']}).")  # fmt: skip
    if not summary["agree"]:
        says = ", ".join(f"{METRICS[metric].name} at layer {start}" for metric, start in starts.items())
        lines.append(f"{layers}: the metrics disagree on where the block starts: {says}.")
    if summary["recommended"]:
        chosen = summary["recommended"]
        lines.append(f"{layers}: drop {_range(chosen)}, by {METRICS[chosen['by']].name}.")
    return lines


def _warnings(values: Values, at_chance: bool | None) -> list[str]:
    if not at_chance:
        return []
    mean, stderr, n = mean_and_error(values["winogrande_acc"][TEACHER])
    return [f"Winogrande is at chance for this teacher (accuracy {mean:.3f} +- {stderr:.3f}, n = {n}): its accuracy "
            "ranks nothing here. Look at LM loss, and at the margin, which is denser."]  # fmt: skip


def _range(cut: Mapping[str, Any]) -> str:
    first, last = cut["start"], cut["start"] + cut["length"] - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _list(layers: Sequence[int]) -> str:
    return "layers " + ", ".join(map(str, layers))


def _plus_minus(of: Mapping[str, Any], key: str = "value") -> str:
    return f"{of[key]:.4f} +- {of['stderr']:.4f}"
