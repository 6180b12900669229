"""evidence.json in sentences."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minitron_search.evaluation.controls import NAMES as CONTROLS
from minitron_search.evaluation.statistics import FEWEST_FOR_TAU, LEVEL

Found = Mapping[str, Any]
NAMES = {
    "lm_loss": ("LM loss", "nats per token", "windows"),
    "kl": ("KL", "nats per token", "windows"),
    "winogrande_margin": ("Winogrande margin", "nats", "questions"),
    "winogrande_acc": ("Winogrande accuracy", "of 1", "questions"),
}
NAMED = 3  # flips of a rung, the widest


def words(found: Found) -> Iterable[str]:
    """Sentences for what `evidence.evidence` found."""
    objective, finalists = found["objective"], found["finalists"]
    at_chance = [NAMES[metric][0] for metric, of in (found["at_chance"] or {}).items() if of["at_chance"]]
    if at_chance:
        yield (f"{' and '.join(at_chance)} {'is' if len(at_chance) == 1 else 'are'} at chance for this teacher: "
               f"reported, and {'ranks' if len(at_chance) == 1 else 'rank'} nothing.")  # fmt: skip
    yield from _of_finalists(finalists, objective)
    yield from _of_seeds(finalists, found["seeds"], objective)
    yield from (_of_rung(of, objective) for of in found["rungs"])
    yield from _of_choice(found["rungs"])
    for of in found["controls"]:
        if of["controls"]:
            yield from _of_controls(of)


def too_few(n: int, tests: int = 1) -> bool:
    """Whether `tests` paired tests of n values cannot reach the level, all differences having one sign."""
    return 2 * tests / 2**n >= LEVEL


def _of_finalists(finalists: Sequence[Found], objective: str) -> Iterable[str]:
    name, _, units = NAMES[objective]
    key = f"{objective}_against_best"
    tested = [(about["architecture"], about[key]) for about in finalists if key in about]
    if tested:
        tied = [architecture for architecture, test in tested if test["p_holm"] >= LEVEL]
        names = f": {', '.join(tied)}" if tied else ""
        yield (f"Of {len(tested)} others at the last rung, {len(tested) - len(tied)} differ from "
               f"{finalists[0]['architecture']} in {name} on the same {units} (paired, p < {LEVEL} after Holm's "
               f"correction); {len(tied)} do not{names}.")  # fmt: skip
        n = tested[0][1]["n"]
        if too_few(n, len(tested)):
            yield f"{n} {units} are too few to tell {len(tested) + 1} architectures apart, however they differ."
    elif len(finalists) == 1:
        yield f"One architecture reached the last rung: {finalists[0]['architecture']} was compared with none there."
    elif finalists:
        yield "The finalists' trials logged no values to be paired."


def _of_seeds(finalists: Sequence[Found], spread: Found | None, objective: str) -> Iterable[str]:
    name, unit, units = NAMES[objective]
    if spread:
        yield (f"Seeds of one architecture scatter by {spread['sd']:.4f} {unit} of {name} (standard deviation, "
               f"{spread['freedom']} degrees of freedom).")  # fmt: skip
        counts = {about["seeds"] for about in finalists}
        if len(counts) > 1:
            yield (f"Finalists have {min(counts)} to {max(counts)} seeds: means are over all of them, tests over those "
                   "that both have.")  # fmt: skip
    elif len(finalists) > 1:
        yield f"One seed each: tests know how {units} scatter, and not how another seed would have trained."


def _of_rung(of: Found, objective: str) -> str:
    tau = ""
    if of["kendall"] is not None:
        sure = of["kendall_interval"]
        known = f"95% {sure[0]:.2f} to {sure[1]:.2f}" if sure else f"n < {FEWEST_FOR_TAU}, too few for an interval"
        tau = f", Kendall's tau {of['kendall']:.2f} (p {of['kendall_p']:.2g}; {known})"
    kept = "the best stayed the best"
    if not of["best_kept"]:
        p = "" if of["regret_p"] is None else f" (p {of['regret_p']:.2g})"
        kept = (f"the best changed, and the first choice, {of['chosen']}, is {of['regret']:.4f} {NAMES[objective][1]} "
                f"worse there than {of['best']}{p}")  # fmt: skip
    flips = len(of["flips"])
    named = "; ".join(" and ".join(pair) for pair in of["flips"][:NAMED])
    named = f" ({named}{'; ...' if flips > NAMED else ''})" if flips else ""
    top = "".join(
        f", {top['shared']} of its first {top['k']} stayed there ({top['by_chance']:.1f} by chance)"
        for top in of["top"][-1:] if top["k"] > 1
    )  # fmt: skip
    pairs = f"{flips} {'pair' if flips == 1 else 'pairs'} of {of['n'] * (of['n'] - 1) // 2} flipped{named}"
    return f"{of['before']} to {of['after']}, {of['n']} architectures: {kept}, {pairs}{top}{tau}."


def _of_choice(rungs: Sequence[Found]) -> Iterable[str]:
    cut = [f"{of['n']} of {of['before_n']} from {of['before']}" for of in rungs if of["n"] < of["before_n"]]
    if cut:
        yield (f"Only what a rung let go on is ranked again ({', '.join(cut)}): among survivors, which are alike, "
               "ranks correlate less than among all.")  # fmt: skip


def _of_controls(of: Found) -> Iterable[str]:
    candidate = of["candidate"]
    parts, mixed = [], []
    for control in of["controls"]:
        test = control["against_candidate"].get("lm_loss")
        if test is None:
            continue
        where = "below" if test["difference"] > 0 else "above"
        apart = f"{test['low']:.3f} to {test['high']:.3f}"
        if where == "above":
            apart = f"{-test['high']:.3f} to {-test['low']:.3f}"
        told = ""
        if test["p"] >= LEVEL:
            told = f", not told apart: p {test['p']:.2g}" if not too_few(test["n"]) else f", n = {test['n']}: too few"
        parts.append(f"{abs(test['difference']):.3f} {where} {CONTROLS[control['arm']]} (95% {apart}{told})")
        if control["precision"] != candidate["precision"]:
            mixed.append(f"{CONTROLS[control['arm']]} in {control['precision']}")
    if parts:
        yield (f"{of['architecture']} after {candidate['tokens']:,} tokens, LM loss {candidate['lm_loss']:.3f}: "
               f"{', '.join(parts)}.")  # fmt: skip
    if mixed:
        yield (f"{of['architecture']} was scored in {candidate['precision']}, {' and '.join(mixed)}: those differences "
               "hold that of the precisions too.")  # fmt: skip
