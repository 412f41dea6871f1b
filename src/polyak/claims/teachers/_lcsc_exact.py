"""Checkpoints of a noisy descent on a quadratic: the best combination is known, by linear algebra. This module imports torch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polyak.teachers import LCSC, combine

PROBLEMS, COUNT, SIZE, EVERY, EVALS = 3, 20, 60, 5, 2000
RATE = 0.8  # of the average that is kept on the way


class Descent:
    """``F(w) = (w - t)' A (w - t)`` with curvatures from 0.1 to 10, and 20 checkpoints, every 5 steps, of a noisy descent to t.

    The descent is still on its way in the flat directions and in equilibrium in the steep ones.
    """

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(SIZE, generator=draw, dtype=torch.float64)

        self.curvature, self.target = torch.logspace(-1, 1, SIZE, dtype=torch.float64), normal()
        w, saved = self.target + 3 * normal(), []
        for step in range(1, COUNT * EVERY + 1):
            w = w - 0.05 * (self.curvature * (w - self.target) + 2 * normal())
            if step % EVERY == 0:
                saved.append(w)
        self.saved = torch.stack(saved)

    def __call__(self, state: dict[str, Tensor]) -> float:
        return self.of(state["w"])

    def of(self, w: Tensor) -> float:
        return float((self.curvature * (w - self.target) ** 2).sum())

    @property
    def states(self) -> list[dict[str, Tensor]]:
        return [{"w": w} for w in self.saved]

    def least(self) -> float:
        """The minimum over coefficients of sum 1, from the conditions of Karush, Kuhn and Tucker."""
        system = torch.zeros(COUNT + 1, COUNT + 1, dtype=torch.float64)
        system[:COUNT, :COUNT] = 2 * self.saved * self.curvature @ self.saved.T
        system[:COUNT, COUNT] = system[COUNT, :COUNT] = 1
        right = torch.cat([2 * self.saved @ (self.curvature * self.target), torch.ones(1, dtype=torch.float64)])
        return self.of(torch.linalg.solve(system, right)[:COUNT] @ self.saved)


def measured(seed: int, search: Any) -> dict[str, float]:
    """Searches of 2000 evaluations on three problems.

    Returns:
        closed: the part of the gap between the best average and the minimum that a search closes, the problems' mean. combined:
        the distance of its model to the sum of coefficients times checkpoints, and of its value to that model's; from_ema: the
        distance of its model to an average at rate 0.8 that was kept on the way; the largest.
    """
    found = [_measured(PROBLEMS * seed + i, search) for i in range(PROBLEMS)]
    largest = {name: max(f[name] for f in found) for name in ("combined", "from_ema")}
    return {"closed": sum(f["closed"] for f in found) / PROBLEMS, **largest}


def _measured(seed: int, search: Any) -> dict[str, float]:
    problem, average = _problem(seed)
    found = _searched(problem, search, seed)
    a, model = found.coefficients, combine(problem.states, found.coefficients)["w"]
    kept = problem.saved[0]
    for w in problem.saved[1:]:
        kept = RATE * kept + (1 - RATE) * w
    by_sum = sum(float(c) * w for c, w in zip(a, problem.saved, strict=True))
    return {
        "closed": (average - found.value) / (average - problem.least()),
        "combined": max(_far(model, by_sum), abs(found.value / problem.of(model) - 1)),
        "from_ema": _far(model, kept),
    }


@lru_cache(maxsize=64)
def _problem(seed: int) -> tuple[Descent, float]:
    """A seed's problem, and what the best average has there: the same for all arms."""
    problem = Descent(seed)
    return problem, _searched(problem, "grid", seed).value


def _searched(problem: Descent, search: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return LCSC(problem.states, objective=problem, optimizer=search, evals=EVALS, generator=generator).run()


def _far(got: Tensor, want: Any) -> float:
    return float((got - want).norm() / want.norm())
