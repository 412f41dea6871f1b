"""Clouds, moving of states, and genealogies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyak.core.particles import SCHEMES, Cloud, Genealogy, counts, gather, resample


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hmm() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Initial law, transitions, emissions, and what is observed."""
    start = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    move = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]], dtype=torch.float64)
    emit = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.05, 0.15, 0.8]], dtype=torch.float64)
    return start, move, emit, [0, 1, 2, 2, 0, 1, 2, 0]


def forward() -> float:
    start, move, emit, seen = hmm()
    alpha = start * emit[:, seen[0]]
    for y in seen[1:]:
        alpha = (alpha @ move) * emit[:, y]
    return alpha.sum().log().item()


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    u = torch.rand(p.shape[:-1], dtype=p.dtype, generator=generator)
    return (p.cumsum(-1) <= u.unsqueeze(-1)).sum(-1).clamp(max=p.shape[-1] - 1)


def filtered(kappa: float, scheme: str, runs: int, N: int = 64) -> Cloud:
    start, move, emit, seen = hmm()
    generator = seeded(1)
    cloud = Cloud.uniform(draw(start.expand(runs, N, 3), generator), (runs, N))
    for t, y in enumerate(seen):
        cloud = cloud.reweight(emit[:, y].log()[cloud.x])
        if t + 1 < len(seen):
            cloud, _, _ = cloud.maybe_resample(kappa, scheme, generator)
            cloud = Cloud(draw(move[cloud.x], generator), cloud.logw, cloud.log_z)
    return cloud


@pytest.mark.parametrize(
    ("kappa", "scheme"), [(0.0, "systematic"), (0.5, "systematic"), *((1.0, s) for s in SCHEMES), (0.5, "ssp")]
)
def test_the_evidence_is_unbiased(kappa: float, scheme: str) -> None:
    ratio = (filtered(kappa, scheme, 2000).log_z - forward()).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(2000)
    assert ratio.std() > 0.01


def test_weights_are_carried_where_nothing_is_resampled() -> None:
    logw = torch.tensor([[0.0, 0.1, 0.2], [0.0, -20.0, -30.0]], dtype=torch.float64)
    cloud = Cloud(torch.arange(6.0).reshape(2, 3), logw, torch.tensor([0.5, 1.5], dtype=torch.float64))
    new, ancestors, did = cloud.maybe_resample(0.5)
    assert did.tolist() == [False, True]
    assert ancestors.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert torch.equal(new.logw, torch.stack([logw[0], torch.zeros(3, dtype=torch.float64)]))
    assert new.x.tolist() == [[0, 1, 2], [3, 3, 3]]
    assert torch.equal(new.log_z, cloud.log_z)
    assert cloud.maybe_resample(0.0)[2].tolist() == [False, False]
    assert cloud.maybe_resample(1.0, "multinomial", seeded())[2].tolist() == [True, True]


def test_gather_moves_trees_system_by_system() -> None:
    x = {"a": torch.randn(2, 3, 5, 4), "b": (torch.arange(30).reshape(2, 3, 5), None)}
    ancestors = resample(torch.randn(2, 3, 5, dtype=torch.float64), 7, generator=seeded())
    moved = gather(x, ancestors, 2)
    for i in range(2):
        for j in range(3):
            assert torch.equal(moved["a"][i, j], x["a"][i, j][ancestors[i, j]])
            assert torch.equal(moved["b"][0][i, j], x["b"][0][i, j][ancestors[i, j]])
    assert moved["b"][1] is None
    history = torch.randn(6, 3, 5, 4)
    own = ancestors[0]
    assert torch.equal(gather(history, own, 2)[4], gather(history[4], own))
    with pytest.raises(ValueError, match=r"tree\['a'\] must have shape \(2, 3, N, ...\)"):
        gather({"a": torch.zeros(2, 5, 5)}, ancestors)
    with pytest.raises(ValueError, match=r"ancestors must be in \[0, 5\), got 5"):
        gather(torch.zeros(2, 5), torch.tensor([[0, 1], [5, 0]]))


def test_a_genealogy_knows_lineages_and_prunes() -> None:
    generator = seeded(2)
    tree, x = Genealogy(), torch.randn(2, 30, 3, generator=generator)
    tree.append(torch.arange(30).expand(2, 30), x)
    own = x.unsqueeze(2)  # every particle's path, moved at each time
    for t in range(12):
        ancestors = resample(torch.randn(2, 30, dtype=torch.float64, generator=generator), generator=generator)
        x = torch.randn(2, 30, 3, generator=generator)
        own = torch.cat((gather(own, ancestors), x.unsqueeze(2)), 2)
        tree.append(ancestors, x)
        if t == 6:
            tree.prune()
    assert torch.equal(tree.path(), own)
    lineage = tree.lineage(4)
    unique = torch.stack([tree.unique(t) for t in range(13)])
    assert bool((unique.diff(dim=0) >= 0).all())
    assert unique[-1].tolist() == [30, 30]
    tree.prune()
    assert torch.equal(tree.path(), own)
    assert torch.equal(tree.path(4), own[:, 4])
    assert torch.equal(tree.lineage(4), lineage)
    assert torch.equal(torch.stack([tree.unique(t) for t in range(13)]), unique)
    assert tree._x[0].shape[1] == unique[0].max()


def test_means_and_quantiles() -> None:
    logw = torch.randn(2, 50, dtype=torch.float64, generator=seeded())
    x = torch.randn(2, 50, 3, dtype=torch.float64, generator=seeded(1))
    cloud = Cloud(x, logw, torch.zeros(2, dtype=torch.float64))
    W = logw.softmax(-1)
    assert torch.allclose(cloud.mean(), (W.unsqueeze(-1) * x).sum(1))
    assert torch.allclose(cloud.mean(lambda x: x.square().sum(-1)), (W * x.square().sum(-1)).sum(1))
    for q in (0.0, 0.3, 1.0):
        made = cloud.quantile(q)
        share = ((x <= made.unsqueeze(1)) * W.unsqueeze(-1)).sum(1)
        less = ((x < made.unsqueeze(1)) * W.unsqueeze(-1)).sum(1)
        assert bool((share >= q - 1e-12).all())
        assert bool((less <= q + 1e-12).all())
    assert int(counts(torch.tensor([1, 1, 0]), 3)[1]) == 2
