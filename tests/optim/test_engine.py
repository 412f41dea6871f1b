"""The engine under rules it has not seen, tensors that change behind its back, and checkpoints from elsewhere."""

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from references_for_tests import assert_same, give, gradients, normal, parameters, run, snapshot
from systems_for_tests import CLASSES, LAUNCHED, SYSTEMS, THOROUGH

from polyak.core.elementwise import absolute, axpy, exp, maximum, minimum, sign, sqrt, tanh, where
from polyak.optim import LionK
from polyak.optim._engine import RuleOptimizer, base

SHAPES = [(), (7,), (3, 5), (0,), (2, 600)]
makers = pytest.mark.parametrize("name", sorted(SYSTEMS))
# What is compared with the reference is not the reference itself.
compared = pytest.mark.parametrize("backend", ["compiled", "foreach", "kernel"], indirect=True)


def agree(make, shapes, backend, change=None, *, steps=6, atol=1e-12, **kinds):
    """Two runs, the second by the reference; ``change(t, params, optimizer)`` meddles with both before each step."""
    results = []
    for options in (backend, dict(foreach=False)):
        params = parameters(shapes)
        optimizer = make(params, **options)
        for t, grads in enumerate(gradients(shapes, steps, **kinds)):
            give(params, grads)
            if change:
                change(t, params, optimizer)
            optimizer.step()
        results.append(params)
    assert_same(*results, atol=atol)


# Rules.


def optimizer_of(rule, *states):
    class Custom(RuleOptimizer):
        state_names = states

        def __init__(self, params, **options):
            super().__init__(params, {"lr": 0.1, "foreach": None, "fused": None, **options})

    Custom.rule = staticmethod(rule)
    return Custom


OPERATIONS = [
    lambda x, y, z, u, w, flag: x + y,
    lambda x, y, z, u, w, flag: x - y,
    lambda x, y, z, u, w, flag: x * y,
    lambda x, y, z, u, w, flag: x / (absolute(y) + 1.0),
    lambda x, y, z, u, w, flag: axpy(u, x, y),
    lambda x, y, z, u, w, flag: u - x,
    lambda x, y, z, u, w, flag: u * x + w,
    lambda x, y, z, u, w, flag: u / (x * x + 1.0),
    lambda x, y, z, u, w, flag: minimum(x, y),
    lambda x, y, z, u, w, flag: maximum(x, u),
    lambda x, y, z, u, w, flag: minimum(w, x),
    lambda x, y, z, u, w, flag: where(flag, x, y),
    lambda x, y, z, u, w, flag: where(flag, x, u) + where(x >= y, w, z),
    lambda x, y, z, u, w, flag: sign(x),
    lambda x, y, z, u, w, flag: sqrt(absolute(x)),
    lambda x, y, z, u, w, flag: -x,
    lambda x, y, z, u, w, flag: x * (absolute(y) <= absolute(z)),
]


def random_rule(seed):
    """A rule of random operations, whose outputs are any of its values: old states and intermediate ones too."""

    def rule(p, g, state, h):
        draw = random.Random(seed)
        arrays, uniforms, flags = [p, g, state.a, state.b], [h.lr, 0.5, -2.0, h.step, 1 / h.step], []
        for _ in range(draw.randint(4, 14)):
            x, y, z = (draw.choice(arrays) for _ in range(3))
            u, w = (draw.choice(uniforms) for _ in range(2))
            flag = draw.choice([*flags, x > y, x > 0.1, h.step > 2])
            flags.append(flag)
            uniforms.append(u * 0.25 + w * 0.25)
            arrays.append(draw.choice(OPERATIONS)(x, y, z, u, w, flag))
        arrays[4:] = [maximum(minimum(x, 4.0), -4.0) for x in arrays[4:]]
        new_p, a, b = (draw.choice(arrays) for _ in range(3))
        return new_p, ({"a": a, "b": b} if draw.random() < 0.7 else {"b": b, "a": a})

    return rule


