"""Words and number formats that the terminal, the report and the scoreboard share."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polyak.lab.claim import KINDS, Claim, Criterion, Kind
from polyak.lab.result import ClaimResult, CriterionResult, KindVerdict
from polyak.lab.statistics import OPERATORS, UNCLEAR

GLYPHS = {"holds": "✓", "fails": "✗", "undecided": "?", "not asked": "–", "not run": "–"}  # never by colour alone
RULES = {"every": "every seed", "mean": "the mean over seeds"}
BOUNDS = {"<=": "at most", "<": "below", ">=": "at least", ">": "above"}


def number(value: Any, digits: int = 3) -> str:
    """Three significant digits, as short as they get: 0.312, 1.2e-5, 48,000, ∞. What is no number stays as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isnan(value):
        return "none"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or 10**digits - 0.5 <= abs(value) < 1e7:
        return f"{value:,.0f}".replace("-", "−")
    mantissa, _, exponent = f"{value:,.{digits}g}".partition("e")
    return (mantissa + (f"e{int(exponent)}" if exponent else "")).replace("-", "−")


def bound(c: CriterionResult) -> str:
    """ "at most 0.5"."""
    return f"{BOUNDS[c.op]} {number(c.bound)}"


def interval(c: CriterionResult) -> str:
    """ "0.25 to 0.38", or "none" where one seed gives no interval."""
    if math.isnan(c.low) or math.isnan(c.high):
        return "none"
    return f"{number(c.low)} to {number(c.high)}"


def rounded(value: float, low: float, high: float) -> str:
    """A value to the decimals of its interval: two digits of the larger end, and at least one of the interval's width.

    So of an estimate no more is said than is known: −3.19e−5 in −0.00294 to 0.003 is 0. The ends are said in the same way; one that
    is not zero, of an interval on one side of it, does not become zero. Of an infinite interval the value's own digits are said.
    """
    ends = [end for end in (low, high) if math.isfinite(end)]
    if not (ends and math.isfinite(value)):
        return number(value)
    size, width = max(map(abs, ends)), max(ends) - min(ends)
    places = 1 - _power(size) if size else 0
    if width:
        places = max(places, -_power(width))
    short = round(value, places)
    if not short:
        one_sided = low > 0 or high < 0
        return number(value, 1) if one_sided else "0"
    return number(short, max(1, _power(short) + places + 1))


def _power(value: float) -> int:
    """The power of ten of a number's first digit."""
    return math.floor(math.log10(abs(value)))


def compared(c: CriterionResult) -> tuple[str, str]:
    """A difference and its 95 % interval, to the same decimals: ("−0.005", "−0.0066 to −0.0015")."""
    if math.isnan(c.low) or math.isnan(c.high) or (math.isinf(c.low) and c.low == c.high):
        return number(c.estimate), "none"
    said, low, high = (rounded(v, c.low, c.high) for v in (c.estimate, c.low, c.high))
    return said, f"{low} to {high}"


def seeds_passing(c: CriterionResult) -> str:
    """ "5 of 5"."""
    return f"{c.seeds_passing} of {len(c.per_seed)}"


def count(n: int, noun: str, plural: str = "") -> str:
    """ "1 seed", "5 seeds"."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def listing(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


# Between "Discrete" and "Scheduler", "DPM" and "Solver"; after "a_", "module." and "name=".
_SEAMS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[_.:=/-])(?=\w)")


def parts(word: str) -> list[str]:
    """Where a long word may be broken: ["KDPM2", "Discrete", "Scheduler"]."""
    return _SEAMS.split(word)


def lines(text: str, width: int) -> list[str]:
    """Lines of at most so many characters. A word that is longer is broken between its parts, and a part that is, anywhere."""
    found = [""]
    for word in text.split():
        pieces = [word] if len(word) <= width else parts(word)
        pieces = [piece[i : i + width] for piece in pieces for i in range(0, len(piece), width)]
        for i, piece in enumerate(pieces):
            joint = "" if i or not found[-1] else " "
            if len(found[-1] + joint + piece) <= width:
                found[-1] += joint + piece
            else:
                found.append(piece)
    return found


def duration(seconds: float) -> str:
    """ "45 s", "3 min 20 s", "2 h 05 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s" if seconds >= 1 or seconds == 0 else f"{seconds:.1g} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def time(seconds: float) -> str:
    """A measured time: two significant digits below 10 s, so that 2.8 s and 3.4 s differ; from there on as :func:`duration`."""
    return f"{number(float(f'{seconds:.2g}'), 2)} s" if float(f"{seconds:.2g}") < 10 else duration(seconds)


