"""The dataclasses that a claim is declared with: arms, tasks, scales, metrics, criteria. Nothing here runs anything.

A claim's file declares one :class:`Claim` named ``CLAIM``. Importing it must stay light (no torch, numpy, scipy or
matplotlib at module level): listings and help read claims, too. What is heavy is imported inside the trial function.

The words: a *system* is one paper's method (one slug); its *claim* says what the paper says; an *arm* is one competitor,
the paper's baseline first; a *task* is a problem the arms are run on; a *trial* is one arm on one task with one seed; a
*measurement* is what a trial yields; a *criterion* is what must hold, of the kind *mechanism* (by the method's mathematics) or
*effect* (what it does for who uses it); a *verdict* is ``holds``, ``fails`` or ``undecided``, one for each kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import product
from typing import Any, Literal

from polyak.core import checks

Verdict = Literal["holds", "fails", "undecided"]
Kind = Literal["mechanism", "effect"]
Role = Literal["baseline", "method", "ablation", "control"]
Value = float | int | str | bool | None
KINDS: tuple[Kind, ...] = ("mechanism", "effect")
EMPTY: Mapping[str, Any] = {}
_WORDS = checks.Text(empty=True)
_TEXTS = checks.Each(checks.text)


class UnknownName(KeyError, ValueError):
    """A claim has no task, arm, scale or metric of this name."""


class Diverged(ArithmeticError):
    """Raised by a trial that cannot go on (NaN, overflow). The lab records every metric at its worst: a measurement."""


@checks.arguments(
    title=_WORDS, year=checks.Integer(0, 2200), arxiv=_WORDS, venue=_WORDS, code=_WORDS
)  # fmt: skip
@dataclass(frozen=True)
class Paper:
    """Where the method comes from."""

    title: str
    year: int
    arxiv: str = ""  # "2208.06677"
    venue: str = ""
    code: str = ""  # address of the official code

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


@checks.arguments(
    what=checks.text, where=checks.text, effect=checks.text, test=checks.text
)  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class Erratum:
    """Where official code departs from its paper, or a widespread implementation is wrong.

    what: what the code does, and what the paper says.
    where: the repository, file or release in which it is so.
    effect: what it does to results.
    test: the test here that shows it, "tests/optim/test_adan.py::test_restart".
    """

    what: str
    where: str
    effect: str
    test: str


@checks.arguments(
    name=checks.text, label=_WORDS, role=checks.Choice("baseline", "method", "ablation", "control"), options=checks.Map(),
    grid=checks.Map(checks.Each(checks.anything)), says=_WORDS, tasks=_TEXTS,
)  # fmt: skip
@dataclass(frozen=True)
class Arm:
    """One competitor.

    ``options`` are fixed and handed to the trial. ``grid`` is tuned: for every reported seed each point of the product of its
    values is one tuning trial per task, on seeds that are never reported, and the best point is used for that seed. Within a
    claim every arm that is tuned on a task must have a grid of the same size.
    """

    name: str
    label: str
    role: Role
    options: Mapping[str, Value] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    _: KW_ONLY
    says: str = ""
    tasks: tuple[str, ...] = ()  # the tasks that it is run on; empty: all

    @property
    def points(self) -> list[dict[str, Value]]:
        """The grid's points in order; one empty point where nothing is tuned."""
        names = list(self.grid)
        return [dict(zip(names, values, strict=True)) for values in product(*(self.grid[n] for n in names))]


@checks.arguments(
    name=checks.text, label=_WORDS, better=checks.Choice("lower", "higher"), unit=_WORDS,
    worst=checks.Number(infinite=True) | None, exact=checks.flag,
)  # fmt: skip
@dataclass(frozen=True)
class Metric:
    """A measured quantity. ``worst`` is what a diverged trial scores (default: infinitely bad).

    ``exact``: mathematics decides it, and a seed only picks the instance. What training reaches is not exact, nor what is sampled.
    """

    name: str
    label: str
    _: KW_ONLY
    better: Literal["lower", "higher"] = "lower"
    unit: str = ""
    worst: float | None = None
    exact: bool = False

    @property
    def worst_value(self) -> float:
        if self.worst is not None:
            return self.worst
        return math.inf if self.better == "lower" else -math.inf


