"""Terminal output: the list of systems, a system's sheet, results and progress."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from polyak.lab import words
from polyak.lab.claim import KINDS, Claim, Criterion, Kind, Scale
from polyak.lab.report import Entry
from polyak.lab.result import ClaimResult

if TYPE_CHECKING:
    from polyak.lab.compare.answer import TaskComparison
    from polyak.lab.compare.comparison import Comparison
    from polyak.lab.compare.rows import Estimate, Row
    from polyak.lab.run import Progress

STYLES = {"holds": "green", "fails": "red", "undecided": "yellow", "not asked": "dim", "not run": "dim"}
REST_S = 30  # where no terminal redraws a line, progress is told this often
PIPE_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr. Into a file or pipe its lines are of one length."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = PIPE_WIDTH
    return made


def verdict(name: str, note: str = "") -> Text:
    """ "✓ holds", coloured."""
    return Text.assemble((f"{words.GLYPHS[name]} {name}", STYLES[name]), (f" {note}" if note else "", "dim"))


def listing(entries: Sequence[Entry], width: int) -> Table:
    """All systems in a table, with both verdicts; in a narrow terminal these stand below the slug, one above the other."""
    wide = width >= 100
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in ("system", "room", "mechanism", "effect at this scale") if wide else ("system",):
        table.add_column(head, no_wrap=True)
    table.add_column("what it is")
    for e in entries:
        found = [_at_scales(e, kind) for kind in KINDS]
        if wide:
            name = Text.assemble(e.claim.slug, ("\n(published)" if e.published else "", "dim"))
            table.add_row(name, e.claim.room, *found, Text(e.claim.summary))
        else:
            told = [Text.assemble((f"{kind} ", "dim"), one) for kind, one in zip(KINDS, found, strict=True)]
            more = f"{e.claim.room} (published)" if e.published else e.claim.room
            table.add_row(Text("\n").join([Text(e.claim.slug), Text(more, "dim"), *told]), Text(e.claim.summary))
    return table


def _at_scales(e: Entry, kind: Kind) -> Text:
    """A kind's verdict; a line for each scale where there are several."""
    if len(e.results) < 2:
        return _kind(e.result, kind)
    return Text("\n").join(_kind(r, kind).append(f" ({r.scale})", "dim") for r in e.results)


def _kind(result: ClaimResult | None, kind: Kind, here: str = "") -> Text:
    """ "✗ not seen, 1 of 3", coloured."""
    return Text(words.marked(result, kind, here=here), STYLES[words.of_kind(result, kind)])


