"""``polyak compare`` and ``polyak init-task``: comparing optimizers or samplers on a user's own problem."""

import logging
import re
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from polyak.cli import terminal
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
    check_out,
    place,
    print_json,
    stop,
    trackers,
    trial_error,
    wrong,
)

EXAMPLES = Path(__file__).parents[1] / "lab" / "templates"
KINDS = {"optim": "optimizers", "sampler": "samplers"}
TRY = {"optim": "adamw,adan,lion --budget 2m", "sampler": "ddim,dpmsolver,heun --budget 20nfe"}


def compare(
    tasks: Annotated[
        list[Path],
        typer.Argument(
            metavar="TASK", help="Task files, or a folder of them; `polyak init-task` writes one.", show_default=False
        ),
    ],
    arms: Annotated[
        str,
        typer.Option(
            help="The arms to compare, e.g. adamw,adan:weight_decay=0.02,pytorch_optimizer:Muon; name=low..high is tuned.",
            show_default=False,
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="A time for all trials together (5m), for each (20s/trial), or a count for each (500steps, 2000grads, 20nfe)."
        ),
    ] = "5m",
    seeds: Annotated[int, typer.Option(help="How many seeds are reported; 3 or more can decide something.")] = 5,
    trials: Annotated[int, typer.Option(help="Tuning trials (single runs) of every arm, for each seed anew.")] = 6,
    baseline: Annotated[
        str | None, typer.Option(help="The arm to compare with (default: the first).", show_default=False)
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Say what it costs to reach this value (default: where the baseline ends).", show_default=False
        ),
    ] = None,
    points: Annotated[int, typer.Option(help="How often a reported trial is measured on the way.")] = 20,
    device: Device = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Trials at once (default: 1 where the budget is a time, else one per core).", show_default=False
        ),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            help="When a trial that does not end is stopped, e.g. 10m (default: generous).", show_default=False
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run all trials anew, also those that are stored.")] = False,
    cluster: ClusterAt = None,
    gpus: Gpus = None,
    processes: Processes = 1,
    track: Track = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write (default: polyak-report/compare-TASK-BUDGET.html).", show_default=False),
    ] = None,
    show_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    home: Home = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare optimizers or samplers on your own problem.

    Every arm gets the same tuning trials, seeds, batches and budget. What has run is stored, and is not run again.

    Exit status: 0 if it could be compared, 2 if the command is wrong, 3 if something could not run, 130 if interrupted.
    """
    from polyak.lab.compare.budget import seconds
    from polyak.lab.compare.main import compare as carry_out
    from polyak.lab.compare.spec import ArmError
    from polyak.lab.compare.task import NoTaskError, TaskError
    from polyak.lab.run import TrialError
    from polyak.lab.store import Store

    for option, count in (("--seeds", seeds), ("--trials", trials), ("--points", points), ("--jobs", jobs)):
        check_count(option, count)
    if out is not None:
        check_out(out)
    mirrors = trackers(track)
    try:
        limit = None if deadline is None else seconds("--deadline", deadline)
        with (
            place(cluster, gpus=gpus, processes=processes, jobs=jobs, device=device) as executor,
            Store(home) as store,
            terminal.progress() as tell,
            _told(),
        ):
            found = carry_out(
                tasks,
                arms,
                budget=budget,
                seeds=seeds,
                trials=trials,
                baseline=baseline,
                target=target,
                points=points,
                device=device,
                jobs=jobs,
                deadline=limit,
                fresh=fresh,
                store=store,
                on_progress=tell,
                executor=executor,
                processes=processes,
                track=mirrors,
            )
    except TrialError as error:
        stop(trial_error(error, verbose))
    except KeyboardInterrupt:
        stop(INTERRUPTED, 130)
    except NoTaskError as error:
        wrong(f"{error}{_space(tasks, arms)}", "TASK")
    except TaskError as error:
        stop(str(error))
    except ArmError as error:
        wrong(error, "--arms")
    except ValueError as error:
        wrong(error)
    at = out or _page([t.name for t in found.tasks], budget)
    replaced = at.exists()
    path = found.save(at)
    if as_json:
        print_json(found.to_json())
    else:
        terminal.comparison(terminal.console(), found)
        print(f"The page, with curves and all trials: {path}{' (it replaces an earlier one)' if replaced else ''}")
    if show_it:
        webbrowser.open(path.resolve().as_uri())


@contextmanager
def _told() -> Iterator[None]:
    """What the lab says before the first trial, on stderr."""

    class ToStderr(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage(), file=sys.stderr, flush=True)

    log, handler = logging.getLogger("polyak.lab.compare"), ToStderr()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


def _page(tasks: Sequence[str], budget: str) -> Path:
    """Where the page goes: a file for each budget, since one does not supersede another."""
    words = [*tasks[:3], re.sub(r"[^\w.]+", "-", budget.strip())]
    return Path("polyak-report", f"compare-{'-'.join(words)}.html")


def _space(tasks: Sequence[Path], arms: str) -> str:
    """A hint where "adamw, adan" has become an arm and a task."""
    return "; arms are separated by commas alone: --arms adamw,adan" if arms.endswith(",") and len(tasks) > 1 else ""


def init_task(
    kind: Annotated[str, typer.Argument(metavar="optim|sampler", help="What is to be compared.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("task.py"),
) -> None:
    """Write an example task, with comments.

    It runs as it stands, on data at hand; replace its parts with yours. A file that is there is not overwritten.
    """
    check("KIND", kind, list(KINDS))
    text = (EXAMPLES / f"{kind}_task.py").read_text(encoding="utf-8")
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        stop(f"{out} is there already; name another with --out")
    print(f"Wrote {out}, a task for {KINDS[kind]}. Try it:\n  polyak compare {out} --arms {TRY[kind]} --open")