@checks.arguments(
    x=_WORDS, y=checks.text, title=_WORDS, x_label=_WORDS, log_x=checks.flag, log_y=checks.flag
)  # fmt: skip
@dataclass(frozen=True)
class Plot:
    """A curve over the course of trials: metric ``y`` against the measurement's coordinate ``x``, one line per arm."""

    x: str  # a key of Measurement.at, e.g. "step" or "nfe"
    y: str  # a metric's name
    title: str = ""
    _: KW_ONLY
    x_label: str = ""
    log_x: bool = False
    log_y: bool = False


@checks.arguments(
    name=checks.text, label=_WORDS, says=_WORDS, options=checks.Map(), tune=_WORDS,
    plots=checks.Each(checks.Instance(Plot, words="a Plot")),
)  # fmt: skip
@dataclass(frozen=True)
class Task:
    """A problem the arms are run on. ``tune`` names the metric by which grids are tuned here ("" where none is)."""

    name: str
    label: str
    says: str = ""  # data, model, budget, in a sentence
    options: Mapping[str, Value] = field(default_factory=dict)
    _: KW_ONLY
    tune: str = ""
    plots: tuple[Plot, ...] = ()


@checks.arguments(
    name=checks.text, says=_WORDS, seeds=checks.Integer(1), first_seed=checks.Integer(0), tuning_seeds=checks.Integer(0),
    options=checks.Map(), task_options=checks.Map(checks.Map()), tasks=_TEXTS,
)  # fmt: skip
@dataclass(frozen=True)
class Scale:
    """A size at which a claim can be run, with verdicts of its own.

    ``small`` is minutes on two CPU cores with data at hand offline; ``gpu`` is one accelerator for 20 minutes at most, in pieces of
    8 at most, between which the store may move (``polyak export``, ``polyak import``); ``paper`` is the paper's own.
    """

    name: str
    says: str
    seeds: int
    _: KW_ONLY
    first_seed: int = 0  # the seeds that are reported are those from here on
    tuning_seeds: int = 1  # for each reported seed
    options: Mapping[str, Value] = field(default_factory=dict)
    task_options: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)  # per task, over the task's own
    tasks: tuple[str, ...] = ()  # the tasks that exist at this scale; empty: all


@checks.arguments(
    name=checks.text, says=_WORDS, kind=checks.Choice(*KINDS), task=checks.text, metric=checks.text, arm=checks.text,
    against=_WORDS | _TEXTS, against_metric=_WORDS, compare=checks.Choice("ratio", "difference", "value"),
    op=checks.Choice("<=", "<", ">=", ">"), bound=checks.Number(infinite=True), rule=checks.Choice("every", "mean"), control=_WORDS,
    gating=checks.flag, both_diverged=checks.Choice("fails", "equal"), rounding=checks.non_negative,
)  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What must hold, set before the run: ``arm``'s metric on ``task``, compared with ``against``, within ``bound``.

    Claims declare it by :class:`polyak.lab.criteria.Ask`.

    kind: "mechanism" is what must be true by the method's mathematics, "effect" what it does for who uses it. Each has its verdict.
    compare: "ratio" arm/against, "difference" arm - against, "value" arm alone. With several names in ``against``
        (or several arms) the best of them, seed by seed, is compared with.
    op, bound: the statistic must be ``<=``, ``<``, ``>=`` or ``>`` than the bound.
    rule: "every" seed must satisfy it (of exact metrics only, "n of n seeds"); or the "mean" over seeds must,
        where Student's t over seeds puts it on one side of the bound, at 5 % for all gating criteria together (Holm); else it
        is undecided. Ratios are averaged as logarithms.
    control: an arm that lacks the method's key ingredient; put in ``arm``'s place it must not pass, else the criterion says
        nothing and is ``undecided``.
    gating: whether its kind's verdict depends on it; a criterion that is not gating is only reported.
    both_diverged: what a seed says with which the arm and all of its rivals diverged: that the arm is not better, so that it
        "fails" there, or that they are "equal".
    rounding: values of a difference's two sides that are no farther apart, relative to the larger one, are equal.
    """

    name: str
    says: str
    kind: Kind
    task: str
    metric: str
    arm: str
    against: str | tuple[str, ...] = ""
    against_metric: str = ""  # where the other side is another metric, e.g. at another budget
    compare: Literal["ratio", "difference", "value"] = "ratio"
    op: Literal["<=", "<", ">=", ">"] = "<="
    bound: float = 1.0
    rule: Literal["every", "mean"] = "mean"
    control: str = ""
    gating: bool = True
    both_diverged: Literal["fails", "equal"] = "fails"
    rounding: float = 0.0

    @property
    def rivals(self) -> tuple[str, ...]:
        return (self.against,) if isinstance(self.against, str) and self.against else tuple(self.against)


@checks.arguments(
    values=checks.Map(), at=checks.Map() | None
)  # fmt: skip
@dataclass(frozen=True)
class Measurement:
    """What a trial yields: values by metric name, with ``at`` the coordinates on the way (``{"step": 10}``).

    A measurement without coordinates is final: the trial's results. A trial yields exactly one, as its last; metrics may be
    left out of those on the way.
    """

    values: Mapping[str, float]
    at: Mapping[str, float] | None = None


@checks.arguments(_at=checks.Map() | None)
def measure(_at: Mapping[str, float] | None = None, **values: float) -> Measurement:
    """``measure({"step": 10}, loss=0.3)`` on the way; ``measure(loss=0.2, accuracy=0.9)`` at the end."""
    return Measurement(values=values, at=_at)


@checks.arguments(
    claim=_WORDS, scale=_WORDS, task=_WORDS, arm=_WORDS, seed=checks.Integer(), device=checks.text, options=checks.Map()
)  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a trial function is given: all that determines its result.

    ``options`` holds, later over earlier, the scale's, the task's, the scale's for this task, the arm's, and the chosen
    point of the arm's grid. ``seed`` is the same for every arm of a pair: derive data order and initial state from it alone.
    """

    claim: str
    scale: str
    task: str
    arm: str
    seed: int
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        try:
            return self.options[key]
        except KeyError:
            raise KeyError(
                f"trial of {self.claim}: no option {key!r} for arm {self.arm!r}, task {self.task!r}; it has {sorted(self.options)}"
            ) from None


