"""What the tests of Feynman-Kac correctors share: the two normals of the specification, and a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.core.exact import Mixture
from polyak.generate import VE, ReverseSDE, sample
from polyak.generate.problems import ExactDenoiser

PROCESS = VE(sigma_min=0.01, sigma_max=8.0)
# Of the two normals of the specification: means and variances.
FIRST, SECOND = (1.5, 0.5), (-0.5, 2.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(law: tuple[float, float], process: Any = PROCESS) -> ExactDenoiser:
    return ExactDenoiser(Mixture([[law[0]]], law[1]), process)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def run(denoiser: Any, start: Any, corrector: Any = None, steps: int = 100, seed: int = 1, **options: Any) -> Any:
    given = dict(solver=ReverseSDE(), steps=steps, grid="karras", generator=rng(seed), return_info=True) | options
    if not isinstance(start, Tensor) and "dtype" not in given:
        given["dtype"] = torch.float64
    return sample(denoiser, start, steering=corrector, **given)
