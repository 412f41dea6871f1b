"""Integrators whose rows start at levels of their own: against scalar loops, exact flows, and the room's sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak.generate import (
    DDIM,
    EDM,
    GHVB,
    PFGMPP,
    RK4,
    VE,
    VP,
    Denoiser,
    DPMSolver,
    Euler,
    Flow,
    HeavyBallDPM,
    Heun,
    KarrasHeun,
    PerSample,
    ReverseDiffusion,
    heun_per_sample,
    inject_noise,
    sample,
)
from polyak.generate.dmcmc import RK45, integrators
from polyak.generate.dmcmc.integrators import karras_levels
from polyak.generate.dmcmc.scaled import Scaled
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture

F64 = torch.float64
LAW = Mixture([[-1.0, 0.2], [0.6, 0.5]], [0.1, 0.2])
SIGMAS = torch.tensor([7.0, 0.8, 0.11, 30.0], dtype=F64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(sigma: Tensor = SIGMAS) -> Tensor:
    return sigma[:, None] * torch.randn(len(sigma), 2, dtype=F64, generator=rng(3))


def test_the_grid_is_edms_for_each_row() -> None:
    made = karras_levels(SIGMAS, 6, 0.01)
    assert made.shape == (7, 4)
    assert torch.equal(made[0], SIGMAS)
    assert torch.equal(made[-2:], torch.tensor([[0.01], [0.0]], dtype=F64).expand(2, 4))
    for j, s in enumerate(SIGMAS.tolist()):
        # official N = 7: i = 0 .. N-2, and then 0
        want = [(s ** (1 / 7) + i / 5 * (0.01 ** (1 / 7) - s ** (1 / 7))) ** 7 for i in range(6)]
        assert made[:-1, j].tolist() == pytest.approx(want, rel=1e-13)
    assert karras_levels(SIGMAS, 1, 0.01).tolist() == [SIGMAS.tolist(), [0.0] * 4]
    assert karras_levels(torch.tensor([0.004], dtype=F64), 3, 0.01)[:, 0].tolist() == pytest.approx([0.004] * 3 + [0])


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_heun_from_one_level_is_the_scalar_method_bit_for_bit(steps: int) -> None:
    denoiser, x = ExactDenoiser(LAW, EDM()), start(torch.full((5,), 3.0, dtype=F64))
    got = heun_per_sample(denoiser, x, 3.0, steps)
    assert denoiser.nfe == 2 * steps - 1 == KarrasHeun(steps).nfe
    assert torch.equal(got, heun_per_sample(denoiser, x, torch.full((5,), 3.0), steps))
    grid, y = karras_levels(torch.tensor([3.0], dtype=F64), steps, 0.01)[:, 0].tolist(), x

    def slope(y: Tensor, s: float) -> Tensor:
        return denoiser(y, EDM().t_of_lam(torch.tensor([-math.log(s)], dtype=F64)).expand(5)).eps

    for i in range(steps):
        d, h = slope(y, grid[i]), grid[i + 1] - grid[i]
        ahead = y + h * d
        y = ahead if i == steps - 1 else y + h * (0.5 * (d + slope(ahead, grid[i + 1])))
    assert torch.equal(got, y)
    if steps > 1:
        process = EDM(0.01, 3.0)
        want = sample(ExactDenoiser(LAW, process), x, solver=Heun(), grid=process.grid(steps, "karras", end=0))
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-13)


def test_heun_is_of_second_order_from_a_level_for_each_row() -> None:
    law, process = Gaussian([0.3, -0.2], [0.5, 0.05]), EDM(1e-6)
    x = start()
    want = torch.cat([law.flow(x[i : i + 1], (1.0, s.item()), (1.0, 0.0)) for i, s in enumerate(SIGMAS)])

    def error(steps: int) -> float:
        got = heun_per_sample(ExactDenoiser(law, process), x, SIGMAS, steps, sigma_min=1e-4)
        return (got - want).abs().max().item()

    assert math.log2(error(64) / error(128)) == pytest.approx(2, abs=0.1)
    half = heun_per_sample(ExactDenoiser(law, process), x.bfloat16(), SIGMAS, 8)
    assert half.dtype == torch.bfloat16
    assert heun_per_sample(ExactDenoiser(law, process), x[:0], SIGMAS[:0], 8).shape == (0, 2)


@pytest.mark.parametrize(
    "integrator", [KarrasHeun(4), KarrasHeun(4, 80.0), ReverseDiffusion(5), ReverseDiffusion(5, 0.16), PerSample(DDIM(1.0), 4)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("process", [EDM(), VE(), VP()], ids=repr)
def test_a_row_does_not_depend_on_the_others(integrator: Any, process: Any) -> None:
    scaled = Scaled(ExactDenoiser(LAW, process), process)
    x = start()
    together = integrator(scaled, x, SIGMAS, [rng(i) for i in range(4)])
    assert scaled.nfe == (integrator.nfe or 4)
    for i in range(4):
        alone = integrator(scaled, x[i : i + 1], SIGMAS[i : i + 1], [rng(i)])
        assert torch.allclose(alone, together[i : i + 1], rtol=1e-11, atol=1e-12)
    assert x.equal(start())


def test_churn_is_algorithm_2_of_edm() -> None:
    denoiser, x, draw = ExactDenoiser(LAW, EDM()), start()[:1], rng(1)
    got = heun_per_sample(denoiser, x, 7.0, 12, 3.0, generator=rng(1))
    grid, y = karras_levels(SIGMAS[:1], 12, 0.01)[:, 0].tolist(), x
    churned = 0
    for i in range(12):
        s, t, z = grid[i], grid[i + 1], torch.randn(1, 2, dtype=F64, generator=draw)
        gamma = min(3.0 / 12, math.sqrt(2) - 1) if 0.05 <= s <= 1 else 0.0
        churned += gamma > 0
        hat = s * (1 + gamma)
        y = y + math.sqrt(hat**2 - s**2) * 1.007 * z
        d = denoiser(y, hat).eps
        ahead = y + (t - hat) * d
        y = ahead if t == 0 else y + (t - hat) * (d + denoiser(ahead, t).eps) / 2
    assert 2 <= churned <= 10
    assert torch.allclose(got, y, rtol=1e-10, atol=1e-12)


def test_reverse_diffusion_is_that_of_score_sde() -> None:
    denoiser, x, draw, n = ExactDenoiser(LAW, VE()), start()[:1], rng(1), 6
    for snr in (None, 0.2):
        draw.manual_seed(1)
        got = ReverseDiffusion(n, snr)(Scaled(denoiser, VE()), x, SIGMAS[:1], rng(1))
        grid, y = [7 * (0.01 / 7) ** (i / (n - 1)) for i in range(n)] + [0.0], x
        for i in range(n):
            if snr is not None:
                score, z = (
                    denoiser.score(y, VE().t_of_lam(-math.log(grid[i]))),
                    torch.randn(1, 2, dtype=F64, generator=draw),
                )
                h = 2 * (snr * z.norm().item() / score.norm().item()) ** 2
                y = y + h * score + math.sqrt(2 * h) * z
            gone = grid[i] ** 2 - grid[i + 1] ** 2
            y = y + gone * denoiser.score(y, VE().t_of_lam(-math.log(grid[i])))
            if i < n - 1:
                y = y + math.sqrt(gone) * torch.randn(1, 2, dtype=F64, generator=draw)
        assert torch.allclose(got, y, rtol=1e-9, atol=1e-11)


def test_rk45_follows_the_flow_of_each_row() -> None:
    law, x = Gaussian([0.3, -0.2], [0.5, 0.05]), start()
    for kind, bound in ((F64, 2e-4), (torch.float32, 5e-4)):
        made = RK45()(Scaled(ExactDenoiser(law, VE()), VE()), x.to(kind), SIGMAS)
        assert made.dtype == kind
        for i, s in enumerate(SIGMAS):
            want = law.flow(x[i : i + 1], (1.0, s.item()), (1.0, 0.01))  # and keeps the noise of sigma_min
            assert torch.allclose(made[i : i + 1].to(F64), want, atol=bound)


SOLVERS = [
    DDIM(), Euler(), Heun(), RK4(), DPMSolver(order=3, method="singlestep"), DPMSolver(order=2, form="data", method="multistep"),
    DPMSolver(order=3, form="data", method="multistep", start="singlestep"), GHVB(order=2, beta=0.8), HeavyBallDPM(beta=0.8),
    DPMSolver(order=2, form="data", method="multistep", sde=True),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize(
    ("process", "kind"), [(EDM(), "karras"), (VP(), "logsnr"), (Flow(t_min=1e-3, t_max=0.999), "logsnr")]
)
def test_any_linear_solver_starts_each_row_where_it_is(solver: Any, process: Any, kind: str) -> None:
    """As :func:`sample` does row by row, on the process's own grid from there."""
    sigmas, x = SIGMAS[:3], start()[:3]
    denoiser = ExactDenoiser(LAW, process)
    got = PerSample(solver, 6, kind)(Scaled(denoiser, process), x, sigmas, [rng(i) for i in range(3)])
    for i, s in enumerate(sigmas.tolist()):
        t = process.t_of_lam(torch.tensor([-math.log(s)], dtype=F64)).item()
        end = 0.0 if solver.reaches_zero and process.ends_clean(0.0) else None
        grid = process.grid(6, kind, start=t, end=end)
        want = sample(denoiser, process.alpha(t) * x[i : i + 1], solver=solver, grid=grid, generator=[rng(i)])
        want = want / process.alpha(grid[-1].item())
        assert torch.allclose(got[i : i + 1], want, rtol=1e-9, atol=1e-11)