TrialFunction = Callable[[Trial], Iterator[Measurement]]


@checks.arguments(
    slug=checks.text, room=_WORDS, name=_WORDS, summary=_WORDS, says=_WORDS,
    paper=checks.Instance(Paper, words="a Paper"),
    part=_WORDS, budget=_WORDS, tasks=checks.Each(checks.Instance(Task, words="a Task")),
    arms=checks.Each(checks.Instance(Arm, words="an Arm")), scales=checks.Each(checks.Instance(Scale, words="a Scale")),
    metrics=checks.Each(checks.Instance(Metric, words="a Metric")),
    criteria=checks.Each(checks.Instance(Criterion, words="a Criterion")), trial=checks.Function("a function of a Trial", 1),
    departures=_TEXTS, errata=checks.Each(checks.Instance(Erratum, words="an Erratum")),
    picture=checks.Function("a function that returns a figure", 0) | None, sources=_TEXTS, usage=_WORDS,
)  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class Claim:
    """One system's claim: what its paper says, and the experiment that shows it. The lab does all the rest."""

    slug: str
    room: str  # "optim", "generate", ...
    name: str  # "Adan"
    summary: str  # one line for listings
    says: str  # what the paper says, in our own words, with its figures
    paper: Paper
    part: str  # "polyak.optim.adan:Adan"
    budget: str  # the unit in which arms are given equal budgets, e.g. "optimizer steps"
    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]
    scales: tuple[Scale, ...]
    metrics: tuple[Metric, ...]
    criteria: tuple[Criterion, ...]
    trial: TrialFunction
    departures: tuple[str, ...] = ()  # where the experiment differs from the paper's
    errata: tuple[Erratum, ...] = ()  # what official code gets wrong
    picture: Callable[[], Any] | None = (
        None  # draws what the method does, from the part itself, in seconds: polyak.lab.pictures
    )
    sources: tuple[str, ...] = ()  # further modules whose code decides results, beside the part's
    usage: str = ""  # two to four lines of code with the part in use; "": its import alone is shown

    def __post_init__(self) -> None:
        check_claim(self)

    def task(self, name: str) -> Task:
        return _named(self.tasks, name, f"claim {self.slug}: task")

    def arm(self, name: str) -> Arm:
        return _named(self.arms, name, f"claim {self.slug}: arm")

    def scale(self, name: str) -> Scale:
        return _named(self.scales, name, f"claim {self.slug}: scale")

    def metric(self, name: str) -> Metric:
        return _named(self.metrics, name, f"claim {self.slug}: metric")

    def tasks_at(self, scale: str) -> tuple[Task, ...]:
        only = self.scale(scale).tasks
        return tuple(t for t in self.tasks if not only or t.name in only)

    def arms_on(self, task: str) -> tuple[Arm, ...]:
        return tuple(a for a in self.arms if not a.tasks or task in a.tasks)

    def options(self, scale: str, task: str, arm: str, point: Mapping[str, Value] = EMPTY) -> dict[str, Any]:
        """What :attr:`Trial.options` holds for this combination."""
        s, t, a = self.scale(scale), self.task(task), self.arm(arm)
        return {**s.options, **t.options, **s.task_options.get(task, {}), **a.options, **point}


