"""The plots of a run as SVG text, each once wide and once narrow (for phones)."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from growmoe.errors import UsageError

WIDE, NARROW = (9.0, 4.2), (4.4, 3.8)
COLOURS = ("#3b6fb6", "#d9822b", "#3a9a5b", "#a2499e", "#c0392b", "#5f6b7a")
_PATH, _LONG, _INDENT = (re.compile(p) for p in (r' d="[^"]*"', r"(\.\d\d)\d+", r"\s*\n\s*"))
_METADATA = ("Date", "Creator", "Format", "Type")


@dataclass
class Curve:
    """One training stage: cumulative FLOPs and tokens of the whole lineage at every step."""

    name: str
    flops: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation: list[tuple[float, float, dict[str, float]]] = field(default_factory=list)
    """(FLOPs, tokens, loss by domain)"""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "the report needs matplotlib: install the plots extra, pip install 'growmoe[plots]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "growmoe",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e8eb",
            "axes.edgecolor": "#9aa4af",
            "axes.labelcolor": "#3c4650",
            "xtick.color": "#3c4650",
            "ytick.color": "#3c4650",
        }
    )
    return plt


def draw(paint: Callable[[Any, Any, bool], None], name: str) -> dict[str, str]:
    """{'wide': svg, 'narrow': svg} of `paint(figure, axes, is_narrow)`."""
    return _draw(
        lambda figure, narrow: paint(figure, figure.subplots(), narrow), name, WIDE, NARROW
    )


def draw_panels(
    paint: Callable[[Any, list[Any], bool], None], name: str, panels: int
) -> dict[str, str]:
    """As `draw`, of `paint(figure, list of axes over steps, is_narrow)`: small multiples, below
    each other where it is narrow."""
    columns = min(panels, 2 if panels in (2, 4) else 3)
    rows = -(-panels // columns)

    def paint_all(figure: Any, narrow: bool) -> None:
        across, down = (1, panels) if narrow else (columns, rows)
        figure.get_layout_engine().set(h_pad=0.07)
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for unused in axes[panels:]:
            unused.remove()
        paint(figure, axes[:panels], narrow)
        for ax in axes[max(0, panels - across) : panels]:
            ax.set_xlabel("step", fontsize=8)
        for ax in axes[:panels]:
            ax.tick_params(labelsize=8)

    if panels == 1:
        return _draw(paint_all, name, (WIDE[0], 3.4), NARROW)
    return _draw(paint_all, name, (WIDE[0], 0.5 + 2.1 * rows), (NARROW[0], 0.6 + 1.7 * panels))


def _draw(
    paint: Callable[[Any, bool], None],
    name: str,
    wide: tuple[float, float],
    narrow: tuple[float, float],
) -> dict[str, str]:
    plt = _pyplot()
    result = {}
    for kind, size in (("wide", wide), ("narrow", narrow)):
        figure = plt.figure(figsize=size, layout="constrained")
        paint(figure, kind == "narrow")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(_METADATA))
        plt.close(figure)
        svg = _lighter(buffer.getvalue())
        # ids must not clash when several figures share a page
        for mark in ('id="', "url(#", 'href="#'):
            svg = svg.replace(mark, f"{mark}{name}-{kind}-")
        result[kind] = svg
    return result


def _lighter(svg: str) -> str:
    """Without its header, indentation, and what is finer than a hundredth of a point."""
    svg = _INDENT.sub("\n", svg[svg.index("<svg") :])
    return _PATH.sub(lambda path: _LONG.sub(r"\1", path[0]), svg)


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values at every point."""
    total, result = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        result.append(total / min(i + 1, window))
    return result


def loss_against_flops(curves: list[Curve]) -> dict[str, str]:
    """Training loss against log FLOPs over all stages: quick recovery shows at each transition."""

    def paint(figure: Any, axes: Any, narrow: bool) -> None:
        for curve, colour in zip(curves, COLOURS * len(curves)):
            axes.plot(curve.flops, curve.loss, color=colour, alpha=0.22, linewidth=0.8)
            window = max(1, len(curve.loss) // 40)
            axes.plot(curve.flops, smooth(curve.loss, window), color=colour, label=curve.name)
            points = [(f, sum(d.values()) / len(d)) for f, _, d in curve.validation if f > 0]
            if points:
                axes.plot(*zip(*points), "o", color=colour, markersize=4, markeredgecolor="white")
        for curve in curves[1:]:
            axes.axvline(curve.flops[0], color="#9aa4af", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs, all stages")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title("line: training, dots: validation", fontsize=9, color="#66707a", loc="right")
        axes.legend(frameon=False)

    return draw(paint, "flops")


def validation_by_domain(curves: list[Curve]) -> dict[str, str]:
    """Validation loss of every domain over all tokens of the lineage."""
    domains = sorted({d for curve in curves for _, _, losses in curve.validation for d in losses})

    def paint(figure: Any, axes: Any, narrow: bool) -> None:
        for domain, colour in zip(domains, COLOURS * len(domains)):
            points = [
                (tokens, losses[domain])
                for curve in curves
                for _, tokens, losses in curve.validation
                if domain in losses
            ]
            axes.plot(*zip(*points), "-o", color=colour, markersize=3.5, label=domain)
        for curve in curves[1:]:
            axes.axvline(curve.tokens[0], color="#9aa4af", linewidth=0.8, linestyle=":")
            axes.annotate(
                f" {curve.name}", (curve.tokens[0], 1), xycoords=("data", "axes fraction"),
                fontsize=8, color="#66707a", va="top",
            )  # fmt: skip
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value else "0")
        axes.set_xlabel("training tokens, all stages")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend(frameon=False)

    return draw(paint, "domains")


def expert_load(loads: list[list[float]]) -> dict[str, str]:
    """Heat map of the load per layer and expert; 1 is a perfectly even share."""
    grid = [[share * len(row) for share in row] for row in loads]
    words = [[f"{value:.2f}" for value in row] for row in grid]

    def paint(figure: Any, axes: Any, narrow: bool) -> None:
        largest = max(2.0, max(value for row in grid for value in row))
        image = heat_map(axes, grid, words, "RdBu_r", (2 - largest, largest), narrow)
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("load / even share")
        bar.ax.set_ylim(0, largest)

    return draw(paint, "experts")


def heat_map(
    axes: Any,
    grid: list[list[float]],
    words: list[list[str]],
    colours: str,
    ends: tuple[float, float],
    narrow: bool,
) -> Any:
    """Paint [layer][expert] numbers, rows of any length, with `words` in the cells if they fit.

    Returns the image, for a colour bar from `ends[0]` to `ends[1]`.
    """
    widest = max(len(row) for row in grid)
    padded = [row + [float("nan")] * (widest - len(row)) for row in grid]
    image = axes.imshow(padded, aspect="auto", cmap=colours, vmin=ends[0], vmax=ends[1])
    axes.grid(visible=False)
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.set_xticks(range(0, widest, 1 if widest <= (10 if narrow else 16) else widest // 8))
    axes.set_yticks(range(0, len(grid), 1 if len(grid) <= 16 else 4))
    longest = max(len(word) for row in words for word in row)
    if widest * longest <= 32 and len(grid) <= 12:
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                red, green, blue, _ = image.to_rgba(value)
                light = 0.299 * red + 0.587 * green + 0.114 * blue
                axes.text(x, y, words[y][x], ha="center", va="center", fontsize=8,
                          color="white" if light < 0.5 else "#222")  # fmt: skip
    return image
