"""What MKOR leaves to its base, what it does not take in, and what it refuses: always before anything has changed."""

import copy
import warnings

import pytest
import torch
from mkor_for_tests import OTHERS, backward, batches, data, mkor, mlp, sgd, train
from references_for_tests import assert_same
from torch import nn

from polyak.optim import MKOR, MKORH


@pytest.mark.parametrize("skip", [["head"], ["body.2"], ["body"], []])
def test_skipped_modules_go_to_the_base(skip):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"body": mlp(3, 3, 3), "head": mlp(3, 2)[0]}).double()

    model = make()
    forward = nn.Sequential(model["body"], model["head"])
    for entries in (skip, [model.get_submodule(s) for s in skip]):
        optimizer = MKOR(model, sgd(model), skip=entries, **OTHERS)
        left = [n for n in ("body.0", "body.2", "head") if not any(n == s or n.startswith(s + ".") for s in skip)]
        assert sorted(optimizer.factors) == left
    found = []
    optimizer.base.register_step_pre_hook(
        lambda o, a, k: found.append({n: m.weight.grad for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    )
    train(forward, optimizer, batches(3))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (found[-1][name] is module.weight.grad) == (name not in left)


def test_what_is_no_dense_layer_is_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4, sparse=True)
            self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, i):
            return self.out(self.norm(self.embed(i)))

    model = Model()
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), inv_freq=1)
    assert set(optimizer.factors) == {"out"}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([1, 2, 2])).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("modules", [lambda m: list(m), lambda m: list(m.named_modules()), lambda m: iter(m)])
def test_modules_in_place_of_a_model(modules):
    model = mlp(3, 4, 2)
    assert sorted(MKOR(modules(model), sgd(model)).factors) == ["0", "2"]


def test_layers_that_the_base_does_not_have_are_left_alone():
    model = mlp(3, 4, 2)
    assert set(MKOR(model, torch.optim.SGD(model[2].parameters(), lr=0.1)).factors) == {"2"}


def test_grouped_convolutions_are_left_to_the_base():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    with pytest.warns(UserWarning, match="leaves '0' to the base optimizer: it is a convolution of 2 groups"):
        optimizer = MKOR(model, sgd(model))
    assert set(optimizer.factors) == {"1"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_not_taken_in(value):
    model = mlp(3, 3, 3)
    optimizer = mkor(model, inv_freq=1, clip=1e30)
    train(model, optimizer, batches(3))
    before = {name: [f.clone() for f in pair] for name, pair in optimizer.factors.items()}
    optimizer.zero_grad()
    backward(model, data(4, 3))
    optimizer._layers[0].a[1] = value
    with pytest.warns(UserWarning, match=r"statistics of \['0'\] are not finite"):
        optimizer.step()
    assert torch.equal(optimizer.factors["0"][0], before["0"][0])
    assert not torch.equal(optimizer.factors["0"][1], before["0"][1])
    assert optimizer.skipped == 1
    optimizer.zero_grad()
    backward(model, data(4, 3))
    optimizer._layers[1].g[0] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.skipped == 2


def test_an_infinite_loss_reaches_the_base_and_no_factor():
    model = mlp(3, 3, 3)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, batches(2))
    before = {name: [f.clone() for f in pair] for name, pair in optimizer.factors.items()}
    optimizer.zero_grad()
    (model(data(4, 3)).sum() * float("nan")).backward()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert model[0].weight.isnan().all()
    for name, (_, G) in before.items():
        assert_same([optimizer.factors[name][1]], [G])
        assert optimizer.factors[name][0].isfinite().all()


def make(options, base=None):
    model = mlp(3, 4, 2)
    return MKOR(model, base or sgd(model), **options)


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(inv_freq=0), "inv_freq must be at least 1, got 0"),
        (dict(inv_freq=-3), "inv_freq must be at least 1"),
        (dict(warmup_steps=-1), "warmup_steps must be at least 0"),
        (dict(decay=0.0), r"decay must be in \(0, 1\), got 0.0"),
        (dict(decay=1.0), r"decay must be in \(0, 1\)"),
        (dict(decay=NAN), "decay must be finite"),
        (dict(clip=0.0), "clip must be > 0"),
        (dict(clip=-1.0), "clip must be > 0"),
        (dict(clip=NAN), "clip must be finite"),
        (dict(update="packge"), "update must be one of 'package', 'ema', got 'packge'; did you mean 'package'?"),
        (dict(loss_reduction="men"), "did you mean 'mean'?"),
        (dict(stabilize=2.0), r"stabilize must be \(threshold, blend\)"),
        (dict(stabilize=(-1.0, 1.0)), r"stabilize\[0\] must be > 0"),
        (dict(stabilize=(NAN, 1.0)), r"stabilize\[0\] must be finite"),
        (dict(stabilize=(2.0, 0.0)), r"stabilize\[1\] must be in \(0, 1\]"),
        (dict(stabilize=(2.0, NAN)), r"stabilize\[1\] must be finite"),
        (dict(stabilize=(1e5, 1.0), factor_dtype=torch.float16), r"stabilize\[0\] must be at most 62228.8"),
        (dict(factor_dtype=torch.int32), "factor_dtype must be one of"),
        (dict(skip=["3"]), "skip: there is no module '3'"),
        (dict(skip=["2.weigth"]), "skip: there is no module '2.weigth'"),
        (dict(skip=[nn.Linear(1, 1)]), "Linear is no module of the model"),
        (dict(skip=["0", "2"]), "found no Linear or Conv2d"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(inv_freq=2.5), "inv_freq must be an integer"),
        (dict(decay="0.9"), "decay must be a number"),
        (dict(skip="0"), "skip must be a list"),
        (dict(inv_frq=3), "unexpected keyword argument 'inv_frq'"),
    ],
)
def test_options_of_the_wrong_type(options, message):
    with pytest.raises(TypeError, match=message):
        make(options)


