"""Problems with known answers know them."""

from __future__ import annotations

import math

import pytest
import torch
from generate_cases import PROCESSES, every_process, exact, noise

from polyak.generate import DDIM, EDM, RK4, VP, DPMSolver, Process, sample
from polyak.generate.problems import (
    ExactDenoiser,
    Gaussian,
    Recorder,
    gaussian_flow,
    kde,
    path_rmse,
    reference,
    reference_path,
    ring,
)

LAW = Gaussian([0.5, -0.3], torch.tensor([[0.5, 0.2], [0.2, 0.3]]))


@every_process
def test_the_gaussian_flow_is_what_solvers_converge_to(process: Process) -> None:
    denoiser, x = ExactDenoiser(LAW, process), 0.5 * noise(16, 2)
    times = process.grid(300, "logsnr")
    got = sample(denoiser, x, solver=DPMSolver(order=3, method="singlestep"), grid=times)
    want = gaussian_flow(LAW, process, x, process.t_max, process.t_min)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_ring() -> None:
    law = ring()
    assert len(law) == 8
    assert torch.allclose(law.means.norm(dim=1), torch.full((8,), 2.0, dtype=torch.float64))
    assert torch.allclose(law.covariance, (0.04 + 2.0) * torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(law.of_class(2).means, torch.tensor([[0.0, 2.0]], dtype=torch.float64), atol=1e-12)


def test_a_kde_without_bandwidth_memorises() -> None:
    data = noise(20, 3)
    denoiser = ExactDenoiser(kde(data, 0.0), EDM())
    x = sample(denoiser, 80 * noise(30, 3, seed=1), solver=DPMSolver(order=2, form="data", method="multistep"), nfe=60)
    assert torch.cdist(x, data).min(1).values.max() < 0.02
    smooth = kde(data, 0.5, labels=[0] * 10 + [1] * 10)
    assert torch.allclose(smooth.covariances, 0.25 * torch.eye(3, dtype=torch.float64).expand(20, 3, 3))
    assert len(smooth.of_class(1)) == 10


def test_exact_denoiser_density_score_and_per_sample_times() -> None:
    process = VP()
    denoiser, x = exact(process), noise(4)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    p = denoiser(x, t)
    rows = torch.cat([denoiser(x[i : i + 1], t[i].item()).x0 for i in range(4)])
    assert torch.allclose(p.x0, rows)
    assert torch.allclose(p.score, denoiser.score(x, t))
    slope = (denoiser.log_prob(x + 1e-6, t) - denoiser.log_prob(x - 1e-6, t)) / 2e-6
    assert torch.allclose(p.score[:, 0], slope, atol=1e-7)
    assert (denoiser.nfe, denoiser.evaluations) == (5, 5)


def test_the_exact_denoiser_guides_between_laws() -> None:
    law = ring(2)
    denoiser = ExactDenoiser(law.of_class(0), VP(), unconditional=law)
    cond, uncond = denoiser.pair(torch.zeros(1, 2, dtype=torch.float64), 0.5)
    assert cond.x0[0, 0] > 1
    assert uncond.x0[0, 0].item() == pytest.approx(0, abs=1e-12)

    class NotGaussian(EDM):
        is_gaussian = False

    with pytest.raises(ValueError, match="exact for Gaussian noise only"):
        ExactDenoiser(law, NotGaussian())


def test_the_reference_agrees_with_another_method_of_fourth_order() -> None:
    denoiser, x = exact(), noise()
    other = sample(denoiser, x, solver=RK4(), nfe=4 * 2000, grid="quadratic")
    ref = reference(denoiser, x, nfe=3000)
    assert ref.dtype == torch.float64
    assert path_rmse(ref, other) < 1e-8


def test_reference_path_at_given_times() -> None:
    process = PROCESSES["VP"]
    denoiser, x = ExactDenoiser(LAW, process), noise(8, 2)
    times = process.grid(6, "time")
    path = reference_path(denoiser, x, times, nfe=600)
    assert path.shape == (7, 8, 2)
    for i, t in enumerate(times.tolist()):
        assert torch.allclose(path[i], gaussian_flow(LAW, process, x, 1.0, t), atol=1e-6)
    recorder = Recorder()
    sample(denoiser, x, solver=DDIM(), grid=process.grid(600, "time"), callback=recorder)
    assert recorder.times[99] == pytest.approx(times[1].item())
    assert path_rmse(recorder.states[99], path[1]) < 5e-3
    assert len(recorder.states) == 600


def test_path_rmse_is_over_paths() -> None:
    x = torch.zeros(2, 2, dtype=torch.float64)
    y = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert path_rmse(x, y) == pytest.approx(math.sqrt(25 / 2))
    with pytest.raises(ValueError, match="one shape"):
        path_rmse(x, y[:1])