def exact(rule, params, steps, states):
    """The rule on fresh copies of everything: no output can overwrite an input that is still needed."""

    class Hyper:
        lr = 0.1

    values = {n: [torch.zeros_like(p) for p in params] for n in states}
    params = snapshot(params)
    for t, grads in enumerate(steps, 1):
        Hyper.step = float(t)
        for i, g in enumerate(grads):
            state = type("State", (), {n: v[i].clone() for n, v in values.items()})
            new, made = rule(params[i].clone(), g.clone(), state, Hyper)
            params[i] = torch.as_tensor(new, dtype=params[i].dtype).expand_as(params[i]).clone()
            for n, v in made.items():
                values[n][i] = torch.as_tensor(v, dtype=g.dtype).expand_as(g).clone()
    return params, values


@pytest.mark.parametrize("chunk", range(8))
def test_random_rules(backend, chunk):
    shapes = [(3, 5), ()]
    for seed in range(10 * chunk, 10 * chunk + 10):
        rule = random_rule(seed)
        params = parameters(shapes)
        steps = gradients(shapes, 3)
        expected, states = exact(rule, params, steps, ("a", "b"))
        optimizer = run(optimizer_of(rule, "a", "b")(params, **backend), params, steps)
        assert_same(params, expected, atol=1e-10)
        for n in "ab":
            assert_same([optimizer.state[p][n] for p in params], states[n], atol=1e-10)


HAZARDS = {
    "old parameter": lambda p, g, s, h: (p - g, {"a": p, "b": s.b}),
    "swap": lambda p, g, s, h: (p - g, {"a": s.b, "b": s.a + g}),
    "history": lambda p, g, s, h: (p - s.b, {"a": g, "b": s.a}),
    "parameter from a state": lambda p, g, s, h: (s.a, {"a": p * 0.5 + g, "b": s.b}),
    "one value twice": lambda p, g, s, h: (p + s.a, {"a": p * g, "b": p * g}),
    "number": lambda p, g, s, h: (p * 0.5, {"a": h.step, "b": 2.0}),
    "flags": lambda p, g, s, h: (p * (g > 0), {"a": where(g > s.a, 0.125, 0.25), "b": where(h.step > 1, g, 0.3)}),
    "transcendental": lambda p, g, s, h: (p - tanh(g) * exp(-absolute(p)), {"a": tanh(s.a + g), "b": s.b}),
    "used after it is due": lambda p, g, s, h: (
        p - ((s.a * 0.9 + g) * 2.0 + s.a) * 3.0, {"a": s.a * 0.9 + g, "b": s.b}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HAZARDS))
def test_outputs_do_not_overwrite_what_is_still_needed(backend, name):
    rule, shapes = HAZARDS[name], [(7,), (3, 5)]
    params, steps = parameters(shapes), gradients(shapes, 4)
    expected, states = exact(rule, params, steps, ("a", "b"))
    optimizer = run(optimizer_of(rule, "a", "b")(params, **backend), params, steps)
    assert_same(params, expected, atol=1e-13)
    for n in "ab":
        assert_same([optimizer.state[p][n] for p in params], states[n], atol=1e-13)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda p, g, s, h: (p if p > 0 else g, {}), "branch on a traced value"),
        (lambda p, g, s, h: (p**2.0, {}), "only uniform values to a power"),
        (lambda p, g, s, h: (axpy(p, g, p), {}), "uniform a"),
        (lambda p, g, s, h: (p + "x", {}), "operands must be its inputs and numbers"),
        (lambda p, g, s, h: (p.elementwise("sin", p), {}), "known are"),
    ],
)
def test_rules_that_cannot_be_traced(rule, words):
    (p,) = params = parameters([(3,)])
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=words):
        optimizer_of(rule)(params).step()


def test_a_rule_that_writes_unknown_state():
    (p,) = params = parameters([(3,)])
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"unknown state \['z'\]; it has \['a'\]"):
        optimizer_of(lambda p, g, s, h: (p, {"z": g}), "a")(params).step()


# What users change between steps.


