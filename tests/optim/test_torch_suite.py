"""What PyTorch asks of its own optimizers, asked of ours: a table of configurations, and what its test suite does with it.

The table is of the kind of ``torch.testing._internal.common_optimizers``, whose error inputs are run too where it can be imported
(it needs expecttest). What does not apply, or is other on purpose: ``docs/optimizers.md``.
"""

import copy
import functools
import gc
import io
import math
import warnings
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from every_for_tests import EXTRA
from references_for_tests import assert_same, snapshot
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler

import polyak.optim as po
from polyak.optim import MKOR

DOUBLE = torch.float64


@dataclass(frozen=True)
class Info:
    """One optimizer: configurations without the flags that choose a backend, and which of those it has."""

    name: str
    inputs: tuple[dict, ...]
    impls: tuple[str, ...] = ("foreach", "differentiable")
    complex: bool = True
    lr: float = 0.01  # one that goes down in the problems below
    errors: tuple[tuple[dict, str], ...] = ()
    old: tuple[str, ...] = ("foreach", "differentiable", "maximize", "capturable", "fused", "rounding", "state_dtype")
    steps: bool = True  # whether a state counts
    extra: dict = field(default_factory=dict)

    @property
    def cls(self):
        return po.info(self.name).optimizer

    def make(self, params, **options):
        options = {**EXTRA.get(self.name, {}), "lr": self.lr, **self.extra, **options}
        if po.info(self.name).wraps:
            return MKOR(Holder(params), torch.optim.SGD(params, momentum=0.9, **options))
        return self.cls(params, **options)

    def configurations(self, without=()):
        """Every input with every flag it supports, each alone."""
        impls = [i for i in self.impls if i not in without]
        base = dict.fromkeys(impls, False)
        for given in self.inputs:
            yield {**given}
            for impl in impls:
                yield {**given, **base, impl: True}
            if impls:
                yield {**given, **base}