@pytest.mark.parametrize(("window", "tau"), [(0, 0.2), (50, -0.1), (50, 1.5), (50, NAN)])
def test_bad_options_of_the_hybrid(window, tau):
    model = mlp(3, 2)
    with pytest.raises(ValueError, match=r"window must|tau must"):
        MKORH(model, sgd(model), window=window, tau=tau)


def test_bad_models_and_bases():
    model = mlp(3, 2)
    for nothing in ([], nn.ReLU(), nn.Sequential(), nn.Embedding(3, 2)):
        with pytest.raises(ValueError, match=r"model must be a module|MKOR found no Linear or Conv2d"):
            MKOR(nothing, sgd(model))
    for wrong in (3, [3], [("a", 3)], [("a", model, 1)]):
        with pytest.raises(TypeError, match="model must"):
            MKOR(wrong, sgd(model))
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, got 'sgd'"):
        MKOR(model, "sgd")
    with pytest.raises(ValueError, match="LBFGS"):
        MKOR(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="MKOR itself"):
        MKOR(model, mkor(model))
    lazy = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match="'0' is lazy; run a forward pass first"):
        MKOR(lazy, torch.optim.SGD(lazy.parameters(), lr=0.1))
    tied = mlp(3, 3, 3)
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="'0' and '2' share a weight: name one of them in skip"):
        mkor(tied)
    assert set(mkor(tied, skip=["2"]).factors) == {"0"}


def test_weights_in_shards_are_refused(monkeypatch):
    monkeypatch.setattr("polyak.optim.mkor.layers.is_dtensor", lambda t: True)
    model = mlp(3, 2)
    with pytest.raises(TypeError, match="that of '0' is in shards"):
        mkor(model)


def test_sparse_gradients_are_refused_before_anything_changes():
    model = mlp(3, 3, 2)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, batches(2))
    backward(model, data(4, 3))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients; the weight of '2' has one"):
        optimizer.step()
    assert str((model.state_dict(), optimizer.state_dict())) == str(before)


def test_gradients_of_another_type_or_device():
    """PyTorch refuses them where they are set; a type that it is told to allow is kept for the base."""
    model = mlp(3, 2)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, batches(2))
    p = model[0].weight
    for wrong in (p.grad.float(), p.grad.to("meta"), p.grad[:1]):
        with pytest.raises(RuntimeError, match=r"assigned grad|assign a gradient"):
            p.grad = wrong
    p.grad = None
    p.grad_dtype = torch.float32
    p.grad = torch.ones_like(p, dtype=torch.float32)
    optimizer.step()
    assert p.grad.dtype == torch.float32
    assert p.isfinite().all()


def test_an_error_in_the_base_gives_the_gradients_back():
    model = mlp(3, 2)
    optimizer = mkor(model, inv_freq=1)
    backward(model, data(4, 3))
    grads = [p.grad for p in model.parameters()]

    def fail(*_):
        raise ArithmeticError

    optimizer.base.register_step_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert optimizer._steps == 0


def _others():
    def trained(model, base=sgd):
        optimizer = MKOR(model, base(model), **OTHERS)
        train(model, optimizer, batches(3))
        return optimizer.state_dict()

    plain = mlp(3, 4, 2)
    one = sgd(plain)
    train(plain, one, batches(3))
    wrong = trained(mlp(3, 4, 2))
    wrong["param_groups"][0]["params"] = [0, 1]
    partial = trained(mlp(3, 4, 2))
    del partial["mkor"]["factors"]["2"]["A_reset"]
    return {
        "in part": (partial, "factors of '2' are incomplete"),
        "of SGD": (one.state_dict(), "not one of MKOR"),
        "nonsense": ({"mkor": 3, "state": {}, "param_groups": []}, "not one of MKOR"),
        "another base": (
            trained(mlp(3, 4, 2), lambda m: torch.optim.AdamW(m.parameters())),
            "around AdamW, this one is around SGD",
        ),
        "other shapes": (trained(mlp(3, 5, 2)), r"G of '0' has shape \(5, 5\), where \(4, 4\) is needed"),
        "other layers": (trained(mlp(3, 4, 4, 2)), r"do not have the same layers: \['4'\]"),
        "other groups": (wrong, "doesn't match the size"),
    }


@pytest.mark.parametrize(
    "name", ["in part", "of SGD", "nonsense", "another base", "other shapes", "other layers", "other groups"]
)
def test_a_wrong_checkpoint_changes_nothing(name):
    saved, message = _others()[name]
    model = mlp(3, 4, 2, seed=5)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, batches(4))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)
