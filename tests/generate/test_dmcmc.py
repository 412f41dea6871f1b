"""Denoising MCMC against closed forms, exact posteriors, and its equations written here again."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from polyak.generate import (
    EDM,
    PFGMPP,
    VE,
    VP,
    Denoiser,
    DenoisingLangevinGibbs,
    Flow,
    Interpolant,
    KarrasHeun,
    NoiseClassifier,
    NoisePosterior,
    noise_classifier_loss,
    noise_levels,
)
from polyak.generate.dmcmc import Integrator, autocorrelation, effective_sample_size, levels
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture

F64 = torch.float64
LAW = Mixture([[-1.0, 0.2], [0.6, 0.5], [0.0, -0.7]], [0.1, 0.2, 0.05])
TABLE = noise_levels(n=40)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Spy(Integrator):
    """Notes what it is given, and returns it."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor]] = []

    def __call__(self, scaled: Any, y: Tensor, sigma: Tensor, generator: Any = None) -> Tensor:
        self.given.append((y, sigma))
        return y


def chains(law: Mixture = LAW, process: Any = None, table: Tensor = TABLE, **options: Any) -> DenoisingLangevinGibbs:
    process = process or VE()
    options = {"eta": 0.2, **options}
    return DenoisingLangevinGibbs(ExactDenoiser(law, process), process, NoisePosterior.exact(law, table), **options)


def begun(made: DenoisingLangevinGibbs, x: Tensor, sigma: Tensor, seed: int = 0) -> DenoisingLangevinGibbs:
    """Chains with these states."""
    numbers = dict.fromkeys(("nfe", "warmup_nfe", "emitted", "classified"), 0)
    made.load_state_dict({"x": x, "sigma": sigma, "generator": rng(seed).get_state(), "dtype": x.dtype} | numbers)
    return made


# --- the table, and who tells the level


def test_levels_fall_from_the_largest() -> None:
    made = noise_levels()
    assert len(made) == 1000
    assert made[0].item() == 50.0
    assert bool((made.diff() < 0).all())
    assert made[-1].item() == pytest.approx(0.01 * 5000**1e-3, rel=1e-14)
    tau = torch.linspace(1, 1e-3, 1000, dtype=F64)  # the official table
    assert torch.allclose(made, 0.01 * 5000**tau, rtol=1e-12)
    with pytest.raises(ValueError, match="sigma_max must be above sigma_min=1"):
        noise_levels(1.0, 0.5)
    with pytest.raises(ValueError, match="too near for n=100"):
        noise_levels(1.0, 1.0 + 1e-15, 100)


@pytest.mark.parametrize("room", [2**23, 7])
@pytest.mark.parametrize("full", [False, True])
def test_the_exact_posterior_is_bayes_rule(full: bool, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "_ROOM", room)
    means, x = torch.randn(2, 5, 3, dtype=F64, generator=rng())
    root = torch.randn(5, 3, 3, dtype=F64, generator=rng(1))
    covariances = root @ root.mT if full else torch.tensor([0.0, 0.1, 0.2, 1.0, 3.0], dtype=F64)
    weights = torch.tensor([1.0, 2, 3, 4, 5], dtype=F64)
    table = noise_levels(n=7)
    got = NoisePosterior.exact(Mixture(means, covariances, weights), table)(x.reshape(5, 3, 1)).softmax(1)
    each = covariances if full else torch.eye(3, dtype=F64) * covariances[:, None, None]
    want = torch.tensor(
        [
            [
                sum(
                    w
                    * stats.multivariate_normal(m.numpy(), (c + s**2 * torch.eye(3, dtype=F64)).numpy()).pdf(
                        row.numpy()
                    )
                    for w, m, c in zip(weights / 15, means, each, strict=True)
                )
                for s in table
            ]
            for row in x
        ],
        dtype=F64,
    )
    assert torch.allclose(got, want / want.sum(1, keepdim=True), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "features"), [((3, 32, 32), 1024), ((3, 256, 256), 1024), ((1, 8, 8), 1024), ((1, 28, 28), 2304), ((2, 2, 2), 1024)]
)  # fmt: skip
def test_a_classifier_has_an_answer_for_images_of_every_size(shape: tuple[int, ...], features: int) -> None:
    classifier = NoiseClassifier(shape, 10)
    assert classifier.head.in_features == features
    with torch.no_grad():
        assert classifier(torch.zeros(2, *shape)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"x must have shape \(B, "):
        classifier(torch.zeros(2, shape[0], 3, 3))


