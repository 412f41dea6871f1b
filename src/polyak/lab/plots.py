"""The report's curves, as SVG that takes its colours and fonts from the page around it.

They are drawn by matplotlib in colours that become CSS variables, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from polyak.lab import ticks, words
from polyak.lab.claim import Arm, Claim, Plot, Task
from polyak.lab.result import ClaimResult, TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT, LEADING = 13, 15
NAME = 18  # characters in a line of a label
FEW = 4  # lines whose labels need not show their points
WIDTH, HEIGHT = 480, 310  # as drawn: two fit side by side on a desk, and one is legible on a phone
# The style sheet's colours of a light page: a figure outside of a page has them, one inside its variables.
INK, MUTED, GRID, NEUTRAL = "#1d1f22", "#5d6269", "#dcdcd6", "#6b7078"
SERIES = ("#0068a8", "#c25400", "#00805f", "#8f246f", "#604c0b", "#603dc7")
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", NEUTRAL: "neutral"} | {
    color: f"series-{i + 1}" for i, color in enumerate(SERIES)
}
DASHES = {"baseline": "", "method": "", "ablation": "6 3", "control": "1.5 2.5"}
# Single points beside an arm's line, and what they are: how they look in the arm's colour (a shape of None: the arm's own).
MARKS: dict[str, dict[str, Any]] = {
    "other": {"marker": None, "markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1.4},
    "stopped": {"marker": "|", "markersize": 11, "markeredgewidth": 2},
    "diverged": {"marker": "x", "markersize": 8, "markeredgewidth": 2},
    "chosen": {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.4},
}
# From the seventh of a kind on colours come again, with these dashes: each shows on both sides of the point in a swatch.
AGAIN = ("7 2 1.5 2", "3 2")
Shape = tuple[tuple[float, float], ...]


def _corners(count: int, *radii: float, turn: float = 0) -> Shape:
    """The corners of a polygon that stands on an edge, or of a star with two radii."""
    angles = [math.radians(turn + 360 * i / count) for i in range(count)]
    away = [radii[i % len(radii)] for i in range(count)]
    return tuple((-r * math.sin(a), r * math.cos(a)) for r, a in zip(away, angles, strict=True))


# The outlines of arms' points, in pixels: with these and dashes no two arms differ by colour alone.
SHAPES: tuple[Shape, ...] = (
    _corners(24, 3.3),
    _corners(4, 4.4, turn=45),
    _corners(3, 4.5),
    _corners(4, 4.5),
    _corners(3, 4.5, turn=180),
    _corners(10, 5, 2),
    ((-1.3, 4), (1.3, 4), (1.3, 1.3), (4, 1.3), (4, -1.3), (1.3, -1.3),
     (1.3, -4), (-1.3, -4), (-1.3, -1.3), (-4, -1.3), (-4, 1.3), (-1.3, 1.3)),  # a plus
    ((-3.6, 4), (3.6, 4), (-3.6, -4), (3.6, -4)),  # an hourglass
)  # fmt: skip


def style(claim: Claim, arm: Arm) -> tuple[str, str]:
    """(CSS variable, dash pattern) of an arm's line: the same on every plot of a claim. Baselines are neutral."""
    peers = [a for a in claim.arms if (a.role == "baseline") == (arm.role == "baseline")]
    at = peers.index(arm)
    if arm.role == "baseline":
        return "neutral", ["", "6 3", "1.5 2.5"][at % 3]
    turn, color = divmod(at, len(SERIES))
    return f"series-{color + 1}", AGAIN[(turn - 1) % len(AGAIN)] if turn else DASHES[arm.role]


def shape(claim: Claim, arm: Arm) -> Shape:
    """The outline of an arm's points: the same on every plot of a claim."""
    return SHAPES[claim.arms.index(arm) % len(SHAPES)]


def _color(claim: Claim, arm: Arm) -> str:
    variable, _ = style(claim, arm)
    return next(color for color, name in VARIABLES.items() if name == variable)


# ---------------------------------------------------------------------------------------------------------------- curves


