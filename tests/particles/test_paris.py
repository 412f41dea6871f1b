"""PaRIS and Parisian particle Gibbs against closed forms, enumeration, SciPy and loops in NumPy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats

from polyak.claims.particles import _state_spaces as S
from polyak.core import exact
from polyak.particles import LinearGaussian, PaRIS, ParisParticleGibbs, particle_gibbs
from polyak.particles.paris import backward

DOUBLE = torch.float64
ENGINES = ("dense", "rejection", "mcmc", "ancestor")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(**options):
    A = torch.tensor([[0.9, 0.2], [-0.1, 0.8]], dtype=DOUBLE)
    given = dict(C=[[1.0, 0.5]], Q=[[0.3, 0.1], [0.1, 0.2]], R=[[0.2]], m0=[0.5, -0.5], P0=[[1.0, 0.2], [0.2, 0.5]])
    return LinearGaussian(A, **given, **options), exact.LinearGaussian(A, **given)


def smoothed(model, y, functional=S.product, n=16, m=2, seed=0, **options):
    smoother = PaRIS(model, functional, n, m, generator=seeded(seed), **options)
    clouds = S.run(smoother, y)
    return smoother, clouds


# The filter


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("optimal", [False, True])
def test_the_filter_is_kalmans(threshold, optimal):
    model, kalman = vectors(optimal=optimal)
    _, y = model.simulate(6, generator=seeded(1))
    y[3] = math.nan
    truth = kalman.filter(y)
    runs = 1000
    smoother, _ = smoothed(
        model, y.expand(runs, 6, 1), lambda x, x_next, t: x[..., 0], 64, ess_threshold=threshold, backward="ancestor"
    )
    cloud = smoother.cloud
    z = (cloud.log_z - truth.log_likelihood).exp()
    assert abs(z.mean() - 1) < 4 * z.std() / runs**0.5
    mean = (z[:, None] * cloud.mean()).mean(
        0
    ) / z.mean()  # of the unbiased measure, so that it has no bias of order 1 / N
    spread = (z[:, None] * (cloud.mean() - truth.means[-1])).std(0) / runs**0.5
    assert ((mean - truth.means[-1]).abs() < 4 * spread).all()


def test_an_observation_that_is_missing_does_not_count():
    model = S.linear()
    y = torch.tensor([0.3, math.nan, -0.2], dtype=DOUBLE)
    _, clouds = smoothed(model, y)
    assert not clouds[1].logw.any()
    assert clouds[1].log_z == clouds[0].log_z
    mixed = torch.stack([y, torch.tensor([0.3, 0.1, -0.2], dtype=DOUBLE)])
    _, clouds = smoothed(model, mixed)
    assert clouds[1].logw.any(-1).tolist() == [False, True]
    vector, _ = vectors()
    seen = torch.tensor([[0.1], [math.nan]], dtype=DOUBLE)
    assert not smoothed(vector, seen, lambda x, x_next, t: x[..., 0])[1][1].logw.any()


# Statistics


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("slice_", [2**18, 40])
def test_with_all_pairs_it_is_forward_filtering_backward_smoothing(threshold, slice_, monkeypatch):
    """Weights that are carried, where nothing was resampled, are in the backward kernel; the matrix in slices is the whole one."""
    monkeypatch.setitem(backward._AT_ONCE, "cpu", slice_)
    model = S.linear()
    _, y = model.simulate(12, generator=seeded(2))
    smoother, clouds = smoothed(model, y, S.product, 17, math.inf, ess_threshold=threshold)
    torch.testing.assert_close(smoother.estimate(), S.forward_backward(model, clouds, S.product), rtol=1e-12, atol=0)


def test_a_golden_run():
    """Without a draw: moves that are given, no resampling, all pairs; in NumPy."""

    class Fixed(LinearGaussian):
        def sample_transition(self, x, t, generator):
            return self.A * x + torch.sin(7 * t + torch.arange(4, dtype=DOUBLE))

        def initial(self):
            law = super().initial()
            law.sample = lambda shape, generator=None: torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=DOUBLE)
            return law

    model = Fixed(torch.tensor(0.9, dtype=DOUBLE), Q=0.5, R=0.4)
    y = torch.tensor([0.2, -0.4, 0.1], dtype=DOUBLE)
    smoother, _ = smoothed(model, y, lambda x, x_next, t: (t + 1) * x * x_next**2, 4, math.inf, ess_threshold=0.0)
    x, tau = np.array([-1.0, 0.0, 0.5, 1.0]), np.zeros(4)
    w = stats.norm.pdf(0.2, x, 0.4**0.5)
    for t in range(2):
        new = 0.9 * x + np.sin(7 * t + np.arange(4))
        kernel = w[:, None] * stats.norm.pdf(new[None], 0.9 * x[:, None], 0.5**0.5)
        tau = (kernel / kernel.sum(0) * (tau[:, None] + (t + 1) * x[:, None] * new[None] ** 2)).sum(0)
        x, w = new, w * stats.norm.pdf(y[t + 1].item(), new, 0.4**0.5)
    assert smoother.estimate().item() == pytest.approx((w * tau).sum() / w.sum(), rel=1e-13)
    assert smoother.estimate().item() == pytest.approx(GOLDEN, rel=1e-12)


GOLDEN = 0.46888974505149783


@pytest.mark.parametrize("engine", ["dense", "rejection", "mcmc"])
def test_backward_draws_have_their_law(engine):
    model, m = S.linear(), 8000
    x = torch.linspace(-1, 1, 5, dtype=DOUBLE).repeat(2, 1)
    logw = torch.tensor([[0.0, -1.0, -math.inf, 0.5, 0.2], [0.0, 0.0, 0.0, 0.0, -2.0]], dtype=DOUBLE)
    x_next = torch.tensor([[0.0, 0.7, -0.3, 2.0, 0.1], [1.0, -1.0, 0.2, 0.4, -3.0]], dtype=DOUBLE)
    log_p = torch.stack([logw[b] + stats_log_normal(x_next[b][:, None], S.A * x[b][None], S.Q) for b in range(2)])
    p = log_p.softmax(-1)
    # Metropolis-Hastings keeps what it is started from: draws from the law itself.
    start = torch.multinomial(p.view(10, 5).repeat(m, 1), 1, generator=seeded(3)).view(m, 2, 5)
    if engine == "mcmc":
        given = (model, x.expand(m, 2, 5), logw.expand(m, 2, 5), x_next.expand(m, 2, 5), start, 0, 1, seeded(1))
        j = backward.draw(engine, *given)[0][..., 0].permute(1, 2, 0)
    else:
        j, undefined = backward.draw(engine, model, x, logw, x_next, start[0], 0, m, seeded(1))
        assert not undefined.any()
    for b in range(2):
        for i in range(5):
            found = torch.bincount(j[b, i], minlength=5)
            kept = p[b, i] > 0
            assert not found[~kept].any()
            rare = kept & (p[b, i] * m < 5)
            assert (found[rare] <= 25).all()
            kept &= ~rare
            if kept.sum() > 1:
                wanted = p[b, i][kept] * found[kept].sum() / p[b, i][kept].sum()
                assert stats.chisquare(found[kept].numpy(), wanted.numpy()).pvalue > 1e-4


def stats_log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance)


def test_two_metropolis_steps_come_nearer_than_none(monkeypatch):
    model, m = S.linear(), 4000
    x, logw = torch.linspace(-1, 1, 5, dtype=DOUBLE).expand(m, 5), torch.zeros(m, 5, dtype=DOUBLE)
    x_next = torch.full((m, 5), 0.5, dtype=DOUBLE)
    p = stats_log_normal(x_next[0, :1], S.A * x[0], S.Q).softmax(-1)
    distance = []
    for steps in (0, 2, 8):
        monkeypatch.setattr(backward, "MCMC_STEPS", steps)
        j = backward.draw("mcmc", model, x, logw, x_next, torch.zeros(m, 5, dtype=torch.long), 0, 1, seeded())[0]
        distance.append((torch.bincount(j.flatten(), minlength=5) / j.numel() - p).abs().sum().item())
    assert distance[0] > 3 * distance[1] > 9 * distance[2]


def test_what_has_no_weight_is_not_drawn_even_at_the_ends():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf], dtype=DOUBLE).expand(2, 5)
    for u, wanted in ((0.0, 1), (1 - 2**-53, 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *a, u=u, **o: torch.full((2, 3), u, dtype=DOUBLE))
            assert (backward.categorical(logits, 3, None)[0] == wanted).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_constant_counts_steps_for_every_particle(engine):
    y = S.linear().simulate(20, (3,), generator=seeded())[1]
    smoother, _ = smoothed(
        S.linear(), y, lambda x, x_next, t: torch.full_like(x_next, 0.1), backward=engine, ess_threshold=0.5
    )
    torch.testing.assert_close(smoother.tau, torch.full((3, 16), 1.9, dtype=DOUBLE), rtol=1e-13, atol=0)
    chain = ParisParticleGibbs(
        S.linear(), lambda x, x_next, t: x.new_tensor([0.1, 1.0]).expand(*x.shape, 2), 4, sweeps=3, backward=engine
    )
    wanted = torch.tensor([1.9, 19.0], dtype=DOUBLE).expand(3, 3, 2)
    torch.testing.assert_close(chain.run(y).per_sweep, wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("m", [2, math.inf])
def test_it_is_linear_in_the_functional(m):
    y = S.linear().simulate(15, generator=seeded())[1]
    both = lambda x, x_next, t: torch.stack([x * x_next, x_next + t, 2 * x * x_next - 3 * (x_next + t)], -1)  # noqa: E731
    for estimate in (
        smoothed(S.linear(), y, both, m=m)[0].estimate(),
        ParisParticleGibbs(S.linear(), both, 8, m, sweeps=2, burn_in=0, generator=seeded()).run(y).estimate,
    ):
        assert estimate[2] == pytest.approx((2 * estimate[0] - 3 * estimate[1]).item(), rel=1e-12)


def test_what_was_long_ago_keeps_its_estimate():
    """A functional of x_0 and x_1 alone, after 80 steps: ancestors' paths have forgotten it, PaRIS has not."""
    y = S.linear().simulate(80, generator=seeded(4))[1].expand(60, 80)
    spread = [
        smoothed(
            S.linear(), y, lambda x, x_next, t: x + x_next if t == 0 else torch.zeros_like(x_next), 40, backward=e
        )[0]
        .estimate()
        .var()
        for e in ("dense", "ancestor")
    ]
    assert spread[1] > 4 * spread[0]


