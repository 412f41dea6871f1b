"""Precision-weighted guidance in diffusers: as a guider, and in a pipeline that guides inside, equal to our own loop to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers_cases import diffusers, rng
from torch import Tensor, nn

from polyak.generate import CFG, Denoiser, DPMSolverMultistep, Heun, PrecisionGuidance, sample
from polyak.generate.adapters.diffusers import PolyakScheduler, PrecisionGuider, guide

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning"),
    pytest.mark.xdist_group("diffusers pipelines"),
]
TWO = DPMSolverMultistep(order=2, form="data")


class Network(nn.Module):
    """A network that is told its condition as a number."""

    def forward(self, sample: Tensor, t: Any, condition: Any) -> tuple[Tensor]:
        turn = torch.as_tensor(condition, dtype=sample.dtype).reshape(-1, *[1] * (sample.ndim - 1))
        return (torch.tanh(0.7 * sample + turn * sample.flip(-1)) + 0.3 * turn,)


def scheduler(solver: Any = TWO, kind: str = "v_prediction") -> PolyakScheduler:
    theirs = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False)
    return PolyakScheduler.from_config(theirs.config, solver=solver)


def start() -> Tensor:
    return torch.randn(4, 2, 6, 6, generator=rng(1), dtype=torch.float64)


def modular(guider: Any, steps: Any, x: Tensor) -> Tensor:
    """The loop of a modular pipeline."""
    network = Network()
    steps.set_timesteps(6)
    for i, t in enumerate(steps.timesteps):
        guider.set_state(step=i, num_inference_steps=len(steps.timesteps), timestep=t)
        batches = guider.prepare_inputs({"condition": (0.8, -0.2)})
        for batch in batches:
            guider.prepare_models(network)
            batch.noise_pred = network(x, t, batch.condition)[0]
            guider.cleanup_models(network)
        x = steps.step(guider(batches).pred, t, x, return_dict=False)[0]
    return x


def own(steps: PolyakScheduler, guidance: Any) -> tuple[Tensor, Any]:
    """Our own loop on the scheduler's times, and the last state."""
    steps.set_timesteps(6)
    network, states = Network(), []

    class Exactly(Denoiser):
        def _run(self, model: Any, x: Tensor, t: Any) -> Tensor:
            return network(x, float(t), model)[0]

    ask: Any = (lambda x, t: x, lambda x, t: x)
    denoiser = Exactly(ask[0], steps.process, steps._plan.kind, unconditional=ask[1])
    denoiser.model, denoiser.unconditional = 0.8, -0.2  # type: ignore[assignment]
    keep: Any = lambda step: states.append(step.guidance)  # noqa: E731
    x = sample(denoiser, start(), solver=steps.solver, grid=steps._times, guidance=guidance, callback=keep)
    return x, states[-1]


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("solver", [TWO, Heun()], ids=["2M", "Heun"])
def test_a_guider_is_our_own_loop(solver: Any, kind: str) -> None:
    steps = scheduler(solver, kind)
    guider = PrecisionGuider(3.0, members=2, scheduler=steps)
    assert guider.precision is None
    want, state = own(scheduler(solver, kind), PrecisionGuidance(2.0, members=2))
    for _ in range(2):  # a second forecast begins anew
        assert torch.allclose(modular(guider, steps, start()), want, rtol=1e-12, atol=1e-12)
        assert guider._state.count == 6
        assert torch.allclose(guider.uncertainty, state.uncertainty, rtol=1e-10)  # type: ignore[arg-type]
        assert torch.allclose(guider.precision, 1 / (guider.uncertainty + 1e-6))  # type: ignore[arg-type]


def test_a_pipeline_that_guides_inside() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.scheduler, self.unet = scheduler(), Network()

        def __call__(self, x: Tensor) -> Tensor:
            self.scheduler.set_timesteps(6)
            for t in self.scheduler.timesteps:
                u, c = self.unet(torch.cat([x] * 2), t, [-0.2] * len(x) + [0.8] * len(x))[0].chunk(2)
                x = self.scheduler.step(u + 4.0 * (c - u), t, x, return_dict=False)[0]
            return x

    pipe = Pipe()
    guide(pipe, PrecisionGuidance(2.0, members=2))
    want, _ = own(scheduler(), PrecisionGuidance(2.0, members=2))
    assert torch.equal(pipe(start()), want)
    assert torch.equal(pipe(start()), want)


def test_with_weight_one_it_is_cfg_and_scale_one_is_none() -> None:
    steps = scheduler()
    flat = modular(PrecisionGuider(3.0, clip=(1.0, 1.0), scheduler=steps), steps, start())
    assert torch.allclose(flat, own(scheduler(), CFG(3.0))[0], rtol=1e-12, atol=1e-12)
    none = PrecisionGuider(1.0, scheduler=steps)
    assert none.num_conditions == 1
    assert torch.allclose(modular(none, steps, start()), own(scheduler(), CFG(1.0))[0], rtol=1e-12, atol=1e-12)


def test_half_precision() -> None:
    steps = scheduler()
    guider = PrecisionGuider(3.0, members=2, scheduler=steps)
    want = modular(guider, steps, start())
    half = modular(guider, steps, start().half())
    assert half.dtype == torch.float16
    assert (half - want).abs().max() < 0.1
    assert guider.uncertainty.dtype == torch.float32  # type: ignore[union-attr]


def test_a_run_that_fails_leaves_nothing_behind() -> None:
    steps = scheduler()
    guider, network = PrecisionGuider(3.0, members=2, scheduler=steps), Network()
    want = modular(guider, steps, start())
    guider.set_state(step=0, num_inference_steps=6, timestep=steps.timesteps[0])
    for _ in range(2):
        guider.prepare_models(network)
        with pytest.raises(TypeError):
            network(start())
    guider.cleanup_models(network)
    assert not network._forward_pre_hooks
    assert torch.equal(modular(guider, steps, start()), want)
    with pytest.raises(ValueError, match=r"scheduler has no evaluation left: .* the scheduler that the pipeline has"):
        modular(copy.deepcopy(guider), steps, start())  # whose scheduler is a copy, too


def test_configuration_and_what_is_refused(tmp_path: Any) -> None:
    steps = scheduler()
    options: dict[str, Any] = dict(window=3, pool="member", quantile=0.9, clip=(0.0, 2.0), smooth=1.5, members=2)
    guider = PrecisionGuider(3.0, precision_start=2, scheduler=steps, **options)
    guider.save_config(tmp_path)
    again = PrecisionGuider.from_config(PrecisionGuider.load_config(tmp_path), scheduler=steps)
    assert again.guidance == guider.guidance == PrecisionGuidance(2.0, start=2, **options)
    assert guider.new(guidance_scale=2.0).guidance.scale == 1.0
    with pytest.raises(ValueError, match="scheduler is needed"):
        PrecisionGuider(3.0)
    with pytest.raises(ValueError, match="PrecisionGuider does not know: eta"):
        PrecisionGuider.from_config({"eta": 0.5}, scheduler=steps)
    with pytest.raises(ValueError, match="pred_uncond is missing: precision guidance needs a context-free prediction"):
        guider.forward(start(), None)
