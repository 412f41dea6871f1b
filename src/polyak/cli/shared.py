"""Options that several commands share, how they are checked, and how a command ends with an error."""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import polyak
from polyak.core import checks
from polyak.lab import limits

if TYPE_CHECKING:
    from polyak.lab.run import TrialError
    from polyak.lab.trackers import Tracker
    from polyak.lab.workers import Executor

INTERRUPTED = "interrupted. Finished trials are kept: the same command goes on from there."

CHECKOUT = Path(polyak.__file__).resolve().parents[2]  # the repository's root, if it is one that polyak runs from

_LINE = 1000  # characters of a message about an option

Home = Annotated[
    Path | None,
    typer.Option(help="Folder of stored results (default: POLYAK_HOME, else your data folder).", show_default=False),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
ClusterAt = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="auto|ADDRESS",
        help="Run trials on a Ray cluster: the one that this machine is part of, or HOST:PORT.",
        show_default=False,
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-trial",
        help="On a cluster (default: one for each process with --device cuda, else none).",
        show_default=False,
    ),
]
Processes = Annotated[
    int, typer.Option("--nproc-per-trial", help="Processes of each trial, started as torchrun starts them.")
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:WHERE]",
        help="Mirror measurements in tensorboard[:FOLDER], mlflow[:URI] or wandb[:PROJECT]; may be repeated.",
        show_default=False,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print the traceback of a trial that cannot run.")]


def stop(message: str, status: int = 3) -> NoReturn:
    """End with one message on stderr."""
    print(f"polyak: {message}", file=sys.stderr)
    raise SystemExit(status)


def need_checkout() -> Path:
    """The repository's root, or the end: for commands that write in it."""
    if not (CHECKOUT / "pyproject.toml").exists() or not (CHECKOUT / "README.md").exists():
        stop("this is for a checkout of polyak, and this is an installed package")
    return CHECKOUT


def print_json(data: Any) -> None:
    """Data on stdout, for machines."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def wrong(error: object, option: str | None = None) -> NoReturn:
    """End with what is wrong with an option, in a line."""
    raise typer.BadParameter(limits.short(str(error), _LINE), param_hint=option) from None


def check(option: str, value: str, allowed: Sequence[str]) -> str:
    """A value among those allowed, or the end, with a suggestion."""
    try:
        return checks.one_of(option, value, allowed)
    except ValueError as error:
        wrong(error, option)


def check_count(option: str, value: int | None, name: str = "") -> None:
    """A number of seeds, trials, ... in its range (that of ``name``; by default the option's), or the end."""
    try:
        limits.count(name or option.removeprefix("--"), 1 if value is None else value, called=option)
    except ValueError as error:
        wrong(error, option)


def check_device(device: str, processes: int = 1) -> None:
    """A device that is there, one for each process, or the end."""
    from polyak.lab.run import device_kind

    try:
        device_kind(device, processes)
    except ValueError as error:
        wrong(error, "--device")


def check_out(out: Path) -> None:
    """A place for a file that is written at the end of long work, or the end."""
    if out.is_dir():
        raise typer.BadParameter(f"must be a file to write, got the folder {out}", param_hint="--out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {out.parent}: {error.strerror}", param_hint="--out") from None
    if not os.access(out.parent, os.W_OK):
        raise typer.BadParameter(f"the folder {out.parent} is not for you to write in", param_hint="--out")


@contextmanager
def place(
    address: str | None, *, gpus: float | None, processes: int, jobs: int | None, device: str
) -> "Iterator[Executor | None]":
    """Where trials run: a cluster, or None for this machine. Options that do not fit are the end."""
    check_count("--nproc-per-trial", processes, "processes")
    if address is None:
        if gpus is not None:
            raise typer.BadParameter("is for trials on a cluster: --cluster", param_hint="--gpus-per-trial")
        check_device(device, processes)
        yield None
        return
    check("--device", device, ["cpu", "cuda"])
    from polyak.lab.cluster import Cluster, ClusterError

    wanted = (processes if device == "cuda" else 0) if gpus is None else gpus
    try:
        cluster = Cluster(address, jobs=jobs, processes=processes, gpus=wanted)
    except ValueError as error:
        wrong(error, "--gpus-per-trial")
    with cluster:
        try:
            yield cluster
        except ClusterError as error:
            stop(str(error))


def trackers(names: Sequence[str] | None) -> "list[Tracker]":
    """The trackers that are meant, or the end."""
    from polyak.lab.trackers import TrackerError, make

    try:
        return [make(name) for name in names or ()]
    except TrackerError as error:
        stop(str(error))
    except ValueError as error:
        wrong(error, "--track")


def trial_error(error: "TrialError", verbose: bool) -> str:
    """What could not run and why; the traceback only if asked for."""
    if verbose:
        return str(error)
    what = str(error).splitlines()[0]
    # Our own errors are sentences; where they are defined says nothing.
    why = [re.sub(r"^polyak\.[\w.]+: ", "", line) for line in error.trace.strip().splitlines()[-1:]]
    return "\n".join([what, *(f"  {line}" for line in why), "(--verbose prints all; finished trials are kept)"])
