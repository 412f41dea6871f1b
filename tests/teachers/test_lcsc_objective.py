"""Objectives that are the same at every call, metrics against their definitions, the landscape, and saving checkpoints."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyak.core import distances
from polyak.teachers import LCSC, CheckpointBank, CheckpointSaver, combine, landscape, metric_to, sample_metric
from polyak.teachers.lcsc.objective import METRICS


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))


def draw(model: nn.Module, n: int, generator: torch.Generator) -> torch.Tensor:
    x = model(torch.randn(n, 3, generator=generator))
    return x + 0.1 * torch.randn(n, 2)  # from the global generator, as some samplers do


Y = torch.randn(50, 2, generator=torch.Generator().manual_seed(7))


# -- sample_metric ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 7])
def test_an_objective_is_the_same_at_every_call_and_touches_no_generator(batch):
    model, objective = net(), sample_metric(draw, metric_to(Y), 40, 3, batch=batch)
    before = torch.get_rng_state()
    first = objective(model)
    torch.rand(5)
    after = torch.get_rng_state()
    assert objective(model) == first
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(before)
    assert objective(model) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_is_the_seeds_and_fresh_is_other_noise_and_more():
    sizes = []

    def counted(model, n, generator):
        sizes.append(n)
        return draw(model, n, generator)

    model, objective = net(), sample_metric(counted, metric_to(Y), 40, 3, batch=16)
    value = objective(model)
    assert sizes == [16, 16, 8]
    assert sample_metric(draw, metric_to(Y), 40, 4)(model) != value
    sizes.clear()
    fresh = objective.fresh()
    assert (fresh.n, fresh.seed) == (160, 4)
    fresh(model)
    assert sum(sizes) == 160
    other = objective.fresh(n=10, seed=9, metric=lambda x: float(len(x)))
    assert other(model) == 10


def test_the_model_is_in_evaluation_mode_without_gradients_and_then_as_it_was():
    model = net()
    model[1].eval()

    def look(m, n, generator):
        assert not any(part.training for part in m.modules())
        x = m(torch.randn(n, 3, generator=generator))
        assert not x.requires_grad
        return x

    sample_metric(look, metric_to(Y), 10, 0)(model)
    assert model.training
    assert not model[1].training
    assert model[3].training


def test_a_search_judges_on_fresh_samples_by_itself():
    given = [net(i).state_dict() for i in range(4)]
    objective, model = sample_metric(draw, metric_to(Y), 30, 0), net(9)
    result = LCSC(given, objective=objective, model=model, evals=60).run()
    assert len(result.finalists) == 5
    assert result.heldout == objective.fresh()(model)
    model.load_state_dict(combine(given, result.coefficients))
    assert result.heldout == objective.fresh()(model)
    # Searched weights were moved to, those here are combined from the start: float32's rounding, not new noise.
    assert abs(objective(model) - result.value) < 1e-4
    assert LCSC(given, objective=objective, model=model, evals=60, heldout=False).run().heldout is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_metric(draw, metric_to(Y), **{"n": 5, "seed": 0, **arguments})


# -- metrics ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_is_zero_or_least_on_the_reference_and_grows_with_the_distance(kind):
    metric = metric_to(Y, kind)
    values = [metric(Y + shift) for shift in (0.0, 0.5, 2.0)]
    assert values[0] < values[1] < values[2]
    if kind != "kid":  # unbiased, hence below 0 here
        assert abs(values[0]) < 1e-6


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_is_that_of_core(kind):
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    direct = {
        "energy": distances.energy_distance,
        "fid": distances.frechet_distance,
        "kid": distances.kernel_inception_distance,
        "mmd": distances.mmd,
        "sliced_w2": lambda a, b: distances.sliced_wasserstein(a, b, generator=torch.Generator().manual_seed(5)),
    }[kind]
    assert metric_to(Y, kind, seed=5)(x) == direct(x, Y)


def test_features_are_taken_of_both():
    double = metric_to(Y, features=lambda x: x[:, :1] * 2)
    assert double(Y + 1) == distances.energy_distance((Y[:, :1] + 1) * 2, Y[:, :1] * 2)
    images = torch.randn(10, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert metric_to(images)(images + 1) == distances.energy_distance((images + 1).flatten(1), images.flatten(1))


def test_an_unknown_metric_suggests_a_near_one():
    with pytest.raises(ValueError, match=r"kind must be one of .*did you mean 'energy'"):
        metric_to(Y, "enrgy")


# -- the landscape ---------------------------------------------------------------------------------------------------------


def test_the_landscape_is_the_plane_through_three_checkpoints():
    a, b, c = (net(i).state_dict() for i in range(3))
    xs, ys = [-0.5, 0.0, 1.0], [0.0, 1.0, 1.5, 2.0]

    def objective(state):
        return float(sum(v.square().sum() for v in state.values()))

    values = landscape(a, b, c, (xs, ys), objective=objective)
    assert values.shape == (3, 4)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            point = {k: a[k] + x * (b[k] - a[k]) + y * (c[k] - a[k]) for k in a}
            assert abs(float(values[i, j]) - objective(point)) < 1e-4 * objective(point)
    model = net(5)
    of_model = landscape(a, b, c, (xs, ys), objective=lambda m: objective(m.state_dict()), model=model)
    assert torch.equal(of_model, values)
    with pytest.raises(ValueError, match="grid must be"):
        landscape(a, b, c, (xs,), objective=objective)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grid\[1\]\[0\] must be finite"):
        landscape(a, b, c, (xs, [float("nan")]), objective=objective)


# -- saving checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_checkpoints_are_saved_at_the_interval_and_the_last_are_kept(tmp_path, form):
    model = net()
    saver = CheckpointSaver(tmp_path / "run", every=10, keep=3, start=20, format=form)
    states = {}
    for step in range(1, 61):
        with torch.no_grad():
            model[0].weight.add_(0.01)
        path = saver(model, step)
        assert (path is not None) == (step % 10 == 0 and step >= 20)
        states[step] = {k: v.clone() for k, v in model.state_dict().items()}
    assert [int(p.stem[5:]) for p in saver.paths()] == [40, 50, 60]
    assert len(list((tmp_path / "run").iterdir())) == 3
    made = combine(saver.bank(), [1.5, -1.0, 0.5])
    expected = combine([states[s] for s in (40, 50, 60)], [1.5, -1.0, 0.5])
    assert all(torch.equal(made[k], expected[k]) for k in expected)
    assert len(CheckpointBank(tmp_path / "run")) == 3


def test_every_step_of_an_optimizer_counts(tmp_path):
    model = net()
    saver = CheckpointSaver(tmp_path, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(saver.hook(model))
    for _ in range(5):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
    assert [p.name for p in saver.paths()] == ["step-00000002.safetensors", "step-00000004.safetensors"]


def test_wrapped_models_and_tied_weights_are_saved_plainly(tmp_path):
    model = net()
    saver = CheckpointSaver(tmp_path, every=1)
    path = saver({f"module._orig_mod.{k}": v for k, v in model.state_dict().items()})
    assert load_file(path).keys() == model.state_dict().keys()
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert torch.equal(load_file(saver(tied))["1.weight"], tied[0].weight)


def test_transformers_calls_the_saver(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x, labels=None):
            return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}

    data = [{"x": torch.ones(3) * i, "labels": torch.tensor(float(i))} for i in range(16)]
    saver = CheckpointSaver(tmp_path / "saved", every=2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = Model()
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[saver.transformers()]).train()
    assert [p.stem for p in saver.paths()] == ["step-00000002", "step-00000004"]
    assert torch.equal(load_file(saver.paths()[-1])["layer.weight"], model.layer.weight.detach())


def test_a_saver_checks_its_arguments_and_what_it_is_given(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        CheckpointSaver(tmp_path, every=0)
    with pytest.raises(ValueError, match="keep must be at least 2, got 1"):
        CheckpointSaver(tmp_path, every=1, keep=1)
    with pytest.raises(ValueError, match="did you mean 'safetensors'"):
        CheckpointSaver(tmp_path, every=1, format="safetensor")
    with pytest.raises(ValueError, match="'extra' is no tensor, which safetensors cannot hold; use format='torch'"):
        CheckpointSaver(tmp_path, every=1)({"w": torch.ones(1), "extra": 3})
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    assert CheckpointSaver(tmp_path, every=1, format="torch")({"w": torch.ones(1), "extra": 3}) is not None
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"polyak\[teachers\]"):
        CheckpointSaver(tmp_path, every=1)(net())