@makers
@compared
def test_hyperparameters_change(backend, name):
    def change(t, params, optimizer):
        group = optimizer.param_groups[0]
        group["lr"] = [0.01, 0.02, np.float32(0.015), np.float64(0.03), 0, 0.001][t]
        group["weight_decay"] = 0.1 * (t % 2)
        if "betas" in group:
            group["betas"] = tuple(b * 0.9 for b in group["betas"]) if t == 3 else list(group["betas"])
        else:
            group["momentum"] = 0.8 if t == 3 else np.float32(0.5)
        group["maximize"] = t == 4

    agree(SYSTEMS[name], SHAPES, backend, change)


@makers
def test_learning_rates_of_other_number_types_do_not_pile_up_programs(name):
    from polyak.optim._engine.dispatch import _programs

    params = parameters([(3,)])
    optimizer = SYSTEMS[name](params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: np.float32(1 / (t + 1)))
    run(optimizer, params, gradients([(3,)], 1))
    before = len(_programs)
    for grads in gradients([(3,)], 5):
        scheduler.step()
        run(optimizer, params, [grads])
    assert len(_programs) == before


def buffer(optimizer):
    return optimizer.state_names[0]


def other_layout(t):
    return t.t().contiguous().t()


def twice(state, names):
    return {name: value.clone() * (2 if name in names else 1) for name, value in state.items()}


CHANGES = {
    "parameter data": lambda p, o: setattr(p, "data", p.data.clone() * 2),
    "parameter data in place": lambda p, o: p.data.mul_(2),
    "transposed data": lambda p, o: setattr(p, "data", p.data.t()),
    "other layout": lambda p, o: setattr(p, "data", p.data.t().contiguous().t()),
    "state tensor": lambda p, o: o.state[p].update({buffer(o): o.state[p][buffer(o)] * 3}),
    "state data": lambda p, o: setattr(o.state[p][buffer(o)], "data", o.state[p][buffer(o)].data * 3),
    "state in place": lambda p, o: o.state[p][buffer(o)].mul_(3),
    "shared state": lambda p, o: o.state[p][buffer(o)].share_memory_().mul_(3),
    "state of other layout": lambda p, o: o.state[p].update({buffer(o): other_layout(o.state[p][buffer(o)])}),
    "state cleared": lambda p, o: o.state[p].clear(),
    "all state cleared": lambda p, o: o.state.clear(),
    "state dict replaced": lambda p, o: o.state.__setitem__(p, twice(o.state[p], o.state_names)),
    "state deleted": lambda p, o: o.state.pop(p),
    "something else in the state": lambda p, o: o.state[p].__setitem__("mine", torch.ones(3)),
    "gradient of other layout": lambda p, o: setattr(p, "grad", p.grad.t().contiguous().t()),
    "gradient with gaps": lambda p, o: setattr(p, "grad", torch.stack([p.grad, p.grad], -1)[..., 0]),
    "broadcast gradient": lambda p, o: setattr(p, "grad", torch.ones(()).double().expand_as(p)),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("name", sorted(THOROUGH))
@compared
def test_nothing_goes_stale(backend, name, change):
    def meddle(t, params, optimizer):
        if t in (2, 3):
            CHANGES[change](params[0], optimizer)

    agree(SYSTEMS[name], [(4, 4), (5,)], backend, meddle, steps=5)


@makers
@compared
def test_gradients_come_and_go(backend, name):
    absent = {(0, 0), (1, 0), (1, 1), (2, 2), (2, 4), (4, 0), (5, 3)}
    agree(SYSTEMS[name], SHAPES, backend, steps=8, absent=absent)


@makers
def test_counters_belong_to_their_tensors(name):
    params = parameters([(3,), (3,), (3,)])
    optimizer = SYSTEMS[name](params)
    run(optimizer, params, gradients([(3,)] * 3, 6, absent={(1, 0), (3, 0), (3, 1)}))
    if "step" in optimizer.state[params[0]]:
        assert [float(optimizer.state[p]["step"]) for p in params] == [4, 5, 6]


@makers
def test_a_group_added_later(backend, name):
    params, late = parameters([(3, 2), (4,)]), [torch.nn.Parameter(normal((5,), 9))]
    twins, late_twins = ([torch.nn.Parameter(p.detach().clone()) for p in ps] for ps in (params, late))
    optimizer, reference = SYSTEMS[name](params, **backend), SYSTEMS[name](twins, foreach=False)
    for t, grads in enumerate(gradients([(3, 2), (4,), (5,)], 5)):
        if t == 2:
            optimizer.add_param_group({"params": late, "lr": 0.05})
            reference.add_param_group({"params": late_twins, "lr": 0.05})
        run(optimizer, params + late, [grads])
        run(reference, twins + late_twins, [grads])
    assert_same(params + late, twins + late_twins, atol=1e-12)
    fresh = SYSTEMS[name]([torch.nn.Parameter(p.detach().clone()) for p in params])
    fresh.add_param_group({"params": [torch.nn.Parameter(p.detach().clone()) for p in late]})
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copies = [p for g in fresh.param_groups for p in g["params"]]
    more = gradients([(3, 2), (4,), (5,)], 3, seed=5)
    run(optimizer, params + late, more)
    run(fresh, copies, more)
    assert_same(copies, params + late, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(SYSTEMS) - {"lion-cautious"}))  # a sign of whole complex numbers is refused
