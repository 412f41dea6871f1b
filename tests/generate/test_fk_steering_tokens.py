"""Steering of masked diffusion: strings whose exact conditionals are the network, by predictions and by draws."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak.generate import FKSteering, sample

tokens = pytest.importorskip("polyak.generate.tokens")
masked = pytest.importorskip("polyak.generate.masked_diffusion")

LENGTH, VOCAB, LAM = 3, 3, 1.5
STRINGS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
PLACES = VOCAB ** torch.arange(LENGTH - 1, -1, -1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LAW = torch.rand(len(STRINGS), dtype=torch.float64, generator=rng(1))
LAW /= LAW.sum()
WORTH = torch.randn(len(STRINGS), dtype=torch.float64, generator=rng(2))


def says(x: Tensor) -> Tensor:
    """Logits of each position given all that is visible."""
    fits = ((x[:, None] == STRINGS) | (x[:, None] == VOCAB)).all(2).double() * LAW
    return torch.einsum("bs,slv->blv", fits, torch.nn.functional.one_hot(STRINGS, VOCAB).double()).log()


def worth(strings: Tensor) -> Tensor:
    return WORTH[(strings * PLACES).sum(-1)]


def run(steering: Any, batch: int, solver: Any, seed: int = 7, **options: Any) -> Any:
    from polyak.generate.process import MaskedProcess

    denoiser = tokens.TokenDenoiser(says, MaskedProcess(VOCAB))
    return sample(
        denoiser, (batch, LENGTH), solver=solver, steering=steering, generator=rng(seed), return_info=True, **options
    )


@pytest.mark.parametrize("intermediate", ["x0", "samples"])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_law_of_strings_is_the_tilt(intermediate: str, threshold: float) -> None:
    """``E[Z f]`` for the indicators of all strings, one token at a time, which is exact: five standard errors."""
    batch, k = 400, 20
    steering = FKSteering(
        worth, lam=LAM, num_particles=k, schedule=[0, 1], intermediate=intermediate, ess_threshold=threshold, pick="all"
    )
    x, info = run(steering, batch, masked.FirstHitting())
    state = info.steering
    share = state.logw.softmax(1) * state.log_z.exp()[:, None]
    index = (x * PLACES).sum(-1).view(batch, k)
    found = torch.zeros(batch, len(STRINGS), dtype=torch.float64).scatter_add_(1, index, share)
    error, spread = found.mean(0) - LAW * (LAM * WORTH).exp(), found.std(0) / batch**0.5
    assert (error.abs() < 5 * spread + 1e-3).all()


def test_without_a_tilt_strings_are_what_they_were() -> None:
    steering = FKSteering(worth, lam=0.0, num_particles=4, schedule=[0, 1], intermediate="samples", pick="all")
    assert torch.equal(run(steering, 5, masked.FirstHitting())[0], run(None, 20, masked.FirstHitting())[0])


def test_on_a_grid_of_times() -> None:
    made = {}
    for lam in (0.0, 3.0):
        steering = FKSteering(worth, lam=lam, intermediate="samples", num_x0_samples=2, pick="all")
        x, info = run(steering, 100, masked.MaskedAncestral(), steps=10)
        assert x.shape == (400, LENGTH)
        assert not x.is_floating_point()
        assert info.steering.scored == 5
        made[lam] = worth(x).mean()
    assert made[3.0] > made[0.0] + 0.3


def test_the_number_of_reveals_is_not_known_before() -> None:
    with pytest.raises(ValueError, match="schedule in fractions needs the number of steps"):
        run(FKSteering(worth), 2, masked.FirstHitting())