@dataclass
class Line:
    """One arm on one plot. The median counts a diverged seed as its worst value; the band spans the seeds still going."""

    arm: Arm
    x: list[float] = field(default_factory=list)
    middle: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    singles: list[list[tuple[float, float]]] = field(default_factory=list)  # where seeds have no x in common
    crosses: list[tuple[float, float]] = field(default_factory=list)  # the last points of diverged seeds
    marks: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # others alone, by their kind in MARKS
    label: str = ""

    @property
    def places(self) -> list[float]:
        """Where it has points, in any order."""
        alone = [*self.singles, self.crosses, *self.marks.values()]
        return [*self.x, *(x for points in alone for x, _ in points)]

    @property
    def end(self) -> tuple[float, float] | None:
        points = [p for p in zip(self.x, self.middle, strict=True) if math.isfinite(p[1])]
        marks = [] if points else [*self.crosses, *(p for places in self.marks.values() for p in places)]
        return max([*points[-1:], *(s[-1] for s in self.singles), *marks], default=None)


def lines(claim: Claim, task: Task, plot: Plot, result: ClaimResult) -> list[Line]:
    """What a plot shows, from the reported trials: a line per arm that has any points."""
    found = []
    for arm in claim.arms_on(task.name):
        trials = [t for t in result.trials if (t.purpose, t.task, t.arm) == ("report", task.name, arm.name)]
        line = _line(arm, trials, plot, claim.metric(plot.y).worst_value)
        if line.end is not None:
            found.append(line)
    return found


def _line(arm: Arm, trials: Sequence[TrialResult], plot: Plot, worst: float) -> Line:
    going: list[dict[float, float]] = []
    stopped: list[dict[float, float]] = []
    for trial in trials:
        points = {
            float(at[plot.x]): float(values[plot.y])
            for at, values in trial.curve
            if plot.x in at and plot.y in values and _drawable(at[plot.x], values[plot.y], plot)
        }
        (stopped if trial.diverged else going).append(points)
    label = arm.label + (f" ({len(stopped)} of {len(trials)} diverged)" if stopped else "")
    line = Line(arm, label=label, crosses=[max(points.items()) for points in stopped if points])
    places = sorted(set().union(*going, *stopped))
    shared = [x for x in places if all(x in points for points in going)]
    if going and 2 * len(shared) < len(set().union(*going)):
        line.singles = [sorted(points.items()) for points in going if points]
        return line
    for x in shared:
        alive = [points[x] for points in (*going, *stopped) if x in points]
        if alive:
            line.x.append(x)
            line.middle.append(statistics.median(alive + [worst] * (len(trials) - len(alive))))
            line.low.append(min(alive))
            line.high.append(max(alive))
    return line


def _drawable(x: float, y: float, plot: Plot) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not plot.log_x) and (y > 0 or not plot.log_y)


def curves(claim: Claim, task: Task, plot: Plot, result: ClaimResult) -> str:
    """The SVG of one plot; "" where no trial has a point on it."""
    shown = lines(claim, task, plot, result)
    metric = claim.metric(plot.y)
    unit = f" ({metric.unit})" if metric.unit else ""
    log = ", log scale" if plot.log_y else ""
    above = f"{metric.label}{unit}{log}; {metric.better} is better"
    name = f"{claim.name} on {task.label}: {metric.label} over {plot.x_label or plot.x}, per arm"
    return drawing(claim, shown, plot, name=name, prefix=f"{task.name}-{plot.x}-{plot.y}", above=above)


def drawing(claim: Claim, shown: Sequence[Line], plot: Plot, *, name: str, prefix: str, **how: Any) -> str:
    """The SVG of lines with their labels; "" where there are none.

    ``name`` is said to those who cannot see it; ``prefix`` is a word that no other drawing of the page has; the rest is as for
    :func:`draw`.
    """
    if not shown:
        return ""
    with styled():
        buffer = io.StringIO()
        draw(claim, shown, plot, **how).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return adapt(buffer.getvalue(), name, prefix=prefix)


@contextmanager
def styled() -> Iterator[None]:
    """What figures are made and saved in, so that their text stays text."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "polyak",
        "text.parse_math": False,
        "font.size": FONT,
    }
    with matplotlib.rc_context(settings):
        yield


def draw(
    claim: Claim,
    shown: Sequence[Line],
    plot: Plot,
    *,
    above: str,
    title: str = "",
    view: tuple[float, float] | None = None,
    keys: Mapping[str, str] | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Lines as a figure, in a light page's colours.

    Args:
        above: said over the drawing, in one line or several.
        title: said over that.
        view: from where to where the vertical axis goes; lines leave it, single points beyond it are at its edge. Default: all.
        keys: by kinds of marks ("" for a line), what they are.
        figure: the empty one to draw on. Default: a new one.
    """
    from matplotlib.figure import Figure as Empty

    figure = Empty() if figure is None else figure
    figure.set_dpi(72)  # one point is one CSS pixel
    figure.set_size_inches(WIDTH / 72, HEIGHT / 72)
    axes = figure.add_axes((0, 0, 1, 1))
    for line in shown:
        _draw(axes, claim, line, view)
    _scales(axes, shown, plot, view)
    _frame(axes, plot.x_label or plot.x)
    heads = [(title, INK)] * bool(title) + [(line, MUTED) for line in above.splitlines()]
    _label(figure, axes, claim, shown, heads, keys or {})
    return figure


