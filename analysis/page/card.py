"""What the page is made of: cards, and the figures on them."""

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go


class Panel(NamedTuple):
    """One figure of a card and the data behind it, which the page offers as `<name>.csv`. columns: how many of the
    card's six it takes; a card with one figure gives it all."""

    name: str
    figure: go.Figure
    data: pd.DataFrame
    heading: str = ""
    columns: int = 3


class Card(NamedTuple):
    """One part of a report. sample: n and units. body: HTML in which every word from the run is escaped. reason: why
    there is nothing more."""

    title: str
    how_to_read: str
    sample: str = ""
    body: str = ""
    panels: tuple[Panel, ...] = ()
    data: tuple[tuple[str, pd.DataFrame], ...] = ()  # downloads that belong to no figure
    reason: str = ""
