"""Dmcmc's claim: what the paper says, in a line."""

from __future__ import annotations

from collections.abc import Iterator

from polyak.claims._pictures import dmcmc as pictures
from polyak.lab.claim import Arm, Claim, Measurement, Metric, Paper, Plot, Scale, Task, Trial
from polyak.lab.criteria import Ask


def trial(t: Trial) -> Iterator[Measurement]:
    """One arm on one task with one seed: measurements on the way, ``measure({"step": n}, ...)``, and one final."""
    raise NotImplementedError("the trial of dmcmc")
    yield


ARMS = (
    Arm("baseline", "The paper's baseline", "baseline", {"method": "baseline"}, {"lr": (1e-3, 1e-2, 1e-1)}, tasks=("data",)),
    Arm("dmcmc", "Dmcmc", "method", {"method": "dmcmc"}, {"lr": (1e-3, 1e-2, 1e-1)}, tasks=("data",)),
    Arm("exact", "Dmcmc", "method", {"method": "dmcmc"}, tasks=("exact",)),
    Arm(
        "without", "Dmcmc without its key ingredient", "control", {"method": "without"}, tasks=("exact",),
        says="what is left out, and why the criterion must then fail",
    ),
)  # fmt: skip
TASKS = (
    Task("exact", "A problem whose answer is known", "what it is; seconds"),
    Task(
        "data", "Digits", "data, model, budget", {"steps": 100}, tune="loss",
        plots=(Plot("step", "loss", "Test loss", log_y=True),),
    ),
)  # fmt: skip
METRICS = (Metric("error", "Distance to the closed form", exact=True), Metric("loss", "Test loss"))
PROVED = Ask(METRICS, kind="mechanism", task="exact", arm="exact", metric="error", rule="every")
SEEN = Ask(METRICS, kind="effect", task="data", arm="dmcmc", over="baseline", metric="loss")
CRITERIA = (
    PROVED.at_most("closed_form", 1e-10, "What the mathematics says", control="without"),
    SEEN.beats("loss", "What the paper shows"),
)

CLAIM = Claim(
    slug="dmcmc", room="generate", name="Dmcmc",
    summary="What it is and does, in a line",
    says="What the paper says, in our own words, with its figures.",
    paper=Paper("Title", 2000, "0000.00000", "Venue", "https://example.org/official-code"),
    part="polyak.generate.dmcmc:Dmcmc", budget="optimizer steps",
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    scales=(Scale("small", "what it takes on two cores, at most three minutes", 5, first_seed=100),),
    departures=("Where the experiment differs from the paper's.",),
    errata=(),
)  # fmt: skip
