"""A system's picture: one figure that shows what its method does, made from the part itself.

A picture is a function without arguments that returns a matplotlib figure, made in a few seconds on a CPU. It is drawn with
:func:`panels`, in the reports' colours, so that it fits light and dark pages; ``figure.description`` tells those who cannot see
it what is there::

    def picture():
        from polyak.optim import Lion

        figure, (left, right) = panels(2, titles=("SGD", "Lion"))
        left.plot(xs, ys, color=SERIES[0])
        name(left, xs[-1], ys[-1], "SGD", SERIES[0])
        return described(figure, "Two paths to a minimum: ...")
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.core import checks
from polyak.lab import plots, ticks
from polyak.lab import versions as facts
from polyak.lab.claim import Claim
from polyak.lab.plots import GRID, INK, MUTED, NEUTRAL, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GRID", "INK", "MUTED", "NEUTRAL", "SERIES", "described", "drawn", "name", "panels"]
WIDTH, HEIGHT = 520, 280  # CSS pixels; on a phone it is scaled down to two thirds
_DESCRIPTION = "polyak_description"


_AXES = checks.Like("axes of matplotlib", "annotate", "plot")


@checks.arguments(
    count=checks.Integer(1, 16), rows=checks.Integer(1, 16), titles=checks.Each(checks.Text(empty=True)),
    height=checks.positive, frame=checks.flag, square=checks.flag, share=checks.flag,
)  # fmt: skip
def panels(
    count: int = 1,
    *,
    rows: int = 1,
    titles: Sequence[str] = (),
    height: float = HEIGHT,
    frame: bool = True,
    square: bool = False,
    share: bool = False,
) -> tuple[Figure, list[Axes]]:
    """An empty figure with axes beside each other, in the reports' look.

    Args:
        count: how many axes, in all rows together.
        rows: of axes.
        titles: above each of the axes.
        height: of the figure, in CSS pixels; its width is 520.
        frame: whether axes have ticks and labels; images and fields have none.
        square: whether a unit is as long upwards as to the right.
        share: whether all axes have the same limits.
    """
    from matplotlib.figure import Figure as Empty

    figure = Empty(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
    made = figure.subplots(rows, -(-count // rows), sharex=share, sharey=share, squeeze=False)
    axes = list(made.flat)
    for i, one in enumerate(axes):
        if i >= count:
            one.remove()
            continue
        for spine in one.spines.values():
            spine.set_visible(False)
        if titles:
            one.set_title(titles[i], color=INK, fontsize=plots.FONT, loc="left")
        if square:
            one.set_aspect("equal", adjustable="box")
        if frame:
            one.grid(color=GRID, linewidth=1)
            one.set_axisbelow(True)
            one.tick_params(which="both", colors=MUTED, length=0, labelsize=plots.FONT - 1)
            one.xaxis.label.set_color(MUTED)
            one.yaxis.label.set_color(MUTED)
        else:
            one.set_xticks([])
            one.set_yticks([])
    return figure, axes[:count]


@checks.arguments(
    axes=_AXES,
    x=checks.real,
    y=checks.real,
    text=checks.text,
    color=checks.text,
    shift=checks.Each(checks.real, count=2),
)
def name(axes: Axes, x: float, y: float, text: str, color: str = INK, *, shift: tuple[float, float] = (6, 0)) -> None:
    """A label beside a point of the drawing, moved by so many pixels."""
    how: dict[str, Any] = {"xytext": shift, "textcoords": "offset points", "color": color, "fontsize": plots.FONT}
    align = "left" if shift[0] >= 0 else "right"
    axes.annotate(text, (x, y), **how, ha=align, va="center", annotation_clip=False)


def log(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    """Logarithmic axes whose ticks are written as numbers."""
    from matplotlib import ticker

    for axis, wanted, limits in ((axes.xaxis, x, axes.get_xlim), (axes.yaxis, y, axes.get_ylim)):
        if wanted:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            axis.set_major_locator(ticks.locator(*limits(), log=True, whole=False))
            axis.set_minor_locator(ticker.NullLocator())
            axis.set_major_formatter(ticks.formatter())


@checks.arguments(figure=checks.Like("a figure of matplotlib", "savefig"), text=checks.text)
def described(figure: Figure, text: str) -> Figure:
    """The figure, with what it shows in words, for those who cannot see it."""
    setattr(figure, _DESCRIPTION, text)
    return figure


@checks.arguments(claim=checks.Instance(Claim, words="a Claim"))
def drawn(claim: Claim) -> str:
    """A claim's picture as SVG in the page's colours; "" where it has none.

    It is kept in the user's cache folder until its code, or that of the part, changes.
    """
    if claim.picture is None:
        return ""
    kept = _place(claim)
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    svg = draw(claim)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_name(f"{kept.name}.{os.getpid()}")
        made.write_text(svg, encoding="utf-8")
        made.replace(kept)
    except OSError:
        pass  # without a cache it is drawn again
    return svg


def is_kept(claim: Claim) -> bool:
    """Whether a claim has a picture that need not be drawn any more."""
    return claim.picture is not None and _place(claim).exists()


def draw(claim: Claim) -> str:
    """A claim's picture as SVG, drawn now."""
    assert claim.picture is not None
    return svg(claim.picture, f"picture-{claim.slug}", f"What {claim.name} does")


def svg(picture: Callable[[], Figure], prefix: str, says: str = "") -> str:
    """A picture as SVG in the page's colours. ``prefix`` is a word that no other drawing of the page has."""
    with plots.styled():
        figure, buffer = picture(), io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    shorter = re.sub(r' d="[^"]*"', _shorter, buffer.getvalue())
    return plots.adapt(shorter, getattr(figure, _DESCRIPTION, says), prefix=prefix)


def _shorter(path: re.Match[str]) -> str:
    """A tenth of a pixel is as much as anybody sees."""
    return re.sub(r"(\d+\.\d)\d+", r"\1", path[0])


def description(svg: str) -> str:
    """What a picture's SVG shows, in words."""
    found = re.search(r'aria-label="([^"]*)"', svg)
    return html.unescape(found[1]) if found else ""


def _place(claim: Claim) -> Path:
    return _folder() / f"{claim.slug}-{_digest(claim)}.svg"


def _folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("polyak", appauthor=False)) / "pictures"


def _digest(claim: Claim) -> str:
    """Of the code that draws: the picture's, that of the part and all it imports, and the look."""
    import matplotlib

    picture = claim.picture
    assert picture is not None
    code = [facts.code_of(f"{picture.__module__}:{picture.__name__}"), facts.fingerprint(claim), matplotlib.__version__]
    code += [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (plots, ticks)]
    code.append(Path(__file__).read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]