def _draw(axes: Axes, claim: Claim, line: Line, view: tuple[float, float] | None) -> None:
    color, (_, dashes) = _color(claim, line.arm), style(claim, line.arm)
    pattern = (0, [float(d) for d in dashes.split()]) if dashes else "-"
    width = 2.4 if line.arm.role == "method" else 1.8
    points = _point(claim, line.arm)
    if len(line.x) > 12:  # a few points along the line, each arm's at other places
        points["markevery"] = (0.04 + 0.23 * claim.arms.index(line.arm) / len(claim.arms), 0.24)
    if line.x:
        axes.plot(line.x, line.middle, color=color, linewidth=width, linestyle=pattern, **points)
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0)
    for single in line.singles:
        axes.plot(*zip(*single, strict=True), color=color, linewidth=1, alpha=0.7, linestyle=pattern)
    for kind, places in (*line.marks.items(), ("diverged", line.crosses)):
        look = MARKS[kind] | ({} if MARKS[kind]["marker"] else {"marker": points["marker"]})
        for x, y in places:
            y = min(max(y, view[0]), view[1]) if view else y
            axes.plot([x], [y], **look, color=color, linestyle="none", clip_on=False, zorder=3)


def _point(claim: Claim, arm: Arm) -> dict[str, Any]:
    """An arm's point, as matplotlib takes it."""
    outline = shape(claim, arm)
    size = 2 * max(abs(place) for corner in outline for place in corner)  # to which matplotlib scales an outline
    closed = (*outline, outline[0])  # a hollow one, too
    return {"marker": closed, "markersize": size, "markeredgewidth": 0}


def _scales(axes: Axes, shown: Sequence[Line], plot: Plot, view: tuple[float, float] | None) -> None:
    from matplotlib import ticker

    for axis, log, limits in ((axes.xaxis, plot.log_x, axes.get_xlim), (axes.yaxis, plot.log_y, axes.get_ylim)):
        across = axis is axes.xaxis
        if log:
            axis.set_major_locator(ticker.MaxNLocator(5))
            (axes.set_xscale if across else axes.set_yscale)("log")
        if view and not across:
            axes.set_ylim(view)
        axis.set_major_locator(ticks.locator(*limits(), log=log, whole=across and _whole(shown)))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticks.formatter())


def _whole(shown: Sequence[Line]) -> bool:
    """Whether there are lines at whole numbers only, such as steps: there is nothing between them."""
    return all(x == round(x) for line in shown for x in line.places)


def _frame(axes: Axes, below: str) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, pad=6, labelsize=FONT)
    axes.set_xlabel(below, color=MUTED, fontsize=FONT, labelpad=6)