def test_a_classifier_learns_levels_of_which_the_first_is_the_largest() -> None:
    torch.manual_seed(0)
    classifier, draw = NoiseClassifier((1, 4, 4), 12), rng()
    data = 0.1 * torch.randn(64, 1, 4, 4, generator=draw)
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    losses = []
    for _ in range(40):
        loss = noise_classifier_loss(classifier, data, draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 * math.log(12)
    assert sum(losses[-5:]) / 5 < 0.6 * math.log(12)
    with torch.no_grad():
        assert classifier(50 * torch.randn(50, 1, 4, 4, generator=draw)).argmax(1).max().item() <= 2
        assert classifier(data).argmax(1).min().item() >= 7


def test_the_loss_is_that_of_the_noised_data_and_their_levels() -> None:
    seen: list[Tensor] = []

    class Teller:
        levels = torch.tensor([4.0, 2.0, 1.0], dtype=F64)

        def __call__(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.tensor([[0.0, 1.0, 3.0]]).expand(len(x), 3)

    n = 3000
    loss = noise_classifier_loss(Teller(), torch.zeros(n, 50), rng())
    which = (torch.rand(n, generator=rng(), dtype=F64) * 3).long()
    spread = seen[0].std(1).double()
    assert torch.allclose(spread, Teller.levels[which], rtol=0.6)
    assert torch.bincount(which).tolist() == pytest.approx([n / 3] * 3, rel=0.1)  # each level as likely
    logits = torch.tensor([0.0, 1.0, 3.0])
    assert loss.item() == pytest.approx((logits.logsumexp(0) - logits[which].mean()).item(), rel=1e-5)


# --- the chain


def test_the_chain_is_the_papers_equations_written_again() -> None:
    """A golden trajectory: Langevin step, likeliest level, the smallest of a window, Heun's method, twice."""
    c, eta, n_skip, steps = 0.3, 0.4, 3, 3
    x0 = torch.randn(4, 2, dtype=F64, generator=rng(5))
    sigma0 = TABLE[[20, 25, 10, 30]]
    made = begun(chains(Gaussian([0.0, 0.0], c), eta=eta, n_skip=n_skip, integrator=KarrasHeun(steps)), x0, sigma0)
    got = made.sample(8).tolist()
    noise, want = rng(), []
    x, s = x0.tolist(), sigma0.tolist()
    table = [0.01 * 5000 ** (1 - k / 40) for k in range(40)]
    for _ in range(2):
        best, least = [list(row) for row in x], list(s)
        for _ in range(n_skip):
            z = torch.randn(4, 2, dtype=F64, generator=noise).tolist()
            for i in range(4):
                x[i] = [v - eta / 2 * v / (c + s[i] ** 2) + math.sqrt(eta) * e for v, e in zip(x[i], z[i], strict=True)]
                square = sum(v * v for v in x[i])
                s[i] = max(table, key=lambda q: -square / (2 * (c + q * q)) - math.log(c + q * q))
                if s[i] < least[i]:
                    best[i], least[i] = list(x[i]), s[i]
        for i in range(4):
            root = [
                least[i] ** (1 / 7) + k / (steps - 1) * (0.01 ** (1 / 7) - least[i] ** (1 / 7)) for k in range(steps)
            ]
            grid, y = [*(r**7 for r in root), 0.0], best[i]
            for a, b in itertools.pairwise(grid):
                d = [v * a / (c + a * a) for v in y]
                ahead = [v + (b - a) * e for v, e in zip(y, d, strict=True)]
                late = [v * b / (c + b * b) for v in ahead] if b else d
                y = [v + (b - a) * (e + f) / 2 for v, e, f in zip(y, d, late, strict=True)]
            want.append(y)
    assert torch.allclose(torch.tensor(got, dtype=F64), torch.tensor(want, dtype=F64), rtol=1e-9, atol=1e-11)
    assert made.sigma is not None
    assert torch.allclose(made.sigma, torch.tensor(s, dtype=F64), rtol=1e-12)


def shares(update: str, eta: float, metropolis: bool, from_law: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of levels, and x and its level, of 4000 chains on N(0, 0.5) that all began at one state, or at draws of the law."""
    table, n = noise_levels(0.3, 1.8, 6), 4000
    made = chains(
        Gaussian([0.0], 0.5), table=table, eta=eta, n_skip=40, sigma_update=update, metropolis=metropolis,
        integrator=Spy(), select="last",
    )  # fmt: skip
    sigma = table.repeat(n // 6 + 1)[:n] if from_law else table[:1].expand(n)
    z = torch.randn(n, 1, dtype=F64, generator=rng(7)) if from_law else torch.zeros(n, 1, dtype=F64)
    begun(made, (0.5 + sigma[:, None] ** 2).sqrt() * z, sigma)
    x = made.sample(n)[:, 0]
    assert made.sigma is not None
    return torch.bincount((made.sigma[:, None] == table).double().argmax(1), minlength=6), x, made.sigma


def test_gibbs_steps_make_sigma_uniform_and_x_normal() -> None:
    """With Metropolis's correction whatever eta; without it for small ones only; with likeliest levels never."""
    for found in (shares("sample", 1.0, True), shares("sample", 0.02, False, from_law=True)):
        counts, x, sigma = found
        assert stats.chisquare(counts.numpy(), [len(x) / 6] * 6).pvalue > 1e-3
        assert stats.kstest((x / (0.5 + sigma**2).sqrt()).numpy(), "norm").pvalue > 1e-3
    assert stats.chisquare(shares("sample", 1.5, False, from_law=True)[0].numpy()).pvalue < 1e-6
    assert stats.chisquare(shares("argmax", 1.0, True)[0].numpy()).pvalue < 1e-6


def test_levels_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]]).expand(8000, 4)
    counts = torch.bincount(levels.draw(logits, rng()), minlength=4)
    want = logits[0].double().softmax(0) * 8000
    assert counts[2].item() == 0
    assert stats.chisquare(counts[[0, 1, 3]].numpy(), want[[0, 1, 3]].numpy()).pvalue > 1e-3
    assert levels.draw(torch.tensor([[-math.inf, 0.0], [0.0, -math.inf]]), rng()).tolist() == [1, 0]