BETAS = ({"betas": (1.0, 0.0)}, r"betas\[0\] must be in \[0, 1\), got 1.0")
DECAY = ({"weight_decay": -1}, "weight_decay must be >= 0, got -1")
EPS = ({"eps": -1e-8}, "eps must be >")
CAPTURABLE = ({"capturable": True}, {"capturable": True, "lr": torch.tensor(0.01), "weight_decay": 0.1})
SHARED = ({}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}, {"lr": torch.tensor(0.01)}, *CAPTURABLE)
INFOS = [
    Info(
        "adan", (*SHARED, {"no_prox": True, "weight_decay": 0.1}, {"max_grad_norm": 1.0}, {"restart_radius": 3.0}),
        errors=(
            ({"betas": (1.0, 0.0, 0.5)}, BETAS[1]), DECAY, EPS, ({"max_grad_norm": -1.0}, "max_grad_norm must be >= 0"),
        ),
    ),
    Info("lion", (*SHARED, {"cautious": True}), lr=0.005, errors=(BETAS, DECAY), steps=False),
    Info("lionk", (*SHARED, {"kappa": "l1"}), lr=0.05, complex=False, errors=(BETAS, DECAY), steps=False),
    Info("adamp", (*SHARED, {"nesterov": True}, {"delta": 0.0}), errors=(BETAS, DECAY, EPS)),
    Info(
        "sgdp", (*SHARED, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        errors=(DECAY, ({"momentum": -0.5}, "momentum must be in"), ({"nesterov": True}, "Nesterov momentum requires")),
        steps=False, lr=0.005,
    ),
    Info(
        "spam", (*SHARED, {"reset_interval": 30, "warmup_steps": 5, "grace": 4}, {"threshold": 0.0}),
        errors=(BETAS, DECAY, EPS, ({"reset_interval": 3}, "reset_interval must be above grace")),
    ),
    Info(
        "monna", ({}, {"weight_decay": 0.1}, {"momentum": 0.5, "max_norm": 1.0}), impls=(), complex=False, old=(), steps=False,
        errors=(DECAY, ({"momentum": 1.0}, "momentum must be in")), lr=0.05,
    ),
    Info("mkor", ({}, {"weight_decay": 0.1}), impls=("foreach",), complex=False, old=("foreach", "maximize"), steps=False),
]  # fmt: skip
NAMED = {info.name: info for info in INFOS}
RULES = [info for info in INFOS if info.name != "mkor"]
COMPLEX = [info for info in INFOS if info.complex]


def infos(chosen=INFOS):
    return pytest.mark.parametrize("info", chosen, ids=lambda info: info.name)


class Holder(nn.Module):
    """A layer around the first matrix among parameters or param groups, for the optimizer that wraps."""

    def __init__(self, params):
        super().__init__()
        found = []
        for given in params:
            given = given["params"] if isinstance(given, dict) else [given]
            found += [given] if isinstance(given, torch.Tensor) else given
        weight = next(p for p in found if p.dim() == 2)
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = weight


def problem(dtype=torch.float32, seed=0, strided=False):
    """Weight, bias and a closure of a least-squares loss, as in PyTorch's suite."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(10, 5), (10,)]
    made = [torch.randn(*s, 2, generator=g, dtype=DOUBLE)[..., 0] for s in shapes]
    weight, bias = (Parameter((m if strided else m.contiguous()).to(dtype)) for m in made)
    x = torch.randn(5, generator=g, dtype=DOUBLE).to(dtype)

    def loss():
        return (weight.mv(x) + bias).pow(2).sum()

    return weight, bias, loss


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def run(optimizer, loss, count):
    closure = closure_of(optimizer, loss)
    for _ in range(count):
        optimizer.step(closure)


def gradients(params, seed):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=DOUBLE).to(p.dtype)


# Errors.

P, Q = Parameter(torch.randn(1, 1)), Parameter(torch.randn(1, 1))
OF_ALL = [
    (P, {}, TypeError, "params argument given to the optimizer should be an iterable"),
    ([{"params": P}, {"params": P}], {}, ValueError, "some parameters appear in more than one parameter group"),
    ([P], {"lr": torch.tensor([0.001, 0.001])}, ValueError, "Tensor lr must be 1-element"),
    ([("weight", P), Q], {}, ValueError, "with/without names. Some param names are missing"),
    ([{"params": [P]}, {"params": [("weight", Q)]}], {}, ValueError, "with/without names. cannot add param group with"),
    ([], {}, ValueError, "optimizer got an empty parameter list"),
    ([P * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
    ([{"params": {P, Q}}], {}, TypeError, "ordered collections"),
    (["P"], {}, TypeError, "optimizer can only optimize Tensors"),
]  # fmt: skip


@infos(RULES)
def test_errors(info):
    for params, options, kind, message in OF_ALL:
        # torch.optim writes the defaults into the groups that it is given.
        given = [dict(g) if isinstance(g, dict) else g for g in params] if isinstance(params, list) else params
        with pytest.raises(kind, match=message):
            info.make(given, **options)
    for options, message in info.errors:
        with pytest.raises(ValueError, match=message):
            info.make([P], **options)
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        info.make([P, P])


@infos(RULES)
def test_the_error_inputs_of_pytorchs_own_table(info):
    table = pytest.importorskip("torch.testing._internal.common_optimizers")
    for given in table.get_error_inputs_for_all_optims("cpu", torch.float32):
        params = [P] if given.optimizer_error_input.params is None else given.optimizer_error_input.params
        expect = pytest.warns if issubclass(given.error_type, Warning) else pytest.raises
        with expect(given.error_type, match=given.error_regex):
            info.make(params, **given.optimizer_error_input.kwargs)


# Param groups, and the direction.


@infos()
def test_groups_with_learning_rates_and_decays_of_their_own(info):
    for options in info.inputs:
        if "lr" in options:
            continue
        for which in ("lr", "weight_decay"):
            weight, bias, loss = problem()
            groups = [{"params": [weight]}, {"params": [bias], which: info.lr / 2 if which == "lr" else 0.03}]
            optimizer = info.make(groups, **options)
            start = loss().item()
            run(optimizer, loss, 20)
            assert (loss().item() > start) == bool(options.get("maximize")), options
            assert optimizer.param_groups[0][which] != optimizer.param_groups[1][which]
    # Group by group what an optimizer of its own does. (Not where something is over all groups: a norm, a restart.)
    pairs = []
    for split in (False, True):
        weight, bias, loss = problem(DOUBLE)
        second = {"params": [bias], "lr": info.lr / 3, "weight_decay": 0.05}
        if info.name == "mkor":  # whose two groups share the layer that it preconditions
            continue
        made = (
            [info.make([{"params": [weight]}]), info.make([second])]
            if split
            else [info.make([{"params": [weight]}, second])]
        )
        for t in range(3):
            gradients((weight, bias), t)
            for optimizer in made:
                optimizer.step()
        pairs.append((weight, bias))
    if pairs:
        assert_same(*pairs)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.9),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.95**t),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.4, 4),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.4, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 12, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=1e3),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.02, 12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.005, 4),
}


@infos()
@pytest.mark.parametrize("lr", [float, torch.tensor])
def test_every_scheduler_of_torch(info, lr):
    """Rates and momenta are those that torch.optim's optimizers get; the steps are those with these numbers set by hand."""
    options = {"momentum": 0.9} if info.name == "sgdp" else {}
    cycles = "betas" if info.name in ("adan", "lion", "lionk", "adamp", "spam") else "momentum"
    for name, make in SCHEDULERS.items():
        weight, bias, loss = problem(DOUBLE)
        optimizer = info.make([weight, bias], lr=lr(0.01), **options)
        twin, twin_bias, twin_loss = problem(DOUBLE)
        by_hand = info.make([twin, twin_bias], lr=0.01, **options)
        like = torch.optim.Adam if cycles == "betas" else functools.partial(torch.optim.SGD, momentum=0.9)
        model = like([Parameter(torch.zeros(1))], lr=lr(0.01))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler, other = make(optimizer), make(model)
            for _ in range(8):
                group, theirs = optimizer.param_groups[0], model.param_groups[0]
                assert float(group["lr"]) == pytest.approx(float(theirs["lr"]), rel=1e-6), name
                if name in ("onecycle", "cyclic"):
                    ours, expected = (g["betas"][0] if cycles == "betas" else g["momentum"] for g in (group, theirs))
                    assert ours == expected, name
                by_hand.param_groups[0]["lr"] = float(group["lr"])
                by_hand.param_groups[0][cycles] = group[cycles]
                run(optimizer, loss, 1)
                run(by_hand, twin_loss, 1)
                model.step()
                metric = [torch.tensor(1.0)] if name == "plateau" else []
                scheduler.step(*metric)
                other.step(*metric)
        assert_same((weight, bias), (twin, twin_bias))


@infos()
@pytest.mark.parametrize("strided", [False, True])
def test_it_goes_the_right_direction(info, strided):
    for options in info.configurations(without=("differentiable",)):
        weight, bias, loss = problem(strided=strided)
        optimizer = info.make([weight, bias], **options)
        assert repr(optimizer)
        start = loss().item()
        run(optimizer, loss, 20)
        assert (loss().item() > start) == bool(options.get("maximize")), options


@infos()
def test_a_group_and_a_scheduler(info):
    weight, bias, loss = problem()
    optimizer = info.make([{"params": [weight]}, {"params": [bias], "lr": info.lr / 2}])
    schedulers = [lr_scheduler.StepLR(optimizer, 10, 0.9), lr_scheduler.ReduceLROnPlateau(optimizer)]
    start = loss().item()
    for _ in range(20):
        run(optimizer, loss, 1)
        schedulers[0].step()
        schedulers[1].step(loss().item())
    assert loss().item() < start


# Learning rates as tensors, and backends.


@infos(RULES)
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_a_learning_rate_of_any_number_of_dimensions(info, dims):
    for options in info.configurations(without=("differentiable",)):
        results = []
        for lr in (0.01, torch.full((1,) * dims, 0.01, dtype=DOUBLE)):
            weight, bias, loss = problem(DOUBLE)
            optimizer = info.make([weight, bias], **{**options, "lr": lr})
            scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
            for _ in range(4):
                run(optimizer, loss, 1)
                scheduler.step()
            results.append((weight, bias))
            assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == isinstance(lr, torch.Tensor)
        assert_same(*results)


@infos([i for i in RULES if "foreach" in i.impls])
def test_backends_match_the_loop(info):
    for options in info.inputs:
        results = []
        for flags in ({"foreach": False}, {"foreach": True}, {"foreach": None}, {"fused": None, "foreach": None}):
            params = [problem(DOUBLE)[0], problem(DOUBLE, 1)[1], Parameter(torch.ones((), dtype=DOUBLE))]
            optimizer = info.make(params, **options, **flags)
            for t in range(5):
                gradients(params, t)
                if t == 2:
                    params[1].grad = None
                optimizer.step()
            results.append(
                [*params, *(v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))]
            )
        for other in results[1:]:  # compiled rules round multiply-adds otherwise than PyTorch's vector code
            assert_same(other, results[0], atol=16 * torch.finfo(DOUBLE).eps)