def _named(items: Iterable[Any], name: str, what: str) -> Any:
    found = {item.name: item for item in items}
    if name not in found:
        raise UnknownName(f"{what} {name!r} is unknown; it has {', '.join(found)}")
    return found[name]


_CLAIM = checks.Instance(Claim, words="a Claim")


@checks.arguments(claim=_CLAIM)
def check_claim(claim: Claim) -> None:
    """Raise ValueError where a claim contradicts itself: unknown names, unequal tuning budgets, a missing baseline."""
    where = f"claim {claim.slug!r}"
    for kind in ("tasks", "arms", "scales", "metrics"):
        names = [item.name for item in getattr(claim, kind)]
        if not names:
            raise ValueError(f"{where}: no {kind}")
        if len(set(names)) != len(names):
            raise ValueError(f"{where}: {kind} share a name: {names}")
    if claim.arms[0].role != "baseline":
        raise ValueError(f"{where}: the first arm must be the paper's baseline, got role {claim.arms[0].role!r}")
    tasks, metrics = ({i.name for i in items} for items in (claim.tasks, claim.metrics))
    for task in claim.tasks:
        sizes = {a.name: len(a.points) for a in claim.arms_on(task.name) if a.grid}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{where}, task {task.name!r}: arms must get equally many tuning trials, got {sizes}")
        if sizes and task.tune not in metrics:
            raise ValueError(
                f"{where}, task {task.name!r}: arms {sorted(sizes)} are tuned; tune= must name a metric, got {task.tune!r}"
            )
        for plot in task.plots:
            if plot.y not in metrics:
                raise ValueError(
                    f"{where}, task {task.name!r}: plot of unknown metric {plot.y!r}; it has {sorted(metrics)}"
                )
    for arm in claim.arms:
        if unknown := set(arm.tasks) - tasks:
            raise ValueError(f"{where}, arm {arm.name!r}: unknown tasks {sorted(unknown)}")
        if not arm.points:
            raise ValueError(f"{where}, arm {arm.name!r}: a name in its grid has no values: {dict(arm.grid)}")
    for scale in claim.scales:
        if unknown := {*scale.tasks, *scale.task_options} - tasks:
            raise ValueError(f"{where}, scale {scale.name!r}: unknown tasks {sorted(unknown)}; it has {sorted(tasks)}")
    for c in claim.criteria:
        if c.task not in tasks:
            raise ValueError(f"{where}, criterion {c.name!r}: unknown task {c.task!r}; it has {sorted(tasks)}")
        here = {a.name for a in claim.arms_on(c.task)}
        for arm_name in (c.arm, *c.rivals, *([c.control] if c.control else [])):
            if arm_name not in here:
                raise ValueError(
                    f"{where}, criterion {c.name!r}: no arm {arm_name!r} on task {c.task!r}; it has {sorted(here)}"
                )
        for metric in (c.metric, *([c.against_metric] if c.against_metric else [])):
            if metric not in metrics:
                raise ValueError(f"{where}, criterion {c.name!r}: unknown metric {metric!r}; it has {sorted(metrics)}")
        if (c.compare == "value") == bool(c.rivals):
            raise ValueError(f"{where}, criterion {c.name!r}: compare={c.compare!r} with against={c.against!r}")


@checks.arguments(claim=_CLAIM)
def check_rules(claim: Claim) -> None:
    """Raise ValueError where every seed must pass by a noisy metric: more seeds would make that harder, whatever is true."""
    exact = {m.name for m in claim.metrics if m.exact}
    for c in claim.criteria:
        if c.rule == "every" and (noisy := {c.metric, c.against_metric} - exact - {""}):
            raise ValueError(
                f"claim {claim.slug!r}, criterion {c.name!r}: rule='every' is for exact metrics, and {', '.join(sorted(noisy))} is "
                "not declared so (Metric(exact=True)); where seeds are noisy the rule is 'mean'"
            )
