"""The report's cards, in order. To add one, write a function of a run (analysis/cards/) and put it in `CARDS`."""

from collections.abc import Callable, Mapping
from typing import Any

from analysis.cards.configuration import configuration_card
from analysis.cards.convergence import convergence_card
from analysis.cards.depth import depth_card
from analysis.cards.evidence import agreement_card, evidence_card
from analysis.cards.health import health_card
from analysis.cards.importance import importance_card
from analysis.cards.pareto import pareto_card
from analysis.cards.search_axes import axes_card
from analysis.cards.spend import spend_card
from analysis.cards.trials_table import trials_card
from analysis.outcome.benchmark_tables import tables_card
from analysis.outcome.generations import generations_card
from analysis.outcome.shape import shape_card
from analysis.outcome.summary import summary_card
from analysis.page.card import Card
from analysis.run_data import RunData

CARDS: dict[str, Callable[[RunData], Card]] = {
    "summary": summary_card,
    "shape": shape_card,
    "generations": generations_card,
    "pareto": pareto_card,
    "convergence": convergence_card,
    "depth": depth_card,
    "importance": importance_card,
    "axes": axes_card,
    "evidence": evidence_card,
    "tables": tables_card,
    "agreement": agreement_card,
    "spend": spend_card,
    "health": health_card,
    "trials": trials_card,
    "configuration": configuration_card,
}


def make_cards(run: RunData) -> list[Card]:
    """Return every card of a run's report."""
    return draw(CARDS, run)


def draw(cards: Mapping[str, Callable[[Any], Card]], subject: Any) -> list[Card]:
    """Return every card of `subject`: a run, several runs or an ablation.

    A card that fails says so in its place, because a report with a hole beats no report.
    """
    drawn = []
    for name, make_card in cards.items():
        try:
            drawn.append(make_card(subject))
        except Exception as error:
            title = name.replace("_", " ").capitalize()
            drawn.append(Card(title, "", reason=f"This card could not be made: {type(error).__name__}: {error}"))
    return drawn