def test_memory_does_not_grow_with_time():
    smoother, y = PaRIS(S.linear(), S.product, 32, generator=seeded()), torch.zeros(500, dtype=DOUBLE)
    held = []
    smoother.init(y[0])
    for t in range(1, 500):
        smoother.update(y[t])
        if t in (50, 499):
            held.append((reachable(smoother), S.bytes_held(smoother)))
    assert held[0] == held[1]


def reachable(made, seen=None):
    """Number and bytes of the tensors that an object holds, through all of its attributes."""
    seen = {} if seen is None else seen
    if isinstance(made, torch.Tensor):
        seen[made.untyped_storage().data_ptr()] = made.untyped_storage().nbytes()
    elif isinstance(made, (list, tuple, dict)):
        for one in made.values() if isinstance(made, dict) else made:
            reachable(one, seen)
    elif hasattr(made, "__dict__") and not isinstance(made, torch.nn.Module):
        reachable(vars(made), seen)
    return len(seen), sum(seen.values())


def test_a_run_goes_on_from_its_state():
    y = S.linear().simulate(12, generator=seeded())[1]
    whole, _ = smoothed(S.linear(), y)
    half, _ = smoothed(S.linear(), y[:6])
    state = copy.deepcopy(half.state_dict())
    other = PaRIS(S.linear(), S.product, 16, generator=seeded(99))
    other.load_state_dict(state)
    for y_t in y[6:]:
        other.update(y_t)
    assert torch.equal(other.estimate(), whole.estimate())
    assert torch.equal(other.cloud.log_z, whole.cloud.log_z)
    with pytest.raises(ValueError, match="lacks tau"):
        other.load_state_dict({"t": 0, "cloud": None, "generator": None})


