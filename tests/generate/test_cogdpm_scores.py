"""Scores of ensemble forecasts against formulas by hand and brute force."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from polyak.generate.cogdpm import crps, csi, ensemble_rmse, fss, power_spectrum, rank_histogram, spread_skill


def fields(members: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    e = torch.randn(3, members, 2, 6, 8, generator=draw, dtype=torch.float64)
    return e, torch.randn(3, 2, 6, 8, generator=draw, dtype=torch.float64)


def test_crps() -> None:
    e, y = torch.tensor([[[1.0], [4.0]]]), torch.tensor([[2.0]])
    assert crps(e, y).item() == pytest.approx((1 + 2) / 2 - (0 + 3 + 3 + 0) / 4 / 2)
    e, y = fields()
    brute = (e - y[:, None]).abs().mean(1) - (e[:, :, None] - e[:, None]).abs().mean((1, 2)) / 2
    assert torch.allclose(crps(e, y), brute.flatten(1).mean(1), rtol=1e-12)
    assert torch.allclose(crps(e[:, :1], y), (e[:, 0] - y).abs().flatten(1).mean(1))
    # Of many normal members: the closed form of N(0, 1) at 0, (sqrt(2) - 1) / sqrt(pi).
    many = torch.randn(1, 20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert crps(many, torch.zeros(1, 1).double()).item() == pytest.approx(
        (math.sqrt(2) - 1) / math.sqrt(math.pi), abs=0.02
    )


def test_members_like_the_truth_have_spread_as_error_and_flat_ranks() -> None:
    draw = torch.Generator().manual_seed(0)
    e, y = torch.randn(2, 4, 20_000, generator=draw), torch.randn(2, 20_000, generator=draw)
    assert torch.allclose(spread_skill(e, y), torch.ones(2), atol=0.02)
    assert torch.allclose(spread_skill(3 * e, y), torch.tensor(3 * math.sqrt(1.25 / 3.25)), atol=0.05)
    assert torch.allclose(ensemble_rmse(e, y), torch.tensor(math.sqrt(1.25)), atol=0.02)
    counts = rank_histogram(e, y)
    assert counts.sum() == 40_000
    assert (counts / 8000 - 1).abs().max() < 5 / math.sqrt(8000)
    assert rank_histogram(e + 10, y)[0] == 40_000


def test_thresholds() -> None:
    y = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    e = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])[:, None]
    assert csi(e, y, 0.5).item() == pytest.approx(2 / 4)
    assert fss(e, y, 0.5, 1).item() == pytest.approx(1 - 2 / 6)
    # In squares of two: frequencies 3, 1, 2, 1 quarters against 3, 2, 1, 1.
    p, o = np.array([3, 1, 2, 1]) / 4, np.array([3, 2, 1, 1]) / 4
    assert fss(e, y, 0.5, 2).item() == pytest.approx(1 - ((p - o) ** 2).sum() / (p**2 + o**2).sum())
    assert fss(y[:, None], y, 0.5, 2).item() == 1
    assert math.isnan(csi(e, y, 9.0).item())
    with pytest.raises(ValueError, match="size must be at most the field's 3 pixels, got 4"):
        fss(e, y, 0.5, 4)


def test_power_spectrum() -> None:
    e, _ = fields()
    assert torch.allclose(power_spectrum(e).sum(-1), e.square().mean((-2, -1)))
    wave = torch.cos(2 * torch.pi * 2 * torch.arange(8.0) / 8).expand(6, 8)
    assert power_spectrum(wave).tolist() == pytest.approx([0, 0, 0.5, 0], abs=1e-6)


def test_half_precision_is_scored_in_float32() -> None:
    """The sum of the errors is beyond float16."""
    e, y = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1).expand(1, 2, 300, 300).half(), torch.zeros(1, 300, 300).half()
    assert crps(e, y).tolist() == [1.5]
    assert ensemble_rmse(100 * e, y).tolist() == pytest.approx([200])
    assert spread_skill(e, y).tolist() == pytest.approx([math.sqrt(1.5 * 2) / 2])
    assert power_spectrum(e).sum(-1).tolist() == [pytest.approx([1, 9])]


def test_missing_data() -> None:
    e, y = fields()
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, :3] = False
    hole = y.masked_fill(~mask, math.nan)
    for score in (crps, ensemble_rmse, spread_skill, rank_histogram):
        assert torch.allclose(score(e, hole, mask).double(), score(e[..., 3:], y[..., 3:]).double(), rtol=1e-12)
        with pytest.raises(ValueError, match="truth has NaN, which needs a mask that is False there"):
            score(e, hole)
    for threshold in (0.1, -0.1):  # which a 0 in place of the missing would pass
        assert torch.equal(csi(e, hole, threshold, mask), csi(e[..., 3:], y[..., 3:], threshold))
        assert torch.allclose(fss(e, hole, threshold, 1, mask), fss(e[..., 3:], y[..., 3:], threshold, 1))
    samples = e.clone()
    samples[0, 1, 0, 0, 5] = hole[0, 0, 0, 5] = math.nan  # where there should be data
    for given in ((samples, y, None), (samples, y, mask), (e, hole, mask)):
        for score in (crps, rank_histogram, partial(csi, threshold=0.1), partial(fss, threshold=0.1, size=2)):
            with pytest.raises(ValueError, match=r"(samples|truth) has NaN, which needs a mask"):
                score(*given[:2], mask=given[2])
    with pytest.raises(ValueError, match=r"mask must broadcast to \(3, 2, 6, 8\), got \(6, 7\)"):
        crps(e, y, mask[:, 1:])
    with pytest.raises(ValueError, match="mask must be of bool"):
        crps(e, y, mask.double())
    with pytest.raises(ValueError, match=r"truth must have shape \(3, 2, 6, 8\), got \(3, 2, 6, 7\)"):
        crps(e, y[..., 1:])
    with pytest.raises(ValueError, match="samples must have at least 2 members for a spread, got 1"):
        spread_skill(e[:, :1], y)
