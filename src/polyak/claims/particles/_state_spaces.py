"""State-space models whose smoothing law is known, references computed otherwise, and returns. This module imports torch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polyak.core import exact
from polyak.particles.paris import FisherScore, LinearGaussian, PaRIS, ParisParticleGibbs, StateSpaceModel, fit
from polyak.particles.paris.learning import sweep_score

DOUBLE = torch.float64
A, Q, R = 0.97, 0.2, 0.3


def product(x: Tensor, x_next: Tensor, t: int) -> Tensor:
    return x * x_next


def tenth(x: Tensor, x_next: Tensor, t: int) -> Tensor:
    return torch.full_like(x, 0.1)


class Chain(StateSpaceModel):
    """A chain of finitely many states, seen through log-likelihoods y_t (states,), as ``FiniteHMM`` is."""

    def __init__(self, hmm: exact.FiniteHMM) -> None:
        super().__init__()
        self.hmm, self.observation_shape = hmm, (len(hmm.initial),)

    def initial(self) -> Any:
        return self

    def sample(self, shape: tuple[int, ...], *, generator: torch.Generator | None = None) -> Tensor:
        return self._drawn(self.hmm.initial.expand(*shape, -1), generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.hmm.initial.log()[x.long()]

    def log_transition(self, x: Tensor, x_next: Tensor, t: int) -> Tensor:
        return self.hmm.transition.log()[x.long(), x_next.long()]

    def sample_transition(self, x: Tensor, t: int, generator: torch.Generator | None) -> Tensor:
        return self._drawn(self.hmm.transition[x.long()], generator)

    def log_observation(self, x: Tensor, y: Tensor, t: int) -> Tensor:
        return y.expand(*x.shape, -1).gather(-1, x.long()[..., None])[..., 0]

    def q_max(self, t: int) -> Tensor:
        return self.hmm.transition.max()

    def _drawn(self, p: Tensor, generator: torch.Generator | None) -> Tensor:
        u = torch.rand((*p.shape[:-1], 1), dtype=DOUBLE, generator=generator)
        return (p.cumsum(-1) <= u).sum(-1).clamp(max=p.shape[-1] - 1).to(DOUBLE)


def small_chain(seed: int) -> tuple[Chain, Tensor]:
    """Two sticky states at three times, with observations that contradict each other; the model, and y (3, 2)."""
    draw = torch.Generator().manual_seed(seed)
    p = 0.1 + 0.2 * torch.rand(2, generator=draw, dtype=DOUBLE)
    hmm = exact.FiniteHMM([0.6, 0.4], torch.stack([torch.stack([1 - p[0], p[0]]), torch.stack([p[1], 1 - p[1]])]))
    y = torch.tensor([[0.0, -1.5], [-0.5, 0.0], [-2.0, 0.0]], dtype=DOUBLE)
    return Chain(hmm), y + 0.3 * torch.rand(3, 2, generator=draw, dtype=DOUBLE)


def drawn_paths(chain: Chain, y: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Paths from the exact smoothing law, (count, T)."""
    paths, log_p = chain.hmm.path_law(y)
    u = torch.rand(count, 1, dtype=DOUBLE, generator=generator)
    return paths[(log_p.exp().cumsum(0) <= u).sum(-1).clamp(max=len(paths) - 1)].to(DOUBLE)