@pytest.mark.parametrize("update", ["argmax", "denoiser"])
def test_large_dimensions_drive_sigma_upwards(update: str) -> None:
    """``sigma_k^4 = sigma_0^4 + eta^2 k / 2``: the unadjusted step makes more noise than the score takes away."""
    n, d, eta, k, start, c = 40, 256, 0.5, 24, 0.7, 1e-4
    law = Gaussian([0.0] * d, c)
    made = chains(
        law, table=noise_levels(n=500), eta=eta, n_skip=k, sigma_update=update, integrator=Spy(), select="last"
    )
    x = math.sqrt(c + start**2) * torch.randn(n, d, dtype=F64, generator=rng(1))
    begun(made, x, torch.full((n,), start, dtype=F64)).sample(n)
    assert made.sigma is not None
    assert made.sigma.mean().item() == pytest.approx((start**4 + eta**2 * k / 2) ** 0.25, rel=0.03)
    assert made.sigma.std().item() / made.sigma.mean().item() < 0.15


def test_the_denoiser_tells_the_likeliest_level() -> None:
    """Of a normal law that is ``sqrt(|x|^2 / d - c)``; random signs know the trace of an isotropic Jacobian exactly."""
    c, d = 0.02, 16
    made = chains(
        Gaussian([0.0] * d, c), process=EDM(), table=TABLE, sigma_update="denoiser", n_skip=1, integrator=Spy()
    )
    x = torch.randn(30, d, dtype=F64, generator=rng()) * torch.linspace(1, 20, 30, dtype=F64)[:, None]
    begun(made, x, torch.full((30,), 3.0, dtype=F64)).sample(30)
    assert made.x is not None
    assert made.sigma is not None
    assert torch.allclose(made.sigma, (made.x.square().mean(1) - c).sqrt(), rtol=2e-3)
    assert made.nfe_per_sample() == 3  # one for the step, two for the level
    alone = DenoisingLangevinGibbs(ExactDenoiser(LAW, VP()), VP(), sigma_update="denoiser", integrator=KarrasHeun(2))
    alone.warmup((3, 2), rng(), dtype=F64)
    assert bool(alone.sample(6).isfinite().all())


@pytest.mark.parametrize("process", [VP(), Flow(), EDM()], ids=repr)
def test_every_gaussian_process_makes_the_same_chain(process: Any) -> None:
    """In the scaled variable all are variance exploding."""
    table = noise_levels(0.02, 40.0, 30)
    runs = []
    for one in (VE(), process):
        made = chains(process=one, table=table, sigma_update="sample", integrator=KarrasHeun(3, sigma_min=0.02))
        begun(made, torch.randn(4, 2, dtype=F64, generator=rng(1)), table[[3, 10, 15, 20]])
        runs.append(made.sample(20))
    assert torch.allclose(*runs, rtol=1e-8, atol=1e-8)