def test_gradients_keep_their_sign_through_lazy_conjugation(backend, name):
    z = torch.nn.Parameter(torch.complex(normal((9,), 0), normal((9,), 1)))
    twin = torch.nn.Parameter(z.detach().clone())
    optimizer, reference = SYSTEMS[name]([z], **backend), SYSTEMS[name]([twin], foreach=False)
    for t in range(3):
        g = torch.complex(normal((9,), 10 + t), normal((9,), 20 + t))
        z.grad, twin.grad = g.conj(), g.conj().resolve_conj()
        assert z.grad.is_conj()
        optimizer.step(), reference.step()
    assert_same([z], [twin], atol=1e-13)


# Where rows, masks or norms of a tensor are not those of its real view.
@pytest.mark.parametrize("name", sorted(set(SYSTEMS) - {"adamp", "sgdp", "spam-sparse", "lion-cautious"}))
def test_complex_parameters_are_their_real_view(backend, name):
    z = torch.nn.Parameter(torch.complex(normal((9,), 0), normal((9,), 1)))
    r = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    first, second = SYSTEMS[name]([z], **backend), SYSTEMS[name]([r], foreach=False)
    for t in range(4):
        z.grad = torch.complex(normal((9,), 10 + t), normal((9,), 20 + t))
        r.grad = torch.view_as_real(z.grad).clone()
        first.step(), second.step()
    assert z.is_complex()
    assert_same([torch.view_as_real(z.detach())], [r], atol=1e-13)


