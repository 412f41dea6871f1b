"""What LCSC's tests share: quadratic problems with known minima, small state dicts, and a source that counts what is alive."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.teachers.lcsc.sources import Source, describe


@dataclass
class Quadratic:
    """``F(a) = (T'a - t)' A (T'a - t)``: checkpoints are the rows of T, (K, D)."""

    T: Tensor
    t: Tensor
    A: Tensor

    def __call__(self, state: dict[str, Tensor]) -> float:
        e = state["w"].double() - self.t
        return float(e @ self.A @ e)

    def at(self, a: Tensor) -> float:
        return self({"w": self.T.T @ a})

    @property
    def states(self) -> list[dict[str, Tensor]]:
        return [{"w": row} for row in self.T]

    def minimum(self) -> Tensor:
        """The best coefficients of sum 1, by the KKT system ``2 T A T' a + mu 1 = 2 T A t``, ``1'a = 1``."""
        k = len(self.T)
        system = torch.zeros(k + 1, k + 1, dtype=torch.float64)
        system[:k, :k] = 2 * self.T @ self.A @ self.T.T
        system[:k, k] = system[k, :k] = 1
        right = torch.cat([2 * self.T @ self.A @ self.t, torch.ones(1, dtype=torch.float64)])
        return torch.linalg.solve(system, right)[:k]


def unrelated(seed: int, k: int = 20, d: int = 60) -> Quadratic:
    """Checkpoints, target and curvature without any order."""
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(d, d, dtype=torch.float64, generator=g)
    return Quadratic(
        torch.randn(k, d, dtype=torch.float64, generator=g),
        torch.randn(d, dtype=torch.float64, generator=g),
        m @ m.T / d,
    )


def trajectory(seed: int, k: int = 20, d: int = 60) -> Quadratic:
    """Checkpoints of a noisy gradient descent, every 5 steps, still on its way in the flat directions."""
    g = torch.Generator().manual_seed(seed)
    curvature = torch.logspace(-1, 1, d, dtype=torch.float64)
    t = torch.randn(d, dtype=torch.float64, generator=g)
    x = t + 3 * torch.randn(d, dtype=torch.float64, generator=g)
    rows = []
    for step in range(5 * k):
        x = x - 0.05 * curvature * (x - t) + 0.15 * torch.randn(d, dtype=torch.float64, generator=g)
        if step % 5 == 4:
            rows.append(x)
    return Quadratic(torch.stack(rows), t, torch.diag(curvature))


def states(count: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Tensor]]:
    """State dicts with weights, a bias with a minus zero, and an integer buffer."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        bias = torch.randn(5, dtype=torch.float64, generator=g).to(dtype)
        bias[0] = -0.0
        weight = torch.randn(5, 3, dtype=torch.float64, generator=g).to(dtype)
        found.append({"net.weight": weight, "steps": torch.tensor(10 * i), "net.bias": bias})
    return found


class Counting(Source):
    """A checkpoint that counts, over all of its like, the bytes of what it has handed out and is still alive."""

    alive = 0
    most = 0
    reads = 0

    def __init__(self, state: dict[str, Tensor], name: str) -> None:
        self.state, self.name = state, name

    def layout(self):
        return {key: describe(value) for key, value in self.state.items()}

    @contextmanager
    def open(self):
        yield self._get

    def _get(self, key: str) -> Tensor:
        cls = type(self)
        tensor = self.state[key].clone()
        size = tensor.nbytes
        cls.alive += size
        cls.reads += 1
        cls.most = max(cls.most, cls.alive)
        weakref.finalize(tensor.untyped_storage(), self._gone, size)
        return tensor

    @classmethod
    def _gone(cls, size: int) -> None:
        cls.alive -= size
