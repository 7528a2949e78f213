"""The curves of a run as plotly figures; colours of text and grid come from the page, so that both themes work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.reporting.facts import Curve, Prediction, RunSummary

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Colours that people with colour blindness can tell apart on white and on black (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"

# Points of one line: about two per pixel of the widest chart.
MOST_POINTS = 2000
# A curve is drawn smoothed over this share of its steps once it has enough points to be noisy.
SMOOTHED_SHARE, SMOOTHED_FROM = 1 / 25, 60
# A gradient norm that spans more than this factor is drawn on a logarithmic axis.
LOGARITHMIC_FROM = 50.0


def figures(summary: RunSummary) -> dict[str, Figure]:
    """One figure per quantity that the run recorded, by title."""
    curves = summary.curves
    found = {"Loss": _loss(summary)} if {"loss", "eval_loss"} & curves.keys() else {}
    for title, name, colour in (
        ("Learning rate", "learning_rate", GREEN),
        ("Gradient norm", "grad_norm", ORANGE),
        ("Tokens per second", "tokens_per_second", BLUE),
        ("Memory in use (GiB)", "memory_bytes", GREEN),
    ):
        if name in curves:
            found[title] = _single(title, curves[name], colour, scale=2**-30 if name == "memory_bytes" else 1.0)
            if name == "memory_bytes":
                _draw_predictions(found[title], summary.predictions)
    return found


def to_html(figure: Figure, div_id: str) -> str:
    """A figure as a fragment that expects plotly.js in the page."""
    config = {"displaylogo": False, "displayModeBar": False, "responsive": True}
    options: Mapping[str, Any] = {"full_html": False, "include_plotlyjs": False, "config": config, "div_id": div_id}
    fragment: str = figure.to_html(**options)
    return fragment


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most ``most`` points that keep the lowest and the highest value of every stretch, so that spikes stay."""
    count = len(curve.steps)
    if count <= most:
        return curve
    size = math.ceil(count / (most // 2))
    kept: list[int] = []
    for start in range(0, count, size):
        stretch = range(start, min(start + size, count))
        ordered = sorted(stretch, key=lambda i: (curve.values[i] if math.isfinite(curve.values[i]) else math.inf, i))
        kept += sorted({ordered[0], ordered[-1]})
    return Curve(steps=tuple(curve.steps[i] for i in kept), values=tuple(curve.values[i] for i in kept))


def smooth(curve: Curve) -> Curve:
    """An exponential moving average; non-finite values are passed over."""
    weight = 2 / (len(curve.values) * SMOOTHED_SHARE + 1)
    average: float | None = None
    values = []
    for value in curve.values:
        if math.isfinite(value):
            average = value if average is None else average + weight * (value - average)
        values.append(math.nan if average is None else average)
    return Curve(steps=curve.steps, values=tuple(values))


def _loss(summary: RunSummary) -> Figure:
    figure = _empty("Loss")
    if train := summary.curves.get("loss"):
        noisy = len(train.values) >= SMOOTHED_FROM
        _draw(figure, train, "training", BLUE, opacity=0.3 if noisy else 1.0)
        if noisy:
            _draw(figure, smooth(train), "training, smoothed", BLUE)
    if held_out := summary.curves.get("eval_loss"):
        _draw(figure, held_out, "held-out", RED, mode="lines+markers")
    for step in sorted({event.step for event in summary.happenings if event.event in ("incident", "recovery")}):
        figure.add_vline(x=step, line={"color": ORANGE, "width": 1, "dash": "dot"})
    figure.update_layout(showlegend=len(figure.data) > 1)
    return figure


def _single(title: str, curve: Curve, colour: str, *, scale: float) -> Figure:
    figure = _empty(title)
    scaled = Curve(steps=curve.steps, values=tuple(value * scale for value in curve.values))
    _draw(figure, scaled, title, colour)
    positive = [value for value in scaled.values if math.isfinite(value) and value > 0]
    if title == "Gradient norm" and positive and max(positive) > LOGARITHMIC_FROM * min(positive):
        figure.update_yaxes(type="log")
    else:
        figure.update_yaxes(rangemode="tozero")
    return figure


def _draw_predictions(figure: Figure, predictions: Sequence[Prediction]) -> None:
    """Horizontal lines at the predicted peak of memory."""
    peak = next((item for item in predictions if item.unit == "bytes"), None)
    if peak is None:
        return
    lines = [
        ("first plan" if peak.probed else "predicted", peak.predicted, "dot"),
        ("after the probe", peak.probed, "dash"),
    ]
    for index, (name, size, dash) in enumerate(lines):
        if size:
            place = "bottom left" if index else "top left"
            style: Mapping[str, Any] = {"annotation_text": name, "annotation_position": place}
            figure.add_hline(y=size * 2**-30, line={"color": RED, "width": 1, "dash": dash}, **style)


def _draw(
    figure: Figure, curve: Curve, name: str, colour: str, *, opacity: float = 1.0, mode: str | None = None
) -> None:
    points = thin(curve)
    figure.add_scatter(
        x=list(points.steps),
        y=[value if math.isfinite(value) else None for value in points.values],
        name=name,
        mode=mode or ("lines" if len(points.steps) > 1 else "markers"),
        line={"color": colour, "width": 2 if opacity == 1.0 else 1},
        opacity=opacity,
        hovertemplate="step %{x}: %{y:.5g}<extra>" + name + "</extra>",
    )


def _empty(title: str) -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template="none",
        height=340 if title == "Loss" else 230,
        margin={"l": 56, "r": 12, "t": 8, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#777"},
        legend={"orientation": "h", "y": 1.08, "x": 0, "bgcolor": "rgba(0,0,0,0)"},
        hovermode="x unified" if title == "Loss" else "closest",
        showlegend=False,
    )
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True, "exponentformat": "e"}
    figure.update_xaxes(title_text="step", rangemode="tozero", **axis)
    figure.update_yaxes(**axis)
    return figure