def test_gradients_of_a_wider_type_than_the_parameter(backend):
    p = torch.nn.Parameter(torch.ones(600, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    optimizer = LionK([p], "half_square", lr=0.25, betas=(0.0, 0.0), **backend)
    for value in (-3.0, -3.0, 1.0):
        p.grad = torch.full((600,), value)
        optimizer.step()
    assert p.detach().unique().tolist() == [2.25]
    p.grad_dtype = None
    p.grad = torch.full((600,), 1.0, dtype=torch.bfloat16)  # and back
    optimizer.step()
    assert p.detach().unique().tolist() == [2.0]


@makers
@pytest.mark.parametrize("first", [0, 1])
def test_sparse_gradients_are_refused_at_any_step(backend, name, first):
    params = parameters([(4, 3)])
    optimizer = SYSTEMS[name](params, **backend)
    run(optimizer, params, gradients([(4, 3)], first))
    before = snapshot(params)
    params[0].grad = torch.eye(4, 3).double().to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(params, before)


# GradScaler's contract, as with torch.optim's fused optimizers.


@pytest.mark.parametrize("name", sorted({*LAUNCHED, "lion-cautious", "lion-l2-tensor"}))  # the last have no kernel
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("layout", ["dense", "gaps"])
def test_scaled_gradients(interpreter, name, unscaled, layout):
    def make(**options):
        params = parameters([(4, 6), (5,)])
        if layout == "gaps":
            params[0] = torch.nn.Parameter(torch.stack([params[0].detach()] * 2, -1)[..., 0])
        return params, SYSTEMS[name](params, **options)

    params, optimizer = make(fused=True, capturable=True)
    twins, reference = make(foreach=False)
    for t, grads in enumerate(gradients([(4, 6), (5,)], 5)):
        scale, found = 2.0 ** (10 - t), t in (0, 3)
        give(params, [g if unscaled else g * scale for g in grads])
        kept, before, state = (
            [p.grad.clone() for p in params],
            snapshot(params),
            copy.deepcopy(optimizer.state_dict()["state"]),
        )
        if optimizer._step_supports_amp_scaling:
            optimizer.grad_scale = None if unscaled else torch.tensor(scale)
            optimizer.found_inf = torch.tensor(float(found))
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            assert_same([p.grad for p in params], kept)
        elif not found:  # GradScaler does it by itself then
            give(params, grads)
            optimizer.step()
        if found:
            assert_same(params, before)
            for i, old in state.items():
                for key, value in old.items():
                    assert torch.equal(optimizer.state_dict()["state"][i][key], value)
        else:
            run(reference, twins, [grads])
    assert_same(params, twins, atol=1e-7)
    by_tensor = name in ("lion-cautious", "lion-l2-tensor")  # rules that are not elementwise have no kernel
    assert layout == "gaps" or optimizer._step_supports_amp_scaling != by_tensor


@makers
def test_scaling_is_offered_by_the_kernel_only(name):
    params = parameters([(3,)])
    for options in (dict(), dict(capturable=True), dict(foreach=True), dict(foreach=False)):
        assert not SYSTEMS[name](params, **options)._step_supports_amp_scaling


# Low precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
@makers
def test_low_precision_is_the_rounded_reference(backend, name, dtype, state_dtype):
    shapes = [(37,), (3, 5)]
    if "fused" in backend and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    results = []
    for options in (backend, dict(foreach=False)):
        params = parameters(shapes, dtype)
        run(SYSTEMS[name](params, state_dtype=state_dtype, **options), params, gradients(shapes, 4))
        results.append(params)
    # The same arithmetic in float32, rounded once: at most a tie falls to the other side, and moves on from there.
    assert_same(*results, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert sum(int((a != b).sum()) for a, b in zip(*results, strict=True)) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["adan", "adan-no-prox", "lion-huber", "lion-entropic", "lion-relativistic", "adamp-never"]
)
def test_kahan_tracks_float32(backend, name, dtype):
    low, wide = parameters([(50,)], dtype), parameters([(50,)], dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in wide]
    first = SYSTEMS[name](low, rounding="kahan", state_dtype=torch.float32, **backend)
    second = SYSTEMS[name](wide, foreach=False)
    for grads in gradients([(50,)], 30):
        rounded = [g.to(dtype).double() for g in grads]
        run(first, low, [rounded])
        run(second, wide, [rounded])
    tracked = [p.detach().double() + first.state[p]["compensation"].double() for p in low]
    # Each step rounds the remainder (to half an ulp of half an ulp, subnormal in float16) and float32 itself.
    bound = 30 * (4 * (torch.finfo(dtype).eps / 2) ** 2 + 6e-8 + 2.4e-7)
    assert_same(tracked, [p.detach().double() for p in wide], atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -700.0])
def test_stochastic_rounding_is_unbiased(backend, dtype, value):
    n = 1 << 12
    start = torch.full((n,), value).to(dtype)
    ulp = float(torch.nextafter(start[:1], torch.tensor([math.inf], dtype=dtype)) - start[0])
    p = torch.nn.Parameter(start.clone())
    optimizer = LionK([p], "half_square", lr=abs(ulp) / 4, betas=(0.0, 0.0), rounding="stochastic",
                      generator=torch.Generator().manual_seed(1), **backend)  # fmt: skip
    draws = []
    for _ in range(4):
        p.data.copy_(start)
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        draws.append((p.detach().double() - start.double()) / ulp)
        assert set(draws[-1].unique().tolist()) <= {0.0, 1.0}
        # Bernoulli(1/4), 4096 draws: six standard deviations.
        assert abs(float(draws[-1].mean()) - 0.25) < 6 * math.sqrt(0.25 * 0.75 / n)
    for a, b in ((0, 1), (1, 2), (0, 3)):
        correlation = float(((draws[a] - 0.25) * (draws[b] - 0.25)).mean()) / (0.25 * 0.75)
        assert abs(correlation) < 6 / math.sqrt(n), "a new draw at every step"


def test_stochastic_rounding_keeps_what_needs_no_rounding():
    from polyak.optim._engine.rounding import stochastic

    for dtype in (torch.bfloat16, torch.float16):
        exact = torch.tensor([1.0, -0.5, 0.0, 3.0, math.inf, -math.inf, math.nan, 2.0**-10])
        result = stochastic(exact, dtype, torch.Generator().manual_seed(0)).float()
        assert_same([result], [exact])


@makers
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_roundings_go_on_from_a_checkpoint(backend, name, rounding):
    params = parameters([(64,), (5,)], torch.bfloat16)
    steps = gradients([(64,), (5,)], 6)
    if name == "spam-sparse" and rounding == "kahan":
        pytest.skip("refused: remainders are kept for every entry")
    optimizer = run(SYSTEMS[name](params, rounding=rounding, **backend), params, steps[:3])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = SYSTEMS[name](twins, rounding=rounding, **backend)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, steps[3:])
    run(twin, twins, steps[3:])
    assert_same(twins, params)


