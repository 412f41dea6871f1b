"""Every process with every solver that suits it and every guidance, against exact solutions; what makes no sense is refused.

A part that the package exports and that is not in these tables fails the test: new ones are added to them.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from generate_cases import PROCESSES

from polyak import generate
from polyak.generate import CFG, DDIM, RK4, DPMSolver, Euler, Heun, ProbabilityPath, Process, Solver, sample
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture, gaussian_flow

SOLVERS: dict[str, Solver] = {
    "DDIM": DDIM(),
    "Euler": Euler(),
    "Heun": Heun(),
    "RK4": RK4(),
    "DPMSolver-2": DPMSolver(order=2, method="singlestep"),
    "DPMSolver-3": DPMSolver(order=3, method="singlestep", kind="taylor"),
    "DPMSolver-fast": DPMSolver(),
    "DPMSolver++ 2M": DPMSolver(order=2, form="data", method="multistep"),
    "DPMSolver++ 3M": DPMSolver(order=3, form="data", method="multistep", start="singlestep"),
    "DPMSolver-adaptive": DPMSolver(method="adaptive", atol=1e-6, rtol=1e-6),
}
STOCHASTIC: dict[str, Solver] = {
    "DDIM, eta=1": DDIM(eta=1.0),
    "SDE-DPMSolver++ 2M": DPMSolver(order=2, form="data", method="multistep", sde=True),
}
# The second coordinate has no spread, so that the guided difference (0, 0.8) is at right angles to the prediction: then every
# guidance below makes of the two laws the third one, exactly.
COND, UNCOND = Gaussian([0.7, 0.0], [0.5, 1e-12]), Gaussian([0.7, -0.8], [0.5, 1e-12])
GUIDED = Gaussian([0.7, 1.6], [0.5, 1e-12])
GUIDANCES: dict[str, Any] = {"CFG": CFG(3.0)}

# Paths between two laws, forward in a time of their own: sample() refuses them, and tests of their own solve them.
BRIDGES = {generate.Interpolant}


def exported(kind: Any) -> set[type]:
    """The public classes of a kind that can be made without arguments of their own."""
    found = [getattr(generate, name) for name in generate.__all__]
    return {c for c in found if inspect.isclass(c) and issubclass(c, kind) and c.run is not Solver.run}


def test_every_solver_that_is_exported_is_here() -> None:
    abstract = {generate.LinearSolver, generate.RungeKutta, type(DPMSolver()).__mro__[1]}
    here = {c for solver in (*SOLVERS.values(), *STOCHASTIC.values()) for c in type(solver).__mro__}
    assert exported(Solver) - abstract - here == set()


def test_every_process_that_is_exported_is_here() -> None:
    found = [getattr(generate, name) for name in generate.__all__]
    public = {c for c in found if inspect.isclass(c) and issubclass(c, ProbabilityPath)} - {ProbabilityPath, Process}
    assert public - {type(process) for process in PROCESSES.values()} - BRIDGES == set()


def test_every_guidance_that_is_exported_is_here() -> None:
    found = [getattr(generate, name) for name in generate.__all__]
    public = {c for c in found if inspect.isclass(c) and hasattr(c, "paired") and c is not generate.Guidance}
    assert public - {type(guidance) for guidance in GUIDANCES.values()} == set()


def ends(process: Any) -> tuple[float, float]:
    """Times between which sigma / alpha falls from 5 to 0.1: there every field is smooth and orders are seen soon."""
    return process.t_of_lam(-math.log(5.0)), process.t_of_lam(-math.log(0.1))


def starts(process: Any, law: Mixture, n: int = 12) -> torch.Tensor:
    """Draws of the law at the first of these times, float64."""
    generator = torch.Generator().manual_seed(0)
    return process.perturb(law.sample(n, generator=generator), ends(process)[0], generator=generator)[0]


def error(solver: Solver, process: Any, law: Gaussian, steps: int, denoiser: Any, guidance: Any) -> float:
    x, (begin, end) = starts(process, law), ends(process)
    exact = gaussian_flow(law, process, x, begin, end)
    grid = process.grid(steps, "logsnr", start=begin, end=end)
    got = sample(denoiser, x, solver=solver, grid=grid, guidance=guidance)
    return (got - exact).square().sum(1).mean().sqrt().item()


def converges(solver: Solver, process: Any, law: Gaussian, denoiser: Any, guidance: Any = None) -> None:
    """Twice the steps divide the error by 2^order."""
    if solver.adaptive:
        assert error(solver, process, law, 1, denoiser, guidance) < 1e-4  # a hundred steps of its tolerance 1e-6
        return
    if isinstance(process, generate.Discrete) and isinstance(solver, generate.RungeKutta):
        # A chain's schedules are bent at each of its thousand points, where no Runge-Kutta method is of its order.
        assert error(solver, process, law, 192, denoiser, guidance) < (1e-3 if solver.stages > 1 else 0.02)
        return
    before = error(solver, process, law, 24, denoiser, guidance)
    for steps in (48, 96, 192, 384):
        after = error(solver, process, law, steps, denoiser, guidance)
        if after < 1e-11 or math.log2(before / after) > solver.order - solver.tapers - 0.2:
            return
        before, last = after, before / after
    raise AssertionError(f"{steps} steps are off by {after:.3g}; the last doubling gained 2^{math.log2(last):.2f}")


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_a_solver_solves_the_flow_of_a_process(process: Any, solver: Solver) -> None:
    law = Gaussian([0.7, -0.4], [0.5, 0.05])
    converges(solver, process, law, ExactDenoiser(law, process))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES.keys())
def test_a_guided_solver_solves_the_guided_flow(process: Any, solver: Solver, guidance: Any) -> None:
    denoiser = ExactDenoiser(COND, process, unconditional=UNCOND)
    converges(solver, process, GUIDED, denoiser, guidance)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("solver", STOCHASTIC.values(), ids=STOCHASTIC.keys())
@pytest.mark.parametrize("guidance", [None, *GUIDANCES.values()], ids=["none", *GUIDANCES])
def test_a_stochastic_solver_keeps_the_law(process: Any, solver: Solver, guidance: Any) -> None:
    n, law = 20_000, COND if guidance is None else GUIDED
    denoiser = ExactDenoiser(COND, process, unconditional=UNCOND)
    begin, end = ends(process)
    x = sample(
        denoiser, starts(process, law, n), solver=solver, grid=process.grid(100, "logsnr", start=begin, end=end),
        guidance=guidance, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    alpha, sigma = process.alpha(end), process.sigma(end)
    mean, variance = alpha * law.means[0], alpha**2 * law.variances[0] + sigma**2
    # Five standard errors, and the order of a hundred steps of 0.04.
    assert torch.allclose(x.mean(0), mean, rtol=0.01, atol=5 * (variance.max().item() / n) ** 0.5)
    assert torch.allclose(x.var(0), variance, rtol=5 * math.sqrt(2 / n) + 0.04)
