"""A set of few elements with its exact flows by brute force, and a network that is a table: for the tests of GFlowNets."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import torch
from torch import Tensor, nn

from polyak.particles.gflownet import SetEnv

A, K = 6, 3
ENERGIES = torch.tensor([-0.7, 0.4, 0.1, 0.9, -0.2, 1.3], dtype=torch.float64)


class Table(nn.Module):
    """Outputs for every subset, [2^A, 2 A + 1]: forward logits, backward logits, log-flow."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, s: Tensor) -> Tensor:
        return self.values[s.long() @ 2 ** torch.arange(s.shape[1])]


def env() -> SetEnv:
    return SetEnv(ENERGIES, K)


def flows(tilt: dict[tuple[int, ...], float] | None = None) -> dict[tuple[int, ...], float]:
    """log F of every subset under uniform P_B, by a sum over the terminal sets that contain it: {subset: log F}.

    A terminal set x is left towards s by |s|! (K - |s|)! of its K! orders: R(x) / C(K, |s|) of its flow goes through s.
    """
    energies, found = ENERGIES.numpy(), {}
    for size in range(K + 1):
        for s in combinations(range(A), size):
            worth = [
                np.exp(-energies[list(x)].sum() + (tilt or {}).get(x, 0.0))
                for x in combinations(range(A), K)
                if set(s) <= set(x)
            ]
            found[s] = np.log(sum(worth) / comb(K, size))
    return found


def exact_table(*, forward_looking: bool, tilt: dict[tuple[int, ...], float] | None = None) -> Table:
    """The optimum with uniform P_B: forward logits log F(s') - log (|s| + 1), flows F(s), or F(s) exp(E(s))."""
    energies = ENERGIES.numpy()
    found = flows(tilt)
    values = torch.zeros(2**A, 2 * A + 1, dtype=torch.float64)
    for s, flow in found.items():
        row = sum(2**i for i in s)
        values[row, -1] = flow + (energies[list(s)].sum() if forward_looking else 0.0)
        for a in set(range(A)) - set(s):
            after = tuple(sorted((*s, a)))
            if after in found:
                values[row, a] = found[after] - np.log(len(after))
    return Table(values)


def law() -> dict[tuple[int, ...], float]:
    """R / Z of every terminal set."""
    worth = {x: np.exp(-ENERGIES.numpy()[list(x)].sum()) for x in combinations(range(A), K)}
    total = sum(worth.values())
    return {x: w / total for x, w in worth.items()}