def test_weights_are_double_whatever_the_states_are():
    model = LinearGaussian(torch.tensor(0.9), Q=0.2, R=0.3)
    y = model.simulate(5, (2,), generator=seeded())[1]
    smoother, _ = smoothed(model, y)
    assert smoother.cloud.x.dtype == y.dtype == torch.float32
    assert smoother.cloud.logw.dtype == smoother.tau.dtype == smoother.estimate().dtype == DOUBLE


# The chain of paths


CHAIN, SEEN = S.small_chain(0)
COUNT = 20_000


@pytest.fixture(scope="module")
def start():
    return S.drawn_paths(CHAIN, SEEN, COUNT, seeded(5))


def p_value(path):
    found, p = S.histogram(CHAIN, SEEN, path)
    return stats.chisquare(found.numpy(), (p * COUNT).numpy()).pvalue


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n", [2, 3])
def test_a_sweep_keeps_the_law_of_paths_and_is_unbiased(engine, n, start):
    """With two particles, too. Wrong: the frozen one not among ancestors or candidates, paths by the forward ancestors, ..."""
    y = SEEN.expand(COUNT, 3, 2)
    made = ParisParticleGibbs(CHAIN, pairs, n, sweeps=1, burn_in=0, backward=engine, generator=seeded(n)).run(y, start)
    assert p_value(made.path) > 1e-3
    exact_value = CHAIN.hmm.smooth(SEEN).transition_counts
    error = (made.estimate.mean(0) - exact_value) / (made.estimate.std(0) / COUNT**0.5)
    assert (error.abs() < 4).all()


def pairs(x, x_next, t):
    """1(x_t = i, x_{t+1} = j), (*pairs, 2, 2)."""
    both = torch.eye(2, dtype=DOUBLE)
    return both[x.long()][..., :, None] * both[x_next.long()][..., None, :]


