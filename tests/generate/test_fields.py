"""Divergence, and likelihoods by the probability-flow ODE, against closed forms, finite differences and numbers computed here."""

from __future__ import annotations

import math

import pytest
import torch
from generate_cases import PROCESSES
from torch import nn

from polyak.generate import EDM, OU, VE, VP, Denoiser, Flow, divergence, flow_jacobian, log_likelihood
from polyak.generate.fields import directions
from polyak.generate.networks import unet
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture

LAW = Mixture([[-1.0, 0.3], [0.6, -0.5]], [[0.25, 0.5], [0.09, 0.3]], [0.4, 0.6])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0.5, torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)])
def test_a_denoiser_stands_for_its_score_whose_divergence_is_known(t):
    denoiser, x = ExactDenoiser(LAW, EDM()), draw(4, 2)
    want = LAW.score_divergence(x, 1.0, t)
    for field in (denoiser, denoiser.score):
        assert torch.allclose(divergence(field, x, t), want, rtol=1e-11)


def test_rows_of_any_shape_and_functions_of_x_that_are_no_gradients():
    x = draw(3, 2, 2)
    mixed = lambda x, t: torch.sin(x.flip(1)) * x + t * x**3  # noqa: E731
    step, want = 1e-5, torch.zeros(3, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            e = torch.zeros_like(x)
            e[:, i, j] = step
            want += ((mixed(x + e, 0.3) - mixed(x - e, 0.3)) / (2 * step))[:, i, j]
    assert torch.allclose(divergence(mixed, x, 0.3), want, rtol=1e-8)


def test_hutchinson_is_unbiased_and_exact_for_a_diagonal():
    x, M = draw(2, 3), draw(3, 3, seed=1)
    field = lambda x, t: x @ M.T  # noqa: E731
    got = divergence(field, x, 0.5, method="hutchinson", probes=40_000, generator=torch.Generator().manual_seed(0))
    # the variance of v^T M v is 2 |sym offdiagonal|^2
    S = (M + M.T) / 2
    deviation = math.sqrt(2 * (S - torch.diag(S.diagonal())).square().sum().item() / 40_000)
    assert (got - M.trace()).abs().max() < 5 * deviation
    once = divergence(lambda x, t: x * M[0], x, 0.5, method="hutchinson")
    assert torch.allclose(once, M[0].sum().expand(2))


def test_it_is_differentiated_and_works_where_gradients_are_off():
    # div of x^3 is 3 |x|^2, whose gradient is 6 x
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = draw(4, 3).requires_grad_()
    divergence(lambda x, t: weight * x**3, x, 0.5).sum().backward()
    assert torch.allclose(x.grad, 12 * x)
    assert torch.allclose(weight.grad, 3 * x.square().sum())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.allclose(divergence(lambda x, t: x**3, draw(4, 3), 0.5), 3 * draw(4, 3).square().sum(1))


def test_many_directions_go_in_pieces(monkeypatch):
    from polyak.generate import fields

    x = draw(5, 6)
    field = lambda x, t: torch.sin(x.cumsum(1))  # noqa: E731
    whole = divergence(field, x, 0.5), fields.jacobian(lambda y: field(y, 0.5), x)[1]
    monkeypatch.setattr(fields, "_ROOM", 70)  # two directions of 30 elements at once
    assert torch.allclose(divergence(field, x, 0.5), whole[0], rtol=1e-12)
    assert torch.equal(fields.jacobian(lambda y: field(y, 0.5), x)[1], whole[1])
    assert [len(v) for v, _ in fields.pullbacks(lambda y: field(y, 0.5), x, None)[1]] == [2, 2, 2]
    assert torch.allclose(whole[1], torch.func.vmap(torch.func.jacfwd(lambda y: torch.sin(y.cumsum(0))))(x))


@pytest.mark.parametrize("name", [n for n in PROCESSES if n != "Discrete"])
def test_likelihoods_are_exact_under_every_process(name):
    process = PROCESSES[name]
    denoiser = ExactDenoiser(LAW, process)
    low, high = process.t_min, process.t_max
    x = LAW.sample(6, alpha=process.alpha(low), sigma=process.sigma(low), generator=torch.Generator().manual_seed(0))
    got = log_likelihood(denoiser, process, x, steps=40, prior=lambda end: denoiser.log_prob(end, high))
    assert torch.allclose(got, denoiser.log_prob(x, low), rtol=0, atol=2e-3)


def test_its_error_falls_with_the_fourth_power_of_the_steps():
    denoiser, x = ExactDenoiser(LAW, VP()), draw(6, 2)
    want = denoiser.log_prob(x, 1e-3)
    prior = lambda end: denoiser.log_prob(end, 1.0)  # noqa: E731
    few, many = ((log_likelihood(denoiser, VP(), x, steps=n, prior=prior) - want).abs().max().item() for n in (20, 40))
    assert math.log2(few / many) == pytest.approx(4, abs=0.5)


def test_without_a_prior_it_is_the_normal_law_of_the_process():
    # N(0, I) stays itself under VP: no step is needed to know the answer
    x = draw(5, 3)
    denoiser = ExactDenoiser(Gaussian([0.0] * 3, 1.0), VP())
    got = log_likelihood(denoiser, VP(), x, steps=4)
    assert torch.allclose(got, torch.distributions.Normal(0, 1).log_prob(x).sum(1), rtol=1e-12)
    # OU's prior has the variance 1/2
    half = ExactDenoiser(Gaussian([0.0] * 3, 0.5), OU())
    got = log_likelihood(half, OU(), x, steps=4)
    assert torch.allclose(got, -x.square().sum(1) - 1.5 * math.log(math.pi), rtol=1e-12)


def test_hutchinson_keeps_its_signs_along_the_path():
    # of a scalar Jacobian v^T J v is the trace, whatever v: equal to the last digits
    denoiser, x = ExactDenoiser(Gaussian([0.0] * 3, 0.3), VP()), draw(5, 3)
    exact = log_likelihood(denoiser, VP(), x, steps=10)
    signs = log_likelihood(denoiser, VP(), x, "hutchinson", steps=10, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(exact, signs, rtol=1e-12)
    # of another one the integral of one v's estimates is unbiased
    denoiser = ExactDenoiser(Gaussian([0.0] * 2, torch.tensor([[0.5, 0.3], [0.3, 0.4]])), VP())
    x = draw(1, 2).expand(400, 2)
    exact = log_likelihood(denoiser, VP(), x[:1], steps=10)
    signs = log_likelihood(denoiser, VP(), x, "hutchinson", steps=10, generator=torch.Generator().manual_seed(0))
    assert (signs.mean() - exact).abs() < 5 * signs.std() / 20


def test_a_golden_likelihood():
    # log p of N(0, 0.7) at sigma 0.1 under VE(0.1, 10), by Euler steps in plain floats: 2e5 of them, error below 1e-4
    x, total, sigma, n = 0.4, 0.0, 0.1, 200_000
    ratio = 100 ** (1 / n)
    for _ in range(n):
        h = sigma * (ratio - 1)
        slope = sigma / (0.7 + sigma**2)
        x, total, sigma = x + h * slope * x, total + h * slope, sigma * ratio
    want = -(x**2) / 2 / 100.7 - math.log(2 * math.pi * 100.7) / 2 + total
    process = VE(0.1, 10.0)
    denoiser = ExactDenoiser(Gaussian([0.0], 0.7), process)
    prior = lambda end: torch.distributions.Normal(0, math.sqrt(100.7)).log_prob(end).sum(1)  # noqa: E731
    got = log_likelihood(denoiser, process, torch.tensor([[0.4]], dtype=torch.float64), prior=prior)
    assert got.item() == pytest.approx(want, abs=1e-4)
    assert got.item() == pytest.approx(-(0.4**2) / 2 / 0.71 - math.log(2 * math.pi * 0.71) / 2, abs=1e-6)


def test_no_model_is_asked_out_of_its_range():
    asked, process = [], VP(t_min=0.02, t_max=0.9)
    denoiser = Denoiser(lambda x, t: asked.append(t[0].item()) or x, process, label=lambda t: t)
    # t + (t_min - t) is below t_min at the last of these steps, by a rounding
    times = process.grid(3).tolist()
    assert times[-2] + (times[-1] - times[-2]) < process.t_min
    flow_jacobian(denoiser, process, torch.ones(1, 1, dtype=torch.float64), times)
    assert (min(asked), max(asked)) == (0.02, 0.9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_path_is_followed_in_float32(dtype):
    x = torch.tensor([[0.5, -1.0], [0.25, 2.0]], dtype=dtype)
    denoiser = ExactDenoiser(Gaussian([0.0] * 2, 1.0), EDM(0.05, 8.0))
    prior = lambda end: denoiser.log_prob(end.double(), 8.0).to(end)  # noqa: E731
    got = log_likelihood(denoiser, EDM(0.05, 8.0), x, steps=24, prior=prior)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), denoiser.log_prob(x.double(), 0.05), atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_a_networks_likelihood_trains_it():
    network = nn.Linear(2, 2)
    denoiser = Denoiser(lambda x, t: network(x), VP())
    log_likelihood(denoiser, VP(), torch.ones(3, 2), steps=2).sum().backward()
    assert network.weight.grad.abs().min() > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_unet_of_diffusers_has_divergences_and_likelihoods(context):
    pytest.importorskip("diffusers")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = unet(4, width=8, levels=1).double()
    denoiser, x = Denoiser(network, VP(), "epsilon"), draw(2, 1, 4, 4)
    told = dict(method="hutchinson", probes=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        h, want, exact = 1e-5, 0.0, 0.0
        for v in directions(x, "hutchinson", 3, torch.Generator().manual_seed(0)):
            moved = denoiser(x + h * v, 0.5).score - denoiser(x - h * v, 0.5).score
            want = want + (v * moved).flatten(1).sum(1) / (6 * h)
        for v in torch.eye(16).double().reshape(16, 1, 1, 4, 4).expand(16, 2, 1, 4, 4):
            moved = denoiser(x + h * v, 0.5).score - denoiser(x - h * v, 0.5).score
            exact = exact + (v * moved).flatten(1).sum(1) / (2 * h)
    with context():
        assert torch.allclose(divergence(denoiser, x, 0.5, **told, generator=generator), want, rtol=1e-5)
        assert torch.allclose(divergence(denoiser, x, 0.5), exact, rtol=1e-5)
        made = log_likelihood(denoiser, VP(), x, "hutchinson", steps=1)
    if made.requires_grad:  # attention's fused kernels have no second derivative
        made.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    network.model.enable_gradient_checkpointing()
    network.train()
    with pytest.raises(RuntimeError) as refused:
        divergence(denoiser, x, 0.5)
    assert "without gradient checkpointing" in refused.value.__notes__[0]


def test_empty_batches_keep_their_shapes():
    denoiser = ExactDenoiser(LAW, VP())
    assert divergence(denoiser, torch.zeros(0, 2), 0.5).shape == (0,)
    assert log_likelihood(denoiser, VP(), torch.zeros(0, 2), steps=2).shape == (0,)
    assert divergence(lambda x, t: x, torch.zeros(3, 0), 0.5).tolist() == [0, 0, 0]


class Heavy(VE):
    """A process whose noise is not Gaussian."""

    is_gaussian = False


def plain(x, t):
    return -x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: divergence(plain, torch.ones(2, 5000), 0.5), ValueError, "x must have at most 4096 elements in a row"),
        (lambda: divergence(plain, torch.ones(2, 2), torch.ones(3)), ValueError, r"t must be a number or have shape \(2,\)"),
        (lambda: divergence(lambda x, t: x[:1], torch.ones(2, 2), 1.0), ValueError, "field must return a tensor of x's shape"),
        (lambda: divergence(lambda x, t: None, torch.ones(2, 2), 1.0), ValueError, "field must return a tensor"),
        (lambda: divergence(plain, torch.ones(2), 1.0), ValueError, "x must be a floating-point tensor of at least 2"),
        (lambda: divergence(plain, torch.ones(2, 2), 1.0, method="skilling"), ValueError, "method must be one of"),
        (
            lambda: log_likelihood(Denoiser(plain, Heavy()), Heavy(), torch.ones(2, 2)),
            ValueError,
            "process must have Gaussian noise",
        ),
        (
            lambda: log_likelihood(Denoiser(plain, VP()), EDM(), torch.ones(2, 2)),
            ValueError,
            "process must be the denoiser's own, VP",
        ),
        (lambda: log_likelihood(plain, VP(), torch.ones(2, 2)), TypeError, "denoiser must return a Prediction"),
        (
            lambda: log_likelihood(Denoiser(plain, VP()), VP(), torch.ones(2, 2), steps=1, prior=lambda x: x),
            ValueError,
            r"prior must return a tensor of shape \(2,\)",
        ),
        (
            lambda: log_likelihood(Denoiser(plain, Flow(), "flow"), Flow(), torch.ones(2, 2)),
            ValueError,
            "lam is infinite; use 'time'",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_flow_matching_reaches_both_ends_on_the_grid_of_times():
    denoiser = Denoiser(lambda x, t: -x, Flow(), "flow")
    # dx/dt = -x for a unit of time: the end is x / e, and the divergence -2 throughout
    x = draw(3, 2)
    want = torch.distributions.Normal(0, 1).log_prob(x / math.e).sum(1) - 2
    got = log_likelihood(denoiser, Flow(), x, grid="time")
    assert torch.allclose(got, want, atol=1e-8)


def test_large_rows_are_for_hutchinson():
    x = torch.ones(2, 5000)
    assert torch.allclose(divergence(plain, x, 0.5, method="hutchinson"), torch.full((2,), -5000.0))


def test_signs_of_a_list_of_generators_do_not_depend_on_the_batch() -> None:
    from polyak.generate.fields import signs

    def made(*seeds: int) -> torch.Tensor:
        return signs(torch.zeros(len(seeds), 3), 4, [torch.Generator().manual_seed(seed) for seed in seeds])

    both = made(0, 1)
    assert both.shape == (4, 2, 3)
    assert bool((both.abs() == 1).all())
    assert torch.equal(both, torch.cat([made(0), made(1)], 1))
    with pytest.raises(ValueError, match="generator must be one, or one for each of the 1 rows, got 2"):
        signs(torch.zeros(1, 3), 4, [torch.Generator(), torch.Generator()])