def day(iso: str) -> str:
    """The day of an ISO date."""
    return iso[:10]


def options(point: Mapping[str, Any]) -> str:
    """ "lr = 0.01, steps = 400"; "none" for an empty one."""
    return ", ".join(f"{k} = {number(v) if isinstance(v, float) else v}" for k, v in point.items()) or "none"


def choices(points: Sequence[Mapping[str, Any]]) -> str:
    """What tuning chose, of each seed: "lr = 0.01", "lr = 0.01 (3 seeds) or 0.02 (2 seeds)", "lr = 0.0034 (0.001 to 0.01)"."""
    said = []
    for name in points[0] if points else ():
        values = [point[name] for point in points]
        shown = [number(v) if isinstance(v, float) else str(v) for v in values]
        counts = Counter(shown)
        if len(counts) == 1:
            said.append(f"{name} = {shown[0]}")
        elif len(counts) == 2 or not all(isinstance(v, (int, float)) for v in values):
            ordered = sorted(counts, key=lambda v: (-counts[v], shown.index(v)))
            said.append(f"{name} = " + " or ".join(f"{v} ({count(counts[v], 'seed')})" for v in ordered))
        else:
            said.append(f"{name} = {number(typical(values))} ({number(min(values))} to {number(max(values))})")
    return ", ".join(said) or "none"


def times(value: float, low: float, high: float) -> str:
    """A ratio with its interval: "0.8 × (0.6 to 1.1)"."""
    return f"{number(value, 2)} × ({number(low, 2)} to {number(high, 2)})"


def percent(share: float, interval: tuple[float, float]) -> tuple[str, str]:
    """A probability and its interval, in percent: ("80 %", "28 to 99 %")."""
    return f"{100 * share:.0f} %", " to ".join(f"{100 * end:.0f}" for end in interval) + " %"


