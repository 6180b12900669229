"""Sentences about what evidence.json holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minitron_search.evaluation.controls import CONTROL_NAMES
from minitron_search.evaluation.statistics import FEWEST_FOR_TAU, LEVEL
from minitron_search.records.metrics import METRICS
from minitron_search.records.summary import harm_sentences

Entry = Mapping[str, Any]
FLIPS_NAMED = 3  # of a rung's flipped pairs, the widest


def sentences(evidence: Entry) -> Iterable[str]:
    """Yield what `evidence.evidence` found, a sentence at a time."""
    objective, finalists = evidence["objective"], evidence["finalists"]
    at_chance = [METRICS[metric].name for metric, test in (evidence["at_chance"] or {}).items() if test["at_chance"]]
    if at_chance:
        yield (f"{' and '.join(at_chance)} {'is' if len(at_chance) == 1 else 'are'} at chance for this teacher: "
               f"reported, but {'ranks' if len(at_chance) == 1 else 'rank'} nothing.")  # fmt: skip
    yield from harm_sentences(evidence["against_trims"])
    yield from _on_finalists(finalists, objective)
    yield from _on_seeds(finalists, evidence["seeds"], objective)
    yield from (_on_rung(rung, objective) for rung in evidence["rungs"])
    yield from _on_selection(evidence["rungs"])
    for entry in evidence["controls"]:
        if entry["controls"]:
            yield from _on_controls(entry)


def too_few(n: int, tests: int = 1) -> bool:
    """Return whether `tests` paired tests of n values cannot reach the level even if all differences have one sign."""
    return 2 * tests / 2**n >= LEVEL


def _on_finalists(finalists: Sequence[Entry], objective: str) -> Iterable[str]:
    units = f"{METRICS[objective].independent}s"
    key = f"{objective}_against_best"
    tested = [(entry["architecture"], entry[key]) for entry in finalists if key in entry]
    if tested:
        tied = [architecture for architecture, test in tested if test["p_holm"] >= LEVEL]
        names = f": {', '.join(tied)}" if tied else ""
        yield (f"Of {len(tested)} others at the last rung, {len(tested) - len(tied)} differ from "
               f"{finalists[0]['architecture']} in {METRICS[objective].name} on the same {units} (paired, p < {LEVEL} "
               f"after Holm's correction); {len(tied)} do not{names}.")  # fmt: skip
        n = tested[0][1]["n"]
        if too_few(n, len(tested)):
            yield f"{n} {units} are too few to tell {len(tested) + 1} architectures apart, however much they differ."
    elif len(finalists) == 1:
        yield f"One architecture reached the last rung, {finalists[0]['architecture']}, and was compared with none."
    elif finalists:
        yield "The finalists' trials logged no values that could be paired."


def _on_seeds(finalists: Sequence[Entry], spread: Entry | None, objective: str) -> Iterable[str]:
    metric = METRICS[objective]
    if spread:
        yield (f"Seeds of one architecture differ by {spread['sd']:.4f} {metric.unit} in {metric.name} (standard "
               f"deviation, {spread['freedom']} degrees of freedom).")  # fmt: skip
        counts = {entry["seeds"] for entry in finalists}
        if len(counts) > 1:
            yield (f"Finalists have {min(counts)} to {max(counts)} seeds: means are over all of them, tests over those "
                   "that both have.")  # fmt: skip
    elif len(finalists) > 1:
        yield (f"One seed each: the tests know how {metric.independent}s vary, but not how another seed would have "
               "trained.")  # fmt: skip


def _on_rung(rung: Entry, objective: str) -> str:
    return (f"{rung['before']} to {rung['after']}, {rung['n']} architectures: {_kept(rung, objective)}, {_flips(rung)}"
            f"{_shared_top(rung)}{_tau(rung)}.")  # fmt: skip


def _kept(rung: Entry, objective: str) -> str:
    if rung["best_kept"]:
        return "the best stayed the best"
    p = "" if rung["regret_p"] is None else f" (p {rung['regret_p']:.2g})"
    regret = f"{rung['regret']:.4f} {METRICS[objective].unit}"
    return f"the best changed, and the first choice, {rung['chosen']}, is {regret} worse there than {rung['best']}{p}"


def _flips(rung: Entry) -> str:
    flips = len(rung["flips"])
    named = "; ".join(" and ".join(pair) for pair in rung["flips"][:FLIPS_NAMED])
    named = f" ({named}{'; ...' if flips > FLIPS_NAMED else ''})" if flips else ""
    return f"{flips} {'pair' if flips == 1 else 'pairs'} of {rung['n'] * (rung['n'] - 1) // 2} flipped{named}"


def _shared_top(rung: Entry) -> str:
    return "".join(
        f", {top['shared']} of its first {top['k']} stayed there ({top['by_chance']:.1f} by chance)"
        for top in rung["top"][-1:] if top["k"] > 1
    )  # fmt: skip


def _tau(rung: Entry) -> str:
    if rung["kendall"] is None:
        return ""
    interval = rung["kendall_interval"]
    known = f"n < {FEWEST_FOR_TAU}, too few for an interval"
    if interval:
        known = f"95% {interval[0]:.2f} to {interval[1]:.2f}"
    return f", Kendall's tau {rung['kendall']:.2f} (p {rung['kendall_p']:.2g}; {known})"


def _on_selection(rungs: Sequence[Entry]) -> Iterable[str]:
    cut = [f"{rung['n']} of {rung['before_n']} from {rung['before']}" for rung in rungs if rung["n"] < rung["before_n"]]
    if cut:
        yield (f"Only what a rung let go on is ranked again ({', '.join(cut)}): survivors are alike, so their ranks "
               "correlate less than those of all would.")  # fmt: skip


def _on_controls(entry: Entry) -> Iterable[str]:
    candidate = entry["candidate"]
    parts, mixed = [], []
    for control in entry["controls"]:
        test = control["against_candidate"].get("lm_loss")
        if test is None:
            continue
        parts.append(_against_control(control["arm"], test))
        if control["precision"] != candidate["precision"]:
            mixed.append(f"{CONTROL_NAMES[control['arm']]} in {control['precision']}")
    if parts:
        yield (f"{entry['architecture']} after {candidate['tokens']:,} tokens, LM loss {candidate['lm_loss']:.3f}: "
               f"{', '.join(parts)}.")  # fmt: skip
    if mixed:
        yield (f"{entry['architecture']} was scored in {candidate['precision']}, {' and '.join(mixed)}: those "
               "differences include that between the precisions.")  # fmt: skip


def _against_control(arm: str, test: Entry) -> str:
    """Say where the candidate's LM loss lies: `0.300 below random pruning of the same shape (95% 0.270 to 0.330)`."""
    where, low, high = "below", test["low"], test["high"]
    if test["difference"] <= 0:
        where, low, high = "above", -high, -low
    doubt = ""
    if test["p"] >= LEVEL:
        few = too_few(test["n"])
        doubt = f", n = {test['n']}: too few" if few else f", not significantly different: p {test['p']:.2g}"
    return f"{abs(test['difference']):.3f} {where} {CONTROL_NAMES[arm]} (95% {low:.3f} to {high:.3f}{doubt})"
