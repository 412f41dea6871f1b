"""Tiny claims in pure Python. Workers import this module by its name, so that it must be found through ``sys.path``."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyak.lab.claim import (
    Arm,
    Claim,
    Criterion,
    Diverged,
    Measurement,
    Metric,
    Paper,
    Scale,
    Task,
    Trial,
    measure,
)


class Part:
    """What the claims are about."""


def descend(trial: Trial) -> Iterator[Measurement]:
    """Gradient descent on a noisy parabola, whose start and noise follow from the seed."""
    if journal(trial) > int(os.environ.get("POLYAK_TEST_HANGS_AFTER", "1000")):
        while not Path(os.environ["POLYAK_TEST_JOURNAL"]).with_name("go").exists():
            time.sleep(0.02)
    # The environment's, so that one process may be stuck in a trial that is quick in another.
    time.sleep(float(os.environ.get("POLYAK_TEST_SLEEP", trial.options.get("sleep", 0.0))))
    random_numbers = random.Random(trial.seed)
    x, lr = random_numbers.uniform(1, 2), trial["lr"]
    for step in range(trial["steps"]):
        yield measure({"step": step}, loss=x * x)
        x -= lr * (2 * x + random_numbers.gauss(0, 0.01))
        if abs(x) > 1e6:
            raise Diverged(f"|x| > 1e6 at step {step}")
    yield measure(loss=x * x + 1e-9, global_draw=random.random())


def journal(trial: Trial) -> int:
    """One line for each trial that begins, for tests that count them; how many there are with this one."""
    path = os.environ.get("POLYAK_TEST_JOURNAL")
    if not path:
        return 0
    line = f"{trial.claim} {trial.task} {trial.arm} {trial.seed} {trial.options.get('lr')}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)
    text = Path(path).read_text()
    return text[: text.rindex(line)].count("\n") + 1


def misbehave(trial: Trial) -> Iterator[Measurement]:
    """Goes wrong in the way that the option ``how`` names, on seed 1 of the method's arm."""
    journal(trial)
    how = trial.options.get("how", "") if trial.seed == 1 else ""
    match how:
        case "raise":
            raise RuntimeError("a bug in the trial")
        case "diverge":
            yield measure({"step": 0}, loss=5.0)
            raise Diverged("too big")
        case "nan":
            yield measure(loss=math.nan, global_draw=0.5)
        case "print":
            print("hello")
            yield measure(loss=1.0)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "die once":
            mark = Path(trial["mark"])
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield measure(loss=1.0)
        case "unknown metric":
            yield measure(lost=1.0)
        case "no final":
            yield measure({"step": 0}, loss=1.0)
        case "two finals":
            yield measure(loss=1.0)
            yield measure(loss=1.0)
        case "no number":
            yield measure(loss="low")  # pyright: ignore[reportArgumentType]
        case "no loss":
            yield measure(global_draw=1.0)
        case "no measurement":
            yield 1.0  # pyright: ignore[reportReturnType]
        case "unknown option":
            yield measure(loss=trial["momentum"])
        case _:
            yield measure(loss=1.0 + 0.1 * (trial.arm == "plain") + 0.001 * trial.seed)


PAPER = Paper(title="On parabolas", year=1964)
METRICS = (Metric(name="loss", label="loss"), Metric(name="global_draw", label="a global random number"))
BETTER = Criterion(
    name="better", says="lower loss", kind="effect", task="parabola", metric="loss", arm="quick", against="plain"
)


def make(slug: str = "parabola", **changes: Any) -> Claim:
    """The claim that a well-tuned step is better than a fixed small one: 2 arms, 3 points of tuning, 5 seeds."""
    facts: dict[str, Any] = {
        "slug": slug,
        "room": "optim",
        "name": slug.title(),
        "summary": "quick beats plain",
        "says": "Quick is better than plain.",
        "paper": PAPER,
        "part": "claims_for_tests:Part",
        "budget": "steps",
        "tasks": (Task(name="parabola", label="Parabola", tune="loss"),),
        "arms": (
            Arm(name="plain", label="Plain", role="baseline", grid={"lr": [0.001, 0.002, 0.003]}),
            Arm(name="quick", label="Quick", role="method", grid={"lr": [0.1, 0.2, 2.0]}),
        ),
        "scales": (Scale(name="small", says="seconds", seeds=5, options={"steps": 20}),),
        "metrics": METRICS,
        "criteria": (BETTER,),
        "trial": descend,
    }
    return Claim(**{**facts, **changes})


def slow(slug: str = "slow", *, seeds: int = 6, sleep: float = 0.3) -> Claim:
    """Untuned, and long enough to be interrupted."""
    return make(
        slug,
        arms=(
            Arm(name="plain", label="Plain", role="baseline", options={"lr": 0.001}),
            Arm(name="quick", label="Quick", role="method", options={"lr": 0.2}),
        ),
        scales=(Scale(name="small", says="seconds", seeds=seeds, options={"steps": 20, "sleep": sleep}),),
    )


def bad(how: str, *, seeds: int = 3, mark: str = "", **changes: Any) -> Claim:
    """The method's trial with seed 1 goes wrong in a certain way."""
    return make(
        "bad",
        arms=(
            Arm(name="plain", label="Plain", role="baseline"),
            Arm(name="quick", label="Quick", role="method", options={"how": how, "mark": mark}),
        ),
        scales=(Scale(name="small", says="seconds", seeds=seeds),),
        trial=misbehave,
        **changes,
    )
