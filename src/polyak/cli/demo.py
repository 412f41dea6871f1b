"""``polyak demo``: one model with three solvers, one with three optimizers, and a page, in two minutes on real data."""

import time
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyak import claims
from polyak.cli import terminal
from polyak.cli.shared import INTERRUPTED, stop, trial_error

if TYPE_CHECKING:
    from rich.console import Console

    from polyak.lab.compare.comparison import Comparison

ARMS = "adamw,adan,lion"
STEPS, SEEDS, TRIALS = 300, 5, 4
BUDGETS = (10, 20, 40)  # evaluations of the model for a sample
SHOWN = 10  # evaluations at which samples are shown
IMAGES, SAMPLES, WIDTH = 400, 64, 0.2  # digits that the model knows, digits that are drawn, the model's bandwidth
ROW = 12  # digits that are shown of each solver
FIRST = Path(__file__).parents[1] / "lab" / "templates" / "optim_task.py"


@dataclass(frozen=True)
class Sampled:
    """What the solvers made of the same noise: images for one budget, distances to the exact images for each, the answer."""

    images: Mapping[str, Any]  # name -> (SAMPLES, 8, 8); "exact" first
    errors: Mapping[str, Sequence[float]]  # name -> by budget
    answer: str


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("demo"),
    show_it: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Sample one model with three solvers, train another with three optimizers, and write a page of what was found.

    It takes about two minutes on two cores, with data that comes with scikit-learn. Exit status: 0, or 130 if interrupted.
    """
    from polyak.lab.run import TrialError

    begun, told = time.monotonic(), terminal.console()
    out.mkdir(parents=True, exist_ok=True)
    task = out / "digits.py"
    task.write_text(FIRST.read_text(encoding="utf-8"), encoding="utf-8")
    try:
        _head(
            told,
            "1. One model, three solvers.",
            "A diffusion model draws handwritten digits out of noise, step by step.",
        )
        sampled = sample(lambda line: _say(told, line))
        _say(told, sampled.answer, "bold")
        _head(told, "2. One model, three optimizers.", "A network learns to read handwritten digits.")
        trained = train(task, out / "store", told)
        _say(told, trained.answer, "bold")
    except TrialError as error:
        stop(trial_error(error, verbose=False))
    except KeyboardInterrupt:
        stop(INTERRUPTED, 130)
    _say(told, "Drawing the pages ...")
    page = write(out / "report", trained, sampled)
    _head(told, "Pictures, curves and all numbers:", f"{page}  ({time.monotonic() - begun:.0f} s)")
    _head(told, "Try next:")
    for command, says in next_steps(task):
        _say(told, f"{command:<66} {says}")
    if show_it:
        webbrowser.open(page.resolve().as_uri())


def _head(told: "Console", head: str, says: str = "") -> None:
    from rich.text import Text

    told.print(Text.assemble(f"\n{head} ", (says, "not bold"), style="bold"), soft_wrap=True)


def _say(told: "Console", line: str, style: str = "") -> None:
    from rich.padding import Padding
    from rich.text import Text

    told.print(Padding(Text(line, style), (0, 0, 0, 3)))


def next_steps(task: Path) -> list[tuple[str, str]]:
    """Commands, and what each is for."""
    return [
        (
            f"polyak compare {task} --arms adamw,lion,sgdp --budget 2m",
            "your own question: edit the file, name other arms",
        ),
        ("polyak list", "every method, and whether its paper's claim holds"),
        ("polyak show lion", "one method: what the paper says, how to use it"),
        ("polyak reproduce dpm_solver", "run a paper's claim, about a minute"),
    ]


# ---------------------------------------------------------------------------------------------------------------- training


def train(task: Path, home: Path, told: "Console") -> "Comparison":
    """Three optimizers on one problem at an equal budget; a line for each run that is reported, as it ends."""
    from polyak.lab.compare.main import compare

    _say(
        told,
        f"Each gets {STEPS} steps on {SEEDS} seeds. For each its learning rate is tuned on {TRIALS} runs of their own.",
    )
    labels = {"adamw": "AdamW", "adan": "Adan", "lion": "Lion"}

    def heard(trial: Any, at: Mapping[str, float], values: Mapping[str, float]) -> None:
        if trial.purpose == "report" and not at:
            right = f"{100 * values['accuracy']:.1f} % of new digits right"
            _say(told, f"{labels.get(trial.arm, trial.arm):<6} seed {trial.seed}: {right}")

    with terminal.progress() as tell:
        return compare(
            task,
            ARMS,
            budget=f"{STEPS}steps",
            seeds=SEEDS,
            trials=TRIALS,
            store=home,
            on_progress=tell,
            on_measurement=heard,
        )


# ---------------------------------------------------------------------------------------------------------------- sampling


def sample(tell: Callable[[str], None]) -> Sampled:
    """Digits from the same noise by three solvers, and how far each is from where the model's exact path leads."""
    import torch

    from polyak.generate import DDIM, VP, DPMSolver, Heun
    from polyak.generate import sample as run
    from polyak.generate.problems import ExactDenoiser, kde, path_rmse, reference
    from polyak.lab.data import digits

    known = torch.from_numpy(digits()[0][:IMAGES]).double() / 8 - 1
    denoiser = ExactDenoiser(kde(known, WIDTH), VP(t_min=1e-3))
    noise = denoiser.process.prior(
        (SAMPLES, known.shape[1]), generator=torch.Generator().manual_seed(0), dtype=known.dtype
    )
    exact = reference(denoiser, noise, nfe=300)
    solvers = {
        "DDIM": (DDIM(), "time"),
        "Heun": (Heun(), "time"),
        "DPM-Solver++": (DPMSolver(order=3, form="data", method="multistep"), "logsnr"),
    }
    images, errors = {"exact": exact}, {}
    tell("Distance to the exact digit, after")
    for name, (solver, grid) in solvers.items():
        made = {n: run(denoiser, noise, solver=solver, nfe=n, grid=grid) for n in BUDGETS}
        images[name], errors[name] = made[SHOWN], [path_rmse(x, exact) for x in made.values()]
        listed = ", ".join(f"{n} evaluations: {e:.2f}" for n, e in zip(BUDGETS, errors[name], strict=True))
        tell(f"{name:<13} {listed}")
    return Sampled({name: x.reshape(-1, 8, 8) for name, x in images.items()}, errors, _nearest(errors))