# --- windows


@pytest.mark.parametrize("select", ["min", "fresh", "last"])
def test_samples_are_made_from_the_state_that_was_selected(select: str) -> None:
    spy, one = Spy(), Spy()
    made = chains(n_skip=3, integrator=spy, select=select, sigma_update="sample")
    every = chains(n_skip=1, integrator=one, select="last", sigma_update="sample")
    for each in (made, every):
        each.warmup((50, 2), rng(), steps=3, dtype=F64)
    assert every.x is not None
    assert every.sigma is not None
    before = (every.x, every.sigma)
    for _ in range(4):
        made.sample(50)
        every.sample(150)
        window = one.given[-3:]
        seen = {"min": [before, *window], "fresh": window, "last": window[-1:]}[select]
        xs, sigmas = torch.stack([x for x, _ in seen]), torch.stack([s for _, s in seen])
        least = sigmas.argmin(0)
        x, sigma = spy.given[-1]
        assert torch.equal(sigma, sigmas.min(0).values)
        assert torch.equal(x, xs[least, torch.arange(50)])
        if select == "min":
            assert bool((sigma <= before[1]).all())
        before = window[-1]


def test_official_selection_repeats_samples() -> None:
    """Official code seeks the smallest level from the state before the window on, which may have made the sample before."""
    copies = {}
    for select in ("min", "fresh"):
        made = chains(n_skip=2, integrator=KarrasHeun(2), select=select, sigma_update="sample")
        made.warmup((100, 2), rng(), steps=3, dtype=F64)
        x = made.sample(1000).reshape(10, 100, 2)
        copies[select] = (x[1:] == x[:-1]).all(2).double().mean().item()
    assert copies["min"] > 0.05
    assert copies["fresh"] == 0


def test_the_chain_goes_on_from_its_own_state_and_not_from_the_sample() -> None:
    states = []
    for integrator in (KarrasHeun(2), KarrasHeun(5), Spy()):
        made = chains(integrator=integrator)
        made.warmup((5, 2), rng(), steps=3, dtype=F64)
        made.sample(15)
        states.append(made.x)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "options", [{}, {"sigma_update": "sample"}, {"metropolis": True}, {"sigma_update": "denoiser"}]
)
def test_chains_do_not_depend_on_their_batch(options: dict[str, Any]) -> None:
    runs = []
    order = [3, 0, 2, 1]
    for rows in (range(4), order):
        made = chains(integrator=KarrasHeun(3, 80.0), n_skip=2, tweedie=0.02, **options)
        made.warmup((4, 2), [rng(i) for i in rows], steps=3, burn_in=[(2, None)], dtype=F64)
        runs.append(made.sample(8).reshape(2, 4, 2))
    assert torch.allclose(runs[0][:, order], runs[1], rtol=1e-12, atol=1e-13)


def test_saved_and_restored_chains_go_on_as_they_were() -> None:
    for generator in (rng(), [rng(i) for i in range(3)]):
        made = chains(integrator=KarrasHeun(3, 80.0), sigma_update="sample")
        made.warmup((3, 2), generator, steps=3, dtype=F64)
        made.sample(6)
        state = made.state_dict()
        want = [made.sample(4), next(iter(made))]
        other = chains(integrator=KarrasHeun(3, 80.0), sigma_update="sample")
        other.load_state_dict(state)
        assert torch.equal(other.sample(4), want[0])
        assert torch.equal(next(iter(other)), want[1])
        assert other.nfe_per_sample() == made.nfe_per_sample() == 9
        again = chains(integrator=KarrasHeun(3, 80.0), sigma_update="sample")
        again.load_state_dict(state)  # what was saved did not move on
        assert torch.equal(again.sample(4), want[0])


@pytest.mark.parametrize(
    ("options", "spent"), [({}, 4 + 5), ({"tweedie": 0.01}, 4 + 5 + 1), ({"metropolis": True}, 8 + 5), ({"n_skip": 6}, 6 + 5)]
)  # fmt: skip
def test_evaluations_are_counted(options: dict[str, Any], spent: int) -> None:
    made = chains(**options)
    denoiser: Any = made.denoiser
    made.warmup((3, 2), rng(), dtype=F64)
    step = 2 if made.metropolis else 1
    assert denoiser.nfe == made.warmup_nfe == 2 * 19 - 1 + 20 * step
    assert made.classified == 21
    assert made.sample(7).shape == (7, 2)  # three batches
    assert made.nfe_per_sample() == spent
    assert denoiser.nfe == made.warmup_nfe + 3 * spent
    assert made.nfe_per_sample(with_warmup=True) == pytest.approx(spent + made.warmup_nfe / 3)
    assert made.classified == 21 + 3 * made.n_skip


