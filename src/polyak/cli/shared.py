"""What the commands share: options, checks of them, and how a command ends."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from polyak.core import checks

if TYPE_CHECKING:
    from polyak.lab.run import TrialError

INTERRUPTED = "interrupted. Finished trials are kept: the same command goes on from there."

Home = Annotated[
    Path | None,
    typer.Option(help="Folder of stored results (default: POLYAK_HOME, else your data folder).", show_default=False),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print the traceback of a trial that cannot run.")]


def stop(message: str, status: int = 3) -> NoReturn:
    """End with one message on stderr."""
    print(f"polyak: {message}", file=sys.stderr)
    raise SystemExit(status)


def print_json(data: Any) -> None:
    """Data on stdout, for machines."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def check(option: str, value: str, allowed: Sequence[str]) -> str:
    """A value among those allowed, or the end, with a suggestion."""
    try:
        return checks.one_of(option, value, allowed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def check_count(option: str, value: int | None) -> None:
    """An integer from 1, or the end."""
    try:
        checks.integer(option, 1 if value is None else value, least=1)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def check_device(device: str) -> None:
    """A device that is there, or the end."""
    from polyak.lab.versions import device_kind

    try:
        device_kind(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def trial_error(error: "TrialError", verbose: bool) -> str:
    """What could not run and why; the traceback only if asked for."""
    if verbose:
        return str(error)
    what, why = str(error).splitlines()[0], error.trace.strip().splitlines()[-1:]
    return "\n".join([what, *(f"  {line}" for line in why), "(--verbose prints all; finished trials are kept)"])
