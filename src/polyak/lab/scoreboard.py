"""SCOREBOARD.md and the README's tables of systems, made from published verdicts: the same data, the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from polyak.lab import words
from polyak.lab.claim import KINDS, Claim
from polyak.lab.report import Entry, by_room
from polyak.lab.result import ClaimResult

OPEN, CLOSE = "<!-- systems -->", "<!-- /systems -->"
# What each room holds.
ROOMS = {
    "optim": "optimizers",
    "teachers": "averages and combinations of weights",
    "layers": "layers of networks",
    "particles": "weighted particles: smoothing, resampling, flow networks",
    "generate": "samplers of diffusion and flow models",
    "pde": "physics-informed networks and neural operators",
    "physics": "simulators and solvers of physical systems",
    "forecast": "forecasts of markets, air and traffic, and the scores that judge them",
    "dynamics": "analyses of training, and of networks as dynamical systems",
}
LARGEST = 50_000  # bytes; a published verdict is a summary, not an archive


def published_record(result: ClaimResult) -> dict[str, Any]:
    """What is published of a result: all but its trials and their curves. ValueError if that is not small."""
    record = {key: value for key, value in result.to_json().items() if key != "trials"}
    for criterion in record["criteria"]:
        # One number for each seed: nine digits say as much, in half of the room.
        each = criterion["per_seed"]  # what is not finite is a word
        criterion["per_seed"] = [v if isinstance(v, str) else float(f"{v:.9g}") for v in each]
    if len(str(record)) > LARGEST:
        raise ValueError(
            f"the verdict of {result.slug} takes {len(str(record)):,} bytes; at most {LARGEST:,} are published"
        )
    return record


def scoreboard(entries: Sequence[Entry]) -> str:
    """The text of SCOREBOARD.md: a row for each system and scale, then every criterion with its numbers."""
    parts = [
        "# Scoreboard",
        "Made by `polyak record` from published verdicts; do not edit. Bounds were set before the runs. "
        "A claim that fails at a scale is listed as plainly as one that holds.",
        _tally(entries),
        _table(
            ["system", *KINDS, "scale", "decided by", "result", "seeds", "date", "made with"],
            [_row(e.claim, result) for e in entries for result in e.results or (None,)],
        ),
        "*Result*: the estimate, its 95 % interval in brackets, and the bound asked for. "
        "Ratios are averaged over paired seeds as logarithms.",
    ]
    for e in entries:
        if e.results:
            parts += _system(e.claim, e.results)
    return "\n\n".join(parts) + "\n"


def systems_table(entries: Sequence[Entry]) -> str:
    """The README's tables: one for each room, under a heading that says what the room holds."""
    parts = []
    for room, those in by_room(entries).items():
        parts.append(f"### {room}: {ROOMS[room]}" if room in ROOMS else f"### {room}")
        rows = [
            [f"`{e.claim.slug}`", _cell(e.claim.name), _cell(e.claim.summary), *words.at_scales(e.results)]
            for e in those
        ]
        parts.append(_table(["slug", "system", "what it is", *KINDS], rows))
    return "\n\n".join(parts)


def with_table(readme: str, table: str) -> str:
    """The README with the table between its markers. ValueError where the markers are not there, once each, in order."""
    if readme.count(OPEN) != 1 or readme.count(CLOSE) != 1 or readme.index(OPEN) > readme.index(CLOSE):
        raise ValueError(f"README.md must have one {OPEN} and, after it, one {CLOSE}")
    before, _, rest = readme.partition(OPEN)
    return f"{before}{OPEN}\n{table}\n{CLOSE}{rest.partition(CLOSE)[2]}"


def _tally(entries: Sequence[Entry]) -> str:
    if not entries:
        return "No systems yet."
    told = [f"{words.count(len(entries), 'system')}."]
    for kind in KINDS:
        counts = Counter(words.of_kind(e.result, kind) for e in entries)
        told.append(
            f"{kind.capitalize()}: {', '.join(f'{counts[v]} {words.called(kind, v)}' for v in words.GLYPHS if counts[v])}."
        )
    return " ".join(told)


def _row(claim: Claim, result: ClaimResult | None) -> list[str]:
    name = f"[{_cell(claim.name)}](#{claim.slug})" if result else _cell(claim.name)
    if result is None:
        return [name, *_verdicts(None), *[""] * 6]
    c = next(iter(words.deciding(result)), None)
    made_with = f"torch {result.versions.get('torch', '?')}, {result.device}"
    decided = [_cell(words.names(claim, result.criteria)[c.name]), _numbers(c)] if c else ["no criterion decides", ""]
    return [name, *_verdicts(result), result.scale, *decided, str(len(result.seeds)), words.day(result.date), made_with]


def _system(claim: Claim, results: Sequence[ClaimResult]) -> list[str]:
    parts = [f'<a id="{claim.slug}"></a>\n\n## {claim.name}', f"{_cell(claim.says)} ({_source(claim)})"]
    for result in results:
        if len(results) > 1:
            parts.append(f"### {claim.name} at scale {result.scale}")
        parts += _at_scale(claim, result)
    return parts


def _at_scale(claim: Claim, result: ClaimResult) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))
    names = words.names(claim, result.criteria)
    rows = [
        [
            _cell(names[c.name]) + ("" if c.gating else " (reported only)"),
            c.kind,
            f"{words.GLYPHS[c.verdict]} {c.verdict}",
            _cell(c.statistic),
            words.number(c.estimate),
            words.interval(c),
            words.bound(c),
            words.seeds_passing(c),
            c.control_verdict and f"{words.GLYPHS.get(c.control_verdict, '')} {c.control_verdict}".strip(),
        ]
        for c in result.criteria
    ]
    return [
        f"{_cell(words.finding(claim, result))} All {words.where(result)}.",
        _table(
            ["criterion", "kind", "verdict", "statistic", "estimate", "95 % interval", "bound", "seeds", "its control"],
            rows,
        ),
        f"Run on {words.day(result.date)}, {words.duration(result.seconds)} in all, device {result.device}; {versions}.",
    ]


def _source(claim: Claim) -> str:
    title = f"*{_cell(claim.paper.title)}*, {claim.paper.year}"
    return f"{title}, [arXiv {claim.paper.arxiv}]({claim.paper.url})" if claim.paper.arxiv else title


def _verdicts(result: ClaimResult | None) -> list[str]:
    """A cell for each kind's verdict."""
    return [words.marked(result, kind) for kind in KINDS]


def _numbers(c: Any) -> str:
    said = f"{words.number(c.estimate)} [{words.interval(c)}], asked {words.bound(c)}"
    return "; ".join(filter(None, [said, words.reason(c)]))


def _cell(text: str) -> str:
    """Text that cannot break out of a cell: one line, no bars, no tags."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
