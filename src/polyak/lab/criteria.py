"""Short constructors for a claim's criteria (``at_most``, ``beats``, ``order``, ...), one to three lines each.

A claim says once, for each kind, what most of its criteria have in common::

    proved = Ask(METRICS, kind="mechanism", rule="every", task="toy")
    effect = Ask(METRICS, kind="effect", task="vit", metric="train_loss", arm="adan", over="adamw")

    CRITERIA = (
        proved.at_most("closed_form", 1e-10, "Ten steps agree with the closed form", metric="error", arm="adan"),
        effect.at_most("half", 0.5, "Adan's loss is at most half of AdamW's", control="no_difference"),
        effect.beats("accuracy", "Adan's accuracy is above AdamW's", metric="accuracy", minus="adamw"),
    )

What is compared is the metric of ``arm`` alone, or its ratio to (``over=``) or difference from (``minus=``) that of another arm,
or of the best of several. Everything else is as in :class:`~polyak.lab.claim.Criterion`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict, Unpack

from polyak.core import checks
from polyak.lab.claim import Criterion, Kind, Metric

Op = Literal["<=", "<", ">=", ">"]
Rivals = str | Sequence[str]


class Facts(TypedDict, total=False):
    """What a criterion says beside its name, its words and its bound; an :class:`Ask` holds what most have in common."""

    kind: Kind
    task: str
    metric: str
    arm: str
    over: Rivals  # the statistic is the arm's metric divided by theirs
    minus: Rivals  # or less theirs; one that is said later replaces both, and with "" nobody is compared with
    against_metric: str
    rule: Literal["every", "mean"]
    control: str
    gating: bool
    both_diverged: Literal["fails", "equal"]
    rounding: float


class Ask:
    """The constructors of a claim's criteria.

    Args:
        metrics: the claim's; they say which way is better.
        common: what the criteria have in common; each may say otherwise.
    """

    @checks.arguments(metrics=checks.Several(checks.Instance(Metric, words="a Metric")))
    def __init__(self, metrics: Iterable[Metric], **common: Unpack[Facts]) -> None:
        self._metrics = {m.name: m for m in metrics}
        self._common = common

    def but(self, **changes: Unpack[Facts]) -> Ask:
        """The same with other defaults."""
        return Ask(self._metrics.values(), **_later(self._common, changes))

    def at_most(self, name: str, bound: float, says: str, **facts: Unpack[Facts]) -> Criterion:
        """The statistic is ``bound`` or less."""
        return self._criterion(name, "<=", bound, says, facts)

    def below(self, name: str, bound: float, says: str, **facts: Unpack[Facts]) -> Criterion:
        """The statistic is less than ``bound``."""
        return self._criterion(name, "<", bound, says, facts)

    def at_least(self, name: str, bound: float, says: str, **facts: Unpack[Facts]) -> Criterion:
        """The statistic is ``bound`` or more."""
        return self._criterion(name, ">=", bound, says, facts)

    def above(self, name: str, bound: float, says: str, **facts: Unpack[Facts]) -> Criterion:
        """The statistic is more than ``bound``."""
        return self._criterion(name, ">", bound, says, facts)

    def beats(self, name: str, says: str, **facts: Unpack[Facts]) -> Criterion:
        """The arm's metric is better than that of whom it is compared with, as the metric says what is better.

        Raises:
            ValueError: there is nobody to compare with, or the metric is unknown.
        """
        all_facts = _later(self._common, facts)
        if not (rivals := all_facts.get("over") or all_facts.get("minus")):
            raise ValueError(f"criterion {name!r}: say whom it beats by over= or minus=, got {rivals!r}")
        metric = all_facts.get("metric", "")
        if metric not in self._metrics:
            raise ValueError(f"criterion {name!r}: unknown metric {metric!r}; it has {sorted(self._metrics)}")
        op: Op = "<" if self._metrics[metric].better == "lower" else ">"
        return self._criterion(name, op, 1.0 if all_facts.get("over") else 0.0, says, facts)

    def order(self, name: str, p: float, says: str, *, slack: float = 0.1, **facts: Unpack[Facts]) -> Criterion:
        """The metric, a measured order of convergence, is ``p`` or more, up to ``slack``."""
        return self._criterion(name, ">=", p - slack, says, facts)

    def table(self, asks: str, columns: str, *rows: Sequence[Any], **same: Any) -> tuple[Criterion, ...]:
        """A criterion for each row, all by one of the constructors: ``ask.table("at_most", "name bound says", (...), (...))``.

        Columns are named as the constructor's arguments are; ``same`` has those that are the same for all rows.

        Raises:
            ValueError: a row has not as many entries as there are columns, or no argument has the name of a column.
        """
        heads, constructor = columns.split(), getattr(self, asks)
        known = {*inspect.signature(constructor).parameters, *Facts.__annotations__} - {"facts"}
        if unknown := [name for name in (*heads, *same) if name not in known]:
            raise ValueError(f"columns of {asks} must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
        for row in rows:
            if len(row) != len(heads):
                raise ValueError(f"a row must have an entry for each of {', '.join(heads)}, got {row!r}")
        return tuple(constructor(**same, **dict(zip(heads, row, strict=True))) for row in rows)

    def _criterion(self, name: str, op: Op, bound: float, says: str, facts: Facts) -> Criterion:
        known: dict[str, Any] = dict(_later(self._common, facts))
        over, minus = known.pop("over", ""), known.pop("minus", "")
        if over and minus:
            raise ValueError(f"criterion {name!r}: say over= or minus=, one of the two, got {over!r} and {minus!r}")
        rivals = over or minus
        return Criterion(
            name=name,
            says=says,
            op=op,
            bound=bound,
            against=rivals if isinstance(rivals, str) else tuple(rivals),
            compare="ratio" if over else "difference" if minus else "value",
            **known,
        )


def _later(common: Facts, facts: Facts) -> Facts:
    """What is said later replaces what was said before; of ``over`` and ``minus`` either replaces both."""
    compared: Facts = {"over": "", "minus": ""} if "over" in facts or "minus" in facts else {}
    return Facts(**common) | compared | facts