def results(claim: Claim, result: ClaimResult, width: int) -> Table:
    """A claim's criteria with their numbers; in a narrow terminal these take two lines, in a very narrow one stand below."""
    names = words.names(claim, result.criteria)
    asked = [(c, Text(names[c.name]).append("" if c.gating else " (reported only)", "dim")) for c in result.criteria]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if width < 80:
        table.add_column("verdict", no_wrap=True)
        table.add_column("criterion")
        for c, says in asked:
            says.append(f"\n{words.measured(c)}. {words.seeds_passing(c)} seeds pass.", "dim")
            table.add_row(verdict(c.verdict), says)
        return table
    gap = " " if width >= 100 else "\n"
    table.add_column("criterion")
    for head in ("estimate", f"95 %{gap}interval", "asked", "seeds"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for c, says in asked:
        if why := words.reason(c):
            says.append(f"\n{why}", "yellow")
        within = words.interval(c).replace(" to ", f"{gap}to ")
        bound = f"{words.BOUNDS[c.op]}{gap}{words.number(c.bound)}"
        table.add_row(says, words.number(c.estimate), within, bound, words.seeds_passing(c), verdict(c.verdict))
    return table


def outcome(out: Console, claim: Claim, result: ClaimResult, *, published: bool = False) -> None:
    """A claim's verdicts, a line each, the criteria to name in a sentence each, all of them in a table."""
    head = Text.assemble((claim.name, "bold"), f" {words.where(result)}")
    out.print(head.append(f" (published, {words.day(result.date)})" if published else "", "dim"))
    for kind in KINDS:
        out.print(Text.assemble(f"{kind}: ", _kind(result, kind, " at this scale")))
    for sentence in words.decisions(claim, result):
        out.print(Text(sentence))
    if lost := sum(t.diverged for t in result.trials if t.purpose == "report"):
        out.print(Text(f"{words.count(lost, 'reported trial')} diverged, counted at the worst value.", "yellow"))
    out.print(results(claim, result, out.width))


def comparison(out: Console, found: Comparison) -> None:
    """What a comparison found: its answer, what makes it doubtful, and a row for each arm."""
    said = found.said
    out.print(Text(f"{said.head}." if said.long else str(said), "bold"))
    if said.long:
        for clause in (*said.rest, *filter(None, [said.more])):
            out.print(Padding(Text(clause), (0, 0, 0, 2)))
    for warning in found.warnings:
        out.print(Text(f"! {warning}", "yellow"))
    whole = True
    for t in found.tasks:
        if len(found.tasks) > 1:
            out.print(Text(f"\n{t.name}", "bold"))
        table, all_columns = _arms(out, t)
        whole = whole and all_columns
        out.print(table)
        for note in t.notes:
            out.print(Text(f"- {note}", "dim"))
    if not whole:
        out.print(Text("More columns: in a wider terminal, or on the page.", "dim"))


# What a narrow terminal does without, the least important first: the chance to be better, trials that diverged (they are then said
# beside the arm's name), and what it cost to reach the target, in the budget's unit and in the other one.
_OPTIONAL = ("chance", "diverged", "other cost", "cost")
_NAME = 12  # columns that arms' names need at least, where they take several lines


def _arms(out: Console, t: TaskComparison) -> tuple[Table | Text, bool]:
    """A row for each arm, in the fullest form that is not wider than the terminal; and whether it has all columns."""
    endless = out.options.update(width=10_000)

    def width(table: Table) -> int:
        return Measurement.get(out, endless, table).maximum

    forms = [_table(t, _OPTIONAL, broken=False)]
    forms += [_table(t, _OPTIONAL[left_out:], broken=True) for left_out in range(len(_OPTIONAL) + 1)]
    for table in forms:
        if width(table) <= out.width:
            return table, len(table.columns) == len(forms[0].columns)
    names = max(len(row.label) for row in t.rows)
    if out.width >= width(forms[-1]) - names + _NAME:
        return forms[-1], False
    lines = [Text.assemble((row.label, "bold"), f": {t.main.label} ", *_plainly(row)) for row in t.rows]
    return Text("\n").join(lines), False


def _table(t: TaskComparison, optional: Sequence[str], *, broken: bool) -> Table:
    """``broken``: intervals take two lines."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    gap = "\n" if broken else " "
    for head in (t.main.label.replace(" ", "\n"), "difference", f"95 %{gap}interval"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    unit, goal = t.unit, t.goal.replace(" ", "\n")
    costs = {f"{unit}\nto {goal}": _spent, f"time\nto {goal}": _time}
    first, other = reversed(costs) if t.setup.budget.unit == "seconds" else costs
    heads = {"cost": first, "other cost": other, "chance": "chance\nto win", "diverged": "diverged"}
    shown = {name: head for name, head in heads.items() if name in optional}
    for head in shown.values():
        table.add_column(head, justify="right", no_wrap=True)
    for row in t.rows:
        estimate, interval = words.compared(row.difference) if row.difference else ("", "")
        lost = f"{row.diverged} of {row.seeds}"
        label = Text(row.label)
        if row.diverged and "diverged" not in shown:
            label.append(f"\n{lost} diverged", "yellow")
        cells = {
            "chance": _chance(row),
            "diverged": lost,
            "cost": costs[first](t, row),
            "other cost": costs[other](t, row),
        }
        fixed = (label, words.number(row.final), estimate, interval.replace(" to ", f"{gap}to "), _judged(row))
        table.add_row(*fixed, *(cells[name] for name in shown))
    return table


def _judged(row: Row) -> Text:
    d = row.difference
    return Text(_OUTCOMES[d.verdict], STYLES[d.verdict]) if d else Text("baseline", "dim")


def _plainly(row: Row) -> list[str | Text]:
    said = words.number(row.final)
    if row.difference:
        estimate, interval = words.compared(row.difference)
        said += f", difference {estimate} (95 %: {interval})"
    lost = f", {row.diverged} of {row.seeds} diverged" if row.diverged else ""
    return [f"{said}{lost}, ", _judged(row)]


def _chance(row: Row) -> str:
    if row.difference is None or row.chance is None:
        return ""
    return "\n".join(words.percent(row.difference.improvement, row.chance))


def _spent(t: TaskComparison, row: Row) -> str:
    return _cost(t, row, words.number(row.spent_to_target), row.spent_ratio)


def _time(t: TaskComparison, row: Row) -> str:
    amount = words.time(row.seconds_to_target) if math.isfinite(row.seconds_to_target) else ""
    return _cost(t, row, amount, row.seconds_ratio)


def _cost(t: TaskComparison, row: Row, amount: str, ratio: Estimate | None) -> str:
    """What it took to the target, with how many seeds reached it where not all did, and the ratio to the baseline's."""
    some = t.reached(row)
    if not math.isfinite(row.seconds_to_target):
        amount, some = ("reached by", some) if row.reached else ("not reached", "")
    return "\n".join(filter(None, [amount, some, words.times(ratio.value, ratio.low, ratio.high) if ratio else ""]))


_OUTCOMES = {"holds": "✓ better", "fails": "✗ worse", "undecided": "? undecided"}


def sheet(out: Console, entry: Entry) -> None:
    """All about one system."""
    claim, paper = entry.claim, entry.claim.paper
    out.print(Text.assemble((claim.name, "bold"), f"  {claim.slug}, {claim.room}", (f"\n{claim.summary}", "")))
    source = ", ".join(filter(None, (f"{paper.title} ({paper.year})", paper.venue, paper.url, paper.code)))
    _part(out, "The paper says", [claim.says, source])
    _part(out, "Use it", words.usage(claim))
    for kind in KINDS:
        asked = [c for c in claim.criteria if c.kind == kind]
        for head, some in (
            ("", [c for c in asked if c.gating]),
            (", reported only", [c for c in asked if not c.gating]),
        ):
            _part(out, f"Criteria of {kind}{head}", [_asked(claim, c) for c in some])
    _part(
        out,
        f"Arms, at equal {claim.budget}",
        [f"{a.label} ({a.role}){': ' + a.says if a.says else ''}" for a in claim.arms],
    )
    _part(out, "Tasks", [f"{t.label}{': ' + t.says if t.says else ''}" for t in claim.tasks])
    _part(out, "Scales", [_scale(s) for s in claim.scales])
    _part(out, "Departures", claim.departures)
    _part(out, "What official code gets wrong", [f"{e.what} {e.where}. {e.effect}" for e in claim.errata])
    out.print()
    if entry.result is None:
        out.print(Text.assemble(verdict("not run"), f": polyak reproduce {claim.slug}"))
    else:
        outcome(out, claim, entry.result, published=entry.published)
        for result in entry.more:
            out.print()
            outcome(out, claim, result, published=not result.trials)


def _asked(claim: Claim, c: Criterion) -> Group:
    """A criterion: what it says, and below it what must be true."""
    condition = Padding(Text(words.condition(claim, c), "dim"), (0, 0, 0, 2))
    return Group(Text(words.names(claim, claim.criteria)[c.name]), condition)


def _scale(s: Scale) -> str:
    first = f", from {s.first_seed} on" if s.first_seed else ""
    return f"{s.name}: {s.says} ({words.count(s.seeds, 'seed')}{first})"


def _part(out: Console, head: str, lines: Sequence[str | Group]) -> None:
    if lines:
        out.print(Text(f"\n{head}", "bold"))
        for line in lines:
            out.print(Padding(Text(line) if isinstance(line, str) else line, (0, 0, 0, 2)))


class Tally:
    """The progress of all claims of a run together."""

    def __init__(self) -> None:
        self._claims: dict[str, Progress] = {}

    def take(self, p: Progress) -> bool:
        """Whether there was news of this claim before. The first of each come together, before anything runs."""
        known = p.claim in self._claims
        self._claims[p.claim] = p
        return known

    @property
    def done(self) -> int:
        return sum(p.done for p in self._claims.values())

    @property
    def total(self) -> int:
        return sum(p.total for p in self._claims.values())

    def left(self, p: Progress) -> str:
        """How long it will still take, by the latest news."""
        if self.done >= self.total:
            cached = sum(p.cached for p in self._claims.values())
            return f"done, {cached} of them before" if cached else "done"
        return "estimating the time" if p.eta_seconds is None else f"{words.duration(p.eta_seconds)} left"

    @property
    def running(self) -> str:
        return "; ".join(label for p in self._claims.values() for label in p.running)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr while claims run; where stderr is no terminal, a line now and then."""
    out, tally = console(stderr=True), Tally()
    if not out.is_terminal:
        yield _lines(tally)
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    left = TextColumn("{task.fields[left]}", markup=False)
    count = TextColumn("{task.completed:.0f} of {task.total:.0f} trials")
    # What is printed meanwhile stands above the bar; what goes to a file must not be taken for it.
    with Bar(BarColumn(30), count, left, console=out, redirect_stdout=sys.stdout.isatty()) as bar:
        row = bar.add_task("", total=1, left="")

        def tell(p: Progress) -> None:
            tally.take(p)
            running = f"; {tally.running}" if tally.running else ""
            bar.update(row, completed=tally.done, total=tally.total, left=tally.left(p) + running)

        yield tell


def _lines(tally: Tally) -> Callable[[Progress], None]:
    told = -math.inf

    def tell(p: Progress) -> None:
        nonlocal told
        due = tally.take(p) and p.elapsed - told >= REST_S
        if due or (tally.done == tally.total and p.running == ()):
            told = p.elapsed
            print(f"{tally.done} of {tally.total} trials, {tally.left(p)}", file=sys.stderr, flush=True)

    return tell