@infos([i for i in RULES if "foreach" in i.impls])
def test_devices_and_types_may_be_mixed(info):
    """Each parameter as in an optimizer of its own. (Devices: the meta device holds no numbers, and must not be in the way.)"""
    types = (torch.float32, DOUBLE, torch.bfloat16, torch.float16, torch.float32)
    for flags in ({"foreach": False}, {"foreach": True}, {}):
        params = [Parameter(torch.full((3, 2), 0.5 + i / 4).to(t)) for i, t in enumerate(types)]
        twins = [Parameter(p.detach().clone()) for p in params]
        together, alone = info.make(params, **flags), [info.make([p], **flags) for p in twins]
        for t in range(3):
            gradients(params, t)
            for p, q, one in zip(params, twins, alone, strict=True):
                q.grad = p.grad.clone()
                one.step()
            together.step()
        assert_same(params, twins)


@infos()
def test_the_default_type_does_not_matter(info):
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            params = [
                Parameter(torch.full((3, 2), 0.5, dtype=torch.float32)),
                Parameter(torch.ones(2, dtype=torch.float32)),
            ]
            optimizer = info.make(params)
            for t in range(3):
                gradients(params, t)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(params)
    assert_same(*results)


@infos([i for i in RULES if i.impls])
def test_flags_of_backends_are_left_open_and_checked(info):
    weight, bias, _ = problem()
    optimizer = info.make([weight, bias])
    group = optimizer.param_groups[0]
    assert (group["foreach"], group["fused"], group["differentiable"]) == (None, None, False)
    with pytest.raises((ValueError, RuntimeError), match="`fused` and `foreach` cannot be `True` together"):
        info.make([weight], foreach=True, fused=True)
    with pytest.raises((ValueError, RuntimeError), match="differentiable"):
        info.make([weight], foreach=True, differentiable=True)