def _nearest(errors: Mapping[str, Sequence[float]]) -> str:
    """Which solver is the nearest at each budget, and by how much to the second."""
    said = []
    for i, budget in enumerate(BUDGETS):
        first, second = sorted(errors, key=lambda name: errors[name][i])[:2]
        ratio = errors[second][i] / errors[first][i]
        said.append(f"with {budget} {first}" + (f" (by {ratio:.1f} times)" if ratio >= 1.05 else " (just)"))
    return f"The nearest: {', '.join(said)}."


def mosaic(sampled: Sampled) -> Any:
    """The digits of each solver below the exact ones, as a figure."""
    import torch

    from polyak.lab.pictures import described, panels

    titles = [name if name == "exact" else f"{name}, {SHOWN} evaluations" for name in sampled.images]
    figure, axes = panels(len(titles), rows=len(titles), titles=titles, frame=False, height=92 * len(titles))
    for axis, images in zip(axes, sampled.images.values(), strict=True):
        padded = torch.nn.functional.pad(images[:ROW].clamp(-1, 1), (1, 1, 1, 1), value=-1.0)
        axis.imshow(torch.cat(list(padded), dim=1).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    return described(
        figure, "Handwritten digits drawn from the same noise: exactly, and by three solvers in few evaluations."
    )


# ---------------------------------------------------------------------------------------------------------------- the page


def write(folder: Path, trained: "Comparison", sampled: Sampled) -> Path:
    """The demo's page, the comparison's own, and the report over all systems; the path of the first."""
    from markupsafe import Markup

    from polyak.lab import pictures, report
    from polyak.lab.compare import figures

    trained.save(folder / "compare-digits.html")
    entries = [report.entry(c, (), claims.published_at(slug)) for slug, c in claims.catalogue().items()]
    report.write_report(entries, folder)
    [task] = trained.tasks
    page = folder / "demo.html"
    text = report.render(
        "demo.html",
        trained=trained,
        curve=Markup(figures.curves(task)[0][1]),
        steps=STEPS,
        seeds=SEEDS,
        trials=TRIALS,
        sampled=sampled,
        mosaic=Markup(pictures.svg(lambda: mosaic(sampled), "demo-digits")),
        budgets=BUDGETS,
        shown=SHOWN,
        next_steps=next_steps(folder.parent / "digits.py"),
        tiles=report.some_tiles(entries),
        entries=entries,
    )
    page.write_text(text, encoding="utf-8")
    return page
