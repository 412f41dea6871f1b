"""The HTML report: a page per claim and an index over all. Self-contained: it opens from disk, with no network or server."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from polyak.lab import pictures, plots, strips, words
from polyak.lab.claim import KINDS, Arm, Claim, Criterion, Metric, Task
from polyak.lab.result import ClaimResult, CriterionResult, TrialResult

ROLES = {
    "baseline": "the paper's baseline",
    "method": "the paper's method",
    "ablation": "a variant, to see what matters",
    "control": "a negative control: it must not pass",
}
FEW = 3  # criteria that are shown without a fold
TILES = 12  # pictures at the top of an index
LONG = 12  # characters of a word that a browser may break
RULES = {
    "every": "Every seed must pass.",
    "mean": "The mean over seeds decides.",
}


@dataclass(frozen=True)
class Entry:
    """What the report says about one system: its claim and, if there is one, a result; and those of other scales."""

    claim: Claim
    result: ClaimResult | None
    published: bool = False  # the result came with polyak; it has no trials
    more: tuple[ClaimResult, ...] = ()  # at other scales

    @property
    def results(self) -> tuple[ClaimResult, ...]:
        """One for each scale that was run, in the claim's order."""
        order = [scale.name for scale in self.claim.scales]
        known = [r for r in (self.result, *self.more) if r is not None]
        return tuple(sorted(known, key=lambda r: order.index(r.scale) if r.scale in order else len(order)))


def entry(
    claim: Claim, own: Sequence[ClaimResult], published: Mapping[str, ClaimResult], *, scale: str | None = None
) -> Entry:
    """A system with what there is of it: own results rather than those published with polyak.

    The one at ``scale`` stands first; by default that of the claim's first scale that has an own one, else a published one.
    """
    by_scale = {**published, **{result.scale: result for result in own}}
    if scale is None:
        have = {result.scale for result in own} or by_scale.keys()
        scale = next((s.name for s in claim.scales if s.name in have), "")
    first = by_scale.pop(scale, None)
    return Entry(claim, first, first is not None and first not in own, tuple(by_scale.values()))


@dataclass(frozen=True)
class Live:
    """What a page that `polyak serve` sends has beside a written one's: a panel of runs in flight that keeps itself up to date."""

    panel: str = ""  # HTML
    claim: str = ""  # the slug of the claim whose runs alone it shows
    revision: str = ""  # changes when the page should be made anew


def write_report(entries: Sequence[Entry], out: Path, *, pages: Collection[str] | None = None) -> Path:
    """Write ``index.html`` over all entries and a page for those whose slug is in ``pages`` (None: for all); the index's path."""
    out.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        if pages is None or entry.claim.slug in pages:
            (out / f"{entry.claim.slug}.html").write_text(claim_page(entry), encoding="utf-8")
    linked = {e.claim.slug for e in entries if (out / f"{e.claim.slug}.html").exists()}
    (out / "gallery.html").write_text(gallery_page(entries, linked=linked), encoding="utf-8")
    index = out / "index.html"
    index.write_text(index_page(entries, linked=linked), encoding="utf-8")
    return index


def index_page(
    entries: Sequence[Entry],
    *,
    linked: Collection[str],
    live: Live | None = None,
    compared: Sequence[Mapping[str, Any]] = (),
    comparisons: int = 0,
) -> str:
    """The index: every system by room, with its verdict and what decided it; a link for those that have a page.

    Served, it begins with the latest of so many ``comparisons`` (``compared``, as in the list of runs).
    """
    counts = {kind: Counter(words.of_kind(e.result, kind) for e in entries) for kind in KINDS}
    return render(
        "index.html",
        entries=sorted(entries, key=lambda e: e.claim.room),
        tiles=some_tiles(_pictured(entries, live)),
        counts=counts,
        order=list(words.GLYPHS),
        total=len(entries),
        linked=linked,
        live=live,
        compared=compared,
        more=comparisons if comparisons > len(compared) else 0,
    )


def gallery_page(entries: Sequence[Entry], *, linked: Collection[str], live: Live | None = None) -> str:
    """The pictures of all systems that have one, by room."""
    return render("gallery.html", rooms=by_room(_pictured(entries, live)), linked=linked, live=live)


def _pictured(entries: Iterable[Entry], live: Live | None) -> list[Entry]:
    """Those that have a picture; on a served page, which must not wait for drawings, those whose picture is drawn."""
    return [e for e in entries if (pictures.is_kept(e.claim) if live else e.claim.picture)]


