"""Training: the loss is what its dialect says, the loop learns, and a saved network is the same one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from polyak.generate import CFG, EDM, VP, Denoiser, Discrete, Euler, Flow, TrigFlow, sample
from polyak.generate.networks import ImageNetwork, dit, image_denoiser, load_denoiser, save_denoiser, unet
from polyak.generate.problems import ExactDenoiser, Gaussian
from polyak.generate.training import denoising_loss, train_denoiser


def images(n: int = 16) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# Of x, t, alpha, sigma, noise, x0 and a network that says 0.3 x: the mean of (said - wanted)^2 by the formulas in words.
WANTED = {
    "epsilon": lambda o, x0, e, a, s: o - e,
    "sample": lambda o, x0, e, a, s: o - x0,
    "score": lambda o, x0, e, a, s: -s * o - e,
    "v_prediction": lambda o, x0, e, a, s: o - (a * e - s * x0),
}


@pytest.mark.parametrize("kind", WANTED)
def test_the_loss_is_the_squared_error_in_the_dialect(kind: str) -> None:
    process, x0 = VP(), images()
    t = torch.linspace(0.1, 0.9, len(x0), dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    a, s = (process.alpha(t)[:, None, None, None], process.sigma(t)[:, None, None, None])
    off = WANTED[kind](0.3 * (a * x0 + s * noise), x0, noise, a, s)
    denoiser = Denoiser(lambda x, label: 0.3 * x, process, kind)
    got = denoising_loss(denoiser, x0, t=t, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(got, off.square().flatten(1).mean(1), rtol=1e-10)


@pytest.mark.parametrize("process", [Flow(t_min=1e-3, t_max=0.999), TrigFlow(t_min=1e-3, t_max=0.999)])
def test_the_loss_of_a_flow(process: Any) -> None:
    x0, t = images(), torch.full((16,), 0.4, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = process.dalpha(0.4) * x0 + process.dsigma(0.4) * noise
    got = denoising_loss(
        Denoiser(lambda x, label: torch.zeros_like(x), process, "flow"), x0, t=t,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert torch.allclose(got, wanted.square().flatten(1).mean(1), rtol=1e-10)


@pytest.mark.parametrize("kind", ["flow", "v_prediction"])
@pytest.mark.parametrize("t", [0.0, 1e-2, 1.0])
def test_targets_near_the_data_are_of_the_noise_itself(kind: str, t: float) -> None:
    """In bfloat16 x - x0 at small t is what rounding left of the noise; at t = 0 it is nothing."""
    x0 = images().bfloat16()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    wanted = noise - x0 if kind == "flow" else (1 - t) * noise - t * x0
    loss = denoising_loss(
        Denoiser(lambda x, label: wanted, Flow(), kind), x0, t=torch.full((16,), t, dtype=torch.float64),
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert loss.max() < 1e-4


def test_the_loss_of_edm_is_one_unit_of_its_network() -> None:
    """The weight 1 / c_out^2 turns the error of x0 into that of the network's own output F."""
    x0, s, sd = images(), 0.7, 0.5
    t = torch.full((16,), s, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x0 + s * noise
    skip, out = sd**2 / (s**2 + sd**2), s * sd / math.sqrt(s**2 + sd**2)
    wanted = (x0 - skip * x) / out
    denoiser = Denoiser(lambda y, label: torch.zeros_like(y), EDM(), "edm", sigma_data=sd)
    got = denoising_loss(denoiser, x0, t=t, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(got, wanted.square().flatten(1).mean(1), rtol=1e-10)


def test_times_are_drawn_as_the_dialect_asks() -> None:
    told: list[torch.Tensor] = []

    def network(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        told.append(label)
        return torch.zeros_like(x)

    x0 = torch.zeros(20_000, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    denoising_loss(Denoiser(network, EDM(), "edm"), x0, generator=generator)
    log_s = 4 * told[-1]  # the label is ln(s) / 4
    assert log_s.mean().item() == pytest.approx(-1.2, abs=5 * 1.2 / 20_000**0.5)
    assert log_s.std().item() == pytest.approx(1.2, abs=5 * 1.2 / 40_000**0.5)
    denoising_loss(Denoiser(network, EDM(0.1, 0.5), "edm"), x0, generator=generator)  # never beyond its ends
    assert (4 * told[-1]).exp().aminmax() == (pytest.approx(0.1), pytest.approx(0.5))
    denoising_loss(Denoiser(network, VP()), x0, generator=generator)
    assert 1e-3 <= told[-1].min() < 2e-3
    assert told[-1].mean().item() == pytest.approx(0.5005, abs=5 / (12 * 20_000) ** 0.5)


def test_the_exact_denoiser_has_the_least_loss() -> None:
    """Of Gaussian data the posterior variance is known: E |x0 - x0_hat|^2 = c sigma^2 / (alpha^2 c + sigma^2)."""
    law, process, n = Gaussian([0.0], 0.36), VP(), 200_000
    x0 = 0.6 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.full((n,), 0.35, dtype=torch.float64)
    loss = denoising_loss(ExactDenoiser(law, process), x0, t=t, generator=torch.Generator().manual_seed(1))
    a, s = process.alpha(0.35), process.sigma(0.35)
    least = 0.36 * s**2 / (a**2 * 0.36 + s**2)
    assert loss.mean().item() == pytest.approx(least, abs=5 * least * math.sqrt(2 / n))


@pytest.fixture(scope="module")
def learned() -> tuple[ImageNetwork, list[float], torch.Tensor]:
    """A transformer that has learned two patterns, each a class."""
    torch.manual_seed(0)
    network, losses = dit(8, width=32, depth=2, classes=2), list[float]()
    patterns = torch.where(torch.eye(8)[:, :, None].bool().any(1)[None] ^ torch.arange(8).gt(3)[:, None], 1.0, -1.0)
    patterns = torch.stack([patterns.expand(1, 8, 8), -patterns.expand(1, 8, 8)])
    data, labels = patterns.repeat(8, 1, 1, 1), torch.tensor([0, 1]).repeat(8)
    trained = train_denoiser(
        network, data, Flow(), "flow", labels=labels, none=2, steps=100, batch=16, lr=5e-3, ema=0.9,
        generator=torch.Generator().manual_seed(0), progress=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    return trained, losses, patterns


def test_training_learns_and_classes_are_told_apart(learned: Any) -> None:
    network, losses, patterns = learned
    assert len(losses) == 50
    for label in (0, 1):
        denoiser = image_denoiser(network, Flow(), "flow", label=label)
        x = sample(denoiser, (6, 1, 8, 8), solver=Euler(), steps=12, generator=torch.Generator().manual_seed(1))
        nearest = [(x - p).square().flatten(1).mean(1) for p in patterns]
        assert bool((nearest[label] < 0.5 * nearest[1 - label]).all())
    both = image_denoiser(network, Flow(), "flow", label=[0, 1, 0])
    guided = sample(
        both, (3, 1, 8, 8), solver=Euler(), steps=6, guidance=CFG(2.0), generator=torch.Generator().manual_seed(1)
    )
    assert guided.shape == (3, 1, 8, 8)


def test_the_loop_is_adam_with_a_warmup_a_cosine_clipped_gradients_and_an_average() -> None:
    class Net(torch.nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    network, data = Net(2, 2).double(), images().flatten(1)[:, :2]
    p, steps = [w.detach().clone().requires_grad_() for w in network.parameters()], 40
    m, v, mean = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    how: dict[str, Any] = dict(steps=steps, batch=8, lr=0.05, ema=0.9, generator=torch.Generator().manual_seed(1))
    trained = train_denoiser(network, data, Flow(), "flow", **how)
    draws, clipped = torch.Generator().manual_seed(1), 0
    for i in range(steps):
        x0 = data[torch.randint(16, (8,), generator=draws)]
        t = torch.rand(8, 1, generator=draws, dtype=torch.float64)
        noise = torch.randn(8, 2, generator=draws, dtype=torch.float64)
        loss = (((1 - t) * x0 + t * noise) @ p[0].T + p[1] - (noise - x0)).square().mean()
        grads = torch.autograd.grad(loss, p)
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        clipped += norm > 1
        rate = 0.05 * min(1.0, (i + 1) / 2) * (1 + math.cos(math.pi * i / steps)) / 2
        for j, g in enumerate(grads):
            g = g * min(1.0, 1 / (norm + 1e-6))
            m[j], v[j] = 0.9 * m[j] + 0.1 * g, 0.99 * v[j] + 0.01 * g**2  # type: ignore[assignment]
            with torch.no_grad():
                p[j] -= rate * m[j] / (1 - 0.9 ** (i + 1)) / ((v[j] / (1 - 0.99 ** (i + 1))) ** 0.5 + 1e-8)
                mean[j] = 0.9 * mean[j] + 0.1 * p[j] if i else p[j].clone()  # type: ignore[assignment]
    assert 0 < clipped < steps
    for own, kept, want, average in zip(network.parameters(), trained.parameters(), p, mean, strict=True):
        assert torch.allclose(own, want, rtol=1e-6)
        assert torch.allclose(kept, average, rtol=1e-6)
    assert network.training
    assert not trained.training


def test_a_run_is_a_function_of_its_generator() -> None:
    def once(seed: int) -> torch.Tensor:
        torch.manual_seed(7)
        network = dit(8, width=16, depth=1, heads=2, classes=2)
        torch.manual_seed(seed)  # the global generator is not asked
        train_denoiser(
            network, torch.ones(4, 1, 8, 8), EDM(), "edm", labels=torch.tensor([0, 1, 0, 1]), steps=2, batch=4,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return next(network.parameters())

    assert torch.equal(once(1), once(2))


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize(("process", "prediction"), [(EDM(sigma_max=50.0), "edm"), (VP(), "epsilon")])
def test_a_saved_network_is_the_same(tmp_path: Path, make: Any, process: Any, prediction: str) -> None:
    torch.manual_seed(0)
    network = make(8, width=16, classes=3)
    save_denoiser(tmp_path / "net.safetensors", network, process, prediction, sigma_data=0.4)
    denoiser = load_denoiser(tmp_path / "net.safetensors", label=1)
    assert (denoiser.process, denoiser.prediction, denoiser.sigma_data) == (process, prediction, 0.4)
    x, t = torch.randn(4, 1, 8, 8), 0.5
    own = image_denoiser(network.eval(), process, prediction, label=1, sigma_data=0.4)
    for got, want in zip(denoiser.pair(x, t), own.pair(x, t), strict=True):
        assert torch.equal(got.output, want.output)
    assert not torch.equal(*(p.output for p in denoiser.pair(x, t)))
    plain = load_denoiser(str(tmp_path / "net.safetensors"))
    assert torch.equal(plain(x, t).output, denoiser.pair(x, t)[1].output)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [unet, dit])
def test_a_saved_network_keeps_its_type(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    network = make(8, width=16).to(dtype).eval().requires_grad_(False)
    x = torch.randn(2, 1, 8, 8, dtype=dtype)
    save_denoiser(tmp_path / "net.safetensors", network, VP())
    got = load_denoiser(tmp_path / "net.safetensors")(x, 0.5).output
    assert got.dtype == dtype
    assert torch.equal(got, Denoiser(network, VP())(x, 0.5).output)


def test_no_class_is_the_networks_own_whatever_classes_the_data_have() -> None:
    told: list[int] = []

    class Net(torch.nn.Linear):
        classes = 5

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            told.extend(y.tolist())
            return super().forward(x)

    def train(network: Any, **how: Any) -> None:
        told.clear()
        train_denoiser(
            network, torch.ones(4, 2), VP(), labels=torch.tensor([0, 1, 0, 1]), steps=1, batch=50, drop=0.5, **how
        )

    train(Net(2, 2))
    assert set(told) == {0, 1, 5}
    train(Net(2, 2), none=3)
    assert set(told) == {0, 1, 3}
    Net.classes = None  # type: ignore[assignment]
    train(Net(2, 2))
    assert set(told) == {0, 1, 2}


@pytest.mark.parametrize("make", [unet, dit])
def test_networks_without_classes(make: Any) -> None:
    network = make(8, 3, width=16)
    assert network(torch.zeros(2, 3, 8, 8), torch.tensor([0.1, 0.9])).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"label must be in \[0, 0\), the network's classes, got 0"):
        image_denoiser(network, VP(), label=0)


def test_a_model_is_told_times_on_its_own_scale() -> None:
    class Says(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            return SimpleNamespace(sample=t)

    assert ImageNetwork(Says(), time_scale=7.0)(torch.zeros(2, 1), torch.tensor([0.5, 1.0])).tolist() == [3.5, 7.0]


def test_what_cannot_be_made_saved_or_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width must be a multiple of 8, got 12"):
        unet(8, width=12)
    with pytest.raises(ValueError, match="size must be divisible by 4 for 3 levels, got 6"):
        unet(6, levels=3)
    with pytest.raises(ValueError, match="width must be a multiple of heads=4, got 18"):
        dit(8, width=18)
    with pytest.raises(ValueError, match="size must be a multiple of patch=3, got 8"):
        dit(8, patch=3)
    network = dit(8, width=16, depth=1)
    with pytest.raises(ValueError, match=r"network must be one that unet\(...\) or dit\(...\) made"):
        save_denoiser(tmp_path / "a", ImageNetwork(torch.nn.Identity()), VP())
    chain = Discrete(torch.linspace(1e-4, 0.02, 10))
    with pytest.raises(ValueError, match=r"process must (be one that the file can name|have numbers for options)"):
        save_denoiser(tmp_path / "a", network, chain)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="path must be a file of save_denoiser"):
        load_denoiser(tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"path must be a file of save_denoiser, got '.*junk.safetensors': "):
        load_denoiser(tmp_path / "junk.safetensors")
    told = {"format": "polyak denoiser 1", "process": {"name": "sample"}, "prediction": "edm", "sigma_data": 0.5}
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors", {"polyak": json.dumps(told)})
    with pytest.raises(ValueError, match="path must be a file with a process of this package, got 'sample'"):
        load_denoiser(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="label must be one class, or one for each of the 3 rows, got 2"):
        image_denoiser(dit(8, width=16, depth=1, classes=2), VP(), label=[0, 1])(torch.zeros(3, 1, 8, 8), 0.5)
    with pytest.raises(ValueError, match=r"t must have shape \(16,\), one for each row of x0, got \(3,\)"):
        denoising_loss(Denoiser(lambda x, t: x, VP()), images(), t=torch.ones(3))
    with pytest.raises(ValueError, match="labels must have one class for each of the 4 images, got 3"):
        train_denoiser(network, torch.ones(4, 1, 8, 8), VP(), labels=torch.zeros(3, dtype=torch.long))
    for labels, says in (
        (torch.zeros(4), "labels must be integers, got torch.float32"),
        (torch.tensor([0, -1, 0, 0]), r"labels must be in \[0, 2\), got -1"),
        (torch.tensor([0, 2, 0, 1]), r"labels must be in \[0, 2\), got 2"),
    ):
        with pytest.raises(ValueError, match=says):
            train_denoiser(dit(8, width=16, depth=1, classes=2), torch.ones(4, 1, 8, 8), VP(), labels=labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 0\), got 0"):  # of a network that knows none
        train_denoiser(network, torch.ones(4, 1, 8, 8), VP(), labels=torch.zeros(4, dtype=torch.long))


def test_the_command_trains_and_saves(tmp_path: Path) -> None:
    from polyak.cli.app import app

    file = tmp_path / "made" / "net.safetensors"
    words = [
        "train",
        "digits",
        "--network",
        "dit",
        "--process",
        "vp",
        "--width",
        "16",
        "--steps",
        "2",
        "--out",
        str(file),
    ]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "saved:" in said.output
    denoiser = load_denoiser(file, label=9)
    x = sample(denoiser, (2, 1, 8, 8), solver=Euler(), steps=2, generator=torch.Generator().manual_seed(0))
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "letters"], "DATA must be one of 'digits', 'mnist', got 'letters'"),
        (["train", "--width", "12"], "must be a multiple of 8, got 12"),
        (["train", "--steps", "0"], "--steps must be at least 1"),
        (["train", "--network", "uunet"], "did you mean 'unet'?"),
        (["train", "--steps", "1", "--out", "/"], "must be a file to write, got the folder /"),
        (["train", "--steps", "1", "--out", "/dev/null/net"], "cannot make the folder /dev/null"),
    ],
)
def test_the_command_refuses(words: list[str], says: str) -> None:
    from polyak.cli.app import app

    said = CliRunner().invoke(app, words)
    assert said.exit_code == 2
    assert "learns" not in said.output  # before anything is done
    assert says in " ".join(said.output.replace("│", " ").split())
