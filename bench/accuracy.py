"""Accuracy against evaluations: how far solvers end from the exact solution, ours, diffusers' and k-diffusion's in one run.

    python bench/accuracy.py [--scale 7.5] [--picture accuracy.png] [--json rows.json]

The problem is solved exactly: a mixture of eight modes on a circle under the chain of 1000 steps that Stable Diffusion is
trained with. All begin at the same noise. The error is the root of the mean square distance, over 256 paths, to the solution of
the probability-flow ODE at the chain's first step, by 4000 evaluations in float64. ``--scale`` guides class 0 against all.

Each solver is used as its library does unless told otherwise, with as many steps as the evaluations pay for, and ends at the
chain's first step, sigma = 0.01, where it can; diffusers' Heun ends on clean data, which adds at most that much.
k-diffusion is taken as its file of samplers alone, since its package needs torchvision; where it is not there it is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.generate import CFG, DDIM, GHVB, RK4, Denoiser, Discrete, DPMSolver, Euler, HeavyBall, Heun, sample
from polyak.generate.problems import ExactDenoiser, path_rmse, reference, ring

EVALUATIONS = (5, 8, 10, 15, 20, 50)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
PATHS = 256


class Problem:
    """The exact network, what all start from, and where they should end."""

    def __init__(self, scale: float) -> None:
        self.process = Discrete(BETAS)
        law = ring()
        if scale == 1.0:
            self.exact = ExactDenoiser(law, self.process)
        else:
            self.exact = ExactDenoiser(law.of_class(0), self.process, unconditional=law)
        self.guidance = None if scale == 1.0 else CFG(scale)
        self.x = torch.randn(PATHS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.guided = Denoiser(lambda x, t: self.eps(x, t), self.process, label=lambda t: t)
        self.end = reference(self.guided, self.x, nfe=3999)

    def eps(self, x: Tensor, t: Any) -> Tensor:
        """The guided noise prediction at a time of the process."""
        t = float(t[0]) if isinstance(t, Tensor) and t.ndim else float(t)
        if self.guidance is None:
            return self.exact(x, t).eps
        return self.guidance(*self.exact.pair(x, t)).eps

    def at_label(self, x: Tensor, label: Any) -> Tensor:
        return self.eps(x, self.process.t_of_label(float(label)))


def ours() -> dict[str, Any]:
    found = {
        "DDIM": DDIM(),
        "Euler": Euler(),
        "Heun": Heun(),
        "RK4": RK4(),
        "DPM-Solver-2": DPMSolver(order=2, method="singlestep"),
        "DPM-Solver-fast 3": DPMSolver(),
        "DPM-Solver++ 2M": DPMSolver(order=2, form="data", method="multistep"),
        "DPM-Solver++ 3M": DPMSolver(order=3, form="data", method="multistep"),
        "PLMS4": HeavyBall(order=4, beta=1.0),
        "HB 4, 0.8": HeavyBall(order=4, beta=0.8),
        "GHVB 4, 0.8": GHVB(order=4, beta=0.8),
        "GHVB 4, 0.8, variable": GHVB(order=4, beta=0.8, spacing="variable"),
    }
    return {f"polyak {name}": solver for name, solver in found.items()}


def run_ours(problem: Problem, solver: Any, nfe: int) -> Tensor | None:
    try:
        return sample(problem.guided, problem.x, solver=solver, nfe=nfe)
    except ValueError:  # too few evaluations for one step
        return None


def diffusers_schedulers() -> dict[str, Any]:
    import diffusers as d

    chain = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    end: Any = dict(final_sigmas_type="sigma_min")
    found = {
        "DDIM": d.DDIMScheduler(**chain, clip_sample=False, set_alpha_to_one=False, timestep_spacing="linspace"),
        "PNDM": d.PNDMScheduler(**chain, skip_prk_steps=True, set_alpha_to_one=False),
        "Euler": d.EulerDiscreteScheduler(**chain, **end),
        "Heun": d.HeunDiscreteScheduler(**chain),
        "DPM-Solver++ 2M": d.DPMSolverMultistepScheduler(**chain, **end),
        "DPM-Solver++ 2M Karras": d.DPMSolverMultistepScheduler(**chain, **end, use_karras_sigmas=True),
        "DPM-Solver++ 3M": d.DPMSolverMultistepScheduler(**chain, **end, solver_order=3),
        "UniPC 2": d.UniPCMultistepScheduler(**chain, **end),
        "DEIS 2": d.DEISMultistepScheduler(**chain),
    }
    return {f"diffusers {name}": scheduler for name, scheduler in found.items()}


def run_diffusers(problem: Problem, scheduler: Any, nfe: int) -> Tensor | None:
    steps = nfe
    while steps:  # as many steps as the evaluations pay for: some ask twice in a step, or once more
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) <= nfe:
            break
        steps -= 1
    if not steps:
        return None
    t = scheduler.timesteps[0]
    # Where sigma / alpha is the state's scale, or t is not the chain's last, it starts from the exact solution there.
    x = _started(problem, scheduler, float(t))
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        x = scheduler.step(problem.at_label(x_in, t), t, x, return_dict=False)[0]
    return x


def _started(problem: Problem, scheduler: Any, label: float) -> Tensor:
    process = problem.process
    t = process.t_of_label(label)
    x = problem.x
    if t < process.t_max - 1e-9:
        fine = process.grid(600, "logsnr", start=process.t_max, end=t)
        x = sample(problem.guided, x, solver=DPMSolver(order=3, method="singlestep"), grid=fine)
    scaled = float(scheduler.init_noise_sigma) > 1.5  # its state is x0 + sigma eps
    return x / process.alpha(t) if scaled else x


def k_diffusion() -> Any:
    """k-diffusion's samplers, or None: the file alone, its imports of what these do not use replaced by nothing."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0], "sampling.py")
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(file.parent)]
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    stand_ins: dict[str, Any] = {"k_diffusion": package, "k_diffusion.utils": utils}
    for name in ("torchsde", "torchdiffeq"):
        if importlib.util.find_spec(name) is None:
            stand_ins[name] = types.ModuleType(name)
            stand_ins[name].odeint = None
    sys.modules.update(stand_ins)
    inner = importlib.util.spec_from_file_location("k_diffusion.sampling", file)
    assert inner is not None
    assert inner.loader is not None
    module = importlib.util.module_from_spec(inner)
    inner.loader.exec_module(module)
    return module


