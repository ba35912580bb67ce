"""The plots of routers and experts: one line per MoE layer over steps, and grids of experts."""

from dataclasses import dataclass
from typing import Any

from growmoe.report.figures import COLOURS, draw, draw_panels, heat_map, smooth
from growmoe.report.routing import Lines, RoutingHistory

SOFT = "#66707a"
LEGEND_LAYERS = 6
"""With more MoE layers a colour scale takes the legend's place."""
BAND_LAYERS = 4
"""With more MoE layers the bands around the cosines would only cover each other."""
POINTS = 300
"""Most points of a line."""
ALL_POINTS = 2400
"""Most points of the lines of one panel together, which bounds the page for deep models."""
GROUPS = {
    "router": "router",
    "experts": "experts",
    "fixed": "fixed branch",
    "attention": "attention",
    "dense": "dense feed-forward",
    "embedding": "embedding",
    "norm": "norms",
}
GROUP_COLOURS = dict(zip(GROUPS, (*COLOURS, "#8c6d46")))


@dataclass(frozen=True)
class Panel:
    """One of the small multiples."""

    measure: str
    title: str
    reference: float | None
    """Where a dashed line says what is ideal or extreme."""
    percent: bool = False
    optional: bool = False
    """Left out when there was never anything but zeros, from which the axis starts."""


PANELS = (
    Panel("max_vio", "Busiest expert (MaxVio)", 0.0),
    Panel("load_entropy", "Evenness of the load (entropy)", 1.0),
    Panel("router_entropy", "Indecision of the router (entropy)", 1.0),
    Panel("log_z", "Size of the router logits (log Z)", 0.0),
    Panel("dropped", "Choices dropped over capacity", None, percent=True, optional=True),
    Panel("dead", "Dead experts", None, optional=True),
    Panel("bias_range", "Range of the selection bias", None, optional=True),
)


def thin(values: list[Any], most: int) -> list[Any]:
    """Every n-th value, so that at most `most` remain; the last one always does."""
    every = -(-len(values) // most) or 1
    return values[(len(values) - 1) % every :: every] if values else []


def routing_panels(history: RoutingHistory, name: str) -> dict[str, str] | None:
    """Small multiples of what the routers did, smoothed; None when nothing was logged."""
    panels = [
        (panel, history.measures[panel.measure])
        for panel in PANELS
        if panel.measure in history.measures
        and (not panel.optional or history.measures[panel.measure].any())
    ]
    if not panels:
        return None

    def paint(figure: Any, axes: list[Any], narrow: bool) -> None:
        for ax, (panel, lines) in zip(axes, panels):
            _paint_lines(ax, lines)
            if panel.reference is not None:
                ax.axhline(panel.reference, color="#9aa4af", linewidth=0.9, linestyle="--")
            if panel.optional:
                ax.set_ylim(bottom=0)
            if panel.percent:
                ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
            ax.set_title(panel.title, fontsize=9, loc="left", color="#1f2730")
        _name_layers(figure, axes, len(panels[0][1].values), narrow)

    return draw_panels(paint, name, len(panels))


def _paint_lines(ax: Any, lines: Lines) -> None:
    """One smoothed line per layer."""
    most = max(2, min(POINTS, ALL_POINTS // len(lines.values)))
    steps = thin(lines.steps, most)
    for values, colour in zip(lines.values, _layer_colours(len(lines.values))):
        ax.plot(steps, thin(smooth(values, lines.window), most), color=colour, linewidth=1.2)


def _scale() -> Any:
    """Colours from early to late layers; without the yellow that white paper swallows."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"]([i / 255 * 0.8 for i in range(256)]))


def _layer_colours(layers: int) -> list[Any]:
    scale = _scale()
    return [scale(layer / max(1, layers - 1)) for layer in range(layers)]


def _name_layers(figure: Any, axes: list[Any], layers: int, narrow: bool) -> None:
    """Say which line is which layer: a legend for few, a colour scale for many."""
    if layers > LEGEND_LAYERS:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        bar = figure.colorbar(
            ScalarMappable(Normalize(0, layers - 1), _scale()), ax=axes,
            location="top" if narrow else "right", shrink=0.9 if narrow else 0.7,
            aspect=40 if narrow else 30,
        )  # fmt: skip
        bar.set_label("MoE layer, from early to late", fontsize=8)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        return
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour) for colour in _layer_colours(layers)]
    labels = [f"MoE layer {layer}" for layer in range(layers)]
    columns = layers if not narrow else 2 if layers == 4 else 3
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8
    )


def expert_similarity(history: RoutingHistory, name: str) -> dict[str, str] | None:
    """Mean cosine between two experts of a layer over steps, with the range for few layers."""
    mean = history.cosines.get("cosine_mean")
    if mean is None:
        return None
    least, most = (history.cosines.get(f"cosine_{end}") for end in ("min", "max"))
    layers = len(mean.values)

    def paint(figure: Any, axes: list[Any], narrow: bool) -> None:
        ax = axes[0]
        points = max(2, min(POINTS, ALL_POINTS // layers))
        steps = thin(mean.steps, points)
        marker = "o" if len(steps) <= 30 else ""
        for layer, colour in enumerate(_layer_colours(layers)):
            ax.plot(
                steps, thin(mean.values[layer], points), marker=marker, color=colour,
                markersize=3, linewidth=1.4,
            )  # fmt: skip
            if least and most and layers <= BAND_LAYERS:
                low, high = (thin(end.values[layer], points) for end in (least, most))
                ax.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
        ax.axhline(1.0, color="#9aa4af", linewidth=0.9, linestyle="--")
        ax.set_ylabel("cosine of two experts")
        _name_layers(figure, axes, layers, narrow)

    return draw_panels(paint, name, 1)


def gradient_norms(history: RoutingHistory, name: str) -> dict[str, str] | None:
    """The norm of the gradient of every group of parameters over steps, smoothed."""
    groups = [group for group in GROUPS if group in history.norms and history.norms[group].any()]
    groups += [group for group in history.norms if group not in GROUPS]
    if not groups:
        return None

    def paint(figure: Any, axes: Any, narrow: bool) -> None:
        for group in groups:
            lines = history.norms[group]
            shown = thin(smooth(lines.values[0], lines.window), POINTS)
            axes.plot(
                thin(lines.steps, POINTS), [v if v > 0 else float("nan") for v in shown],
                color=GROUP_COLOURS.get(group, SOFT), label=GROUPS.get(group, group),
                linewidth=1.3,
            )  # fmt: skip
        _log_axis(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("gradient norm")
        figure.legend(loc="outside upper left", ncols=3 if narrow else 7, frameon=False, fontsize=8)

    return draw(paint, name)


def _log_axis(axes: Any) -> None:
    """A log y axis with plain numbers, of which a few within each decade if there are few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def credit_ranks(ranks: list[list[float]], name: str) -> dict[str, str] | None:
    """Grid of the place by credit per layer and expert, 1 the best; None where all are equal."""
    if all(len(set(row)) == 1 for row in ranks):
        return None
    share = [[(rank - 1) / max(1, len(row) - 1) for rank in row] for row in ranks]
    places = [[f"{len(row) + 1 - rank:g}" for rank in row] for row in ranks]

    def paint(figure: Any, axes: Any, narrow: bool) -> None:
        image = heat_map(axes, share, places, "Blues", (-0.15, 1.1), narrow)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1])
        bar.ax.set_yticklabels(["last", "first"])
        bar.ax.set_ylim(0, 1)
        bar.set_label("place by credit")

    return draw(paint, name)
