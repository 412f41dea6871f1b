"""Clouds, moving of states, and genealogies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyak.core.exact import FiniteHMM, LinearGaussian
from polyak.core.particles import SCHEMES, Cloud, Genealogy, _native, counts, gather, resample


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


HMM = FiniteHMM(
    [0.6, 0.3, 0.1],
    [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]],
    [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.05, 0.15, 0.8]],
)
SEEN = [0, 1, 2, 2, 0, 1, 2, 0]


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    u = torch.rand(p.shape[:-1], dtype=p.dtype, generator=generator)
    return (p.cumsum(-1) <= u.unsqueeze(-1)).sum(-1).clamp(max=p.shape[-1] - 1)


def filtered(kappa: float, scheme: str, runs: int, N: int = 64) -> Cloud:
    generator, emission = seeded(1), HMM.emission
    assert emission is not None
    cloud = Cloud.uniform(draw(HMM.initial.expand(runs, N, 3), generator), (runs, N))
    for t, y in enumerate(SEEN):
        cloud = cloud.reweight(emission[:, y].log()[cloud.x])
        if t + 1 < len(SEEN):
            cloud, _, _ = cloud.maybe_resample(kappa, scheme, generator)
            cloud = Cloud(draw(HMM.transition[cloud.x], generator), cloud.logw, cloud.log_z)
    return cloud


@pytest.mark.parametrize(
    ("kappa", "scheme"), [(0.0, "systematic"), (0.5, "systematic"), *((1.0, s) for s in SCHEMES), (0.5, "ssp")]
)
def test_the_evidence_is_unbiased(kappa: float, scheme: str) -> None:
    ratio = (filtered(kappa, scheme, 2000).log_z - HMM.log_likelihood(torch.tensor(SEEN))).exp()
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


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.complex128])
@pytest.mark.parametrize("event", [(), (3,), (2, 4)])
def test_rows_of_any_width_and_offset_are_moved(dtype: torch.dtype, event: tuple[int, ...]) -> None:
    ancestors = torch.randint(40, (2, 50), generator=seeded())
    x = (torch.randn(2 * 40 * math.prod(event) + 1, generator=seeded(1)) * 3).to(dtype)
    for start in (0, 1):
        given = x[start : start + 80 * math.prod(event)].view(2, 40, *event)
        expected = torch.stack([given[row, ancestors[row]] for row in range(2)])
        assert torch.equal(gather(given, ancestors), expected)
        assert torch.equal(gather(given, ancestors.int()), expected)


@pytest.mark.parametrize("bad", [-1, 40, -(2**63), 2**63 - 1])
def test_ancestors_that_are_no_particles_are_refused(bad: int) -> None:
    ancestors = torch.full((3, 50), 39)
    ancestors[2, 49] = bad
    with pytest.raises(ValueError, match=rf"ancestors must be in \[0, 40\), got {bad}"):
        gather(torch.zeros(3, 40, 2), ancestors)


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


LINEAR = LinearGaussian([[0.9]], [[1.0]], [[0.5]], [[0.4]], [0.3], [[0.7]])


def log_normal(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return -0.5 * ((x - mean).square() / variance + (2 * math.pi * variance).log())


def test_a_filter_is_the_kalman_filter_and_its_gradient_the_score() -> None:
    """A linear Gaussian model: evidence, filtered mean and quantile, and the derivative in A by the differentiable variant."""
    y, runs, N = torch.tensor([0.5, 1.2, 0.7, -0.4, 0.2], dtype=torch.float64), 300, 400
    exact, generator = LINEAR.filter(y[:, None]), seeded(4)
    A = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    gradients = {}
    for differentiable in (True, False):
        x = 0.3 + math.sqrt(0.7) * torch.randn(runs, N, dtype=torch.float64, generator=generator)
        cloud = Cloud.uniform(x, (runs, N), differentiable=differentiable)
        for t, seen in enumerate(y):
            if t:
                cloud, _, _ = cloud.maybe_resample(0.7, generator=generator)
                mean = A.detach() * cloud.x
                x = mean + math.sqrt(0.5) * torch.randn(runs, N, dtype=torch.float64, generator=generator)
                ratio = log_normal(x, A * cloud.x, 0.5) - log_normal(x, mean, 0.5)  # 0, with the gradient of log f
                cloud = Cloud(x, cloud.logw, cloud.log_z, differentiable=differentiable).reweight(ratio)
            cloud = cloud.reweight(log_normal(seen, cloud.x, 0.4))
        gradients[differentiable] = torch.autograd.grad(cloud.log_z.mean(), A)[0].item()
    ratio = (cloud.log_z.detach() - exact.log_likelihood).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(runs)
    mean, spread = exact.means[-1, 0], exact.covariances[-1, 0, 0].sqrt()
    assert abs(cloud.mean().mean() - mean) < 0.01
    assert abs(cloud.quantile(0.8).mean() - (mean + 0.8416 * spread)) < 0.02
    score = LINEAR.score(y[:, None]).A.item()
    assert gradients[True] == pytest.approx(score, abs=0.03)
    assert abs(gradients[False] - score) > 0.1  # what is lost where resampling cuts gradients off


def test_evidence_stays_lost_where_all_weight_was() -> None:
    cloud = Cloud.uniform(torch.arange(6.0).reshape(2, 3), (2, 3))
    none = torch.tensor([[0.0, 0.0, 0.0], [-math.inf] * 3])
    with pytest.raises(ValueError, match=r"log_incr added to logw is -inf for every particle in system \(1,\)"):
        cloud.reweight(none)
    cloud = cloud.reweight(none, on_collapse="uniform").reweight(torch.ones(2, 3))
    assert cloud.log_z.tolist() == pytest.approx([1.0, -math.inf])
    assert cloud.W[1].tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match=r"log_incr added to logw has NaN in system \(0,\)"):
        cloud.reweight(torch.tensor([[math.nan], [0.0]]))
    atom = cloud.reweight(torch.tensor([[0.0, math.inf, 0.0], [0.0] * 3]))
    assert atom.W[0].tolist() == [0, 1, 0]
    assert atom.reweight(torch.full((2, 3), 2.0)).log_z[0] == math.inf


def test_c_reweights_as_the_formulas_do(monkeypatch: pytest.MonkeyPatch) -> None:
    logw = 30 * torch.randn(5, 70, dtype=torch.float64, generator=seeded())
    incr = 30 * torch.randn(5, 70, dtype=torch.float64, generator=seeded(1)) - 1e3
    logw[0, ::2], incr[1, ::3], logw[2], logw[3, 4] = -math.inf, -math.inf, -math.inf, math.inf
    cloud = Cloud(torch.zeros(5, 70), logw, torch.zeros(5, dtype=torch.float64))
    made = cloud.reweight(incr)
    monkeypatch.setattr(_native, "_functions", lambda: None)
    plain = cloud.reweight(incr)
    assert torch.equal(made.logw, plain.logw)
    assert torch.allclose(made.log_z, plain.log_z, rtol=1e-14)


REFUSED = {
    "threshold": (lambda c: c.maybe_resample(1.5), "threshold must be in .0, 1., got 1.5"),
    "increment": (lambda c: c.reweight(torch.zeros(4)), r"log_incr must have the log-weights' shape \(2, 3\)"),
    "log_z": (lambda c: Cloud(c.x, c.logw, torch.zeros(3)), r"log_z must have the shape \(2,\)"),
    "x": (lambda c: Cloud({"v": torch.zeros(2, 4)}, c.logw, c.log_z), r"x\['v'\] must have logw's dimensions \(2, 3\)"),
    "ancestors": (lambda c: gather(c.x, torch.zeros(2, 3)), "ancestors must be integers"),
    "batch": (lambda c: gather(c.x, torch.zeros(3, 3).long()), r"tree must have shape \(3, N, ...\)"),
    "negative": (lambda c: counts(torch.tensor([0, -1]), 3), r"ancestors must be in \[0, 3\), got -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_a_cloud_is_refused(name: str) -> None:
    spoil, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        spoil(Cloud.uniform(torch.zeros(2, 3), (2, 3)))


def test_what_does_not_fit_a_genealogy_is_refused() -> None:
    tree = Genealogy()
    with pytest.raises(ValueError, match="nothing was appended"):
        tree.lineage(0)
    tree.append(torch.arange(3))
    for ancestors, x, says in (
        (torch.tensor([0, 3]), None, r"ancestors must be in \[0, 3\), got 3"),
        (torch.tensor([[0]]), None, r"ancestors must have the batch \(\)"),
        (torch.tensor([0.0]), None, "ancestors must be integers"),
        (torch.tensor([0]), torch.zeros(1), "x must be given at every time"),
        (None, None, "ancestors may be None only at the first time"),
    ):
        with pytest.raises(ValueError, match=says):
            tree.append(ancestors, x)
    with pytest.raises(ValueError, match=r"k must be in \[0, 3\), got 3"):
        tree.lineage(3)
    with pytest.raises(ValueError, match="k has no path: x was not given"):
        tree.path(0)
    with pytest.raises(ValueError, match="t must be one of 1 times, got 1"):
        tree.unique(1)


def test_a_step_is_one_graph_for_torch_compile() -> None:
    def step(x: Tensor, incr: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        cloud, ancestors, did = Cloud.uniform(x, x.shape[:2]).reweight(incr).maybe_resample(0.5, u=u)
        return cloud.x, cloud.logw, cloud.log_z, ancestors, did

    x, u = torch.randn(3, 20, 2, generator=seeded()), torch.rand(3, dtype=torch.float64)
    incr = torch.tensor([0.1, 2.0, 4.0]).unsqueeze(1) * x[..., 0]
    compiled = torch.compile(step, fullgraph=True, backend="eager")(x, incr, u)
    for made, expected in zip(compiled, step(x, incr, u), strict=True):
        assert torch.allclose(made.double(), expected.double(), rtol=1e-14)