def k_samplers(module: Any) -> dict[str, Any]:
    return {
        "k-diffusion euler": (module.sample_euler, 1),
        "k-diffusion heun": (module.sample_heun, 2),
        "k-diffusion dpm_2": (module.sample_dpm_2, 2),
        "k-diffusion lms": (module.sample_lms, 1),
        "k-diffusion dpmpp_2m": (module.sample_dpmpp_2m, 1),
    }


def run_k(problem: Problem, module: Any, sampler: Any, stages: int, nfe: int) -> Tensor | None:
    process, n = problem.process, nfe // stages
    if not n:
        return None
    low, high = process.sigma_hat(process.t_min), process.sigma_hat(process.t_max)
    sigmas = module.get_sigmas_karras(n + 1, low, high).to(torch.float64)[: n + 1]

    def model(y: Tensor, sigma: Tensor) -> Tensor:
        t = process.t_of_lam(-math.log(float(sigma[0])))
        t = min(max(t, process.t_min), process.t_max)
        return y - sigma[:, None] * problem.eps(process.alpha(t) * y, t)

    y = sampler(model, problem.x / process.alpha(process.t_max), sigmas, disable=True)
    return process.alpha(process.t_min) * y


def measured(scale: float) -> dict[str, list[float | None]]:
    """By solver, its error at each number of evaluations; None where it cannot."""
    problem = Problem(scale)
    ways: dict[str, Callable[[int], Tensor | None]] = {}
    for name, solver in ours().items():
        ways[name] = lambda nfe, solver=solver: run_ours(problem, solver, nfe)
    for name, scheduler in diffusers_schedulers().items():
        ways[name] = lambda nfe, scheduler=scheduler: run_diffusers(problem, scheduler, nfe)
    module = k_diffusion()
    if module is None:
        print("k-diffusion is not installed: its rows are missing")
    else:
        for name, (sampler, stages) in k_samplers(module).items():
            ways[name] = lambda nfe, s=sampler, k=stages: run_k(problem, module, s, k, nfe)
    found: dict[str, list[float | None]] = {}
    for name, way in ways.items():
        row: list[float | None] = []
        for nfe in EVALUATIONS:
            end = way(nfe)
            row.append(None if end is None else path_rmse(end, problem.end))
        found[name] = row
    return found


def table(found: dict[str, list[float | None]]) -> str:
    lines = ["| solver | " + " | ".join(map(str, EVALUATIONS)) + " |", "| --- |" + " ---: |" * len(EVALUATIONS)]
    for name, row in found.items():
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.2g}" for v in row) + " |")
    return "\n".join(lines)


def draw(found: dict[str, list[float | None]], file: str) -> None:
    import matplotlib.pyplot as plt

    houses = ("polyak", "diffusers", "k-diffusion")
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.5), sharey=True, layout="constrained")
    for axis, house in zip(axes, houses, strict=True):
        rows = [(n.removeprefix(house + " "), r) for n, r in found.items() if n.startswith(house + " ")]
        rows = sorted((row for row in rows if row[1][-1]), key=lambda row: row[1][-1] or 0.0)
        lowest = -math.inf
        for i, (solver, row) in enumerate(rows):
            points = [(n, v) for n, v in zip(EVALUATIONS, row, strict=True) if v]
            axis.plot(*zip(*points, strict=True), color=f"C{i % 10}", marker=".")
            # Names stand beside the ends of their lines, and above each other where these meet.
            lowest = max(math.log10(points[-1][1]), lowest + 0.16)
            axis.annotate(
                solver, points[-1], (60, 10**lowest), color=f"C{i % 10}", va="center", annotation_clip=False,
                arrowprops=dict(arrowstyle="-", color=f"C{i % 10}", lw=0.5),
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", title=house, xlabel="evaluations of the network", xlim=(4.5, 260))
        axis.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("distance to the exact solution")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of guidance; 1 is none")
    parser.add_argument("--picture")
    parser.add_argument("--json")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = measured(given.scale)
    print(
        f"\nroot mean square distance to the exact solution; guidance {given.scale:g}; by evaluations of the network\n"
    )
    print(table(found))
    if given.picture:
        draw(found, given.picture)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
