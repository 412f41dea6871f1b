"""The command line's commands. Listing and help import neither torch nor matplotlib."""

import json
import math
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import polyak
from polyak import claims
from polyak.cli import compare, demo, new, serving, shared, terminal, train
from polyak.cli.shared import (
    INTERRUPTED,
    ClusterAt,
    Device,
    Gpus,
    Home,
    Json,
    Processes,
    Track,
    Verbose,
    check,
    check_count,
    place,
    print_json,
    stop,
    trackers,
    trial_error,
    wrong,
)
from polyak.lab import pictures, words
from polyak.lab import scoreboard as board
from polyak.lab.claim import Claim
from polyak.lab.report import Entry, entry, write_report
from polyak.lab.result import ClaimResult

STATUSES = ("holds", "fails", "undecided", "not-run")

app = typer.Typer(
    name="polyak",
    help="Published methods as parts of PyTorch, each with its paper's claim as an experiment that you can run.\n\n"
    "A system is one paper's method, and its slug is its short name, such as adan. Begin with `polyak demo` or `polyak list`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Slug = Annotated[str, typer.Argument(help="A system's slug; `polyak list` shows all.", show_default=False)]
Slugs = Annotated[
    list[str] | None,
    typer.Argument(metavar="SLUG", help="Systems' slugs; `polyak list` shows all.", show_default=False),
]
MadeOn = Annotated[
    str | None, typer.Option(metavar="cpu|cuda", help="Only runs made on such a device.", show_default=False)
]
Scale = Annotated[str, typer.Option(help="The size of the experiment; `polyak show SLUG` lists a claim's.")]


def run(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors that are about the world and not about this code become one message and status 3."""
    from polyak.lab.store import StoreError

    try:
        app(args=None if arguments is None else list(arguments), prog_name="polyak")
    except (StoreError, OSError) as error:
        stop(str(error))


# ------------------------------------------------------------------------------------------------------------ what there is


def _load(slug: str) -> Claim:
    try:
        return claims.load(slug)
    except LookupError as error:
        raise typer.BadParameter(error.args[0], param_hint="SLUG") from None


def _choose(slugs: Sequence[str], everything: bool) -> list[Claim]:
    if bool(slugs) == everything:
        raise typer.BadParameter("name systems or say --all, one of the two", param_hint="SLUG")
    return list(claims.catalogue().values()) if everything else [_load(slug) for slug in dict.fromkeys(slugs)]


def _cheapest_first(chosen: Sequence[Claim], scale: str) -> list[Claim]:
    """By the time that the published runs took; those of which it is not known come last, in their order."""
    took = {c.slug: r.seconds if (r := claims.published(c.slug, scale)) else math.inf for c in chosen}
    return sorted(chosen, key=lambda c: took[c.slug])


def _check_scale(chosen: Sequence[Claim], scale: str | None) -> None:
    for claim in chosen:
        if scale is not None:
            check(f"--scale of {claim.slug}", scale, [s.name for s in claim.scales])


def _check_made_on(device: str | None) -> None:
    if device is not None:
        check("--device", device, ["cpu", "cuda"])


def _entries(
    chosen: Sequence[Claim],
    home: Path | None,
    scale: str | None = None,
    device: str | None = None,
    processes: int = 1,
) -> list[Entry]:
    """Each claim with its results: from the store where it has complete ones of the current code, else as published."""
    own = _stored(chosen, home, device=device, processes=processes)
    return [entry(c, list(own[c.slug].values()), claims.published_at(c.slug), scale=scale) for c in chosen]


def _stored(
    chosen: Sequence[Claim],
    home: Path | None,
    scale: str | None = None,
    device: str | None = None,
    processes: int = 1,
) -> dict[str, dict[str, ClaimResult]]:
    """Slug -> scale -> result, of complete runs of the current code."""
    from polyak.lab.database import FILE, home_folder
    from polyak.lab.store import Store

    found: dict[str, dict[str, ClaimResult]] = {c.slug: {} for c in chosen}
    # Reading must not make a store where there is none, nor load what judges results where there are none.
    if (home_folder(home) / FILE).exists():
        with Store(home) as store:
            ran = {r.claim for r in store.runs() if r.done}
            for claim in chosen:
                if claim.slug in ran:
                    from polyak.lab import kept

                    found[claim.slug] = kept.results(claim, store, scale=scale, device=device, processes=processes)
    return found


def _facts(of: Entry) -> dict[str, Any]:
    claim, result = of.claim, of.result
    facts = {"slug": claim.slug, "room": claim.room, "name": claim.name, "summary": claim.summary}
    facts |= {"verdict": words.verdict_of(result), "published": of.published}
    if result is not None:
        facts |= {"verdicts": result.to_json()["verdicts"]}
        facts |= {"scale": result.scale, "seeds": len(result.seeds), "date": result.date}
        facts |= {"by_scale": {r.scale: r.to_json()["verdicts"] for r in of.results}}
    return facts


# ---------------------------------------------------------------------------------------------------------------- commands


def _version(asked: bool) -> None:
    if asked:
        print(f"polyak {polyak.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_systems(
    room: Annotated[
        str, typer.Option(help="Only the systems of this room: optim, generate, ...", show_default=False)
    ] = "",
    status: Annotated[
        str, typer.Option(help=f"Only with this verdict over both kinds: {', '.join(STATUSES)}.", show_default=False)
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List all systems, and what was found of them.

    Each has a verdict for its mechanism (what must be true by its mathematics) and one for its effect (what it does for you).
    They are your own where the store holds a complete run of the current code, else those published with polyak.
    """
    chosen = list(claims.catalogue().values())
    if room:
        check("--room", room, sorted({c.room for c in chosen}))
        chosen = [c for c in chosen if c.room == room]
    if status:
        check("--status", status, STATUSES)
    entries = [e for e in _entries(chosen, home) if status in ("", words.verdict_of(e.result).replace(" ", "-"))]
    if as_json:
        print_json([_facts(e) for e in entries])
    elif entries:
        out = terminal.console()
        out.print(terminal.listing(entries, out.width))
    else:
        print("No system is like that.")


@app.command()
def show(slug: Slug, home: Home = None, as_json: Json = False) -> None:
    """Show one system: its paper's claim, how that is tested, what was found, and how to use it."""
    [found] = _entries([_load(slug)], home)
    if not as_json:
        terminal.sheet(terminal.console(), found)
        return
    claim, paper = found.claim, found.claim.paper
    facts = _facts(found) | {
        "says": claim.says,
        "part": claim.part,
        "usage": words.usage(claim),
        "budget": claim.budget,
    }
    facts["paper"] = {
        "title": paper.title,
        "year": paper.year,
        "venue": paper.venue,
        "url": paper.url,
        "code": paper.code,
    }
    facts["arms"] = [{"name": a.name, "label": a.label, "role": a.role, "says": a.says} for a in claim.arms]
    facts["tasks"] = [{"name": t.name, "label": t.label, "says": t.says} for t in claim.tasks]
    facts["scales"] = [{"name": s.name, "says": s.says, "seeds": s.seeds} for s in claim.scales]
    facts["criteria"] = [asdict(c) | {"asks": words.condition(claim, c)} for c in claim.criteria]
    facts["departures"] = list(claim.departures)
    facts["errata"] = [asdict(e) for e in claim.errata]
    facts["result"] = board.published_record(found.result) if found.result else None
    print_json(facts)


@app.command()
def reproduce(
    slugs: Slugs = None,
    everything: Annotated[bool, typer.Option("--all", help="All systems.")] = False,
    scale: Scale = "small",
    seeds: Annotated[
        int | None, typer.Option(help="How many seeds (default: the scale's).", show_default=False)
    ] = None,
    device: Device = "cpu",
    jobs: Annotated[
        int | None, typer.Option(help="Trials (single runs) at once (default: one per core).", show_default=False)
    ] = None,
    cluster: ClusterAt = None,
    gpus: Gpus = None,
    processes: Processes = 1,
    track: Track = None,
    strict: Annotated[bool, typer.Option("--strict", help="Count undecided as failed in the exit status.")] = False,
    home: Home = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run papers' claims as experiments, and judge them.

    The method and its baselines run at an equal budget, on several seeds. Each verdict is printed as its claim ends, the cheapest
    first. What is stored already is not run again.

    Exit status: 0 if all claims hold or are undecided, 1 if one fails (with --strict: or is undecided), 2 if the command
    is wrong, 3 if something could not run, 130 if interrupted.
    """
    from polyak.lab.run import TrialError, run_many
    from polyak.lab.store import Store

    chosen = _cheapest_first(_choose(slugs or [], everything), scale)
    check_count("--seeds", seeds)
    check_count("--jobs", jobs)
    _check_scale(chosen, scale)
    mirrors = trackers(track)
    out = terminal.console()
    by_slug = {c.slug: c for c in chosen}

    def tell_result(result: ClaimResult) -> None:
        if not as_json:
            terminal.outcome(out, by_slug[result.slug], result)

    try:
        with (
            place(cluster, gpus=gpus, processes=processes, jobs=jobs, device=device) as executor,
            Store(home) as store,
            terminal.progress() as tell,
        ):
            found = run_many(
                chosen,
                scale=scale,
                seeds=seeds,
                device=device,
                jobs=jobs,
                store=store,
                on_progress=tell,
                executor=executor,
                processes=processes,
                track=mirrors,
                on_result=tell_result,
            )
    except TrialError as error:
        stop(trial_error(error, verbose))
    except KeyboardInterrupt:
        stop(INTERRUPTED, 130)
    if as_json:
        print_json({slug: board.published_record(result) for slug, result in found.items()})
    else:
        options = "".join(
            f" {option} {value}"
            for option, value, default in (
                ("--home", home, None),
                ("--scale", scale, "small"),
                ("--device", device, "cpu"),
                ("--nproc-per-trial", processes, 1),
            )
            if value != default
        )
        shown = [c.slug for c in chosen if seeds is None or seeds >= c.scale(scale).seeds]
        if shown:
            out.print(f"Plots and all numbers: polyak report {' '.join(shown)}{options}", soft_wrap=True)
        if fewer := [c.slug for c in chosen if c.slug not in shown]:
            out.print(f"A report needs all seeds of the scale: run {', '.join(fewer)} without --seeds.", soft_wrap=True)
    failing = {"fails", "undecided"} if strict else {"fails"}
    raise typer.Exit(1 if any(r.verdict in failing for r in found.values()) else 0)


@app.command()
def report(
    slugs: Slugs = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("polyak-report"),
    show_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    scale: Annotated[
        str | None,
        typer.Option(
            help="The scale whose numbers stand first (default: the smallest that was run).", show_default=False
        ),
    ] = None,
    device: MadeOn = None,
    processes: Processes = 1,
    home: Home = None,
) -> None:
    """Write the HTML report.

    An index over all systems, and a page for each (or only for those named). The pages open from disk and need no network.
    """
    named = [_load(slug) for slug in slugs or []]
    _check_scale(named, scale)
    check_count("--nproc-per-trial", processes, "processes")
    _check_made_on(device)
    entries = _entries(list(claims.catalogue().values()), home, scale, device, processes)
    pages = {c.slug for c in named} or None
    if missing := [e.claim.name for e in entries if e.claim.picture and not pictures.is_kept(e.claim)]:
        print(f"drawing {words.count(len(missing), 'picture')}, once", file=sys.stderr, flush=True)
    index = write_report(entries, out, pages=pages)
    for e in entries:
        if pages and e.claim.slug in pages and e.result is None:
            print(f"{e.claim.slug} has not been run: polyak reproduce {e.claim.slug}", file=sys.stderr)
    first = out / f"{named[0].slug}.html" if len(named) == 1 else index
    print(f"The report: {first}")
    if show_it:
        webbrowser.open(first.resolve().as_uri())


app.command()(demo.demo)
app.command()(train.train)
app.command("compare")(compare.compare)
app.command("init-task")(compare.init_task)
app.command()(serving.serve)


# ------------------------------------------------------------------------------------------------------------------- moving


@app.command("export")
def export_store(
    file: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    slugs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SLUG", help="Only these systems' trials (default: all).", show_default=False),
    ] = None,
    home: Home = None,
) -> None:
    """Write what is stored to one file, for another machine.

    There, `polyak import FILE` adds them to the store, and `polyak reproduce` runs what is missing.
    """
    from polyak.lab.database import FILE, home_folder
    from polyak.lab.moving import export
    from polyak.lab.store import Store

    chosen = [_load(slug).slug for slug in slugs or []]
    if not (home_folder(home) / FILE).exists():
        stop(f"there is no store in {home_folder(home)}: run something first, or name another folder by --home")
    with Store(home) as store:
        try:
            count = export(store, file, claims=chosen)
        except ValueError as error:
            wrong(error, "FILE")
    print(f"{words.count(count, 'trial')} written to {file}")


@app.command("import")
def import_store(
    file: Annotated[Path, typer.Argument(help="What `polyak export` wrote.", show_default=False)],
    home: Home = None,
) -> None:
    """Add the trials of an exported file to the store.

    What the store has already stays as it is.
    """
    from polyak.lab.moving import take_in
    from polyak.lab.store import Store

    with Store(home) as store:
        try:
            new, total = take_in(store, file)
        except ValueError as error:
            wrong(error, "FILE")
    print(f"{words.count(total, 'trial')} in {file}, {new:,} of them new here")


# --------------------------------------------------------------------------------------------------------------- in a checkout

app.command("new")(new.new)


def _generated() -> dict[Path, str]:
    """What SCOREBOARD.md and README.md should say."""
    entries = [entry(claim, (), claims.published_at(slug)) for slug, claim in claims.catalogue().items()]
    readme = shared.CHECKOUT / "README.md"
    try:
        text = board.with_table(readme.read_text(encoding="utf-8"), board.systems_table(entries))
    except ValueError as error:
        stop(str(error))
    return {shared.CHECKOUT / "SCOREBOARD.md": board.scoreboard(entries), readme: text}


def _write_generated() -> None:
    for path, text in _generated().items():
        path.write_text(text, encoding="utf-8")


@app.command()
def record(slugs: Slugs = None, scale: Scale = "small", device: MadeOn = None, home: Home = None) -> None:
    """Publish verdicts from the store.

    They are written next to the claims, in SCOREBOARD.md and in the README's tables. For those who work in a checkout.
    Refused where the store has no complete run of the current code.
    """
    shared.need_checkout()
    chosen = _choose(slugs or [], False)
    _check_scale(chosen, scale)
    _check_made_on(device)
    _generated()  # what could not be written must stop this before anything is
    found = {slug: kept.get(scale) for slug, kept in _stored(chosen, home, scale, device).items()}
    if missing := [slug for slug, result in found.items() if result is None]:
        command = f"polyak reproduce {' '.join(missing)}{'' if scale == 'small' else f' --scale {scale}'}"
        stop(f"the store has no complete run of {', '.join(missing)} at scale {scale} with the current code: {command}")
    for slug, result in found.items():
        if result is not None:
            text = json.dumps(board.published_record(result), indent=1, ensure_ascii=False, allow_nan=False)
            claims.verdict_path(slug, scale).write_text(text + "\n", encoding="utf-8")
            print(f"{slug}: {'; '.join(f'{v.kind} {words.said(v)}' for v in result.verdicts)}")
    _write_generated()


@app.command("scoreboard")
def write_scoreboard(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if something is out of date.")
    ] = False,
) -> None:
    """Write SCOREBOARD.md and README's tables.

    They are made anew from the published verdicts. For those who work in a checkout.
    """
    shared.need_checkout()
    if not check:
        _write_generated()
        return
    stale = [
        path.name
        for path, text in _generated().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if stale:
        stop(f"{' and '.join(stale)} do not match the published verdicts: run `polyak scoreboard`", 1)
