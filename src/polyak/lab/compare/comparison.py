"""What ``compare`` returns: the answer, with tables, figures and a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polyak.core import checks
from polyak.lab.compare.result import Found, TaskComparison
from polyak.lab.compare.rows import Setup

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checks.arguments(
    setup=checks.Instance(Setup, words="a Setup"),
    tasks=checks.Each(checks.Instance(TaskComparison, words="a TaskComparison")),
)
@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Found):
    """The result of :func:`polyak.lab.compare`.

    In a notebook it shows itself. :attr:`answer` is a sentence, :meth:`to_pandas` the table, :meth:`figure` a drawing,
    :meth:`save` the page, :meth:`to_json` all data.
    """

    def figure(self, what: str = "curves", task: str = "") -> Figure:
        """A matplotlib figure: "curves" of the main metric, "sensitivity" to the learning rate, or "profiles" over tasks."""
        from polyak.lab.compare import figures

        return figures.figure(self, what, task)

    def save(self, path: Path | str) -> Path:
        """Write the page, one HTML file that opens from disk; its path."""
        from polyak.lab.compare.page import page

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(self), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        from polyak.lab.compare.page import summary

        return summary(self)
