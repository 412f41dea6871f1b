"""What samplers cost beside the network: milliseconds for each evaluation, with a network that costs nothing.

    python bench/generate.py [--device cpu|cuda] [--json rows.json]

In one run on one machine: ``sample()``, the same solver as a diffusers scheduler (PolyakScheduler), and the diffusers scheduler
that it corresponds to. All of a run is timed, planning included (``sample``'s grid, ``set_timesteps``), and divided by its
evaluations; the best of several runs counts, after one to warm up. The network gives back one tensor that is there already.
On a GPU also a whole ``sample()`` as one CUDA graph.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from polyak.generate import (
    APG,
    CFG,
    DDIM,
    EDM,
    GHVB,
    VP,
    Denoiser,
    DPMSolver,
    Euler,
    Flow,
    HeavyBall,
    Heun,
    sample,
)

STEPS = 30
LEVELS = EDM(sigma_min=0.03, sigma_max=14.6)  # x0 + sigma eps, the range of the chain that diffusers' schedulers have
# Latents of two pictures of 1024 x 1024, and 64 small pictures.
SHAPES = ((2, 4, 128, 128), (64, 3, 32, 32))


def contenders() -> dict[str, tuple[Any, Any, str, Any]]:
    """Name -> (solver, process, dialect, diffusers' scheduler)."""
    import diffusers as d

    two_m: dict[str, Any] = {"order": 2, "form": "data", "method": "multistep"}
    return {
        "DDIM": (DDIM(), VP(), "epsilon", d.DDIMScheduler(clip_sample=False)),
        "DPM-Solver++ 2M": (DPMSolver(**two_m), VP(), "epsilon", d.DPMSolverMultistepScheduler()),
        "DPM-Solver singlestep 3": (
            DPMSolver(),
            VP(),
            "epsilon",
            d.DPMSolverSinglestepScheduler(
                solver_order=3, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", lower_order_final=True
            ),
        ),
        "SDE-DPM-Solver++ 2M": (
            DPMSolver(**two_m, sde=True),
            VP(),
            "epsilon",
            d.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        ),
        # diffusers has PLMS, the method without momentum.
        "PLMS4 with HB": (HeavyBall(4, 0.8), VP(), "epsilon", d.PNDMScheduler(skip_prk_steps=True)),
        "GHVB 3.8": (GHVB(4, 0.8), VP(), "epsilon", d.PNDMScheduler(skip_prk_steps=True)),
        "Heun": (Heun(), LEVELS, "epsilon", d.HeunDiscreteScheduler()),
        "Euler": (Euler(), LEVELS, "epsilon", d.EulerDiscreteScheduler()),
        "Heun, flow": (Heun(), Flow(), "flow", d.FlowMatchHeunDiscreteScheduler()),
        "Euler, flow": (Euler(), Flow(), "flow", d.FlowMatchEulerDiscreteScheduler()),
    }


def seconds(run: Callable[[], Any], device: str, repeat: int) -> float:
    """The least of several runs."""
    best = float("inf")
    for i in range(repeat + 2):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        if i >= 2:
            best = min(best, time.perf_counter() - began)
    return best


def through(scheduler: Any, x: torch.Tensor, output: torch.Tensor) -> Callable[[], int]:
    """A pipeline's loop."""
    known = inspect.signature(scheduler.step).parameters
    drawn = {"generator": torch.Generator(x.device).manual_seed(0)} if "generator" in known else {}

    @torch.no_grad()
    def run() -> int:
        scheduler.set_timesteps(STEPS, device=x.device)
        y = x
        scales = hasattr(scheduler, "scale_model_input")
        for t in scheduler.timesteps:
            if scales:
                scheduler.scale_model_input(y, t)
            y = scheduler.step(output, t, y, return_dict=False, **drawn)[0]
        return len(scheduler.timesteps)

    return run


def captured(run: Callable[[], Any], generator: torch.Generator) -> Callable[[], Any]:
    """The same as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def rows(device: str, repeat: int, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    from polyak.generate.adapters.diffusers import PolyakScheduler

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    output = 0.5 * x
    found = []
    for name, (solver, process, kind, theirs) in contenders().items():
        generator = torch.Generator(device).manual_seed(0)
        denoiser = Denoiser(lambda x, t: output, process, kind)

        def ours(denoiser: Any = denoiser, solver: Any = solver, generator: Any = generator) -> Any:
            return sample(denoiser, x, solver=solver, steps=STEPS, generator=generator, check_finite=False)

        _, info = sample(denoiser, x, solver=solver, steps=STEPS, generator=generator, return_info=True)
        adapter = PolyakScheduler.from_config(theirs.config, solver=solver)
        loops = {"adapter": through(adapter, x, output), "diffusers": through(theirs, x, output)}
        row: dict[str, Any] = {"solver": name, "sample": seconds(ours, device, repeat) / info.nfe}
        row |= {who: seconds(run, device, repeat) / run() for who, run in loops.items()}
        if device != "cpu":
            row["graph"] = seconds(captured(ours, generator), device, repeat) / info.nfe
        found.append({k: v * 1e3 if isinstance(v, float) else v for k, v in row.items()})
    return found


def guided(device: str, repeat: int, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """DDIM with guidance: ``sample()``, our scheduler with our guider, and diffusers' own of both."""
    import diffusers as d

    from polyak.generate.adapters.diffusers import APGGuider, PolyakScheduler

    kept: dict[str, Any] = {"eta": 0.0, "momentum": -0.5, "norm_threshold": 15.0}
    named = {"adaptive_projected_guidance_rescale": 15.0, "adaptive_projected_guidance_momentum": -0.5}
    theirs = d.DDIMScheduler(clip_sample=False)
    scheduler = PolyakScheduler.from_config(theirs.config, solver=DDIM())
    # The update is of clean data, as in the paper, in sample(); of the network's output, as diffusers has it, in guiders.
    pairs = {
        "DDIM, CFG": (CFG(7.5), d.ClassifierFreeGuidance(7.5), d.ClassifierFreeGuidance(7.5)),
        "DDIM, APG": (
            APG(7.5, **kept),
            APGGuider(7.5, space="pred", **kept),
            d.AdaptiveProjectedGuidance(7.5, eta=0.0, **named),
        ),
    }
    x, c, u = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    denoiser = Denoiser(lambda x, t: c, VP(), unconditional=lambda x, t: u)

    def through_both(scheduler: Any, guider: Any) -> Callable[[], None]:
        def run() -> None:
            scheduler.set_timesteps(STEPS, device=x.device)
            y = x
            for i, t in enumerate(scheduler.timesteps):
                guider.set_state(i, STEPS, t)
                y = scheduler.step(guider.forward(c, u).pred, t, y, return_dict=False)[0]

        return torch.no_grad()(run)

    found = []
    for name, (guidance, adapter, guider) in pairs.items():

        def ours(guidance: Any = guidance) -> Any:
            return sample(denoiser, x, solver=DDIM(), steps=STEPS, guidance=guidance, check_finite=False)

        runs = {"sample": ours, "adapter": through_both(scheduler, adapter), "diffusers": through_both(theirs, guider)}
        found.append({"solver": name, **{who: 1e3 * seconds(run, device, repeat) / STEPS for who, run in runs.items()}})
        if device != "cpu":
            found[-1]["graph"] = 1e3 * seconds(captured(ours, torch.Generator(device)), device, repeat) / STEPS
    return found


def table(found: list[dict[str, Any]]) -> str:
    graph = "graph" in found[0]
    head = ["solver", "sample()", "adapter", "diffusers", "sample / diffusers", "adapter / diffusers"]
    head += ["one graph"] if graph else []
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in found:
        cells = [f"{row[k]:.4f}" for k in ("sample", "adapter", "diffusers")]
        cells += [f"{row[k] / row['diffusers']:.2f}" for k in ("sample", "adapter")]
        cells += [f"{row['graph']:.4f}"] if graph else []
        lines.append(f"| {row['solver']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    devices = [given.device] if given.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {}
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {given.threads} thread(s)"
        for shape in SHAPES:
            found[f"{device} {shape}"] = done = rows(device, given.repeat, shape)
            print(
                f"\n{name}, torch {torch.__version__}; {STEPS} steps, milliseconds for each evaluation, state {shape}\n"
            )
            print(table(done))
            found[f"guidance, {device} {shape}"] = done = guided(device, given.repeat, shape)
            print("\nA step with guidance, both predictions given:\n")
            print(table(done))
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
