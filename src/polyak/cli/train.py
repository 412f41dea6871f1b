"""``polyak train``: a small image model to sample from, trained in minutes and saved as one file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from polyak.cli import terminal
from polyak.cli.shared import check, check_device, check_out, stop, wrong


def train(
    data: Annotated[str, typer.Argument(metavar="digits|mnist", help="The images to learn.")] = "digits",
    network: Annotated[str, typer.Option(metavar="unet|dit", help="A U-Net, or a transformer.")] = "unet",
    process: Annotated[
        str, typer.Option(metavar="vp|edm|flow|pfgmpp", help="What noise it learns to take away.")
    ] = "edm",
    width: Annotated[int, typer.Option(help="Channels; a multiple of 8.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 1500,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    seed: Annotated[int, typer.Option(help="Of initial weights, batches and noise.")] = 0,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to train.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="DATA-NETWORK-PROCESS.safetensors")
    ] = None,
) -> None:
    """Train a small image model under one of four kinds of noise, and save it for sampling.

    It takes minutes on two cores. What is written is read by `polyak.generate.networks.load_denoiser`.
    """
    from polyak.claims import _images
    from polyak.core import checks

    check("DATA", data, _images.DATA)
    check("--network", network, _images.NETWORKS)
    check("--process", process, _images.PROCESSES)
    for name, value, least, most in (
        ("--width", width, 8, 1024), ("--steps", steps, 1, 10**7), ("--batch", batch, 1, 10**5), ("--seed", seed, 0, 2**31),
    ):  # fmt: skip
        try:
            checks.integer(name, value, least=least, most=most)
        except ValueError as error:
            wrong(error, name)
    if width % 8:
        wrong(ValueError(f"must be a multiple of 8, got {width}"), "--width")
    check_device(device, 1)
    file = out or Path(f"{data}-{network}-{process}.safetensors")
    check_out(file)
    from polyak.generate.networks import save_denoiser
    from polyak.lab.data import DataError

    recipe = _images.Recipe(data, network, process, width, steps, batch, seed=seed)
    told, begun = terminal.console(), time.monotonic()
    told.print(f"{data}: a {network} of width {width} learns to take {process} noise away, {steps} steps")

    def progress(step: int, loss: float) -> None:
        told.print(f"  step {step:>6}  loss {loss:.4f}  {time.monotonic() - begun:.0f} s")

    try:
        trained = _images.train(recipe, device, progress)
    except (DataError, ImportError) as error:
        stop(str(error))
    kind, prediction, sigma_data = recipe.noise
    save_denoiser(file, trained, kind, prediction, sigma_data=sigma_data)
    told.print(f"saved: {file}")
    told.print(f'sample it: denoiser = polyak.generate.networks.load_denoiser("{file}", label=3)')
