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
from polyak.generate import CFG, DDIM, RK4, Denoiser, DPMSolver, Euler, Heun, ProbabilityPath, Process, Solver, sample
from polyak.generate.problems import Gaussian, Mixture

ALL: dict[str, Process] = {**PROCESSES, "PFGM++": generate.PFGMPP(8.0)}
every_process = pytest.mark.parametrize("process", ALL.values(), ids=ALL.keys())
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
    "HB 2": generate.HeavyBall(order=2, beta=0.8),
    "GHVB 2": generate.GHVB(order=2, beta=0.8),
    "GHVB 3, variable": generate.GHVB(order=3, beta=0.8, spacing="variable", start="rk"),
    "NT 2": generate.Nesterov(order=2, beta=0.8),
    "HB on 2M": generate.HeavyBallDPM(beta=0.8),
    "DPMSolver-adaptive": DPMSolver(method="adaptive", atol=1e-6, rtol=1e-6),
}
STOCHASTIC: dict[str, Solver] = {
    "DDIM, eta=1": DDIM(eta=1.0),
    "FlowSDE": generate.FlowSDE("sigma", 1.0),
    "SDE-DPMSolver++ 2M": DPMSolver(order=2, form="data", method="multistep", sde=True),
    "ReverseSDE": generate.ReverseSDE(),
}
# The second coordinate has no spread, so that the guided difference (0, 0.8) is at right angles to the prediction: then every
# guidance below makes of the two laws the third one, exactly.
COND, UNCOND = Gaussian([0.7, 0.0], [0.5, 0.0]), Gaussian([0.7, -0.8], [0.5, 0.0])
GUIDED = Gaussian([0.7, 1.6], [0.5, 0.0])
GUIDANCES: dict[str, Any] = {
    "CFG": CFG(3.0),
    "APG": generate.APG(3.0),
    "APG, eta=1": generate.APG(3.0, eta=1.0),
    "APG, threshold": generate.APG(5.0, norm_threshold=0.4),  # half of the difference, twice the scale
    "Precision, W = 1": generate.PrecisionGuidance(2.0, clip=(1.0, 1.0)),
}

STEERINGS: dict[str, Any] = {
    "FK": generate.FKSteering(
        lambda samples: samples[..., 0], lam=0.8, num_particles=4000, ess_threshold=0.5, pick="all"
    ),
}

# Paths between two laws, forward in a time of their own: sample() refuses them, and tests of their own solve them.
BRIDGES = {generate.Interpolant}
# These go on from the best, so that their law is no tilt: tests/generate/test_rbf.py.
SEARCHES = {generate.BestOfN, generate.CoDe, generate.SVDD}
# Its target is a composed denoiser's: tests/generate/test_fkc.py.
CORRECTORS = {generate.FeynmanKacCorrector}
# Integer states, which no solver above steps: tests/generate/test_masked_diffusion.py has their matrix.
TOKENS = {generate.MaskedProcess, generate.FirstHitting, generate.MaskedAncestral}


def exported(kind: Any) -> set[type]:
    """The public classes of a kind that can be made without arguments of their own."""
    found = [getattr(generate, name) for name in generate.__all__]
    return {c for c in found if inspect.isclass(c) and issubclass(c, kind) and c.run is not Solver.run}


def test_every_solver_that_is_exported_is_here() -> None:
    abstract = {generate.LinearSolver, generate.RungeKutta, type(DPMSolver()).__mro__[1]}
    here = {c for solver in (*SOLVERS.values(), *STOCHASTIC.values()) for c in type(solver).__mro__}
    assert exported(Solver) - abstract - here - TOKENS == set()


def test_every_process_that_is_exported_is_here() -> None:
    found = [getattr(generate, name) for name in generate.__all__]
    public = {c for c in found if inspect.isclass(c) and issubclass(c, ProbabilityPath)} - {ProbabilityPath, Process}
    assert public - {type(process) for process in ALL.values()} - BRIDGES - TOKENS == set()


def test_every_guidance_that_is_exported_is_here() -> None:
    found = [getattr(generate, name) for name in generate.__all__]
    public = {c for c in found if inspect.isclass(c) and hasattr(c, "paired") and c is not generate.Guidance}
    assert public - {type(guidance) for guidance in GUIDANCES.values()} == set()


def test_every_steering_that_is_exported_is_here() -> None:
    found = [getattr(generate, name) for name in generate.__all__]
    public = {c for c in found if inspect.isclass(c) and hasattr(c, "resamples") and c is not generate.Steering}
    assert public - {type(steering) for steering in STEERINGS.values()} - SEARCHES - CORRECTORS == set()


def ends(process: Any) -> tuple[float, float]:
    """Times between which sigma / alpha falls from 5 to 0.1: there every field is smooth and orders are seen soon."""
    return process.t_of_lam(-math.log(5.0)), process.t_of_lam(-math.log(0.1))


def starts(process: Any, law: Mixture, n: int = 12) -> torch.Tensor:
    """Draws of the law under Gaussian noise at the first of these times, float64."""
    generator = torch.Generator().manual_seed(0)
    x0, t = law.sample(n, generator=generator), ends(process)[0]
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return process.alpha(t) * x0 + process.sigma(t) * noise