def test_tables_of_levels_that_are_all_new_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrators, "_KEPT", 6)
    made, scaled = PerSample(DDIM(), 2), Scaled(ExactDenoiser(LAW, EDM()), EDM())
    want = PerSample(DDIM(), 2)(scaled, start(), SIGMAS)
    for i in range(5):
        made(scaled, start(), SIGMAS + i / 100)
        assert len(made._tables) <= 6
    assert torch.equal(made(scaled, start(), SIGMAS), want)


def test_what_cannot_start_each_row_is_refused() -> None:
    with pytest.raises(TypeError, match="solver must be a LinearSolver"):
        PerSample(inject_noise(Heun(), 0.1), 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="solver must be a LinearSolver"):
        PerSample(DPMSolver(method="adaptive"), 4)  # type: ignore[arg-type]

    class Own(Heun):
        def run(self, *given: Any, **options: Any) -> Any:
            return super().run(*given, **options)

    with pytest.raises(ValueError, match="solver must have all its work in its table"):
        PerSample(Own(), 4)
    x = start()
    with pytest.raises(ValueError, match="process must have Gaussian noise"):
        heun_per_sample(Denoiser(lambda x, t: x, PFGMPP(8.0), "edm"), x, 1.0, 3)
    with pytest.raises(ValueError, match="process is needed"):
        heun_per_sample(lambda x, t: x, x, 1.0, 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"sigma0 must be within the model's levels .* 0.002 to 80 .* got 90 to 90"):
        heun_per_sample(ExactDenoiser(LAW, EDM()), x, 90.0, 3)
    with pytest.raises(ValueError, match=r"sigma0 must be a number or have shape \(4,\), got \(3,\)"):
        heun_per_sample(ExactDenoiser(LAW, EDM()), x, SIGMAS[:3], 3)
    for wrong in ({"steps": 0}, {"steps": 3, "churn": -1.0}, {"steps": 3, "sigma_min": 0.0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            KarrasHeun(**wrong)