def test_groups_draw_differently():
    p, q = (torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = LionK(
        [{"params": [p]}, {"params": [q]}], "half_square", lr=2**-8, betas=(0.0, 0.0), rounding="stochastic"
    )
    run(optimizer, [p, q], [[torch.full((4096,), -1.0)] * 2])
    same = float((p == q).double().mean())
    assert abs(same - 0.5) < 6 * 0.5 / 64


# Checkpoints.


@makers
@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(backend, name, through):
    params = parameters(SHAPES)
    optimizer = run(SYSTEMS[name](params, **backend), params, gradients(SHAPES, 2))
    twins, twin = (
        copy.deepcopy((params, optimizer)) if through == "deepcopy" else pickle.loads(pickle.dumps((params, optimizer)))
    )
    more = gradients(SHAPES, 2, seed=7)
    run(twin, twins, more)
    run(optimizer, params, more)
    assert_same(twins, params, atol=1e-12)


@makers
def test_two_optimizers_do_not_share_what_was_loaded(name):
    """torch.optim hands over the checkpoint's own tensors, which the next step would then change in both."""
    params = parameters([(6,)])
    optimizer = run(SYSTEMS[name](params), params, gradients([(6,)], 2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = SYSTEMS[name](twins)
    twin.load_state_dict(saved)
    run(twin, twins, gradients([(6,)], 3, seed=7))
    for key, value in kept["state"][0].items():
        assert torch.equal(saved["state"][0][key], value), key


@makers
def test_what_schedulers_keep_in_the_groups_survives_a_checkpoint(name):
    params = parameters([(3,)])
    optimizer = SYSTEMS[name](params)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    steps = gradients([(3,)], 8)
    for grads in steps[:3]:
        run(optimizer, params, [grads])
        scheduler.step()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = SYSTEMS[name](twins)
    other = torch.optim.lr_scheduler.OneCycleLR(twin, max_lr=0.5, total_steps=10)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for grads in steps[3:]:
        for opt, ps, s in ((optimizer, params, scheduler), (twin, twins, other)):
            run(opt, ps, [grads])
            s.step()
    for own in ("betas", "momentum", "lr"):
        assert twin.param_groups[0].get(own) == optimizer.param_groups[0].get(own)
    assert_same(twins, params)


@makers
def test_a_refused_checkpoint_changes_nothing(name):
    params = parameters([(3,), (2,)])
    optimizer = run(SYSTEMS[name](params), params, gradients([(3,), (2,)], 2))
    good = copy.deepcopy(optimizer.state_dict())
    bad, last = [], optimizer.state_names[-1]
    wrong = ("momentum", 1.0) if name == "sgdp" else ("betas", (0.9, 1.5))
    for path, value in [("lr", -1.0), wrong, ("fused", True), ("rounding", "kahan")]:
        broken = copy.deepcopy(good)
        broken["param_groups"][-1][path] = value
        bad.append(broken)
    broken = copy.deepcopy(good)
    broken["state"][1][last] = torch.zeros(3)
    bad.append(broken)
    broken = copy.deepcopy(good)
    if len(optimizer.state_names) > 1:
        del broken["state"][1][last]
        bad.append(broken)
    broken = copy.deepcopy(good)
    broken["param_groups"][-1]["params"] = [0]
    bad.append(broken)
    bad.append(run(torch.optim.Adagrad(params), params, gradients([(3,), (2,)], 1)).state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "available", lambda device: False)
        for checkpoint in bad:
            with pytest.raises(ValueError):
                optimizer.load_state_dict(checkpoint)
            now = optimizer.state_dict()
            assert now["param_groups"] == good["param_groups"]
            for i, state in good["state"].items():
                for key, value in state.items():
                    assert torch.equal(now["state"][i][key], value)
    run(optimizer, params, gradients([(3,), (2,)], 1))


# Bad input to the engine.


def test_fused_without_a_device(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for make in (
        *(lambda p, make=make: make(p, fused=True) for make in CLASSES.values()),
        *(lambda p, make=make: make([{"params": p, "fused": True}]) for make in CLASSES.values()),
    ):
        with pytest.raises(ValueError, match="fused=True needs parameters on a CUDA device and Triton; got one on cpu"):
            make(parameters([(2,)]))


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(fused=True, foreach=True), "cannot be `True` together"),
        (dict(differentiable=True, foreach=True), "differentiable"),
        (dict(maximize=1), "maximize must be one of"), (dict(maximize="no"), "maximize must be one of"),
        (dict(foreach=0), "foreach must be one of"), (dict(fused="yes"), "fused must be one of"),
        (dict(capturable=None), "capturable must be one of"), (dict(differentiable=2), "differentiable must be one of"),
        (dict(rounding="Kahan"), "rounding must be one of .*did you mean 'kahan'"),
        (dict(rounding="kahan"), "is for bfloat16 and float16 parameters, got torch.float64"),
        (dict(rounding="stochastic"), "is for bfloat16 and float16"),
        (dict(generator=torch.Generator()), "generator is used by rounding='stochastic' only"),
        (dict(state_dtype=torch.int8), "state_dtype must be None or a floating-point"),
        (dict(state_dtype="float32"), "state_dtype must be None or a floating-point"),
    ],
)  # fmt: skip
def test_bad_engine_options(make, options, words):
    if make is CLASSES["SPAM"] and "generator" in options:
        pytest.skip("it draws masks")
    with pytest.raises(ValueError, match=words):
        make(parameters([(2,)]), **options)
    if "generator" not in options:
        with pytest.raises(ValueError, match=words):
            make([{"params": parameters([(2,)]), **options}])


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
def test_misspelt_options(make):
    with pytest.raises(TypeError, match="weight_decy"):
        make(parameters([(2,)]), weight_decy=0.1)
    with pytest.warns(UserWarning, match=r"no option 'weight_decy' \(param group\); did you mean 'weight_decay'\?"):
        make([{"params": parameters([(2,)]), "weight_decy": 0.1}])


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
def test_bad_parameters(make):
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(ValueError, match="needs floating-point or complex parameters"):
            make([torch.ones(2).to(dtype)])
    with pytest.raises(TypeError):
        make(torch.ones(2))
    with pytest.raises(TypeError):
        make([1.0])
    p = parameters([(2,)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": p}, {"params": p}])
    optimizer = make([{"params": []}, {"params": p}])
    p[0].grad = torch.ones(2).double()
    optimizer.step()
