"""Feynman-Kac correctors in runs: what equals what, when particles are resampled, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fkc_cases import FIRST, PROCESS, SECOND, normal, rng, run, vectors
from torch import Tensor

from polyak.core.exact import Mixture
from polyak.generate import (
    CFG,
    DDIM,
    EDM,
    VP,
    Composed,
    Denoiser,
    DPMSolverSDE,
    Euler,
    FeynmanKacCorrector,
    Flow,
    Prediction,
    ReverseSDE,
    Step,
    fkc_weight,
    initial_scale,
)
from polyak.generate.problems import ExactDenoiser

# --- what equals what


@pytest.mark.parametrize("solver", [ReverseSDE(), DDIM(eta=1.0), DPMSolverSDE(order=2)], ids=["EM", "DDIM", "DPM++"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "edm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_power_one_is_the_plain_sampler(solver: Any, kind: str, dtype: torch.dtype) -> None:
    process = EDM() if kind == "edm" else VP()
    denoiser = Denoiser(lambda x, t: 0.3 * x + 0.1, process, kind, unconditional=lambda x, t: 0.2 * x)
    x = (process.prior_std * torch.randn(12, 2, generator=rng())).to(dtype)
    plain, _ = run(denoiser, x, None, 6, solver=solver, grid="logsnr" if kind != "edm" else "karras")
    for scheme in ("systematic", "birth_death"):
        corrector = FeynmanKacCorrector(num_particles=4, ess_threshold=None, scheme=scheme)
        grid = dict(solver=solver, grid="logsnr" if kind != "edm" else "karras")
        got, info = run(Composed([(denoiser, 1.0)]), x, corrector, 6, **grid)
        assert got.dtype == dtype
        assert torch.equal(got, plain)
        level = info.steering.log_z
        assert not info.steering.logw.any()
        assert not level.any()
        made = FeynmanKacCorrector("cfg", num_particles=4, scheme=scheme)
        with pytest.warns(RuntimeWarning, match="with one prediction corrects nothing"):
            got = run(denoiser, x, made, 6, guidance=CFG(1.0), **grid)[0]
        assert torch.equal(got, plain)


@pytest.mark.parametrize("process", [PROCESS, VP()], ids=["VE", "VP"])
def test_without_noise_it_is_eulers_method(process: Any) -> None:
    x = vectors(5, 1)
    got, want = (run(normal(FIRST, process), x, None, 8, solver=s, grid="time")[0] for s in (ReverseSDE(0.0), Euler()))
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)


def test_experts_that_are_one_are_annealed() -> None:
    x, a = 4 * vectors(40, 1), normal(FIRST)
    one, info = run(Composed([(a, 2.5)]), x, FeynmanKacCorrector(num_particles=20), 40)
    two, other = run(Composed([(a, 1.8), (a, 0.7)]), x, FeynmanKacCorrector("product", num_particles=20), 40)
    assert torch.allclose(one, two, rtol=1e-9)
    assert torch.allclose(info.steering.log_z, other.steering.log_z, rtol=1e-9)


@pytest.mark.parametrize("w", [-0.5, 0.0, 0.4, 2.5])
def test_guidance_is_a_product_of_powers(w: float) -> None:
    x, options = 4 * vectors(40, 1), dict(num_particles=20, ess_threshold=0.7)
    cond, uncond = (Mixture([[m]], v) for m, v in (FIRST, SECOND))
    pair = ExactDenoiser(cond, PROCESS, unconditional=uncond)
    composed = Composed([(normal(SECOND), 1 - w), (normal(FIRST), w)])
    want, info = run(composed, x, FeynmanKacCorrector("product", **options), 40)
    got, other = run(pair, x, FeynmanKacCorrector("cfg", **options), 40, guidance=CFG(w))
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-8)
    assert torch.allclose(other.steering.log_z, info.steering.log_z, rtol=1e-8, atol=1e-10)


def test_systems_never_exchange_particles() -> None:
    """Each of three systems is what it is alone, given its own uniforms; ancestors and roots stay within."""
    x, composed = 4 * vectors(30, 1), Composed([(normal(FIRST), 2.0)])
    noise = [rng(i) for i in range(30)]
    corrector = FeynmanKacCorrector(num_particles=10, ess_threshold=None, scheme="multinomial")
    seen: list[Step] = []
    _, info = run(composed, x, corrector, 30, generator=noise, callback=seen.append)
    system = torch.arange(30) // 10
    roots = torch.arange(10).expand(3, 10)
    for step in seen:
        ancestors = step.steering.ancestors
        assert torch.equal(ancestors // 10, system)
        roots = roots.gather(1, ancestors.view(3, 10) % 10)
    assert torch.equal(info.steering.roots, roots)
    assert info.steering.log_z.unique().numel() == 3


@pytest.mark.parametrize("scheme", ["systematic", "birth_death"])
def test_resumed_runs_and_generators(scheme: str) -> None:
    composed, x, kept = Composed([(normal(FIRST), 2.0)]), 4 * vectors(30, 1), []

    def made(draws: Any, noise: Any, begin: Any, **options: Any) -> Tensor:
        corrector = FeynmanKacCorrector(num_particles=15, scheme=scheme, generator=draws, window=(0.3, 0.9))
        return run(composed, begin, corrector, 12, generator=noise, **options)[0]

    def keep(step: Step) -> None:
        if step.index == 6:
            kept.extend([replace(step, x=step.x.clone()), draws.get_state(), noise.get_state()])

    draws, noise = rng(7), rng(1)
    want = made(draws, noise, x, callback=keep)
    step, *states = kept
    for generator, state in zip((draws, noise), states, strict=True):
        generator.set_state(state)
    assert torch.equal(made(draws, noise, step), want)
    assert torch.equal(made(rng(7), rng(1), x), want)
    assert not torch.equal(made(rng(8), rng(1), x), want)
    assert torch.equal(made(None, rng(1), x), made(None, rng(1), x))


# --- when and how much


def test_windows_thresholds_and_the_last_step() -> None:
    composed, x = Composed([(normal(FIRST), 3.0)]), 5 * vectors(60, 1)
    moved: list[list[bool]] = []
    for options in (
        dict(ess_threshold=None),
        dict(ess_threshold=None, window=(0.25, 0.5)),
        dict(ess_threshold=1e-9),
        dict(ess_threshold=0.0),
        dict(scheme="birth_death", window=(0.25, 0.5)),
    ):
        seen: list[Any] = []
        corrector = FeynmanKacCorrector(num_particles=30, **options)
        run(composed, x, corrector, 20, callback=lambda s, seen=seen: seen.append(s.steering))
        moved.append(
            [bool((s.ancestors != torch.arange(60)).any()) if s.ancestors is not None else False for s in seen]
        )
        carried = [bool(s.logw.any()) for s in seen]
        if options.get("window"):
            assert carried[:19] == [True] * 5 + [False] * 5 + [True] * 9
        assert carried[-1] == (options.get("ess_threshold") == 0.0)
    each, window, seldom, never, clocks = moved
    assert all(each[:10])
    assert [i for i, m in enumerate(window) if m] == [5, 6, 7, 8, 9, 19]
    assert [i for i, m in enumerate(seldom) if m] == [19]
    assert not any(never)
    assert clocks[5]
    assert clocks[19]
    assert not any(clocks[:5] + clocks[10:19])


def test_clipping_and_centring() -> None:
    composed, x = Composed([(normal(FIRST), 3.0)]), 5 * vectors(60, 1)
    for scheme in ("systematic", "birth_death"):
        made = [FeynmanKacCorrector(num_particles=30, center=c, scheme=scheme) for c in (True, False)]
        (one, first), (two, second) = (run(composed, x, corrector, 20) for corrector in made)
        assert torch.allclose(one, two, rtol=1e-9)
        assert torch.allclose(first.steering.log_z, second.steering.log_z, rtol=1e-9)
        assert not first.steering.clipped.any()
    step = dict(step=0, t=2.0, t_next=1.5, last=False, mean=x)
    pred = composed(x, 0.6)
    rate = (fkc_weight(pred.composed_score, [pred.experts[0].score], [3.0], PROCESS.diffusion2(0.6)) / 2).view(2, 30)
    for center in (True, False):
        corrector = FeynmanKacCorrector(num_particles=30, ess_threshold=0.0, clip=0.5, center=center)
        _, state = corrector.step(corrector.init(2, 30), x, pred=pred, **step)
        gain = rate - rate.mean(1, keepdim=True) if center else rate
        assert torch.allclose(state.logw, gain.clamp(-0.5, 0.5), rtol=1e-9)
        assert torch.equal(state.clipped, (gain.abs() > 0.5).sum(1).double())
        assert state.clipped.all()


# --- refusals


def test_what_is_refused() -> None:
    a, b = normal(FIRST), normal(SECOND, EDM())
    for powers in ([0.0], [1.0, -1.0], [-2.0]):
        with pytest.raises(ValueError, match="target not normalizable at the start: the sum of betas must be positive"):
            Composed([(a, beta) for beta in powers])
        with pytest.raises(ValueError, match="not normalizable"):
            initial_scale(powers, PROCESS)
    with pytest.raises(ValueError, match=r"not normalizable at the start.*got -1"):
        Composed([(a, lambda t: 1 - 2 * t)])
    with pytest.raises(ValueError, match=r"experts must share one process: experts\[1\]"):
        Composed([(a, 1.0), (b, 1.0)])
    with pytest.raises(ValueError, match="power that changes over time, and must have log_prob"):
        Composed([(Denoiser(lambda x, t: x, PROCESS), lambda t: 1.0)])
    with pytest.raises(ValueError, match="no expert has its own"):
        Composed([(lambda x, t: a(x, t), 1.0)])
    with pytest.raises(ValueError, match=r"experts\[0\] must predict for VE"):
        Composed([(lambda x, t: b(x, t), 1.0)], process=PROCESS)(vectors(2, 1), 0.5)
    with pytest.raises(TypeError, match=r"experts\[0\] must return a Prediction"):
        Composed([(lambda x, t: x, 1.0)], process=PROCESS)(vectors(2, 1), 0.5)
    with pytest.raises(ValueError, match="t must be one number for all rows"):
        Composed([(a, 1.0)])(vectors(2, 1), torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="num_particles"):
        FeynmanKacCorrector(num_particles=1)
    with pytest.raises(ValueError, match="window must be increasing"):
        FeynmanKacCorrector(window=(0.5, 0.5))
    with pytest.raises(ValueError, match="ess_threshold=0 never resamples"):
        FeynmanKacCorrector(scheme="birth_death", ess_threshold=0.0)
    with pytest.raises(ValueError, match="needs a solver whose number of steps is known"):
        FeynmanKacCorrector(window=(0.5, 0.6)).init(1, 4)
    with pytest.raises(ValueError, match="is infinite at t=1: begin below"):
        run(ExactDenoiser(Mixture([[0.0]], 1.0), Flow()), (2, 1), None, 4, grid="time")
    S = vectors(3, 2)
    for options, words in (
        (dict(scores=[S], betas=[1.0, 2.0]), "as many"), (dict(scores=[S[:2]], betas=[1.0]), r"scores\[0\] must have S's shape"),
        (dict(scores=[S], betas=[1.0], grad_rho=S), "f is needed"), (dict(scores=[S], betas=[1.0], drho=S), "drho must have shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            fkc_weight(S, sigma2=1.0, **options)


def test_what_is_refused_while_it_runs() -> None:
    a, b = normal(FIRST), normal(SECOND)
    one, two = Composed([(a, 2.0)]), Composed([(a, 1.0), (b, 1.0)])
    tilted = Composed([(a, 1.0)], lambda x, t: (1 - t) * x[:, 0], zeta=1.5)
    for denoiser, target, words in (
        (two, "anneal", "target must be what the denoiser is"), (one, "product", "target must be what the denoiser is"),
        (one, "tilt", "target must be"), (one, two, "target must be"), (a, "anneal", "needs a Composed one"),
        (tilted, "tilt", "zeta must be the Composed's own, 1.5, got 1"),
        (Composed([(a, 1.0)], lambda x, t: x), "tilt", r"reward must return a tensor of shape \(4,\), got \(4, 1\)"),
        (Composed([(a, 1.0)], lambda x, t: x.detach()[:, 0]), "tilt", "reward must be differentiable"),
        (Composed([(lambda x, t: Prediction(x * math.nan, x, t, PROCESS), 2.0)], process=PROCESS), "anneal", "NaN in the pred"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run(denoiser, (1, 1), FeynmanKacCorrector(target, num_particles=4), 3)
    assert run(one, (0, 1), FeynmanKacCorrector(one, num_particles=4), 3)[0].shape == (0, 1)


def test_a_deterministic_solver_is_warned_of() -> None:
    """Its particles contract to v / (beta^2 t^2) and less: resampling is refused, weights alone are warned of."""
    composed = Composed([(normal(FIRST), 3.0)])
    for solver in (ReverseSDE(0.0), DDIM()):
        with pytest.raises(ValueError, match="resampled copies never separate"):
            run(composed, (1, 1), FeynmanKacCorrector(num_particles=4), 3, solver=solver)
        with pytest.warns(RuntimeWarning, match="a deterministic solver contracts particles far below"):
            x, _ = run(composed, (1, 1), FeynmanKacCorrector(num_particles=400, ess_threshold=0.0), 50, solver=solver)
        assert x.var() < 0.01
