"""Dialects of prediction convert into each other; the denoiser feeds the network what it was trained on."""

from __future__ import annotations

import math

import pytest
import torch
from generate_cases import PROCESSES, every_process

from polyak.generate import EDM, VP, Denoiser, Flow, Prediction, Process

KINDS = ["epsilon", "sample", "score", "v_prediction", "flow", "edm"]


class StudentNoise(EDM):
    """A process whose noise is not Gaussian, as far as predictions can tell."""

    is_gaussian = False


def known(process: Process, t: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64, generator=g)
    x, _ = process.perturb(x0, t, eps)
    return x0, eps, x


def output_of(kind: str, process: Process, t: float, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """What a perfect network of each dialect says, from the definitions."""
    a, s = process.alpha(t), process.sigma(t)
    if kind == "flow":
        return process.dalpha(t) * x0 + process.dsigma(t) * eps
    if kind == "edm":
        y, sd, level = x0 + s / a * eps, 0.5, s / a
        return (x0 - sd**2 / (level**2 + sd**2) * y) / (level * sd / math.sqrt(level**2 + sd**2))
    return {"epsilon": eps, "sample": x0, "score": -eps / s, "v_prediction": a * eps - s * x0}[kind]


@pytest.mark.parametrize("kind", KINDS)
@every_process
def test_every_dialect_gives_all_views(process: Process, kind: str) -> None:
    t = process.t_min + 0.3 * (process.t_max - process.t_min)
    x0, eps, x = known(process, t)
    p = Prediction(output_of(kind, process, t, x0, eps), x, t, process, kind)
    close = {"rtol": 1e-9, "atol": 1e-9}
    assert torch.allclose(p.x0, x0, **close)
    assert torch.allclose(p.eps, eps, **close)
    for view, name in ((p.score, "score"), (p.v, "v_prediction"), (p.flow, "flow")):
        assert torch.allclose(view, output_of(name, process, t, x0, eps), **close)
    assert torch.allclose(p.alpha * p.x0 + p.sigma * p.eps, x, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_for_each_sample(kind: str) -> None:
    process, t = VP(), torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    x0, eps, x = known(process, t)
    rows = [output_of(kind, process, t[i].item(), x0[i], eps[i]) for i in range(4)]
    p = Prediction(torch.stack(rows), x, t, process, kind)
    assert torch.allclose(p.x0, x0)
    assert torch.allclose(p.eps, eps)


def test_flow_at_pure_noise_needs_no_division() -> None:
    process = Flow()
    x0, eps, x = known(process, 1.0)
    p = Prediction(eps - x0, x, 1.0, process, "flow")
    assert torch.allclose(p.x0, x0)
    assert torch.allclose(p.eps, eps)
    with pytest.raises(ValueError, match=r"x0 is undetermined, alpha is 0, from the 'epsilon' output at t=1.0"):
        Prediction(eps, x, 1.0, process, "epsilon").x0  # noqa: B018


def test_clean_data_has_no_noise_to_predict() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="eps is undetermined, sigma is 0"):
        Prediction(x, x, 0.0, EDM(), "sample").eps  # noqa: B018
    with pytest.raises(ValueError, match="the score is infinite"):
        Prediction(x, x, 0.0, EDM(), "epsilon").score  # noqa: B018


def test_a_score_needs_gaussian_noise() -> None:
    x = torch.ones(2, 3)
    p = Prediction(x, x, 1.0, StudentNoise(), "sample")
    assert p.eps.shape == x.shape
    with pytest.raises(ValueError, match="no Gaussian noise"):
        p.score  # noqa: B018
    with pytest.raises(ValueError, match="no Gaussian noise"):
        Prediction(x, x, 1.0, StudentNoise(), "score")


def test_short_names_and_bad_ones() -> None:
    x = torch.ones(2, 3)
    assert Prediction(x, x, 0.5, VP(), "eps").kind == "epsilon"
    assert Prediction(x, x, 0.5, VP(), "flow_prediction").kind == "flow"
    with pytest.raises(ValueError, match=r"kind must be one of .*did you mean 'epsilon'"):
        Prediction(x, x, 0.5, VP(), "epsilo")
    with pytest.raises(ValueError, match=r"output must have x's shape \(2, 3\), got \(3, 2\)"):
        Prediction(x.T, x, 0.5, VP())
    with pytest.raises(ValueError, match=r"t must be a number or have shape \(2,\)"):
        Prediction(x, x, torch.full((3,), 0.5), VP())


def test_the_network_gets_labels_of_its_own_kind() -> None:
    heard: list[torch.Tensor] = []

    def network(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        heard.append(label)
        return x

    x = torch.ones(3, 2, dtype=torch.float64)
    discrete = PROCESSES["Discrete"]
    Denoiser(network, discrete)(x, 0.501)
    Denoiser(network, VP())(x.float(), torch.tensor(0.25))
    Denoiser(network, VP())(x.bfloat16(), torch.tensor([0.1, 0.2, 0.3]))
    Denoiser(network, VP(), label=lambda t: 999 * t)(x, 0.5)
    assert heard[0].tolist() == pytest.approx([500.0] * 3)
    assert heard[1].dtype == torch.float32
    assert heard[1].tolist() == [0.25] * 3
    assert heard[2].dtype == torch.float32  # bfloat16 would round the label
    assert heard[2].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert heard[3].tolist() == [499.5] * 3


def test_edm_preconditioning_feeds_and_reads_the_network() -> None:
    heard: list[tuple[torch.Tensor, torch.Tensor]] = []

    def network(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        heard.append((x, label))
        return torch.full_like(x, 2.0)

    x, s, sd = torch.ones(2, 3, dtype=torch.float64), 3.0, 0.5
    p = Denoiser(network, EDM(), "edm")(x, s)
    assert torch.allclose(heard[0][0], x / math.sqrt(s**2 + sd**2))
    assert heard[0][1].tolist() == pytest.approx([math.log(s) / 4] * 2)
    expected = sd**2 / (s**2 + sd**2) * 1.0 + s * sd / math.sqrt(s**2 + sd**2) * 2.0
    assert torch.allclose(p.x0, torch.full_like(x, expected))
    # the same network under VP sees the scaled variable x / alpha at the same sigma / alpha
    process = VP()
    t = process.t_of_lam(-math.log(s))
    q = Denoiser(network, process, "edm")(x * process.alpha(t), t)
    assert torch.allclose(heard[1][0], heard[0][0])
    assert torch.allclose(q.x0, p.x0)


def test_counting() -> None:
    denoiser = Denoiser(lambda x, t: x, VP(), unconditional=lambda x, t: -x)
    x = torch.ones(2, 3)
    denoiser(x, 0.5)
    cond, uncond = denoiser.pair(x, 0.5)
    assert (denoiser.nfe, denoiser.evaluations) == (2, 3)
    assert torch.equal(cond.eps, -uncond.eps)
    with pytest.raises(ValueError, match="guidance needs both predictions"):
        Denoiser(lambda x, t: x, VP()).pair(x, 0.5)
    with pytest.raises(TypeError, match="process must be a Process"):
        Denoiser(lambda x, t: x, VP)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prediction must be one of"):
        Denoiser(lambda x, t: x, VP(), "noise")
