"""One palette for every figure: Okabe and Ito (2008), told apart under every common colour blindness.

A figure is drawn in the light colours below; in a dark scheme the page replaces each key of `DARK` by its
value and redraws. A colour that must change with the scheme therefore has to be one of these exact strings.
"""

from typing import Any

import plotly.graph_objects as go

ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"

INK = "#1c2126"
MUTED = "#667079"
GRID = "#e6e8ea"
SURFACE = "#ffffff"
# Light to dark in one hue, so that the order survives in grey; in a dark scheme it runs the other way.
SEQUENTIAL = ("#f3f7fa", "#bcd8ea", "#67a9d0", "#17699f", "#08324f")

DARK = {
    INK: "#e8eaec",
    MUTED: "#98a2ab",
    GRID: "#2e343a",
    SURFACE: "#1a1e22",
    BLUE: "#2b8fd6",
    SEQUENTIAL[0]: "#1f2429",
    SEQUENTIAL[1]: "#15405f",
    SEQUENTIAL[2]: "#1d6fa5",
    SEQUENTIAL[3]: "#6cb2dd",
    SEQUENTIAL[4]: "#e3f1fa",
}

# What a colour and a symbol mean, the same in every figure.
TEACHER = (INK, "star")
UNTRAINED = (PURPLE, "x")
RETRAINED = (GREEN, "diamond")
RANDOM_PRUNED = (VERMILLION, "cross")
RANDOM_INIT = (MUTED, "pentagon")
STATUS = {
    "promoted": (ORANGE, "square"),
    "complete": (BLUE, "circle"),
    "running": (SKY, "circle-open-dot"),
    "stopped": (SKY, "circle-open"),
    "failed": (VERMILLION, "triangle-down"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def new_figure(height: int, **layout: Any) -> go.Figure:
    """Return an empty figure, `height` pixels high, transparent, in the report's type and grid."""
    axis = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "automargin": True,
        "ticks": "",
        "tickfont": {"color": MUTED, "size": 12},
        "title": {"font": {"color": MUTED, "size": 13}, "standoff": 10},
    }
    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(layout={"xaxis": axis, "yaxis": axis}),
        height=height,
        margin={"l": 12, "r": 12, "t": 16, "b": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": INK},
        hoverlabel={
            "bgcolor": SURFACE,
            "bordercolor": MUTED,
            "font": {"color": INK, "size": 12},
            "align": "left",
        },
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": INK},
        legend={
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "xanchor": "left",
            "font": {"size": 12},
            "itemsizing": "constant",
        },
        uirevision="kept",  # a redraw on a change of scheme keeps the reader's zoom
        **layout,
    )
    return figure


def colour_scale() -> list[tuple[float, str]]:
    """Return `SEQUENTIAL` as a Plotly colour scale over 0..1."""
    return [(place / (len(SEQUENTIAL) - 1), colour) for place, colour in enumerate(SEQUENTIAL)]


# Of runs or arms side by side, in the order given; the dashes tell apart what comes after the sixth.
SERIES = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
DASHES = ("solid", "dash", "dot", "dashdot")


def series(place: int) -> tuple[str, str]:
    """Return the colour and dash of the `place`-th of several runs or arms."""
    return SERIES[place % len(SERIES)], DASHES[place // len(SERIES) % len(DASHES)]


def faint(colour: str) -> str:
    """Return a colour to fill a band with."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