def by_room(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by their room, in the order in which they come."""
    rooms: dict[str, list[Entry]] = {}
    for e in entries:
        rooms.setdefault(e.claim.room, []).append(e)
    return rooms


def some_tiles(entries: Iterable[Entry]) -> list[Entry]:
    """Those whose pictures open a page: at most :data:`TILES`, from every room in turn."""
    rooms = [[e for e in those if e.claim.picture] for those in by_room(entries).values()]
    return [e for turn in zip_longest(*rooms) for e in turn if e is not None][:TILES]


def picture(claim: Claim):
    """A claim's picture, for a page; "" where it has none."""
    from markupsafe import Markup

    return Markup(pictures.drawn(claim))


def claim_page(entry: Entry, *, so_far: ClaimResult | None = None, live: Live | None = None) -> str:
    """The page of one claim. ``so_far`` holds the trials of a run that has not ended: their curves are shown, nothing is judged."""
    return render("claim.html", **view(entry, so_far=so_far), live=live)


def view(entry: Entry, *, so_far: ClaimResult | None = None) -> dict[str, Any]:
    """What a template of one claim's page is given; ``so_far`` as in :func:`claim_page`."""
    claim, result = entry.claim, entry.result
    outcomes = {c.name: c for c in result.criteria} if result else {}
    # Where a scale leaves a criterion's task out, its outcome does not count whatever the claim declares.
    counts = {c.name: outcomes[c.name].gating if c.name in outcomes else c.gating for c in claim.criteria}
    shown = so_far or result
    decided = {o.name for o in words.deciding(result)} if result else set()
    by_kind = sorted(claim.criteria, key=lambda c: KINDS.index(c.kind))
    asked = [c for c in by_kind if counts[c.name]]
    others = [c for c in by_kind if not counts[c.name]]
    shown_criteria, folds = _folded(asked, others, decided, outcomes)
    return {
        "entry": entry,
        "claim": claim,
        "result": result,
        "verdict": words.verdict_of(result),
        "baselines": [arm.label for arm in claim.arms if arm.role == "baseline"],
        "decided": [(c, outcomes[c.name]) for c in by_kind if c.name in decided],
        "names": words.names(claim, claim.criteria),
        "asked": asked,
        "others": others,
        "shown": shown_criteria,
        "folds": folds,
        "tally": words.tally(o.verdict for o in outcomes.values() if o.gating),
        "outcomes": outcomes,
        "tasks": [_task(claim, task, shown) for task in _tasks(claim, shown)],
        "arms": [arm_facts(claim, arm, result) for arm in claim.arms],
        "trials": trial_rows(claim, result) if result else [],
        "data": embedded(result.to_json()) if result and result.trials else "",
        "diverged": _diverged(t for t in result.trials if t.purpose == "report") if result else 0,
        "so_far": so_far,
    }


@dataclass(frozen=True)
class Fold:
    """Criteria that are shown on request. counts: whether verdicts depend on them."""

    says: str
    criteria: list[Criterion]
    counts: bool


def _folded(
    asked: list[Criterion], others: list[Criterion], decided: Collection[str], outcomes: Mapping[str, CriterionResult]
) -> tuple[list[tuple[Criterion, bool]], list[Fold]]:
    """The criteria to show at once, with whether they count, and folds of the others: by kind, then those only reported."""
    few = len(asked) <= FEW
    shown = [(c, True) for c in asked if few or c.name in decided]
    rest = {kind: [c for c in asked if not few and c.name not in decided and c.kind == kind] for kind in KINDS}
    folds = [Fold(_called(kind, these, asked, outcomes), these, True) for kind, these in rest.items() if these]
    if len(others) <= FEW:
        return shown + [(c, False) for c in others], folds
    return shown, [*folds, Fold(f"{len(others)} more that are only reported{_tally(others, outcomes)}", others, False)]


def _called(kind: str, these: list[Criterion], asked: list[Criterion], outcomes: Mapping[str, CriterionResult]) -> str:
    more = "more " if any(c.kind == kind and c not in these for c in asked) else ""
    return f"{kind.capitalize()}: {words.count(len(these), f'{more}criterion', f'{more}criteria')}{_tally(these, outcomes)}"


def _tally(these: Iterable[Criterion], outcomes: Mapping[str, CriterionResult]) -> str:
    found = words.tally(outcomes[c.name].verdict for c in these if c.name in outcomes)
    return f": {found}" if found else ""


def _tasks(claim: Claim, result: ClaimResult | None) -> tuple[Task, ...]:
    scales = {scale.name for scale in claim.scales}
    return claim.tasks_at(result.scale) if result and result.scale in scales else claim.tasks


def _task(claim: Claim, task: Task, result: ClaimResult | None) -> dict[str, Any]:
    from markupsafe import Markup

    if result is None:
        return {"task": task, "plots": [], "finals": {}}
    drawn = []
    for plot in task.plots:
        if svg := plots.curves(claim, task, plot, result):
            title = plot.title or _plot_title(claim, plot.y, plot.x_label or plot.x)
            drawn.append({"title": title, "svg": Markup(svg)})
    return {"task": task, "plots": drawn, "finals": _finals(claim, task, result)}


def _plot_title(claim: Claim, metric: str, x: str) -> str:
    label = claim.metric(metric).label
    return f"{label[:1].upper()}{label[1:]} against {x}"


def _finals(claim: Claim, task: Task, result: ClaimResult) -> dict[str, Any]:
    """Final values per arm: the metrics that were measured here, as the median and the range over seeds."""
    rows, seen = [], [m for m in claim.metrics if any(m.name in t.values for t in result.trials if t.task == task.name)]
    for arm in claim.arms_on(task.name):
        reported = [t for t in result.trials if (t.purpose, t.task, t.arm) == ("report", task.name, arm.name)]
        if reported:
            cells = [_spread([t.values[m.name] for t in reported if m.name in t.values]) for m in seen]
            rows.append({"arm": arm_facts(claim, arm, result), "cells": cells, "diverged": _diverged(reported)})
    return {"metrics": seen, "rows": rows}


def _diverged(trials: Iterable[TrialResult]) -> int:
    return sum(t.diverged for t in trials)


def _spread(values: Sequence[float]) -> tuple[float, str, str]:
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return math.nan, "none", ""
    middle = statistics.median(known)
    span = f"{words.number(min(known))} to {words.number(max(known))}" if len(known) > 1 else ""
    return middle, words.number(middle), span


def arm_facts(claim: Claim, arm: Arm, result: ClaimResult | None) -> dict[str, Any]:
    """What a page says of an arm: its swatch, role, and what tuning chose."""
    from markupsafe import Markup

    chosen = {
        claim.task(task).label: words.choices(points[arm.name])
        for task, points in (result.chosen.items() if result else ())
        if points.get(arm.name) and any(t.name == task for t in claim.tasks)
    }
    return {"arm": arm, "swatch": Markup(plots.swatch(claim, arm)), "chosen": chosen, "role": ROLES[arm.role]}


def trial_rows(
    claim: Claim, result: ClaimResult, metrics: Sequence[Metric] | None = None, *, told: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """All trials, for the table of them, with these metrics (default: all of the claim's).

    Of a diverged trial every metric has its worst value. ``told`` names, by purpose, the one that stands for its outcome;
    the others are then left out, since they were not measured.
    """
    labels = {a.name: a.label for a in claim.arms} | {t.name: t.label for t in claim.tasks}
    shown = claim.metrics if metrics is None else metrics

    def value(t: TrialResult, name: str) -> float | None:
        measured = not t.diverged or told is None or told[t.purpose] == name
        return t.values.get(name) if measured else None

    return [
        {
            "trial": t,
            "task": labels.get(t.task, t.task),
            "arm": labels.get(t.arm, t.arm),
            # A message of one that did not diverge is that it was stopped.
            "purpose": f"{t.purpose}, {t.message}" if t.message and not t.diverged else t.purpose,
            "values": [value(t, m.name) for m in shown],
        }
        for t in sorted(result.trials, key=lambda t: (t.purpose, t.task, t.arm, t.seed))
    ]


def embedded(data: Any):
    """JSON that no parser of HTML can mistake for the end of its script element."""
    from markupsafe import Markup

    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def strip(c: CriterionResult, criterion: Criterion):
    from markupsafe import Markup

    return Markup(strips.strip(c, criterion.compare))


def breakable(text: str):
    """A name whose long words a browser may break between their parts."""
    from markupsafe import Markup, escape

    return Markup(" ").join(
        Markup("<wbr>").join(map(escape, words.parts(word) if len(word) > LONG else [word])) for word in text.split(" ")
    )


def render(template: str, **facts: Any) -> str:
    """A page, or a part of one, from its template."""
    return templates().get_template(template).render(**facts)


TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS, SHEET = ("page.js", "find.js", "live.js"), "style.css"


@cache
def source(name: str):
    """A script or style sheet as it stands in a page."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def digest(text: str) -> str:
    """SHA-256, as browsers write it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def served_policy() -> str:
    """The Content-Security-Policy of served pages: these scripts and this sheet, data of this server, nothing else."""
    scripts = " ".join(f"'sha256-{digest(source(name))}'" for name in SCRIPTS)
    # The attributes are those of matplotlib's drawings.
    return (
        f"default-src 'none'; script-src {scripts}; style-src-elem 'sha256-{digest(source(SHEET))}'; "
        "style-src-attr 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


@cache
def templates(*folders: Path):
    """The report's templates; those of ``folders`` are found first."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["breakable"] = breakable
    environment.globals |= {
        "words": words,
        "strip": strip,
        "picture": picture,
        "description": pictures.description,
        "rules": RULES,
        "kinds": KINDS,
        "source": source,
        "live": None,
    }
    return environment
