"""The simulator of N bodies against equations by hand and closed forms; and the scores of trajectories."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polyak.generate.geotdm import (
    ade,
    classification_score,
    fde,
    marginal_score,
    prediction_score,
    simulate_nbody,
)

DOUBLE = torch.float64
KINDS = ("springs", "charged", "gravity")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def force(kind, x, edges, charges):
    """On each of the bodies x [N, 3], one pair after the other."""
    total = np.zeros_like(x)
    for i in range(len(x)):
        for j in set(range(len(x))) - {i}:
            d = x[i] - x[j]
            r = math.sqrt(d @ d)
            if kind == "springs":
                total[i] -= edges[i, j] * d
            elif kind == "charged":
                total[i] += charges[i] * charges[j] * d / r**3
            else:
                total[i] -= charges[j] * d / (r**2 + 0.01) ** 1.5
    return np.clip(total, -100, 100) if kind == "charged" else total


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_trajectory_of_bodies(kind):
    start = 0.05 * draw(2, 3, 3), draw(2, 3, 3, seed=1)  # so near that forces are clipped
    given = dict(edges=draw(2, 3, 3, seed=2)) if kind == "springs" else dict(charges=draw(2, 3, seed=2))
    x, v, edges, charges = simulate_nbody(kind, 2, 3, 13, save_every=4, dt=0.01, initial=start, **given)
    assert x.shape == v.shape == (2, 3, 3, 3)
    for b in range(2):
        at, speed = (one[b].numpy().copy() for one in start)
        k, q = edges[b].numpy(), charges[b].numpy()
        speed += 0.01 * force(kind, at, k, q)
        for i in range(1, 13):
            at += 0.01 * speed
            if i % 4 == 0:  # the state at the start is no frame
                assert x[b, i // 4 - 1].numpy() == pytest.approx(at, rel=1e-10, abs=1e-12)
                assert v[b, i // 4 - 1].numpy() == pytest.approx(speed, rel=1e-10, abs=1e-12)
            speed += 0.01 * force(kind, at, k, q)


@pytest.mark.parametrize(("kind", "spread"), [("springs", 0.5), ("charged", (8 / 5) ** (1 / 3)), ("gravity", 1.0)])
def test_bodies_start_as_in_the_paper(kind, spread):
    n = 2000
    x, v, edges, charges = simulate_nbody(kind, n, 8, 2, save_every=1, dt=1e-9, generator=seeded())
    assert x.dtype == v.dtype == DOUBLE
    assert x.std().item() == pytest.approx(spread, rel=0.02)
    if kind == "gravity":
        assert v.mean(2).abs().max() < 1e-6
        assert v.var().item() == pytest.approx(7 / 8, rel=0.02)
        assert torch.equal(charges, torch.ones(n, 8, dtype=DOUBLE))
        assert not edges.any()
        return
    assert torch.linalg.vector_norm(v, dim=-1).numpy() == pytest.approx(0.5, abs=1e-6)
    off = edges[:, ~torch.eye(8, dtype=torch.bool)]
    assert not edges.diagonal(0, 1, 2).any()
    assert torch.equal(edges, edges.mT)
    assert sorted(off.unique().tolist()) == ([0, 0.1] if kind == "springs" else [-1, 1])
    assert (off == off.max()).double().mean().item() == pytest.approx(0.5, abs=0.03)
    if kind == "springs":
        assert not charges.any()
    else:
        assert torch.equal(edges[:, 0, 1], charges[:, 0] * charges[:, 1])


def test_it_follows_from_the_generator():
    first, again, other = (simulate_nbody("charged", 2, 3, 20, save_every=5, generator=seeded(i)) for i in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("kind", KINDS)
def test_momentum_and_the_energy_of_springs_are_kept(kind):
    x, v, k, _ = simulate_nbody(kind, 4, 4, 1001, save_every=50, dt=0.002, generator=seeded(3))
    if kind != "charged":  # whose force on a body, not on a pair, is clipped
        torch.testing.assert_close(v.mean(2), v[:, :1].mean(2).expand(-1, 20, -1), rtol=0, atol=1e-12)
    if kind == "springs":
        d = x[:, :, :, None] - x[:, :, None]
        energy = v.square().sum((2, 3)) / 2 + (k[:, None] * d.square().sum(-1)).sum((2, 3)) / 4
        assert (energy / energy[:, :1] - 1).abs().max() < 0.002  # O(dt)


def test_charges_at_one_place_do_not_act_on_each_other():
    x = torch.zeros(1, 2, 3, dtype=DOUBLE)
    there, v, _, _ = simulate_nbody("charged", 1, 2, 5, save_every=1, initial=(x, x), charges=torch.ones(1, 2))
    assert not there.any()
    assert not v.any()
    x[0, 1, 0] = 1e-9  # the force is at its bound, where |a|^2 + |b|^2 - 2 a.b would have no digits
    x = x + 1
    _, v, _, _ = simulate_nbody(
        "charged", 1, 2, 2, save_every=1, dt=1e-12, initial=(x, 0 * x), charges=torch.ones(1, 2)
    )
    assert v[0, 0, :, 0].tolist() == pytest.approx([-1e-10, 1e-10], rel=1e-6)


A, B = draw(2, 3, 3), draw(2, 3, 3)
WRONG = {
    "another kind": (lambda: simulate_nbody("spring", 2), r"kind must be one of .* did you mean 'springs'"),
    "no frame": (lambda: simulate_nbody("springs", 2, steps=50), r"save_every must be below steps=50, for a frame"),
    "edges of charges": (
        lambda: simulate_nbody("charged", 2, 3, edges=A),
        r"edges must be None for kind='charged'",
    ),
    "charges of springs": (lambda: simulate_nbody("springs", 2, 3, charges=A[0]), r"charges must be None"),
    "other bodies": (
        lambda: simulate_nbody("springs", 2, 4, initial=(A, B)),
        r"initial must be finite, of shape \(2, 4, 3\)",
    ),
    "NaN": (lambda: simulate_nbody("springs", 2, 3, initial=(A, B * math.nan)), r"initial must be finite"),
    "no pair": (lambda: simulate_nbody("springs", 2, 3, initial=(A,)), r"initial must have 2 members"),
    "other springs": (
        lambda: simulate_nbody("springs", 2, 3, edges=A[:1]),
        r"edges must be finite, of shape \(2, 3, 3\)",
    ),
    "no time": (lambda: simulate_nbody("springs", 2, dt=0.0), r"dt must be > 0"),
    "samples of others": (lambda: ade(A[:1], B), r"samples must be \(K of\) \(2, 3, 3\)"),
    "samples in the plane": (lambda: fde(A[:, :2], A[:, :2]), r"truth must have shape \[..., 3, T\]"),
    "a batch of others": (lambda: ade(A, B, torch.zeros(3).long()), r"batch must be the graph of each of the points"),
    "a law of one value": (lambda: marginal_score(A, 0 * B), r"truth must be finite and vary in all coordinates"),
    "NaN among samples": (lambda: marginal_score(A * math.nan, B), r"samples must be finite"),
    "few to classify": (lambda: classification_score(A[None], B[None]), r"samples must be five or more"),
    "one frame to predict": (
        lambda: prediction_score(A[None][..., :1], B[None][..., :1]),
        r"samples and truth must have the same points and two or more frames",
    ),
    "features of others": (lambda: prediction_score(A[None], B[None], A), r"h must have shape \(1, 2, 'H'\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_refused_by_name(what):
    call, says = WRONG[what]
    with pytest.raises((TypeError, ValueError), match=says):
        call()


# Scores


def test_displacements_are_means_of_distances():
    truth, samples = draw(4, 3, 3, 6), draw(5, 4, 3, 3, 6, seed=1)
    distance = (samples - truth).square().sum(-2).sqrt()  # [K, B, N, T]
    assert ade(samples, truth) == pytest.approx(distance.mean().item(), rel=1e-12)
    assert fde(samples, truth) == pytest.approx(distance[..., -1].mean().item(), rel=1e-12)
    assert ade(samples[0], truth) == pytest.approx(distance[0].mean().item(), rel=1e-12)
    nearest = distance.mean((2, 3)).amin(0).mean().item()
    assert ade(samples, truth, best=True) == pytest.approx(nearest, rel=1e-12)
    batch = torch.tensor([0, 0, 1])
    each = [distance[:, 0, batch == i].mean().item() for i in range(2)]
    assert ade(samples[:, 0], truth[0], batch) == pytest.approx(np.mean(each), rel=1e-12)
    assert ade(samples[:, 0, 0], truth[0, 0]) == pytest.approx(distance[:, 0, 0].mean().item(), rel=1e-12)
    assert ade(truth, truth) == 0


def test_the_marginal_score_is_of_histograms():
    truth, samples = draw(40, 2, 3, 5), 1.5 * draw(30, 2, 3, 5, seed=1)
    score = []
    for i in range(3):
        a, b = samples[:, :, i].flatten().numpy(), truth[:, :, i].flatten().numpy()
        edges = np.linspace(b.min(), b.max(), 21)
        made, true = (np.histogram(one, edges)[0] / len(one) / (edges[1] - edges[0]) for one in (a, b))
        score.append(np.abs(made - true).mean())
    assert marginal_score(samples, truth, bins=20) == pytest.approx(np.mean(score), rel=1e-9)
    assert marginal_score(truth, truth) == 0


def test_a_classifier_tells_wide_from_narrow_and_not_equal_laws():
    truth = draw(60, 3, 3, 4).float()
    same, wide = (s * draw(60, 3, 3, 4, seed=1).float() for s in (1, 3))
    options = dict(epochs=10, hidden=8, lr=0.01)
    first, again, other = (classification_score(same, truth, **options, generator=seeded(i)) for i in (0, 0, 1))
    assert first == again != other
    assert first > 0.5  # log 2 = 0.69 is a guess
    assert classification_score(wide, truth, **options, generator=seeded()) < 0.35


def test_a_forecast_that_was_learned_from_still_bodies_is_one_of_still_bodies():
    still, moving = draw(50, 2, 3, 1), 0.5 * draw(50, 2, 3, 1, seed=1) * torch.arange(4)
    x = still.expand(-1, -1, -1, 4)
    options = dict(epochs=20, hidden=8, lr=0.01, h=torch.ones(50, 2, 1))
    learned, foreign = (prediction_score(y, x, **options, generator=seeded()) for y in (x, x + moving))
    assert learned < 0.05
    assert prediction_score(x, x + moving, **options, generator=seeded()) > 4 * learned
    assert foreign == prediction_score(x + moving, x, **options, generator=seeded())
