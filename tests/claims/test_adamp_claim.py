"""AdamP's claim at a tiny scale: every arm runs and measures, arms of one seed are paired, and what is measured is right."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from polyak.claims import _convnets, _problems
from polyak.claims.optim.adamp import CLAIM, _optimizer
from polyak.lab.claim import Measurement, Trial
from polyak.optim import SGDP, AdamP

TINY = {
    "toy": {"steps": 300, "starts": 4},
    "convnet": {"widths": "4-4-6", "side": 7, "images": 800, "batch": 64, "epochs": 1},
}
PAIRS = [(task, arm.name) for task in TINY for arm in CLAIM.arms_on(task)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trial_of(task: str, arm: str, seed: int = 0, scale: str = "small", **options: object) -> Trial:
    given = {**CLAIM.options(scale, task, arm, CLAIM.arm(arm).points[0]), **TINY.get(task, {}), **options}
    return Trial(claim="adamp", scale=scale, task=task, arm=arm, seed=seed, options=given)


def run(task: str, arm: str, seed: int = 0, **options: object) -> list[Measurement]:
    return list(CLAIM.trial(trial_of(task, arm, seed, **options)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_runs_and_measures_what_criteria_plots_and_tuning_ask(task, arm):
    *curve, final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task} | ({CLAIM.task(task).tune} - {""})
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert {plot.y for plot in CLAIM.task(task).plots} <= curve[0].values.keys()
    assert all(math.isfinite(v) for m in (*curve, final) for v in m.values.values())
    assert final.at is None


@pytest.mark.parametrize("task", TINY)
def test_a_trial_is_a_function_of_its_seed(task):
    arm = CLAIM.arms_on(task)[1].name
    assert run(task, arm) == run(task, arm)
    assert run(task, arm) != run(task, arm, seed=1)


def test_all_arms_of_a_seed_start_alike_and_see_the_same_data():
    # The first point of five steps is the loss before any optimizer has moved.
    assert len({run("convnet", arm.name)[0].values["train_loss"] for arm in CLAIM.arms_on("convnet")}) == 1
    # Here the first point is after one step, which is the same for all: the gradient is orthogonal, the buffer empty.
    gaps = [run("toy", arm.name, steps=2)[0].values["gap"] for arm in CLAIM.arms_on("toy")]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-12)


def test_the_toy_tells_projection_from_none():
    last = {arm.name: run("toy", arm.name)[-1].values for arm in CLAIM.arms_on("toy")}
    assert last["gd"]["off_1"] < 1e-12
    assert last["gdp"]["off_1"] < 1e-6 < last["gdp_0"]["off_1"]
    assert last["gdm"]["off_19"] < 0.01
    assert last["gdp_0"] == pytest.approx(last["gdm"], rel=1e-6)
    assert last["gd"]["steps"] < 60 < last["gdm"]["steps"]


def test_a_start_that_never_arrives_counts_as_all_steps():
    assert run("toy", "gdm", steps=5)[-1].values["steps"] == 5


def test_the_control_is_the_baseline():
    adamw, control, adamp = (run("convnet", arm)[-1].values for arm in ("adamw", "adamp_0", "adamp"))
    # Float32 over five steps of Adam, which turns a gradient's rounding into a step where the gradient is all but zero.
    assert control["growth"] == pytest.approx(adamw["growth"], rel=1e-3)
    assert control["test_loss"] == pytest.approx(adamw["test_loss"], rel=1e-2)
    assert adamp["growth"] < control["growth"]


def test_optimizers_are_what_the_arms_say():
    weight = [torch.nn.Parameter(torch.zeros(2, 2))]
    made = {arm.name: _optimizer(trial_of("convnet", arm.name), weight) for arm in CLAIM.arms_on("convnet")}
    assert [type(o) for o in made.values()] == [torch.optim.AdamW, AdamP, AdamP, torch.optim.SGD, SGDP]
    assert [made[name].param_groups[0]["delta"] for name in ("adamp", "adamp_0", "sgdp")] == [0.1, 0.0, 0.1]
    assert all(made[name].param_groups[0]["nesterov"] for name in ("sgd", "sgdp"))
    assert len({len(arm.points) for arm in CLAIM.arms_on("convnet")}) == 1
    rates = {arm: _optimizer(trial_of("mobilenetv2", arm, scale="paper"), weight).defaults["lr"]
             for arm in ("adamp_100", "sgdp_100")}  # fmt: skip
    assert rates == {"adamp_100": 2e-3, "sgdp_100": 0.1}


def test_no_image_is_both_trained_on_and_measured():
    problem, per_epoch = _convnets.digits_cnn(0, widths="2-2", side=28, images=1000, batch=50)
    assert per_epoch == 8
    x, _ = _convnets._images(28, "cpu")
    x = x[:1000]
    x = (x - x[:400].mean()) / x[:400].std()
    seen = torch.cat([next(problem.batches)[0] for _ in range(per_epoch)])
    assert {tuple(r) for r in seen.flatten(1).tolist()} == {tuple(r) for r in x[:400].flatten(1).tolist()}


def test_results_are_of_their_own_parts():
    problem, _ = _convnets.digits_cnn(0, widths="2-2", side=7, images=1000)
    x, y = _convnets._images(7, "cpu")
    x, y = x[:1000], y[:1000]
    x = (x - x[:400].mean()) / x[:400].std()
    results = problem.results()
    assert problem.model.training
    problem.model.eval()
    with torch.no_grad():
        logits = problem.model(x)
    for name, part in {"train": slice(400), "validation": slice(400, 600), "test": slice(600, None)}.items():
        expected = torch.nn.functional.cross_entropy(logits[part], y[part]).item()
        assert results[f"{name}_loss"] == pytest.approx(expected, rel=1e-5)
    assert results["accuracy"] == pytest.approx((logits[600:].argmax(1) == y[600:]).double().mean().item())


def test_without_mnist_scikit_learns_digits(monkeypatch):
    def missing() -> None:
        raise _convnets.data.DataError("not at hand")

    monkeypatch.setattr(_convnets.data, "mnist", missing)
    problem, per_epoch = _convnets.digits_cnn(0, widths="2-2", batch=100)
    assert next(problem.batches)[0].shape == (100, 1, 8, 8)
    assert per_epoch == 7


def test_growth_and_turn_of_the_convolutions():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    watched = _convnets.Convolutions(model, optimizer)
    rows = weight.detach().clone().flatten(1)
    tangent = torch.randn_like(rows)
    tangent -= rows * (rows * tangent).sum(1, keepdim=True) / (rows * rows).sum(1, keepdim=True)
    tangent *= (rows.norm(dim=1) / tangent.norm(dim=1))[:, None]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weight.grad = (tangent + 5 * rows).view_as(weight)  # what is radial does not turn
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.02  # the schedule's factor is 0.2
    found = watched.measure()
    assert found["growth"] == pytest.approx(1.0, rel=1e-6)
    assert found["turn"] == pytest.approx(0.1, rel=1e-4)
    with torch.no_grad():
        weight.mul_(3.0)
    assert watched.measure()["growth"] == pytest.approx(3.0, rel=1e-6)


def test_the_papers_scale_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(_problems, "import_module", _missing)
    with pytest.raises(_problems.data.DataError, match="pip install timm"):
        next(iter(CLAIM.trial(trial_of("resnet18", "adamp_100", scale="paper"))))


def _missing(name: str) -> object:
    raise ImportError(name)


def test_the_papers_scale_with_a_stand_in_for_timm(monkeypatch):
    """All but timm itself: two of the loader's batches make a step, and the network is measured on the way."""
    asked: list[dict[str, object]] = []

    def network(name: str, **options: object) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(4, 10),
        )  # fmt: skip

    def loader(split: object, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
        asked.append(options)
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(6)]

    timm = SimpleNamespace(create_model=network)
    loaders = SimpleNamespace(create_dataset=lambda **where: where["split"], create_loader=loader)
    monkeypatch.setattr(_problems, "import_module", {"timm": timm, "timm.data": loaders}.__getitem__)
    before = torch.random.get_rng_state()
    *curve, final = CLAIM.trial(
        trial_of("resnet18", "sgdp_100", scale="paper", batch=8, micro_batch=4, epochs=2, workers=0)
    )
    torch.random.set_rng_state(before)
    assert [m.at for m in curve] == [{"step": i} for i in range(1, 7)]
    assert {"accuracy", "test_loss", "growth", "turn"} <= final.values.keys()
    assert asked[0]["collate_fn"] is None
    assert asked[0]["batch_size"] == asked[1]["batch_size"] == 4
