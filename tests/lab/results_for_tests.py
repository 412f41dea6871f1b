"""Made-up claims and results, of the shapes that real ones have: long labels, diverged trials, infinities, nothing at all."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from polyak.lab.claim import Arm, Claim, Criterion, Measurement, Metric, Paper, Plot, Scale, Task, Trial
from polyak.lab.result import ClaimResult, CriterionResult, TrialResult

MACHINE = {"system": "Linux", "processor": "x86_64", "cores": "2", "accelerator": "none"}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.0", "polyak": "0.1.0", "fingerprint": "3f9a1c"}


def never(trial: Trial) -> Iterator[Measurement]:
    raise AssertionError("made-up claims are not run")
    yield


def optimizer_claim(slug: str = "swift", **changes) -> Claim:
    """Like an optimizer's: two tasks, five arms (one a control), curves with a logarithmic axis."""
    curves = (
        Plot(x="step", y="train_loss", x_label="optimizer step", log_y=True),
        Plot(x="step", y="accuracy", x_label="optimizer step", title="Accuracy on held-out digits"),
    )
    facts = {
        "slug": slug,
        "room": "optim",
        "name": "Swift",
        "summary": "Adam-style optimizer with a look-ahead built from two gradients <of the past>.",
        "says": "Transformer-XL reaches a perplexity of 24.2 in 100k steps, where Adam needs 200k; ViT-S at 300 epochs "
        "reaches 81.1 % against AdamW's 79.9 %. So the same quality costs half as many steps.",
        "paper": Paper(
            title="Swift & Sure: A Made-up Optimizer",
            year=2022,
            arxiv="2201.00001",
            venue="a made-up journal",
            code="https://example.org/swift",
        ),
        "part": "polyak.optim.swift:Swift",
        "budget": "optimizer steps",
        "tasks": (
            Task(
                name="digits",
                label="Vision transformer on digits",
                says="1,797 images of 8 by 8, 16 tokens, two layers of width 32, 40 epochs of batches of 128.",
                tune="train_loss",
                plots=curves,
            ),
            Task(name="text", label="Letters of Shakespeare", says="Two layers.", tune="train_loss", plots=curves[:1]),
        ),
        "arms": (
            Arm(name="adamw", label="AdamW", role="baseline", grid={"lr": [0.002, 0.004, 0.008]}),
            Arm(name="swift", label="Swift", role="method", grid={"lr": [0.01, 0.02, 0.04]}, says="The method."),
            Arm(
                name="half",
                label="Swift, half the budget",
                role="method",
                options={"fraction": 0.5},
                grid={"lr": [0.01, 0.02, 0.04]},
                tasks=("digits",),
            ),
            Arm(
                name="blind",
                label="Swift without the gradient difference",
                role="control",
                options={"difference": False},
                grid={"lr": [0.01, 0.02, 0.04]},
                says="The key ingredient removed.",
                tasks=("digits",),
            ),
            Arm(
                name="wild",
                label="Swift, no warmup",
                role="ablation",
                grid={"lr": [0.01, 0.02, 0.04]},
                tasks=("digits",),
            ),
        ),
        "scales": (
            Scale(name="small", says="Minutes on two CPU cores.", seeds=5, options={"epochs": 40}),
            Scale(name="paper", says="ImageNet, 300 epochs.", seeds=3, tasks=("digits",)),
        ),
        "metrics": (
            Metric(name="train_loss", label="training loss", unit="nats"),
            Metric(name="accuracy", label="accuracy", better="higher", worst=0.0),
        ),
        "criteria": (
            Criterion(
                name="loss",
                says="At an equal budget the training loss is at most half of AdamW's",
                task="digits",
                metric="train_loss",
                arm="swift",
                against="adamw",
                bound=0.5,
                control="blind",
            ),
            Criterion(
                name="half",
                says="At half the budget the training loss is at most twice AdamW's at the full budget",
                task="digits",
                metric="train_loss",
                arm="half",
                against="adamw",
                bound=2.0,
            ),
            Criterion(
                name="text",
                says="On letters, the ratio of the losses",
                task="text",
                metric="train_loss",
                arm="swift",
                against="adamw",
                gating=False,
            ),
            Criterion(
                name="accuracy",
                says="Held-out accuracy loses no more than a point",
                task="digits",
                metric="accuracy",
                arm="swift",
                against="adamw",
                compare="difference",
                op=">=",
                bound=-0.01,
                gating=False,
            ),
        ),
        "trial": never,
        "departures": ("The official code clips p.grad in place; ours does not.", "Digits stand in for ImageNet."),
    }
    return Claim(**(facts | changes))