@pytest.mark.parametrize("kind", ["ancestor", "backward", "pgas"])
def test_plain_particle_gibbs_keeps_the_law_of_paths(kind, start):
    paths = particle_gibbs(CHAIN, SEEN.expand(COUNT, 3, 2), kind, n=2, sweeps=2, path=start, generator=seeded(1))
    assert paths.shape == (2, COUNT, 3)
    assert p_value(paths[-1]) > 1e-3


def test_from_any_start_the_chain_comes_to_the_exact_law_and_one_pass_does_not():
    y = SEEN.expand(COUNT, 3, 2)
    chain = ParisParticleGibbs(CHAIN, S.product, 4, sweeps=8, burn_in=7, generator=seeded())
    made = chain.run(y, torch.zeros(COUNT, 3, dtype=DOUBLE))
    assert p_value(made.path) > 1e-3
    exact_value = CHAIN.hmm.smooth(SEEN).pairs[:, 1, 1].sum()
    assert abs(made.estimate.mean() - exact_value) < 4 * made.estimate.std() / COUNT**0.5
    assert abs(S.run_alone(CHAIN, y, seeded()) - exact_value) > 0.1 * exact_value


def test_a_run_averages_after_the_burn_in_and_goes_on_from_its_path():
    y = S.linear().simulate(10, (3,), generator=seeded())[1]
    made = ParisParticleGibbs(S.linear(), S.product, 8, sweeps=8, generator=seeded()).run(y)
    assert made.per_sweep.shape == (8, 3)
    torch.testing.assert_close(made.estimate, made.per_sweep[2:].mean(0), rtol=1e-14, atol=0)
    g = seeded(1)
    first = ParisParticleGibbs(S.linear(), S.product, 8, sweeps=2, burn_in=0, generator=g).run(y, made.path)
    then = ParisParticleGibbs(S.linear(), S.product, 8, sweeps=1, burn_in=0, generator=g).run(y, first.path)
    whole = ParisParticleGibbs(S.linear(), S.product, 8, sweeps=3, burn_in=0, generator=seeded(1)).run(y, made.path)
    assert torch.equal(torch.cat([first.per_sweep, then.per_sweep]), whole.per_sweep)
    assert torch.equal(then.path, whole.path)


def test_a_path_goes_back_through_first_backward_draws_not_through_ancestors():
    y = S.linear().simulate(10, generator=seeded())[1]
    chain, draws = ParisParticleGibbs(S.linear(), S.product, 12, generator=seeded()), []
    with torch.no_grad():
        path = chain._sweep(list(y), torch.zeros(10, dtype=DOUBLE), draws)
    at = int((draws[-1][0] == path[-1]).nonzero())
    for t in range(9, 0, -1):
        at = int(draws[t][1][at, 0])
        assert path[t - 1] == draws[t - 1][0][at]


def test_with_many_particles_the_given_path_does_not_matter():
    y = S.linear().simulate(8, generator=seeded(1))[1]
    wanted = S.kalman().smooth(y[:, None]).cross_moments.sum()
    off = [
        abs(ParisParticleGibbs(S.linear(), S.product, n, sweeps=1, burn_in=0, generator=seeded())
            .run(y.expand(runs, 8), torch.full((runs, 8), 4.0, dtype=DOUBLE)).estimate.mean() - wanted)
        for n, runs in ((4, 300), (256, 20))
    ]  # fmt: skip
    assert off[1] < 0.3 < off[0]


def test_vectors_are_smoothed_as_kalmans_smoother_says():
    model, kalman = vectors()
    y = model.simulate(8, generator=seeded(3))[1]
    y[4] = math.nan
    chain = ParisParticleGibbs(
        model, lambda x, x_next, t: x[..., :, None] * x_next[..., None, :], 24, sweeps=6, burn_in=2, generator=seeded()
    )
    made = chain.run(y.expand(80, 8, 1)).estimate
    wanted = kalman.smooth(y).cross_moments.sum(0)
    assert made.shape == (80, 2, 2)
    assert ((made.mean(0) - wanted).abs() < 4.5 * made.std(0) / 80**0.5).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["dense", "mcmc", "ancestor"])
def test_nothing_waits_for_the_device(engine):
    model = LinearGaussian(torch.tensor(0.9, device="cuda"), Q=0.2, R=0.3)
    y = torch.zeros(4, 3, device="cuda")
    smoother = PaRIS(model, S.product, 64, backward=engine, generator=torch.Generator("cuda").manual_seed(0))
    chain = ParisParticleGibbs(model, S.product, 64, backward=engine, generator=smoother.generator)
    smoother.init(y[:, 0])
    smoother.update(y[:, 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        smoother.update(y[:, 2])
        chain._sweep(list(y.unbind(1)), y.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert smoother.estimate().isfinite().all()
