"""Trying out a process or a solver of one's own: what the rest of the room relies on, looked at on small problems.

    >>> check_process(MyProcess())
    >>> check_solver(MySolver())

Both raise AssertionError with what is wrong, and return nothing where all is well.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import torch
from torch import Tensor

from polyak.core.exact import Mixture
from polyak.generate.prediction import Prediction
from polyak.generate.process import VP, Process
from polyak.generate.solver import Query, Solver, Step, drive, resume

_LAW = Mixture([[-1.0], [0.6]], [0.25, 0.09], [0.4, 0.6])


def check_process(process: Process, *, points: int = 33) -> None:
    """Look at a Gaussian process: its schedules, their derivatives and inverse, its grids, and that it compares by value.

    Args:
        process: its lam must be finite within (t_min, t_max).
        points: times to look at.

    Raises:
        AssertionError: what does not hold, with the time.
    """
    low, high = float(process.t_min), float(process.t_max)
    _hold(low < high, f"t_min must be below t_max, got {low} and {high}")
    t = torch.linspace(low, high, points + 2, dtype=torch.float64)[1:-1]
    alpha, sigma, lam = process.alpha(t), process.sigma(t), process.lam(t)
    _every(alpha > 0, t, "alpha must be > 0")
    _every(sigma > 0, t, "sigma must be > 0")
    _close(lam, process.log_alpha(t) - process.log_sigma(t), t, "lam must be log alpha - log sigma")
    _close(alpha, process.log_alpha(t).exp(), t, "alpha must be exp(log_alpha)")
    _close(sigma, process.log_sigma(t).exp(), t, "sigma must be exp(log_sigma)")
    _every(torch.diff(lam) < 0, t[1:], "lam must decrease in t")
    _close(process.t_of_lam(lam), t, t, "t_of_lam must be the inverse of lam", 1e-7)
    # A central difference in t, whose step balances truncation and rounding.
    h = 1e-5 * torch.minimum(t - low, high - t).clamp(max=1.0)
    for name, schedule, slope in (("dalpha", process.alpha, process.dalpha), ("dsigma", process.sigma, process.dsigma)):
        numeric = (schedule(t + h) - schedule(t - h)) / (2 * h)
        _close(slope(t), numeric, t, f"{name} must be the derivative", 1e-4)
    _close(process.drift(t) * alpha, process.dalpha(t), t, "drift must be alpha' / alpha", 1e-6)
    squared = 2 * sigma * process.dsigma(t) - 2 * process.drift(t) * sigma**2
    _close(process.diffusion2(t), squared, t, "diffusion2 must be d sigma^2/dt - 2 f sigma^2", 1e-6)
    _close(process.t_of_label(process.label(t)), t, t, "t_of_label must be the inverse of label", 1e-6)
    for kind in (
        ("time", "logsnr") if math.isfinite(process.lam(low)) and math.isfinite(process.lam(high)) else ("time",)
    ):
        grid = process.grid(7, kind)
        _hold(
            (grid[0].item(), grid[-1].item()) == (high, low) and bool((torch.diff(grid) < 0).all()),
            f"grid(7, {kind!r}) must decrease from t_max to t_min, got {grid.tolist()}",
        )
    same = copy.deepcopy(process)
    _hold(same == process, "a copy must be equal: define __eq__, or make the class a frozen dataclass")
    _hold(hash(same) == hash(process), "equal processes must have equal hashes")


def check_solver(solver: Solver, process: Process | None = None, *, steps: int = 12) -> None:
    """Look at a solver: times, steps and order of accuracy, that it changes nothing it is given, and that it can be resumed.

    Args:
        solver: what to look at, on the exact denoiser of a mixture of two Gaussians.
        process: default VP(); of finite lam.
        steps: of the runs. The order is taken from 8 and 16 times as many.

    Raises:
        AssertionError: what does not hold.
    """
    process = process or VP(t_min=0.02)
    generator = torch.Generator().manual_seed(0)
    x = process.prior((6, 1), generator=generator, dtype=torch.float64)
    before = x.clone()
    asked: list[Query] = []
    seen: list[Step] = []
    times = _times(solver, process, steps)

    def answer(query: Query) -> Prediction:
        asked.append(query)
        _hold(query.x.shape == x.shape, f"a query's x must have shape {tuple(x.shape)}, got {tuple(query.x.shape)}")
        _hold(process.t_min <= query.t <= process.t_max, f"it asks at t={query.t:g}, out of the process's range")
        return _exact(query, process)

    end = drive(solver.run(x, times, process, generator=_seeded()), answer, lambda step: seen.append(step))
    _hold(bool(torch.equal(x, before)), "it changed the start in place")
    _hold(end.dtype == x.dtype and end.shape == x.shape, "the result must have the start's dtype and shape")
    _hold(len(seen) > 0 and seen[-1].last and not any(s.last for s in seen[:-1]), "its last step alone must say so")
    _hold([s.index for s in seen] == list(range(len(seen))), "steps must be numbered from 0")
    _hold(seen[0].s == times[0] and seen[-1].t == times[-1], "its steps must go from times[0] to times[-1]")
    _hold(sum(q.first for q in asked) >= len(seen), "the first query of each step must have first=True")
    _hold(not any(s.mean is None for s in seen) or not solver.stochastic or any(s.std is None for s in seen),
          "a stochastic step must give its mean and std")  # fmt: skip
    _resumes(solver, process, times, seen, end)
    if not (solver.adaptive or solver.stochastic):
        _converges(solver, process, x, steps)


def _times(solver: Solver, process: Process, steps: int) -> list[float]:
    if solver.adaptive:
        return process.check_times(solver.times(process))
    return process.check_times(solver.times(process, steps=steps))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _exact(query: Query, process: Process) -> Prediction:
    x0 = _LAW.posterior_mean(query.x, process.alpha(query.t), process.sigma(query.t))
    return Prediction(x0, query.x, query.t, process, "sample")


def _resumes(solver: Solver, process: Process, times: list[float], seen: list[Step], end: Tensor) -> None:
    """From any step the rest of the run is the same, and so again from a pickled copy."""
    for step in seen[:-1:3]:
        ends = []
        for kept in (step, pickle.loads(pickle.dumps(step))):
            quiet = resume(solver, kept, times, process, generator=_seeded())
            ends.append(drive(quiet, lambda query: _exact(query, process)))
        _hold(bool(torch.equal(ends[0], ends[1])), f"resumed twice from step {step.index} it gives two results")
        if not solver.stochastic:
            _hold(
                bool(torch.allclose(ends[0], end, rtol=1e-12, atol=1e-12)),
                f"resumed from step {step.index} it ends elsewhere: what it remembers must be in Step.memory",
            )


def _converges(solver: Solver, process: Process, x: Tensor, steps: int) -> None:
    ends = []
    for n in (steps * 8, steps * 16, steps * 96):
        run = solver.run(x, process.check_times(solver.times(process, steps=n)), process)
        ends.append(drive(run, lambda query: _exact(query, process)))
    coarse, fine = ((end - ends[-1]).square().mean().sqrt().item() for end in ends[:2])
    if fine < 1e-11:  # rounding is in the way of an order
        return
    slope = math.log2(coarse / max(fine, 1e-300))
    # Half an order is left to the asymptotic regime, which so few steps may not have reached.
    _hold(
        slope > solver.order - solver.tapers - 0.5,
        f"it declares order {solver.order}; twice the steps divide its error by 2^{slope:.2f}",
    )


def _hold(true: bool, message: str) -> None:
    if not true:
        raise AssertionError(message)


def _every(true: Tensor, t: Tensor, message: str) -> None:
    if not bool(true.all()):
        at = int((~true).nonzero()[0])
        raise AssertionError(f"{message}, not so at t={t[at].item():.6g}")


def _close(got: Any, want: Any, t: Tensor, message: str, rtol: float = 1e-9) -> None:
    off = (got - want).abs() > rtol * want.abs() + 1e-12
    if bool((off | got.isnan()).any()):
        at = int((off | got.isnan()).nonzero()[0])
        raise AssertionError(
            f"{message}: at t={t[at].item():.6g} it is {got[at].item():.9g}, not {want[at].item():.9g}"
        )