def test_the_last_step_takes_off_what_is_left_at_its_level() -> None:
    """``x + tweedie^2 score(x, tweedie)``, which of the exact denoiser is the mean of the data, given x."""
    made, spy = chains(tweedie=0.3, integrator=Spy()), Spy()
    made.warmup((5, 2), rng(), steps=3, dtype=F64)
    bare = chains(integrator=spy)
    bare.load_state_dict(made.state_dict())
    x = bare.sample(5)
    score = LAW.score(x, 1.0, torch.tensor(0.3, dtype=F64))
    assert torch.allclose(made.sample(5), x + 0.3**2 * score, rtol=1e-6)


def test_the_warm_up_is_the_papers() -> None:
    """20 levels of Heun with churn from the largest, 0.5 of noise, ten steps of eta 0.5 and ten of the chains' own."""
    by_shape, by_noise = chains(), chains()
    by_shape.warmup((4, 2), rng(), dtype=F64)
    draw = rng()
    by_noise.warmup(50 * torch.randn(4, 2, dtype=F64, generator=draw), draw)
    assert by_shape.x is not None
    assert by_noise.x is not None
    assert torch.equal(by_shape.x, by_noise.x)
    still = chains()
    still.warmup((2000, 2), rng(), noise=0.3, burn_in=[], dtype=F64)
    assert still.x is not None
    assert torch.allclose(still.x.mean(0), LAW.mean, atol=0.08)
    assert torch.allclose(torch.cov(still.x.T), LAW.covariance + 0.09 * torch.eye(2, dtype=F64), atol=0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_follows_the_chains(dtype: torch.dtype) -> None:
    made = chains()
    made.warmup((3, 2), rng(), steps=3, dtype=dtype)
    assert made.sample(4).dtype == dtype
    assert made.x is not None
    assert made.x.dtype == torch.float32  # what is kept is not rounded to half precision
    assert made.sample(0).shape == (0, 2)
    assert made.sample(0).dtype == dtype


@pytest.mark.parametrize("update", ["argmax", "denoiser"])
def test_a_unet_of_diffusers_makes_images(update: str) -> None:
    """Its normalisation and attention cannot be mapped over, as derivatives along several directions would be."""
    from polyak.generate.networks import unet

    torch.manual_seed(0)
    network, classifier = unet(8, width=8).model, NoiseClassifier((1, 8, 8), 20, 0.02, 40.0)
    denoiser = Denoiser(lambda x, t: network(x, t).sample, EDM(), "edm")
    made = DenoisingLangevinGibbs(denoiser, EDM(), classifier, integrator=KarrasHeun(2), sigma_update=update, n_skip=1)  # type: ignore[arg-type]
    made.warmup((2, 1, 8, 8), rng(), steps=2, burn_in=[(1, None)])
    images = made.sample(2)
    assert images.shape == (2, 1, 8, 8)
    assert images.dtype == torch.float32
    assert bool(images.isfinite().all())
    assert not images.requires_grad


# --- bad input


def test_what_has_no_score_or_no_level_is_refused() -> None:
    posterior = NoisePosterior.exact(LAW, TABLE)
    with pytest.raises(
        ValueError, match="process must have Gaussian noise: Denoising MCMC needs a score, which PFGMPP"
    ):
        DenoisingLangevinGibbs(lambda x, t: x, PFGMPP(8.0), posterior)  # type: ignore[arg-type, return-value]
    with pytest.raises((TypeError, ValueError), match="process must"):
        DenoisingLangevinGibbs(lambda x, t: x, Interpolant(), posterior)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="process must be the denoiser's own"):
        DenoisingLangevinGibbs(ExactDenoiser(LAW, VP()), VE(), posterior)
    with pytest.raises(ValueError, match="noise_posterior is needed for sigma_update='argmax'"):
        DenoisingLangevinGibbs(ExactDenoiser(LAW, VE()), VE())
    with pytest.raises(ValueError, match=r"noise_posterior.levels must be within the model's levels .* 0.01 to 50"):
        chains(table=noise_levels(0.01, 60.0, 10))
    with pytest.raises(ValueError, match="levels must be at least 2 positive numbers, the largest first"):
        NoisePosterior(lambda x: x, TABLE.flip(0))
    with pytest.raises(ValueError, match="metropolis needs a denoiser with log_prob"):
        DenoisingLangevinGibbs(lambda x, t: x, VE(), posterior, metropolis=True)  # type: ignore[arg-type, return-value]
    for wrong in (
        {"eta": 0.0},
        {"eta": -1.0},
        {"n_skip": 0},
        {"tweedie": 60.0},
        {"select": "max"},
        {"sigma_update": "mean"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            chains(**wrong)


@pytest.mark.parametrize(
    ("logits", "match"), [
        (lambda x: torch.full((len(x), 40), math.nan), "noise_posterior returned NaN"),
        (lambda x: torch.zeros(len(x), 41), r"must return logits of shape \(4, 40\), got \(4, 41\)"),
        (lambda x: torch.eye(40)[-1].expand(len(x), 40), r"astray: .* beyond 5 sqrt\(d\) sigma_max = 354 .* eta=0.5 at sigma=0.0"),
    ],
)  # fmt: skip
def test_a_posterior_that_is_wrong_is_told_and_changes_nothing(logits: Any, match: str) -> None:
    """The last is sure of the smallest level always: there a Langevin step of 0.5 is unstable."""
    process, law = VE(), Gaussian([0.0, 0.0], 1e-3)
    made = DenoisingLangevinGibbs(ExactDenoiser(law, process), process, NoisePosterior(logits, TABLE), 0.5)
    with pytest.raises(ValueError, match=match):
        made.warmup((4, 2), rng(), steps=3, dtype=F64)
    assert made.x is None
    begun(made, 0.01 * torch.randn(4, 2, dtype=F64, generator=rng()), TABLE[-1:].expand(4))
    with pytest.raises(ValueError, match=match):
        made.sample(40)
    assert made.emitted <= 1


def test_the_step_that_goes_astray_is_the_one_that_is_told() -> None:
    x, sigma = torch.zeros(3, 2, dtype=F64), torch.full((3,), 0.5, dtype=F64)
    made = begun(chains(eta=1e8, n_skip=1), x, sigma)
    with pytest.raises(ValueError, match=r"the chains went astray: .* with eta=1e\+08 at sigma=0.5"):
        made.sample(3)
    assert made.x is not None
    assert torch.equal(made.x, x)
    assert made.emitted == made.nfe == 0


def test_chains_that_have_not_begun_or_are_no_state_are_refused() -> None:
    made = chains()
    for ask in (lambda: made.sample(1), lambda: iter(made), made.state_dict):
        with pytest.raises(ValueError, match="call warmup"):
            ask()
    with pytest.raises(ValueError, match="no sample was made yet"):
        made.nfe_per_sample()
    with pytest.raises(ValueError, match="at least one chain"):
        made.warmup(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="dtype and device follow the batch"):
        made.warmup(torch.zeros(1, 2), dtype=F64)
    with pytest.raises(ValueError, match=r"one for each of the 3 rows, got 2"):
        made.warmup((3, 2), [rng(), rng()])
    with pytest.raises(ValueError, match="state must be a state_dict of DenoisingLangevinGibbs, it lacks x"):
        made.load_state_dict({})
    with pytest.raises(ValueError, match=r"levels in \[0.0123"):
        begun(made, torch.zeros(2, 2), torch.tensor([1.0, 80.0], dtype=F64))
    with pytest.raises(ValueError, match=r"x \(B, ...\) and sigma \(B,\)"):
        begun(made, torch.zeros(2, 2), torch.ones(3, dtype=F64))
    assert made.x is None


# --- how far samples are independent


def test_correlations_of_a_process_whose_correlations_are_known() -> None:
    n, rho = 2000, 0.8
    z = torch.randn(n, 40, dtype=F64, generator=rng())
    rows = [z[0]]
    for step in z[1:]:
        rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * step)
    values = torch.stack(rows)
    got = autocorrelation(values)
    assert torch.allclose(got[:6], rho ** torch.arange(6, dtype=F64), atol=0.03)
    assert effective_sample_size(values) / values.numel() == pytest.approx((1 - rho) / (1 + rho), rel=0.15)
    assert effective_sample_size(z) / z.numel() == pytest.approx(1, rel=0.1)
    apart = torch.arange(4.0).expand(50, 4) + 0.01 * torch.randn(50, 4, generator=rng())  # chains that stay
    assert effective_sample_size(apart) < 8
    assert autocorrelation(torch.ones(5, 2)).tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="n at least 2"):
        autocorrelation(torch.ones(1, 3))
