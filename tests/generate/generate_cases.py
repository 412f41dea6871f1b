"""What several tests of this room run on: every process, a 1-D mixture with its exact answers."""

from __future__ import annotations

import pytest
import torch

from polyak.generate import EDM, OU, VE, VP, CosineVP, Discrete, Flow, Process, TrigFlow
from polyak.generate.problems import ExactDenoiser, Mixture

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
# With ends at which everything is finite.
PROCESSES: dict[str, Process] = {
    "VP": VP(),
    "CosineVP": CosineVP(),
    "VE": VE(),
    "EDM": EDM(),
    "Flow": Flow(t_min=1e-3, t_max=0.999),
    "TrigFlow": TrigFlow(t_min=1e-3, t_max=0.999),
    "OU": OU(),
    "Discrete": Discrete(BETAS),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())

MIXTURE = Mixture([[-1.0], [0.6]], [0.25, 0.09], [0.4, 0.6], labels=[0, 1])


def exact(process: Process | None = None) -> ExactDenoiser:
    """The exact denoiser of a smooth 1-D mixture."""
    return ExactDenoiser(MIXTURE, process or VP())


def noise(n: int = 32, d: int = 1, seed: int = 0) -> torch.Tensor:
    """Starts at t_max of VP, float64."""
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
