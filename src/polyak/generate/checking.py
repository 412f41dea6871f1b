"""Checks for a process or a solver of one's own: does it do, on small problems, what the sampling loop relies on?

    >>> check_process(MyProcess())
    >>> check_solver(MySolver())

Both raise AssertionError with what is wrong, and return nothing where all is well.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.exact import Mixture
from polyak.generate.prediction import Prediction
from polyak.generate.process import VP, Process, expand
from polyak.generate.solver import SOLVER, Change, Query, Solver, Step, drive, resume

_LAW = Mixture([[-1.0], [0.6]], [0.25, 0.09], [0.4, 0.6])
_PROCESS = checks.Instance(Process, words="a Process with alpha and sigma (an instance, not the class)")
_EPS = torch.finfo(torch.float64).eps


@checks.arguments(process=_PROCESS, points=checks.Integer(2, 1_000_000))
def check_process(process: Process, *, points: int = 33) -> None:
    """Look at a process: schedules, their derivatives and inverse, grids, what it draws, and that it compares by value.

    Of one whose noise is not Gaussian all but the forward SDE and the deviation of its prior, which it need not have.

    Args:
        process: its lam must be finite within (t_min, t_max).
        points: times to look at.

    Raises:
        AssertionError: what does not hold, with the time.
    """
    low, high = float(process.t_min), float(process.t_max)
    _hold(low < high, f"t_min must be below t_max, got {low} and {high}")
    # Off the middle of their cells: the points of a chain are where its derivative jumps.
    t = low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.37) / points
    _schedules(process, t)
    _derivatives(process, t, low, high)
    _draws(process, t)
    lowest, highest = process.lam(low), process.lam(high)
    for kind in ("time", "logsnr") if math.isfinite(lowest) and math.isfinite(highest) else ("time",):
        grid = process.grid(7, kind)
        _hold(
            (grid[0].item(), grid[-1].item()) == (high, low) and bool((torch.diff(grid) < 0).all()),
            f"grid(7, {kind!r}) must decrease from t_max to t_min, got {grid.tolist()}",
        )
    inside = all(process.evaluable(float(q)) for q in t)
    _hold(inside, 'evaluable(t, "flow") must be true within [t_min, t_max]')
    _hold(not process.evaluable(high + 1.0), "evaluable(t) must be false above t_max")
    _hold(
        not process.ends_clean(low) and not process.ends_clean(high),
        "ends_clean(t) must be false within [t_min, t_max]",
    )
    if low > 0 and process.ends_clean(0.0):
        _hold(process.sigma(0.0) == 0, "ends_clean(0) must be false where sigma(0) is not 0")
    same = copy.deepcopy(process)
    _hold(same == process, "a copy must be equal: define __eq__, or make the class a frozen dataclass")
    _hold(hash(same) == hash(process), "equal processes must have equal hashes")


def _schedules(process: Process, t: Tensor) -> None:
    alpha, sigma, lam = process.alpha(t), process.sigma(t), process.lam(t)
    _every(alpha > 0, t, "alpha must be > 0")
    _every(sigma > 0, t, "sigma must be > 0")
    _close(lam, process.log_alpha(t) - process.log_sigma(t), t, "lam must be log alpha - log sigma")
    _close(alpha, process.log_alpha(t).exp(), t, "alpha must be exp(log_alpha)")
    _close(sigma, process.log_sigma(t).exp(), t, "sigma must be exp(log_sigma)")
    _close(process.sigma_hat(t), sigma / alpha, t, "sigma_hat must be sigma / alpha")
    _every(torch.diff(lam) < 0, t[1:], "lam must decrease in t")
    # lam(t_of_lam(lam)) and not t: where lam is flat, t is not determined to all digits.
    _close(process.lam(process.t_of_lam(lam)), lam, t, "t_of_lam must be the inverse of lam", 1e-9, 1e-9)
    _close(process.t_of_label(process.label(t)), t, t, "t_of_label must be the inverse of label", 1e-6)


def _derivatives(process: Process, t: Tensor, low: float, high: float) -> None:
    h = 1e-6 * torch.minimum(t - low, high - t).clamp(max=1.0)
    for name, schedule, slope in (("dalpha", process.alpha, process.dalpha), ("dsigma", process.sigma, process.dsigma)):
        after, before = schedule(t + h), schedule(t - h)
        # A difference has the rounding of what it is made of: many digits where the schedule is all but flat.
        noise = 8 * _EPS * after.abs() / h
        _close(slope(t), (after - before) / (2 * h), t, f"{name} must be the derivative", 1e-4, noise)
    alpha, sigma, drift = process.alpha(t), process.sigma(t), process.drift(t)
    _close(drift * alpha, process.dalpha(t), t, "drift must be alpha' / alpha", 1e-6)
    if not process.is_gaussian:
        return
    squared = 2 * sigma * process.dsigma(t) - 2 * drift * sigma**2
    _close(process.diffusion2(t), squared, t, "diffusion2 must be d sigma^2/dt - 2 f sigma^2", 1e-6)


def _draws(process: Process, t: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(t), 3, dtype=torch.float64, generator=generator)
    x, used = process.perturb(x0, t, noise)
    _hold(torch.equal(used, noise), "perturb must use the noise that it is given")
    want = expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * noise
    _hold(torch.allclose(x, want, rtol=1e-9, atol=1e-12), "perturb must give alpha x0 + sigma noise")
    n = 4096
    drawn = process.prior((n, 1), generator=generator, dtype=torch.float64)
    _hold(
        drawn.shape == (n, 1) and drawn.dtype == torch.float64, "prior must follow the shape and dtype that it is given"
    )
    if not process.is_gaussian:
        return
    alpha, sigma, std = process.alpha(process.t_max), process.sigma(process.t_max), process.prior_std
    # Five standard errors of a standard deviation, and of a mean.
    _hold(abs(drawn.std().item() / std - 1) < 5 / math.sqrt(2 * n), f"prior must have the std prior_std={std:g}")
    _hold(abs(drawn.mean().item()) < 5 * std / math.sqrt(n), "prior must have mean 0")
    least, most = 0.98 * sigma, 1.02 * math.hypot(alpha, sigma)
    _hold(
        least <= std <= most, f"prior_std must be that of data of unit variance at t_max, about {sigma:g}, got {std:g}"
    )


@checks.arguments(solver=SOLVER, process=_PROCESS | None, steps=checks.Integer(1, 10_000))
def check_solver(solver: Solver, process: Process | None = None, *, steps: int = 12) -> None:
    """Look at a solver: times, budget, steps and order of accuracy, and what it does with the states that it is given.

    It must change nothing that it is given, go on from a state that was changed, and go on from any of its steps.

    Args:
        solver: what to look at, on the exact denoiser of a mixture of two Gaussians.
        process: default VP(t_min=0.02); smooth, of finite lam. The order is found on its uniform grid of times or lam.
        steps: of the runs. The order is taken from 8 and 16 times as many.

    Raises:
        AssertionError: what does not hold.
    """
    process = process or VP(t_min=0.02)
    x = process.prior((6, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = _times(solver, process, steps)
    look = _Look(solver, process, x, times)
    end, seen = look.whole()
    look.heeds_changes(end)
    look.resumes(seen, end)
    if not solver.adaptive:
        look.keeps_to_budgets()
        if not solver.stochastic:
            _converges(solver, process, x, steps)


def _times(solver: Solver, process: Process, steps: int) -> list[float]:
    if solver.adaptive:
        return process.check_times(solver.times(process))
    return process.check_times(solver.times(process, steps=steps))


def _exact(query: Query, process: Process) -> Prediction:
    x0 = _LAW.posterior_mean(query.x, _spread(process.alpha(query.t)), _spread(process.sigma(query.t)))
    return Prediction(x0, query.x, query.t, process, "sample")


def _spread(value: Any) -> Any:
    """A value for each row, made to stand beside (B, 1)."""
    return value[:, None] if isinstance(value, Tensor) and value.ndim else value


class _Look:
    """A solver on a start, and runs of it."""

    def __init__(self, solver: Solver, process: Process, x: Tensor, times: list[float]) -> None:
        self.solver, self.process, self.x, self.times = solver, process, x, times

    def run(
        self,
        answer: Callable[[Query], Prediction] | None = None,
        done: Callable[[Step], Change | None] | None = None,
    ) -> Tensor:
        quiet = self.solver.run(self.x, self.times, self.process, generator=torch.Generator().manual_seed(1))
        return drive(quiet, answer or (lambda query: _exact(query, self.process)), done)

    def whole(self) -> tuple[Tensor, list[Step]]:
        """One run, with a look at all that is asked and said."""
        x, process, solver = self.x, self.process, self.solver
        before, asked, seen, answered = x.clone(), list[Query](), list[Step](), list[tuple[Tensor, Tensor]]()

        def answer(query: Query) -> Prediction:
            asked.append(query)
            _hold(query.x.shape == x.shape, f"a query's x must have shape {tuple(x.shape)}, got {tuple(query.x.shape)}")
            t = torch.as_tensor(query.t, dtype=torch.float64)
            inside = bool(((t >= process.t_min) & (t <= process.t_max)).all())
            _hold(inside, f"it asks at t={t.tolist()}, out of the process's range")
            made = _exact(query, process)
            answered.append((made.output, made.output.clone()))
            return made

        end = self.run(answer, lambda step: seen.append(step))
        _hold(bool(torch.equal(x, before)), "it changed the start in place")
        _hold(all(torch.equal(a, b) for a, b in answered), "it changed a prediction's output in place")
        _hold(end.dtype == x.dtype and end.shape == x.shape, "the result must have the start's dtype and shape")
        _hold(len(seen) > 0 and seen[-1].last and not any(s.last for s in seen[:-1]), "its last step alone must say so")
        _hold([s.index for s in seen] == list(range(len(seen))), "steps must be numbered from 0")
        ends = (seen[0].s, seen[-1].t)
        _hold(ends == (self.times[0], self.times[-1]), "its steps must go from times[0] to times[-1]")
        _hold(sum(q.first for q in asked) >= len(seen), "the first query of each step must have first=True")
        if solver.stochastic:
            told = all(s.mean is not None and s.std is not None for s in seen[:-1])
            _hold(told, "a stochastic step must give its mean and std")
        return end, seen

    def heeds_changes(self, end: Tensor) -> None:
        """A state that whoever answers, or listens, has changed is gone on from."""
        queries = 0

        def moved(query: Query) -> Prediction:
            nonlocal queries
            queries += query.first
            if query.first and queries == 2:
                query = Query(query.x + 0.5, query.t, True)
            return _exact(query, self.process)

        told = self.run(done=lambda step: Change(step.x + 0.5) if step.index == 0 else None)
        _hold(not torch.equal(told, end), "it must go on from a Change")
        _hold(
            bool(torch.allclose(self.run(moved), told, rtol=1e-10, atol=1e-12)),
            "it must go on from prediction.x, which may have been changed",
        )

        def turned(step: Step) -> Change | None:
            rows = torch.arange(len(step.x)).flip(0)
            return Change(step.x[rows], rows) if step.index in (1, 2) else None

        if not self.solver.stochastic:
            # Turned round twice all is as it was, provided that what is remembered is turned, too.
            _hold(
                bool(torch.allclose(self.run(done=turned), end, rtol=1e-10, atol=1e-12)),
                "it must go on from a Change, and move what it remembers with the rows",
            )

    def resumes(self, seen: list[Step], end: Tensor) -> None:
        """From any step the rest of the run is the same, and so again from a pickled copy."""
        for step in seen[:-1:3]:
            ends = []
            for kept in (step, pickle.loads(pickle.dumps(step))):
                quiet = resume(self.solver, kept, self.times, self.process, generator=torch.Generator().manual_seed(1))
                ends.append(drive(quiet, lambda query: _exact(query, self.process)))
            _hold(bool(torch.equal(ends[0], ends[1])), f"resumed twice from step {step.index} it gives two results")
            if not self.solver.stochastic:
                _hold(
                    bool(torch.allclose(ends[0], end, rtol=1e-12, atol=1e-12)),
                    f"resumed from step {step.index} it ends elsewhere: what it remembers must be in Step.memory",
                )

    def keeps_to_budgets(self) -> None:
        """``times(nfe=n)`` is for at most n evaluations."""
        for nfe in (12, 17):
            asked = 0

            def answer(query: Query) -> Prediction:
                nonlocal asked
                asked += 1
                return _exact(query, self.process)

            times = self.process.check_times(self.solver.times(self.process, nfe=nfe))
            quiet = self.solver.run(self.x, times, self.process, generator=torch.Generator().manual_seed(1))
            drive(quiet, answer)
            _hold(asked <= nfe, f"for nfe={nfe} it asks {asked} times: `stages` must be its evaluations per step")


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


def _close(got: Any, want: Any, t: Tensor, message: str, rtol: float = 1e-9, atol: Any = 1e-12) -> None:
    off = ((got - want).abs() > rtol * want.abs() + atol) | got.isnan()
    if bool(off.any()):
        at = int(off.nonzero()[0])
        raise AssertionError(
            f"{message}: at t={t[at].item():.6g} it is {got[at].item():.9g}, not {want[at].item():.9g}"
        )