def _label(
    figure: Figure,
    axes: Axes,
    claim: Claim,
    shown: Sequence[Line],
    heads: Sequence[tuple[str, str]],
    keys: Mapping[str, str],
) -> None:
    """All that is said around the lines, in margins as wide and a figure as high as it needs.

    Names are at the ends of lines, pushed apart where they would overlap.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D

    renderer = FigureCanvasAgg(figure).get_renderer()

    def width(text: str) -> float:
        probe = figure.text(0, 0, text, fontsize=FONT)
        extent = probe.get_window_extent(renderer).width
        probe.remove()
        return extent

    texts = [words.lines(line.label, NAME) for line in shown]
    pointed = len(shown) > FEW  # each label with its line's point
    beside = [t.get_window_extent(renderer).width for t in axes.get_yticklabels()]
    heights = [LEADING * len(text) + 3 for text in texts]
    places = _key_places({kind: width(text) for kind, text in keys.items()})
    rows = 1 + max((row for _, row in places.values()), default=-1)
    left, right = max(beside, default=0) + 10, max(width(t) for text in texts for t in text) + (28 if pointed else 22)
    bottom, top = 48 + (LEADING + 3) * rows, 17 + LEADING * len(heads)
    lowest, highest = (
        bottom - 36,
        3 + LEADING * len(heads),
    )  # labels may go from here, above the bottom, to there, below the top
    height = max(HEIGHT + (LEADING + 3) * rows + LEADING * (len(heads) - 1), sum(heights) + lowest + highest)
    figure.set_size_inches(WIDTH / 72, height / 72)
    axes.set_position((left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - bottom - top) / height))
    for i, (text, color) in enumerate(heads):
        figure.text(0, 1 - LEADING * i / height, text, color=color, fontsize=FONT, verticalalignment="top")

    pixels = [axes.transData.transform(line.end or (0, 0)) for line in shown]
    ends_y = [min(max(float(p[1]), bottom), height - top) for p in pixels]  # of a line that ends out of view, the edge
    centres = spread(ends_y, heights, low=lowest, high=height - highest)
    edge = WIDTH - right
    for line, text, (x, _), y, centre in zip(shown, texts, pixels, ends_y, centres, strict=True):
        color = _color(claim, line.arm)
        for row, part in enumerate(text):
            baseline = centre + LEADING * ((len(text) - 1) / 2 - row) - 0.35 * FONT
            figure.text((edge + (24 if pointed else 18)) / WIDTH, baseline / height, part, color=color, fontsize=FONT)
        ends = [(x + 4) / WIDTH, (edge + 14) / WIDTH], [y / height, centre / height]
        figure.add_artist(Line2D(*ends, color=color, linewidth=0.8, alpha=0.55))
        if pointed:
            at = [(edge + 15) / WIDTH], [centre / height]
            figure.add_artist(Line2D(*at, color=color, linewidth=0, **_point(claim, line.arm)))
    for kind, (x, row) in places.items():
        y = (LEADING + 3) * (rows - row - 1) + 5
        look: dict[str, Any] = {"color": MUTED, "linewidth": 0} | (
            MARKS[kind] if kind else {"marker": "o", "markersize": 6}
        )
        look["markersize"] = min(look["markersize"], 12)
        look["marker"] = look["marker"] or "o"
        if not kind:
            stroke = [x / WIDTH, (x + 20) / WIDTH], [(y + 4.5) / height] * 2
            figure.add_artist(Line2D(*stroke, color=MUTED, linewidth=1.8))
        figure.add_artist(Line2D([(x + 10) / WIDTH], [(y + 4.5) / height], **look))
        figure.text((x + 25) / WIDTH, y / height, keys[kind], color=MUTED, fontsize=FONT)


def _key_places(widths: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    """Where each key begins: its pixel, and its row."""
    found, x, row = {}, 0.0, 0
    for kind, width in widths.items():
        if x and x + 25 + width > WIDTH:
            x, row = 0.0, row + 1
        found[kind] = (x, row)
        x += 25 + width + 16
    return found


def spread(wanted: Sequence[float], heights: Sequence[float], *, low: float, high: float) -> list[float]:
    """Centres near the wanted ones, in their order, that keep boxes of these heights apart and, if they fit, inside."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    centres = list(wanted)
    floor = low
    for i in order:
        centres[i] = max(centres[i], floor + heights[i] / 2)
        floor = centres[i] + heights[i] / 2
    ceiling = high
    for i in reversed(order):
        centres[i] = min(centres[i], ceiling - heights[i] / 2)
        ceiling = centres[i] - heights[i] / 2
    return centres


def adapt(svg: str, name: str, prefix: str) -> str:
    """Make a drawing part of the page: its variables, its fonts, identifiers that no other drawing has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)  # as newer matplotlibs write it
    key = re.sub(r"\W+", "-", prefix)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', body)
    body = body.replace("url(#", f"url(#{key}-")
    return f'<svg class="curves" {box.group() if box else ""} role="img" aria-label="{escape(name)}">{body}'


# ---------------------------------------------------------------------------------------------------------------- tables


def swatch(claim: Claim, arm: Arm) -> str:
    """An arm's line and point, for tables."""
    variable, dashes = style(claim, arm)
    points = " ".join(f"{12 + x:.1f},{5 - y:.1f}" for x, y in shape(claim, arm))
    line = f'<line x1="0" x2="24" y1="5" y2="5" stroke="var(--{variable})" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
    point = f'<polygon points="{points}" fill="var(--{variable})"/>'
    return f'<svg class="swatch" width="24" height="10" aria-hidden="true">{line}{point}</svg>'