def solver_claim(slug: str = "leap", **changes) -> Claim:
    """Like a solver's: deterministic, few points per curve, both axes logarithmic, every seed must pass."""
    facts = {
        "slug": slug,
        "room": "generate",
        "name": "Leap",
        "summary": "A third-order solver of the diffusion equation.",
        "says": "Good samples in ten evaluations instead of a hundred.",
        "paper": Paper(title="Leap: A Made-up Solver", year=2023),
        "part": "polyak.generate.leap:Leap",
        "usage": "from polyak.generate import Leap, sample\nx = sample(denoiser, shape, solver=Leap(), nfe=20)",
        "budget": "network evaluations",
        "tasks": (
            Task(
                name="mixture",
                label="Mixture of eight Gaussians",
                plots=(Plot(x="nfe", y="rmse", x_label="network evaluations", log_x=True, log_y=True),),
            ),
        ),
        "arms": (
            Arm(name="ddim_t", label="DDIM, time-uniform", role="baseline"),
            Arm(name="ddim_l", label="DDIM, logSNR-uniform", role="baseline"),
            Arm(name="leap3", label="Leap-3", role="method"),
            Arm(name="leap2", label="Leap-2", role="method"),
        ),
        "scales": (Scale(name="small", says="Exact scores.", seeds=3),),
        "metrics": (Metric(name="rmse", label="path RMSE"),),
        "criteria": (
            Criterion(
                name="rmse",
                says="At 40 evaluations Leap-3's error is at most a quarter of the best DDIM's",
                task="mixture",
                metric="rmse",
                arm="leap3",
                against=("ddim_t", "ddim_l"),
                bound=0.25,
                rule="every",
            ),
        ),
        "trial": never,
    }
    return Claim(**(facts | changes))


def criterion(
    claim: Claim, name: str, verdict: str, estimate: float, low: float, high: float, **changes
) -> CriterionResult:
    c = next(c for c in claim.criteria if c.name == name)
    seeds = changes.pop("seeds", 5)
    spread = random.Random(name)
    per_seed = tuple(
        estimate if not math.isfinite(low + high) else spread.uniform(low - (high - low) / 4, high + (high - low) / 4)
        for _ in range(seeds)
    )
    facts = {
        "name": name,
        "says": c.says,
        "verdict": verdict,
        "gating": c.gating,
        "statistic": f"{c.compare} of {c.metric}, {c.arm} / {' or '.join(c.rivals)}",
        "op": c.op,
        "bound": c.bound,
        "estimate": estimate,
        "low": low,
        "high": high,
        "p_value": 0.03125,
        "per_seed": per_seed,
        "seeds_passing": seeds if verdict == "holds" else 1,
        "improvement": 1.0 if verdict == "holds" else 0.4,
        "control_verdict": "fails" if c.control else "",
    }
    return CriterionResult(**(facts | changes))