def typical(values: Sequence[Any]) -> Any:
    """The middle one of numbers (of an even count the lower one), or the most frequent of what are none."""
    if all(isinstance(v, (int, float)) for v in values):
        return sorted(values)[(len(values) - 1) // 2]
    return Counter(values).most_common(1)[0][0]


def typical_point(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each option the typical value."""
    return {name: typical([point[name] for point in points]) for name in (points[0] if points else ())}


def verdict_of(result: ClaimResult | None) -> str:
    """The verdict over both kinds, or "not run"."""
    return result.verdict if result else "not run"


def of_kind(result: ClaimResult | None, kind: Kind) -> str:
    """The verdict of one kind, "not asked" where none of its criteria counts, or "not run"."""
    if result is None:
        return "not run"
    return next((v.verdict for v in result.verdicts if v.kind == kind), "not asked")


def said(v: KindVerdict, *, here: str = " at this scale") -> str:
    """A kind's verdict with how many criteria are met: "holds, 4 of 4", "not seen at this scale, 1 of 3"."""
    return f"{called(v.kind, v.verdict, here=here)}, {v.met} of {v.total}"


def called(kind: Kind, verdict: str, *, here: str = " at this scale") -> str:
    """What a kind's verdict is called: an effect that fails was not seen at this scale."""
    return f"not seen{here}" if (kind, verdict) == ("effect", "fails") else verdict


def said_of(result: ClaimResult | None, kind: Kind, *, here: str = " at this scale") -> str:
    """The same of a result, or "not asked" or "not run"."""
    found = [said(v, here=here) for v in (result.verdicts if result else ()) if v.kind == kind]
    return found[0] if found else of_kind(result, kind)


def marked(result: ClaimResult | None, kind: Kind, *, here: str = " at this scale") -> str:
    """The same with its glyph: "✓ holds, 4 of 4"."""
    return f"{GLYPHS[of_kind(result, kind)]} {said_of(result, kind, here=here)}"


def at_scales(results: Sequence[ClaimResult]) -> list[str]:
    """A cell for each kind: "✓ holds, 4 of 4"; with several scales "✗ not seen, 1 of 3 (small); ✓ holds, 3 of 3 (gpu)"."""
    if len(results) < 2:
        return [marked(results[0] if results else None, kind) for kind in KINDS]
    return ["; ".join(f"{marked(r, kind, here='')} ({r.scale})" for r in results) for kind in KINDS]


def tally(verdicts: Iterable[str]) -> str:
    """ "3 holds, 1 fails", in the order of the glyphs."""
    counts = Counter(verdicts)
    return ", ".join(f"{counts[v]} {GLYPHS[v]} {v}" for v in GLYPHS if counts[v])


def deciding(result: ClaimResult) -> list[CriterionResult]:
    """The criteria to name: of each kind that does not hold the first that made it so; where both do, the last kind's first."""
    chosen = []
    for v in result.verdicts:
        counting = [c for c in result.criteria if c.gating and c.kind == v.kind]
        chosen.append((v.verdict, next(c for c in counting if c.verdict == v.verdict)))
    return [c for verdict, c in chosen if verdict != "holds"] or [c for _, c in chosen[-1:]]


def reason(c: CriterionResult) -> str:
    """Why the verdict is not what the estimate alone would say, in a clause; "" where the estimate says it."""
    if c.verdict == "undecided":
        return _why_undecided(c)
    if c.verdict == "fails" and OPERATORS[c.op](c.estimate, c.bound):
        return f"every seed must pass, and only {seeds_passing(c)} do{'es' if c.seeds_passing == 1 else ''}"
    return ""


def _why_undecided(c: CriterionResult) -> str:
    if c.control_verdict == "holds":
        return "the control, which lacks the method's key ingredient, passes too"
    note = c.note.rstrip(".")
    if UNCLEAR in note and c.low < c.bound < c.high:
        return f"the interval reaches across the bound (p = {number(c.p_value)})"
    if not note:
        return f"the interval, {interval(c)}, does not lie on one side of the bound"
    return note


def where(result: ClaimResult) -> str:
    """ "at scale small, on 5 seeds"."""
    return f"at scale {result.scale}, on {count(len(result.seeds), 'seed')}"


def figures(c: CriterionResult) -> str:
    """ "measured 0.267 (interval 0.178 to 0.399), asked at most 0.5"."""
    within = "" if interval(c) == "none" else f" (interval {interval(c)})"
    return f"measured {number(c.estimate)}{within}, asked {bound(c)}"


def measured(c: CriterionResult) -> str:
    """The figures and, where they do not explain the verdict, its reason: "...; every seed must pass, and only 4 of 5 do"."""
    return "; ".join(filter(None, [figures(c), reason(c)]))


def names(claim: Claim, criteria: Sequence[Criterion | CriterionResult]) -> dict[str, str]:
    """What these criteria ask, by name; with the task where several ask the same."""
    tasks = {c.name: claim.task(c.task).label for c in claim.criteria}
    counts = Counter(c.says for c in criteria)
    return {
        c.name: f"{c.says} ({tasks[c.name]})" if counts[c.says] > 1 and c.name in tasks else c.says for c in criteria
    }


def quantity(claim: Claim, c: Criterion) -> str:
    """What a criterion's axis shows: "training loss, ratio: Swift ÷ AdamW", "accuracy (points), difference: Swift − AdamW"."""
    metric, arm = claim.metric(c.metric), claim.arm(c.arm).label
    unit = f" ({metric.unit})" if metric.unit and c.compare != "ratio" else ""
    if c.compare == "value":
        return f"{metric.label}{unit}: {arm}"
    rival = listing([claim.arm(name).label for name in c.rivals])
    if len(c.rivals) > 1:
        rival = f"the best of {rival}"
    if c.against_metric:
        rival = f"{rival} ({claim.metric(c.against_metric).label})"
    return f"{metric.label}{unit}, {c.compare}: {arm} {'÷' if c.compare == 'ratio' else '−'} {rival}"


def condition(claim: Claim, c: Criterion) -> str:
    """What must be true, in full: "Training loss, ratio: Swift ÷ AdamW: at most 0.5, the mean over seeds, on Digits"."""
    asked = f"{quantity(claim, c)}: {BOUNDS[c.op]} {number(c.bound)}, {RULES[c.rule]}, on {claim.task(c.task).label}"
    return f"{asked}; {claim.arm(c.control).label}, in its place, must not pass" if c.control else asked


def finding(claim: Claim, result: ClaimResult | None) -> str:
    """What was found, in plain sentences: each kind's verdict, and what decided it."""
    verdicts = [f"{v.kind.capitalize()}: {said(v)}." for v in (result.verdicts if result else ())]
    return " ".join([*verdicts, *decisions(claim, result)])


def decisions(claim: Claim, result: ClaimResult | None) -> list[str]:
    """A sentence for each of the criteria to name."""
    if result is None:
        return ["Nothing yet: it has not been run."]
    named = names(claim, result.criteria)
    return [f"{named[c.name].rstrip('.')}: {measured(c)}." for c in deciding(result)]


def usage(claim: Claim) -> list[str]:
    """The lines of code that bring the part into a user's own."""
    module, _, name = claim.part.partition(":")
    head = f"from {module} import {name}" if name else f"import {module}"
    return claim.usage.strip().splitlines() or [head, f"help({name or module})"]