@infos([i for i in INFOS if "foreach" in i.impls and i.name != "mkor"])
def test_a_step_makes_no_copies_of_all_parameters(info):
    """The fast way needs no more memory than the states that it keeps: no temporaries of the parameters' size pile up."""
    params = [Parameter(torch.ones(64, 64)) for _ in range(40)]
    optimizer = info.make(params)
    for _ in range(2):
        gradients(params, 0)
        optimizer.step()
    peak = _peak(optimizer.step)
    assert peak < 0.5 * sum(p.numel() * 4 for p in params)


def _peak(function):
    """The most memory that torch holds on the CPU beyond what it had, as its profiler counts it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# No gradients.


@infos()
def test_nothing_happens_without_gradients(info):
    for options in info.configurations():
        weight, bias, _ = problem()
        optimizer = info.make([weight, bias], **options)
        before = snapshot((weight, bias))
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        assert_same((weight, bias), before)
        assert not any(s for s in optimizer.state.values())
        assert optimizer.step(lambda: 5.0) == 5.0


@infos()
def test_zero_gradients_move_nothing_but_by_decay(info):
    for options in info.configurations(without=("differentiable",)):
        decay = options.get("weight_decay", 0)
        weight, bias, _ = problem(DOUBLE)
        optimizer = info.make([weight, bias], **options)
        before = snapshot((weight, bias))
        for p in (weight, bias):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moved = any(not torch.equal(p, b) for p, b in zip((weight, bias), before, strict=True))
        assert moved == bool(decay), options


@infos()
def test_gradients_that_come_and_go(info):
    weight, bias, _ = problem()
    optimizer = info.make([weight, bias])
    gradients((weight, bias), 0)
    optimizer.step()
    optimizer.zero_grad()
    assert weight.grad is None
    optimizer.zero_grad(set_to_none=False)
    gradients((weight, bias), 1)
    bias.grad, before = None, snapshot([bias])
    optimizer.step()
    assert_same([bias], before)
    gradients((weight, bias), 2)
    optimizer.step()
    assert not torch.equal(bias, before[0])
    optimizer.zero_grad(set_to_none=False)
    assert not weight.grad.any()


# Complex parameters.


# Of the size of a complex number, not of its parts: a norm, a test of agreement, a spike, a row's projection.
BY_SIZE = {"adan": ("max_grad_norm", "restart_radius"), "lion": ("cautious",)}


@infos(COMPLEX)
def test_complex_parameters_are_pairs_of_real_ones(info):
    for options in info.configurations(without=("differentiable",)):
        if any(name in options for name in BY_SIZE.get(info.name, ())):
            continue
        if info.name in ("adamp", "sgdp"):
            options = {**options, "delta": 0.0}
        elif info.name == "spam":
            options = {**options, "threshold": 0.0}
        g = torch.Generator().manual_seed(0)
        p = Parameter(torch.randn(5, 4, generator=g, dtype=torch.complex128))
        q = Parameter(torch.view_as_real(p.detach()).clone())
        first, second = info.make([p], **options), info.make([q], **options)
        for _ in range(3):
            p.grad = torch.randn(5, 4, generator=g, dtype=torch.complex128)
            q.grad = torch.view_as_real(p.grad).clone()
            first.step()
            second.step()
        assert_same([torch.view_as_real(p.detach())], [q], atol=1e-14)
        assert all(s.dtype == torch.complex128 or s.dim() == 0 for s in first.state[p].values())


# Hooks: what order is in test_edges.py; here those of all optimizers.


@infos()
def test_hooks_of_all_optimizers(info):
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    weight, bias, _ = problem()
    optimizer, seen = info.make([weight, bias]), []
    gradients((weight, bias), 0)
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append("global pre") if o is optimizer else None),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append("global post") if o is optimizer else None),
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append("pre")),
        optimizer.register_step_post_hook(lambda o, a, k: seen.append("post")),
    ]
    optimizer.step()
    assert seen == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 4


# Checkpoints.


@infos()
def test_state_dicts_are_deterministic_and_are_not_written_to(info):
    for options in info.configurations(without=("differentiable",)):
        weight, bias, loss = problem(DOUBLE)
        optimizer = info.make([weight, bias], **options)
        run(optimizer, loss, 3)
        twin, twin_bias, twin_loss = problem(DOUBLE)
        with torch.no_grad():
            twin.copy_(weight), twin_bias.copy_(bias)
        other = info.make([twin, twin_bias], **options)
        saved = copy.deepcopy(optimizer.state_dict())
        given = copy.deepcopy(saved)
        other.load_state_dict(given)
        for _ in range(3):
            run(optimizer, loss, 1)
            run(other, twin_loss, 1)
            assert_same((twin, twin_bias), (weight, bias))
        # Ours go on in copies. (torch.optim, the base of the one that wraps, goes on in what it was given.)
        assert str(given) == str(saved) or info.name == "mkor"
        assert str(other.state_dict()) == str(optimizer.state_dict())
        other.param_groups.extend(other.param_groups)
        assert str(other.state_dict()["param_groups"][-1]) == str(optimizer.state_dict()["param_groups"][-1])


@infos()
def test_older_checkpoints_and_steps_that_are_numbers(info):
    for options in info.inputs:
        weight, bias, loss = problem()
        optimizer = info.make([weight, bias], **options)
        run(optimizer, loss, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for flag in info.old:
                group.pop(flag, None)
        if info.steps:
            for state in saved["state"].values():
                state["step"] = state["step"].item()
        optimizer.load_state_dict(saved)
        run(optimizer, loss, 1)
        assert set(info.old) <= set(optimizer.param_groups[0]) or info.name == "mkor"
        if info.steps:
            assert float(optimizer.state[weight]["step"]) == 3
            assert isinstance(optimizer.state[weight]["step"], torch.Tensor)


@infos()
def test_what_is_saved_is_loaded_with_weights_only(info):
    for options in info.configurations(without=("differentiable",)):
        weight, bias, loss = problem()
        optimizer = info.make([weight, bias], **options)
        run(optimizer, loss, 2)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert str(loaded) == str(optimizer.state_dict())
        optimizer.load_state_dict(loaded)
        run(optimizer, loss, 1)


@infos()
@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)])
def test_checkpoints_with_and_without_names(info, named):
    def make(with_names):
        weight, bias, loss = problem()
        given = [("weight", weight), ("bias", bias)] if with_names else [weight, bias]
        return (MKOR(Holder([weight]), torch.optim.SGD(given, 0.01)) if info.name == "mkor" else info.make(given)), loss

    (first, loss), (second, _) = make(named[0]), make(named[1])
    run(first, loss, 2)
    saved = copy.deepcopy(first.state_dict())
    if named[0]:
        assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    second.load_state_dict(saved)
    assert second.param_groups[0].get("param_names") == (["weight", "bias"] if any(named) else None)
    if named == (True, True):
        saved["param_groups"][0]["param_names"] = ["other", "names"]
        second.load_state_dict(saved)
        assert second.param_groups[0]["param_names"] == ["other", "names"]


@infos([i for i in RULES if i.impls])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_count_stays_where_it_belongs(info, capturable):
    """Loading, also of parameters that are wider, keeps the count in float32, on the host without capturable."""
    weight, bias, loss = problem()
    optimizer = info.make([weight, bias], capturable=capturable)
    run(optimizer, loss, 2)
    twin, twin_bias, twin_loss = problem(DOUBLE)
    other = info.make([twin, twin_bias], capturable=capturable)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in (twin, twin_bias):
        for name, value in other.state[p].items():
            wanted = torch.float32 if name == "step" else DOUBLE
            assert value.dtype == wanted, name
            assert value.device.type == "cpu"
    run(other, twin_loss, 1)


@infos()
def test_copies_have_all_public_attributes_and_states_are_not_empty(info):
    weight, bias, loss = problem()
    optimizer = info.make([weight, bias])
    run(optimizer, loss, 2)
    assert all(optimizer.state[p] for p in (weight, bias))
    other = copy.deepcopy(optimizer)
    public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, other)]
    assert public[0] == public[1]


@infos()
def test_an_optimizer_is_no_cycle(info):
    weight, bias, loss = problem()
    optimizer = info.make([weight, bias])
    run(optimizer, loss, 2)
    gc.disable()
    try:
        reference = weakref.ref(optimizer)
        del optimizer
        assert reference() is None
    finally:
        gc.enable()


# Closures, differentiable steps, averages.


@infos()
def test_closures_run_with_gradients_and_their_loss_is_returned(info):
    weight, bias, loss = problem()
    optimizer, seen = info.make([weight, bias]), []

    def closure():
        seen.append(torch.is_grad_enabled())
        return closure_of(optimizer, loss)()

    with torch.no_grad():
        first = optimizer.step(closure)
        second = optimizer.step(closure=closure)
    assert seen == [True, True]
    assert second < first
    assert optimizer.step() is None


@infos([i for i in RULES if "differentiable" in i.impls])
def test_gradients_flow_through_differentiable_steps(info):
    """From the end to the start and to the gradients, as finite differences have it."""
    options = {"adamp": {"delta": 0.0}, "sgdp": {"delta": 0.0, "momentum": 0.5}}.get(info.name, {})
    g = torch.Generator().manual_seed(3)
    start, grad = (torch.randn(2, 3, generator=g, dtype=DOUBLE, requires_grad=True) for _ in range(2))

    def after(start, grad):
        p = start.clone()
        optimizer = info.make([p], differentiable=True, weight_decay=0.1, **options)
        for t in range(2):
            p.grad = grad * (1 + t / 2)
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(after, (start, grad))


@infos()
def test_averaged_models(info):
    module = nn.Linear(5, 3)
    optimizer = (
        MKOR(module, torch.optim.SGD(module.parameters(), 0.01))
        if info.name == "mkor"
        else info.make(list(module.parameters()))
    )
    averaged = torch.optim.swa_utils.AveragedModel(module)
    seen = []
    for t in range(3):
        gradients(module.parameters(), t)
        optimizer.step()
        averaged.update_parameters(module)
        seen.append(module.weight.detach().clone())
    assert_same([averaged.module.weight], [torch.stack(seen).mean(0)], atol=1e-6)


# torch.compile, and grad scaling.


@infos(RULES)
def test_a_step_under_torch_compile(info):
    results = []
    for compiled in (False, True):
        weight, bias, _ = problem()
        optimizer = info.make([weight, bias])
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for t in range(3):
            gradients((weight, bias), t)
            step()
        results.append((weight, bias))
    torch._dynamo.reset()
    assert_same(*results)


@infos(RULES)
def test_scaled_gradients(info):
    results = []
    for scaled in (False, True):
        weight, bias, loss = problem()
        optimizer, scaler = info.make([weight, bias]), torch.amp.GradScaler("cpu", init_scale=2.0**7, enabled=scaled)
        for t in range(4):
            optimizer.zero_grad()
            scaler.scale(loss()).backward()
            if scaled and t == 1:
                before = snapshot((weight, bias))
                weight.grad[0, 0] = math.inf
                scaler.step(optimizer)
                scaler.update()
                assert_same((weight, bias), before)
                optimizer.zero_grad()
                scaler.scale(loss()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((weight, bias))
    assert_same(*results, atol=1e-6)