def exact(law: Mixture, process: Any, unconditional: Mixture | None = None) -> Denoiser:
    """The posterior mean under Gaussian noise; of PFGM++, whose ODE is EDM's, it is a denoiser as any other."""

    def of(law: Mixture) -> Any:
        return lambda x, t: law.posterior_mean(x, process.alpha(t)[0].item(), process.sigma(t)[0].item())

    other = None if unconditional is None else of(unconditional)
    return Denoiser(of(law), process, "sample", unconditional=other, label=lambda t: t)


def run(solver: Solver, process: Any, denoiser: Denoiser, x: torch.Tensor, steps: int, guidance: Any = None) -> Any:
    begin, end = ends(process)
    grid = process.grid(1 if solver.adaptive else steps, "logsnr", start=begin, end=end)
    generator = torch.Generator().manual_seed(1)
    return sample(denoiser, x, solver=solver, grid=grid, guidance=guidance, generator=generator)


def error(solver: Solver, process: Any, law: Gaussian, steps: int) -> float:
    x, (begin, end) = starts(process, law), ends(process)
    there = law.flow(x, *((process.alpha(t), process.sigma(t)) for t in (begin, end)))
    return (run(solver, process, exact(law, process), x, steps) - there).square().sum(1).mean().sqrt().item()


@every_process
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_a_solver_solves_the_flow_of_a_process(process: Any, solver: Solver) -> None:
    """Twice the steps divide the error by 2^order."""
    law = Gaussian([0.7, -0.4], [0.5, 0.05])
    if solver.adaptive:
        assert error(solver, process, law, 1) < 1e-4  # a hundred steps of its tolerance 1e-6
        return
    if isinstance(process, generate.Discrete) and isinstance(solver, generate.RungeKutta):
        # A chain's schedules are bent at each of its thousand points, where no Runge-Kutta method is of its order.
        assert error(solver, process, law, 96) < (1e-3 if solver.stages > 1 else 0.04)
        return
    before = error(solver, process, law, 24)
    for steps in (48, 96, 192, 384):
        after = error(solver, process, law, steps)
        if after < 1e-11 or math.log2(before / after) > solver.order - solver.tapers - 0.2:
            return
        before, last = after, before / after
    raise AssertionError(f"{steps} steps are off by {after:.3g}; the last doubling gained 2^{math.log2(last):.2f}")


@every_process
@pytest.mark.parametrize("solver", [*SOLVERS.values(), *STOCHASTIC.values()], ids=[*SOLVERS, *STOCHASTIC])
def test_guidance_makes_of_two_laws_a_third(process: Any, solver: Solver) -> None:
    """Guided between two laws a solver runs as it does on the law that their guided difference is the denoiser of."""
    if solver.stochastic and not process.is_gaussian:
        with pytest.raises(ValueError, match="needs Gaussian noise, which PFGMPP"):
            run(solver, process, exact(COND, process), starts(process, COND), 4)
        return
    x = starts(process, GUIDED, 4)
    want = run(solver, process, exact(GUIDED, process), x, 12)
    for guidance in GUIDANCES.values():
        got = run(solver, process, exact(COND, process, UNCOND), x, 12, guidance)
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9), guidance


@every_process
@pytest.mark.parametrize("solver", STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_a_stochastic_solver_keeps_the_law(process: Any, solver: Solver) -> None:
    if not process.is_gaussian:
        return
    n, (_, end) = 20_000, ends(process)
    x = run(solver, process, exact(COND, process), starts(process, COND, n), 100)
    alpha, sigma = process.alpha(end), process.sigma(end)
    mean, variance = alpha * COND.means[0], alpha**2 * COND.variances[0] + sigma**2
    # Five standard errors, and the order of a hundred steps of 0.04; Euler's method in t does not know that sigma is a factor.
    coarse = 0.2 if isinstance(solver, generate.FlowSDE) else 0.04
    assert torch.allclose(x.mean(0), mean, rtol=0.01, atol=5 * (variance.max().item() / n) ** 0.5)
    assert torch.allclose(x.var(0), variance, rtol=5 * math.sqrt(2 / n) + coarse)


@every_process
@pytest.mark.parametrize("solver", STOCHASTIC.values(), ids=STOCHASTIC.keys())
@pytest.mark.parametrize("steering", STEERINGS.values(), ids=STEERINGS.keys())
def test_a_steering_tilts_the_law(process: Any, solver: Solver, steering: Any) -> None:
    """By exp(0.8 x) a normal law's mean moves by 0.8 times its variance, here that of what the solver makes of the law."""
    if not process.is_gaussian:
        return
    begin, end = ends(process)
    grid = process.grid(30, "logsnr", start=begin, end=end)
    denoiser, x = exact(COND, process), starts(process, COND, 4000)
    free = sample(denoiser, x, solver=solver, grid=grid, generator=torch.Generator().manual_seed(2))[:, 0]
    x, info = sample(
        denoiser, x, solver=solver, grid=grid, steering=steering, generator=torch.Generator().manual_seed(2), return_info=True
    )  # fmt: skip
    mean = (info.steering.logw.softmax(1)[0] * x[:, 0]).sum()
    spread = free.std()
    # Six standard errors, of fewer independent particles than there are.
    assert abs(mean - free.mean() - 0.8 * free.var()) < 6 * (2 / 1000) ** 0.5 * spread
    assert abs(mean - free.mean()) > 0.4 * free.var()
