"""The stochastic solver of a flow model: noise of any strength, the same marginals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.process import VP, ProbabilityPath, Process
from polyak.generate.process.path import unwatched
from polyak.generate.solver import step_count

Shape = Callable[[Process, Tensor], Tensor]

# g(t) for a norm of 1, t in [0, 1] from data to noise.
SHAPES: dict[str, Shape] = {
    "square": lambda process, t: t.square(),
    "sigma": lambda process, t: process.sigma(t),
    "constant": lambda process, t: torch.ones_like(t),
    "sin": lambda process, t: torch.sin(math.pi / 2 * t),
    "linear": lambda process, t: t,
    "clipping": lambda process, t: (2 * (t - 0.5)).clamp(min=0.0),
    "exp": lambda process, t: torch.exp(-((t - 1) / 0.1).square()),
    "tan": lambda process, t: torch.tan(math.pi / 2 * t.clamp(max=0.95)),
}
_ANYWHERE = ("sigma", "constant")  # that mean something for times beyond 1
GRIDS = ("vp", "uniform")
_PROCESS = checks.Instance(Process, words="a Process of Gaussian noise (an instance, not the class)")


@checks.arguments(
    g=checks.Choice(*SHAPES) | checks.Function("a function of t", 1), norm=checks.non_negative,
    grid=checks.Choice(None, *GRIDS), path=_PROCESS | None,
)  # fmt: skip
@dataclass(frozen=True, repr=False)
class FlowSDE(LinearSolver):
    """The reverse SDE of a flow model (Kim et al., arXiv 2503.19385, equation 8), by Euler and Maruyama, from t to t - h:

        x <- x + h (-u + g^2 score / 2) + g sqrt(h) z,    score = (alpha u - alpha' x) / (sigma (alpha' sigma - alpha sigma'))

    u is the velocity dx/dt of the probability-flow ODE, and g that of the step's start, in the time of the interpolant whose SDE it
    is. Every g has the marginals of the ODE. One evaluation a step, first order. ``norm=0`` is Euler's method, bit for bit.

    The last step of a run is the ODE's where it would add more noise than there is at its end.

    Args:
        g: the noise's strength: ``norm`` times "square": t^2; "sigma": sigma(t); "constant": 1; "sin": sin(pi t / 2); "linear": t;
            "clipping": max(0, 2t - 1); "exp": exp(-((t - 1) / 0.1)^2); "tan": tan(pi min(t, 0.95) / 2); or a function from a
            float64 tensor of times to such. All but "sigma", "constant" and functions are for t in [0, 1].
        norm: its factor.
        grid: how a number of steps is spaced: "vp": t = sqrt(1 - (1 - q)^2) for q equally spaced in [0, 1], small steps first;
            "uniform"; None: "vp" for :class:`VP`, else "uniform".
        path: the SDE of another interpolant, run in the coordinates of the model's own: what comes of sampling ``convert(model,
            process, path)``, divided by c. Its ends are taken to be the process's; where these go beyond it, steps are the ODE's.

    Raises:
        ValueError: a shape of g in t on a process whose times go beyond 1.
    """

    g: str | Callable[[Tensor], Tensor] = "square"
    norm: float = 3.0
    grid: str | None = None  # type: ignore[assignment]
    path: Process | None = None

    order: ClassVar[int] = 1

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.norm > 0

    @property
    def needs_gaussian(self) -> bool:  # type: ignore[override]
        return self.norm > 0 or self.path is not None

    def times(
        self, process: ProbabilityPath, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        n = step_count(steps, nfe, self.stages)
        own: Any = process if self.path is None else self.path
        kind = grid or self.grid or ("vp" if isinstance(own, VP) else "uniform")
        if kind not in GRIDS:
            return process.grid(n, kind)
        r = own.grid(n, "time")
        if kind == "vp":
            q = torch.arange(n, -1, -1, dtype=torch.float64, device="cpu") / n
            r = own.t_min + (own.t_max - own.t_min) * (1 - (1 - q).square()).sqrt()
        with unwatched(), torch.device("cpu"):
            return r if self.path is None else self._of_path(process, r)

    def _of_path(self, process: Any, r: Tensor) -> Tensor:
        """Times of the path as those of the process; either's ends are the other's."""
        t = process.t_of_lam(self.path.lam(r)).clamp(process.t_min, process.t_max)  # type: ignore[union-attr]
        t[0], t[-1] = process.t_max, process.t_min
        return t

    def _in_path(self, process: Any, t: Tensor) -> Tensor:
        """Times of the process as those of the path."""
        path: Any = self.path
        inside = path.t_of_lam(process.lam(t)).clamp(path.t_min, path.t_max)
        return torch.where(t >= process.t_max, path.t_max, torch.where(t <= process.t_min, path.t_min, inside))

    def strength(self, process: Process, t: Tensor) -> Tensor:
        """``g(t)``, for float64 times of the interpolant whose SDE it is."""
        if callable(self.g):
            found = self.g(t)
            if not isinstance(found, Tensor) or found.shape != t.shape or not bool((found >= 0).all()):
                raise ValueError(f"g must give a number that is not negative for each time, got {checks.shown(found)}")
            return self.norm * found
        if process.t_max > 1 and self.g not in _ANYWHERE and self.norm:
            raise ValueError(f"g={self.g!r} is for times in [0, 1], {process!r} has t_max={process.t_max:g}")
        return self.norm * SHAPES[self.g](process, t)

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        at: Any = process.moments(times)
        if not self.norm and self.path is None:
            return [Stage(s, t, "flow", 1.0, t - s) for s, t in itertools.pairwise(at)]
        with unwatched(), torch.device("cpu"):
            t = torch.tensor(list(times), dtype=torch.float64)
            return self._stages(at, t, process)

    def _stages(self, at: Any, t: Tensor, process: Any) -> list[Stage]:
        """The weights of x0 and eps in the next state of the path, as those of the state and the flow of the process."""
        path: Any = process if self.path is None else self.path
        r = t if self.path is None else self._in_path(process, t)
        h, s = r[:-1] - r[1:], r[:-1]
        alpha, sigma, dalpha, dsigma = path.alpha(s), path.sigma(s), path.dalpha(s), path.dsigma(s)
        variance = self.strength(path, s).square() * h
        if variance[-1] > path.sigma(r[-1:]) ** 2:
            variance[-1] = 0.0
        half = torch.where(variance > 0, variance / (2 * sigma), 0.0)  # where sigma is 0 there is no score
        if self.path is None:
            turn = sigma * (dalpha * sigma - dsigma * alpha)
            score = torch.where(variance > 0, variance / (2 * turn), 0.0)
            base, value, std = 1 - dalpha * score, alpha * score - h, variance.sqrt()
        else:
            # The path's next state, in the coordinates of the process.
            end, own = r[1:], t[1:]
            noisy = path.lam(end) < 0
            scale = torch.where(noisy, process.sigma(own) / path.sigma(end), process.alpha(own) / path.alpha(end))
            x0, eps = scale * (alpha - h * dalpha), scale * (sigma - h * dsigma - half)
            beyond = h <= 0  # of the path's ends: there the ODE is followed
            x0, eps = torch.where(beyond, process.alpha(own), x0), torch.where(beyond, process.sigma(own), eps)
            alpha, sigma, dalpha, dsigma = (
                f(t[:-1]) for f in (process.alpha, process.sigma, process.dalpha, process.dsigma)
            )
            turn = alpha * dsigma - sigma * dalpha
            base, value = (x0 * dsigma - eps * dalpha) / turn, (eps * alpha - x0 * sigma) / turn
            std = scale * variance.sqrt()
        rows = zip(base.tolist(), value.tolist(), std.tolist(), strict=True)
        return [
            Stage(s, e, "flow", b, v, std=n) for (s, e), (b, v, n) in zip(itertools.pairwise(at), rows, strict=True)
        ]