def optimizer_trials(claim: Claim, seeds: int = 5) -> list[TrialResult]:
    rates = {"adamw": 0.0028, "swift": 0.0006, "half": 0.005, "blind": 0.0026, "wild": 0.0009}
    trials = []
    for task in claim.tasks:
        for arm in claim.arms_on(task.name):
            for seed in range(-1, seeds):
                noise = random.Random(f"{task.name}{arm.name}{seed}")
                goal, scale = rates[arm.name] * (1 if task.name == "digits" else 800), noise.uniform(0.8, 1.25)
                steps = 280 if arm.name == "half" else 560
                diverged = arm.name == "wild" and seed in (1, 3)
                curve = []
                for step in range(0, steps + 1, 10):
                    if diverged and step > 150 + 40 * seed:
                        break
                    loss = goal * scale + 2.3 * math.exp(-step / 45) * noise.uniform(0.85, 1.15)
                    curve.append(({"step": step}, {"train_loss": loss, "accuracy": max(0.1, 0.96 - loss / 2.6)}))
                final = curve[-1][1] if not diverged else {"train_loss": math.inf, "accuracy": 0.0}
                trials.append(
                    TrialResult(
                        task=task.name,
                        arm=arm.name,
                        seed=1000 if seed < 0 else seed,
                        purpose="tuning" if seed < 0 else "report",
                        point={"lr": arm.points[1]["lr"]} if arm.grid else {},
                        values=final,
                        curve=tuple(curve),
                        seconds=12.3 * scale,
                        diverged=diverged,
                        message="loss is nan at step 200" if diverged else "",
                    )
                )
    return trials


def optimizer_result(claim: Claim, verdict: str = "holds") -> ClaimResult:
    """A complete result. ``fails``: the second criterion does; ``undecided``: the first one's control passes."""
    loss = criterion(claim, "loss", "holds", 0.214, 0.172, 0.268)
    half = criterion(claim, "half", "holds", 1.41, 1.02, 1.88)
    if verdict == "fails":
        half = criterion(claim, "half", "fails", math.inf, math.nan, math.inf)
    if verdict == "undecided":
        loss = criterion(claim, "loss", "undecided", 0.214, 0.172, 0.268, control_verdict="holds")
    return ClaimResult(
        slug=claim.slug,
        scale="small",
        device="cpu",
        verdict=verdict,  # pyright: ignore[reportArgumentType]
        criteria=(
            loss,
            half,
            criterion(claim, "text", "fails", 1.023, 1.011, 1.034),
            criterion(claim, "accuracy", "undecided", -0.0123, -0.0312, 0.0041),
        ),
        trials=tuple(optimizer_trials(claim)),
        chosen={t.name: {a.name: (dict(a.points[1]),) * 5 for a in claim.arms_on(t.name)} for t in claim.tasks},
        seeds=tuple(range(5)),
        tuning_seeds=(1000,),
        date="2026-11-20T10:11:12+00:00",
        seconds=1234.5,
        versions=VERSIONS,
        machine=MACHINE,
    )


def solver_result(claim: Claim) -> ClaimResult:
    order = {"ddim_t": (1.0, 1.1), "ddim_l": (0.9, 1.2), "leap3": (3.1, 2.9), "leap2": (1.8, 2.0)}
    trials = []
    for arm in claim.arms:
        size, slope = order[arm.name]
        for seed in range(3):
            curve = tuple(
                ({"nfe": float(n)}, {"rmse": size * (1 + seed / 10) * (10 / n) ** slope}) for n in (10, 12, 20, 40, 96)
            )
            values = {"rmse": size * (1 + seed / 10) * 0.25**slope}
            trials.append(
                TrialResult(
                    task="mixture",
                    arm=arm.name,
                    seed=seed,
                    purpose="report",
                    point={},
                    values=values,
                    curve=curve,
                    seconds=0.4,
                )
            )
    return ClaimResult(
        slug=claim.slug,
        scale="small",
        device="cpu",
        verdict="fails",
        criteria=(criterion(claim, "rmse", "fails", 0.31, 0.301, 0.322, seeds=3),),
        trials=tuple(trials),
        chosen={},
        seeds=(0, 1, 2),
        tuning_seeds=(),
        date="2026-11-21T10:11:12+00:00",
        seconds=4.8,
        versions=VERSIONS,
        machine=MACHINE,
        notes=("The reference path uses 4,000 steps.",),
    )