def histogram(chain: Chain, y: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the paths (count, T) are each possible one, and its exact probability."""
    paths, log_p = chain.hmm.path_law(y)
    found = (drawn[:, None] == paths.to(DOUBLE)).all(-1).sum(0)
    return found, log_p.exp()


def run(smoother: PaRIS, y: Tensor) -> list[Any]:
    """All of y (*batch, T), or (T, ...) where a model's observations are vectors; the clouds on the way."""
    at = y.ndim - 1 - len(smoother.model.observation_shape)
    first, *rest = y.unbind(at)
    return [smoother.init(first), *(smoother.update(y_t)[0] for y_t in rest)]


def forward_backward(model: Any, clouds: list[Any], functional: Any) -> Tensor:
    """FFBSm: the smoothing weights of given particles (N,) backwards in time, and the sum over pairs; loops, in NumPy."""
    import numpy as np

    x = [c.x.numpy() for c in clouds]
    weights = [np.exp(c.logw.numpy() - c.logw.max().item()) for c in clouds]
    weights = [w / w.sum() for w in weights]
    later, total = weights[-1], 0.0
    for t in range(len(x) - 2, -1, -1):
        past, new = torch.as_tensor(x[t])[:, None], torch.as_tensor(x[t + 1])[None]
        q = model.log_transition(past, new, t).detach().exp().numpy()
        h = functional(past, new, t).numpy()
        kernel = weights[t][:, None] * q
        pairs = kernel / kernel.sum(0) * later
        total = total + (pairs * h).sum()
        later = pairs.sum(1)
    return torch.tensor(total, dtype=DOUBLE)


def linear(a: float = A, q: float = Q, r: float = R) -> LinearGaussian:
    return LinearGaussian(torch.tensor(a, dtype=DOUBLE), Q=q, R=r)


def kalman(a: Any = A, q: Any = Q, r: Any = R) -> exact.LinearGaussian:
    a, q, r = (torch.as_tensor(v, dtype=DOUBLE).reshape(1, 1) for v in (a, q, r))
    return exact.LinearGaussian(a, [[1.0]], q, r, [0.0], [[1.0]])


def bytes_held(smoother: PaRIS) -> int:
    """Of the storages that a smoother holds."""
    cloud = smoother.cloud
    storages = [t.untyped_storage() for t in (cloud.x, cloud.logw, cloud.log_z, smoother.tau)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@lru_cache(maxsize=8)
def most_likely(seed: int, steps: int, series: int) -> tuple[Tensor, tuple[float, ...]]:
    """Series (series, steps), and where Kalman's likelihood is largest, (a, log sqrt Q, log sqrt R)."""
    _, y = linear().simulate(steps, (series,), generator=torch.Generator().manual_seed(seed))

    def loss(theta: Tensor) -> Tensor:
        a, q, r = theta
        return -kalman(a, (2 * q).exp(), (2 * r).exp()).log_likelihood(y[..., None]).mean() / steps

    theta = torch.tensor([A, 0.5 * math.log(Q), 0.5 * math.log(R)], dtype=DOUBLE, requires_grad=True)
    search = torch.optim.LBFGS([theta], max_iter=60, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def again() -> Tensor:
        search.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    search.step(again)  # type: ignore[arg-type]
    return y, tuple(theta.tolist())


def learned(
    model: Any,
    names: tuple[str, ...],
    y: Tensor,
    seed: int,
    *,
    arm: str,
    n: int,
    sweeps: int,
    iterations: int,
    lr: float,
    chains: int,
) -> Tensor:
    """The mean of the parameters over the last half of the iterations, (P,)."""
    estimator, backward = ("ppg", "dense") if arm == "ppg" else ("paris", "ancestor" if arm == "ancestor" else "dense")
    parameters = [getattr(model, name) for name in names]
    optimizer = torch.optim.Adam(parameters, lr=lr, maximize=True)
    more: dict[str, Any] = {"burn_in": 0} if estimator == "ppg" else {}
    made = fit(
        model, y.expand(chains, *y.shape), optimizer, estimator, iterations, n=n, sweeps=sweeps, backward=backward,
        generator=torch.Generator().manual_seed(seed), **more,
    )  # fmt: skip
    return made.parameters[iterations // 2 :].mean(0)


def two_scores(seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """Of the draws of one sweep: the score by carried statistics, and by one backward pass."""
    _, y = linear().simulate(steps, generator=torch.Generator().manual_seed(seed))
    model = linear(0.8)
    parameters = list(model.parameters())
    chain = ParisParticleGibbs(model, FisherScore(model), 8, 2, 1, 0, generator=torch.Generator().manual_seed(seed))
    draws: list[Any] = []
    with torch.no_grad():
        chain._sweep(list(y), torch.zeros(steps, dtype=DOUBLE), draws)
        carried = chain._paris._mean()
    passed = torch.cat([g.flatten() for g in sweep_score(model, list(y), chain._paris.cloud, draws, parameters)])
    return carried, passed


def returns(count: int) -> Tensor:
    """The last daily returns of a stock in percent, without their mean: Google's to October 2008, which matplotlib brings along."""
    import numpy as np
    from matplotlib import cbook

    prices = np.load(cbook.get_sample_data("goog.npz", asfileobj=False))["price_data"]["adj_close"]
    made = torch.tensor(100 * np.diff(np.log(prices)), dtype=DOUBLE)[-count:]
    return made - made.mean()


def run_alone(model: Any, y: Tensor, generator: torch.Generator) -> Tensor:
    """The mean estimate of PaRIS with two particles, which are given nothing."""
    smoother = PaRIS(model, product, 2, generator=generator)
    run(smoother, y)
    return smoother.estimate().mean()
