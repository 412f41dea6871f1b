"""Task files of a few lines, as users write them, and made-up comparisons."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak.lab import statistics
from polyak.lab.compare import arms as specs
from polyak.lab.compare.answer import TaskComparison
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.comparison import Comparison
from polyak.lab.compare.experiment import experiment
from polyak.lab.compare.rows import Setup
from polyak.lab.compare.task import Facts
from polyak.lab.result import ClaimResult, TrialResult

VERSIONS = {"python": "3.11", "torch": "2.13.0"}

# A line is fitted by 32 noisy points; the evaluation is the distance of its two weights from the truth.
REGRESSION = '''"""A line through noisy points."""
import torch
from torch import nn

TRUTH = torch.tensor([[2.0, -1.0]])


def task(seed, device):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 2, generator=g)
    y = x @ TRUTH.T + 0.05 * torch.randn(32, 1, generator=g)
    model = nn.Linear(2, 1)

    def batches():
        while True:
            i = torch.randint(32, (8,), generator=g)
            yield x[i], y[i]

    return {
        "model": model,
        "batches": batches(),
        "loss": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        "evaluate": lambda model: {"distance": (model.weight - TRUTH).norm()},
    }
'''

SAMPLING = '''"""Two Gaussians."""
import torch
from polyak.generate import VP
from polyak.generate.problems import ExactDenoiser, ring


def task(seed, device):
    law = ring(2)
    return {
        "denoiser": ExactDenoiser(law, VP()),
        "shape": (64, 2),
        "dtype": torch.float64,
        "metric": lambda x: {"off": (x.norm(dim=1) - 2).abs().mean()},
        "better": "lower",
    }
'''

PIPELINE = '''"""A pipeline of a tiny network that has learned nothing."""
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel


def task(seed, device):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )
    pipeline = DDPMPipeline(unet, DDIMScheduler(num_train_timesteps=100))
    return {
        "pipeline": pipeline,
        "call": {"batch_size": 2, "output_type": "np"},
        "metric": lambda images: {"brightness": images.mean()},
        "better": "higher",
    }
'''

# What `polyak compare` asks of a pipeline, without a library: noise that is scaled down at every step.
DRAWING = '''"""A pipeline that is a few lines."""
import torch


class Scheduler:
    config = {}


class Pipe:
    def __init__(self):
        self.scheduler = Scheduler()

    def __call__(self, num_inference_steps, generator):
        x = torch.randn(16, 2, generator=generator)
        return (x * 0.9**num_inference_steps,)


def task(seed, device):
    return {"pipeline": Pipe(), "metric": lambda x: {"off": x.norm(dim=1).mean()}, "better": "lower"}
'''


def write(folder: Path, text: str, name: str = "line.py", replaced: Mapping[str, str] | None = None) -> Path:
    """A task file, with pieces of its text replaced, each of which must be there."""
    for old, new in (replaced or {}).items():
        assert old in text
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text)
    return path


def made_up(
    finals: Mapping[str, Sequence[float]],
    *,
    better: Any = "lower",
    name: str = "made",
    metric: str = "loss",
    unit: Any = "steps",
    tuning: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    curves: Mapping[str, Sequence[Sequence[float]]] | None = None,
    target: float | None = None,
    processor: float = 0.99,
    **facts: Any,
) -> TaskComparison:
    """A comparison as if it had been run: finals by arm and seed (infinite: diverged), values on the way at 1, 2, ... steps."""
    arms, seeds = specs.parse(list(finals), "training"), len(next(iter(finals.values())))
    setup = Setup(budget=Budget(unit, 4), arms=arms, trials=5, points=4, target=target, jobs=1, seeds=seeds,
                  device="cpu", versions=VERSIONS)  # fmt: skip
    known = Facts(kind="training", says="Made up.", better={metric: better}, schedule="cosine", **facts)
    claim = experiment(Path(f"{name}.py"), known, arms, setup.budget, seeds)
    trials = []
    for arm in arms:
        for seed, final in enumerate(finals[arm.text]):
            diverged = abs(final) == float("inf")
            way = curves[arm.text][seed] if curves else [final] * 4
            curve = tuple(
                (
                    {"used": (i + 1) / len(way), "step": i + 1.0, "seconds": 0.1 * (i + 1), "gradients": i + 1.0},
                    {metric: v, "train_loss": abs(v)},
                )
                for i, v in enumerate(way)
            )
            own = {
                "steps": 4.0,
                "evaluations": 4.0,
                "seconds": 0.4,
                "memory": 1.5,
                "train_loss": 0.1,
                "processor": processor,
            }
            worst = claim.metric(metric).worst_value
            values = dict.fromkeys([metric, *own], worst) if diverged else {metric: final, **own}
            trials.append(
                _trial(name, arm.text, seed, "report", {"lr": 0.01}, values, () if diverged else curve, diverged)
            )
        for seed in range(seeds):
            for lr, value in (tuning or {}).get(arm.text, ()):
                diverged = abs(value) == float("inf")
                curve = (({"used": 1.0, "step": 4.0, "seconds": 0.4}, {"validation": value}),)
                trials.append(
                    _trial(name, arm.text, 10_000 + seed, "tuning", {"lr": lr}, {"validation": value}, curve, diverged)
                )
    seeds = tuple(range(seeds))
    criteria = statistics.judge(claim, trials, seeds, scale=claim.scales[0].name)
    result = ClaimResult(
        slug=claim.slug,
        scale=claim.scales[0].name,
        device="cpu",
        verdict=statistics.verdict(criteria),
        criteria=criteria,
        trials=tuple(trials),
        chosen={name: {arm.text: ({"lr": 0.01},) * len(seeds) for arm in arms}},
        seeds=seeds,
        tuning_seeds=tuple(10_000 + seed for seed in seeds),
        date="2026-11-20T10:11:12+00:00",
        seconds=12.0,
        versions=VERSIONS,
        machine={"system": "Linux", "cores": "2"},
    )
    return TaskComparison(name=name, facts=known, claim=claim, result=result, setup=setup)


def together(*tasks: TaskComparison) -> Comparison:
    return Comparison(setup=tasks[0].setup, tasks=tasks)


def _trial(
    task: str, arm: str, seed: int, purpose: str, point: Any, values: Any, curve: Any, diverged: bool
) -> TrialResult:
    return TrialResult(
        task=task,
        arm=arm,
        seed=seed,
        purpose=purpose,
        point=point,
        values=values,
        curve=curve,
        seconds=0.4,
        diverged=diverged,
        message="nan" if diverged else "",
    )


def falling(rng: random.Random, final: float, points: int = 20) -> list[float]:
    """A curve that falls to a final value."""
    return [final + 2.0 * 0.7**i * rng.uniform(0.9, 1.1) for i in range(1, points)] + [final]
