"""Every optimizer on every kind of tensor: the reference's result, or a refusal; never a crash, nor memory that is not ours.

``bench/sanitized.sh`` runs these under AddressSanitizer.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from references_for_tests import normal
from systems_for_tests import SYSTEMS, THOROUGH
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from polyak.core.cc import SPLIT
from polyak.optim._engine import look

REFERENCE = dict(foreach=False)
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
LOOKS = {"headers": look.through_headers, "dlpack": look.through_dlpack, "python": lambda: None}


class Own(torch.Tensor):
    """A subclass without anything of its own."""


def parameter(t):
    return torch.nn.Parameter(t)


def draw(p, t, i):
    """Step t's gradient of the i-th parameter, of its kind."""
    shape = tuple(p.shape)
    g = normal(shape, 100 * t + i)
    if p.is_complex():
        g = torch.complex(g, normal(shape, 100 * t + i + 50))
    g = g.to(p.dtype)
    return TwoTensor(g, g.clone()) if isinstance(p, TwoTensor) else g


def complex_of(shape):
    return torch.complex(normal(shape, 0), normal(shape, 1))


def base():
    return [parameter(normal((6, 8), 0)), parameter(normal((5,), 1)), parameter(normal((3, 2, 4), 2))]


@dataclass
class Kind:
    """make: the parameters. give: their gradients, from those that were drawn. change: what happens before step 2. twist: what
    happens to gradients that parameters have already."""

    make: Any = base
    give: Any = lambda params, grads, t: grads
    change: Any = lambda params, optimizer: None
    twist: Any = lambda params: None
    refused: bool = False  # by everyone


def first(make):
    """The first parameter's gradient, made of the drawn one."""
    return lambda params, grads, t: [make(params[0], grads[0]), *grads[1:]]


def free(t, size=0):
    """Leave so many bytes of a tensor's storage."""
    t.untyped_storage().resize_(size)
    return t


def inside_of_freed(p, g):
    buffer = torch.zeros(9 + g.numel(), dtype=g.dtype)
    view = buffer[9:].view(g.shape)
    free(buffer)
    return view


def freed_and_filled(params, optimizer):
    kept = params[0].detach().clone()
    free(params[0])
    free(params[0], kept.numel() * kept.element_size())
    params[0].data.copy_(kept)


def resized_in_place(params, optimizer):
    params[0].grad = None
    params[0].requires_grad_(False).resize_(3, 8).requires_grad_()  # the same address and strides


def set_data(t, value):
    t.grad = None
    t.data = value


def swapped(params, optimizer):
    other = parameter(params[0].detach().clone() * 2)
    params[0].grad = None
    torch.utils.swap_tensors(params[0], other)


def another_in_its_place(params, optimizer):
    other = parameter(params[0].detach().clone() * 2)
    for group in optimizer.param_groups:
        group["params"][:] = [other if p is params[0] else p for p in group["params"]]
    params[0] = other


def data(change):
    """The first parameter's data become what ``change`` makes of them."""
    return lambda params, optimizer: set_data(params[0], change(params[0].data))


def states(change):
    """Every state tensor of the first parameter is changed; what is returned takes its place."""

    def run(params, optimizer):
        state = optimizer.state[params[0]]
        for name in optimizer.state_names:
            changed = change(state[name])
            state[name] = state[name] if changed is None else changed

    return run


def count(change):
    """The first parameter's count of steps becomes what ``change`` returns."""

    def run(params, optimizer):
        state = optimizer.state[params[0]]
        if "step" in state:
            changed = change(state["step"])
            state["step"] = state["step"] if changed is None else changed

    return run


def one_state_gone(params, optimizer):
    if len(optimizer.state_names) > 1:
        del optimizer.state[params[0]][optimizer.state_names[0]]
    else:
        del optimizer.state[params[0]]


def shared_states(params, optimizer):
    optimizer.state[params[1]].update({name: optimizer.state[params[0]][name] for name in optimizer.state_names})


def tied(n, part=slice(None)):
    whole = parameter(normal((n,), 0))
    return [whole, parameter(whole.data[part]), parameter(normal((3,), 1))]


def typed(*types):
    return [parameter(normal((6, 4), i).to(t)) for i, t in enumerate(types)]


HALF = torch.bfloat16, torch.float16
KINDS = {
    # What tensors are.
    "plain": Kind(),
    "0-dim": Kind(lambda: [parameter(normal((), 0)), parameter(normal((1,), 1))]),
    "empty": Kind(lambda: [parameter(normal(s, 0)) for s in [(0,), (0, 3), (3, 0), (4,)]]),
    "low precision": Kind(lambda: typed(*HALF)),
    "types side by side": Kind(lambda: typed(*(torch.float64, torch.float32) * 2)),
    "channels last": Kind(lambda: [parameter(normal((4, 3, 2, 2), 0).to(memory_format=torch.channels_last))]),
    "transposed": Kind(lambda: [parameter(normal((4, 6), 0).t())]),
    "gaps": Kind(lambda: [parameter(normal((6, 10), 0)[:, ::2]), parameter(normal((9,), 1)[::3])]),
    "offset": Kind(lambda: [parameter(normal((61,), 0)[1:].view(6, 10))]),
    "large": Kind(lambda: [parameter(normal((300, 300), 0)), parameter(normal((SPLIT + 3,), 1))]),
    "wrapper": Kind(lambda: [parameter(TwoTensor(normal((4, 3), 0), normal((4, 3), 1))), parameter(normal((5,), 2))]),
    "wrapper alone": Kind(lambda: [parameter(TwoTensor(normal((4, 3), 0), normal((4, 3), 1)))]),
    "subclass": Kind(lambda: [parameter(normal((4, 3), 0).as_subclass(Own)), parameter(normal((5,), 2))]),
    "complex": Kind(lambda: [parameter(complex_of((4, 3))), parameter(complex_of((5,))), parameter(normal((2,), 0))]),
    "conjugated": Kind(lambda: [parameter(complex_of((4, 3)).conj())]),
    "negated": Kind(lambda: [parameter(torch._neg_view(normal((4, 3), 0)))]),
    "meta": Kind(lambda: [parameter(torch.empty(4, 3, device="meta", dtype=torch.float64))]),
    "functional": Kind(lambda: [parameter(torch._to_functional_tensor(normal((4, 3), 0)))]),
    "sparse": Kind(lambda: [parameter(torch.eye(4).double().to_sparse())], refused=True),
    "expanded": Kind(lambda: [parameter(normal((1, 5), 0).expand(4, 5))], refused=True),
    "overlapping": Kind(lambda: [parameter(normal((5,), 0).as_strided((3, 3), (1, 1)))]),
    "tied": Kind(lambda: tied(40)),
    "tied in part": Kind(lambda: tied(SPLIT + 8, slice(5, SPLIT))),
    # What gradients are.
    "no gradients": Kind(give=lambda params, grads, t: [None] * len(grads)),
    "gradients come and go": Kind(give=lambda ps, grads, t: [None if (t + i) % 2 else g for i, g in enumerate(grads)]),
    "a late gradient": Kind(give=lambda params, grads, t: [grads[0] if t > 1 else None, *grads[1:]]),
    "sparse gradient": Kind(give=first(lambda p, g: g.to_sparse()), refused=True),
    "expanded gradient": Kind(give=first(lambda p, g: g[:1].expand(g.shape))),
    "gradient of other strides": Kind(give=first(lambda p, g: g.t().contiguous().t())),
    "gradient with gaps": Kind(give=first(lambda p, g: torch.stack([g, g], -1)[..., 0])),
    "gradient of a subclass": Kind(give=first(lambda p, g: g.as_subclass(Own))),
    "gradient that is a parameter": Kind(give=first(lambda p, g: parameter(g))),
    "negated gradient": Kind(give=first(lambda p, g: torch._neg_view(-g * 2))),
    "negated gradient of one element": Kind(
        lambda: [parameter(normal((1,), 0))], first(lambda p, g: torch.complex(g, -g).conj().imag)
    ),
    "conjugated gradient": Kind(lambda: [parameter(complex_of((4, 3)))], first(lambda p, g: g.conj())),
    "gradient that is its parameter": Kind(give=first(lambda p, g: p.detach())),
    "freed gradient": Kind(give=first(lambda p, g: free(g)), refused=True),
    "gradient inside of a freed buffer": Kind(give=first(inside_of_freed), refused=True),
    "cut gradient": Kind(give=first(lambda p, g: free(g, 8 * g.numel() - 8)), refused=True),
    "gradient of another shape": Kind(
        twist=lambda ps: setattr(ps[0].grad, "data", ps[0].grad[:2].clone()), refused=True
    ),
    "gradient with another number of dimensions": Kind(
        twist=lambda ps: setattr(ps[0].grad, "data", ps[0].grad[:, 0].clone()), refused=True
    ),
    "gradient resized in place": Kind(twist=lambda ps: ps[0].grad.resize_(2, 8), refused=True),
    "gradient of another type": Kind(twist=lambda ps: setattr(ps[0].grad, "data", ps[0].grad.float())),
    "parameter cut after its gradient": Kind(twist=lambda ps: setattr(ps[0], "data", ps[0].data[:3]), refused=True),
    # What becomes of them between two steps.
    "data replaced": Kind(change=data(lambda x: x.clone() * 2)),
    "data transposed": Kind(lambda: [parameter(normal((6, 6), 0))], change=data(lambda x: x.t())),
    "data of another type": Kind(change=data(lambda x: x.float())),
    "data negated": Kind(change=data(torch._neg_view)),
    "resized in place": Kind(change=resized_in_place, refused=True),
    "cut at the same address": Kind(change=data(lambda x: x[:2]), refused=True),
    "pruned": Kind(change=data(lambda x: x[3:].clone()), refused=True),
    "grown": Kind(change=data(lambda x: torch.cat([x] * 200)), refused=True),
    "pruned with a new state": Kind(change=lambda ps, o: (set_data(ps[0], ps[0].data[3:].clone()), o.state.pop(ps[0]))),
    "swapped": Kind(change=swapped),
    "another in its place": Kind(change=another_in_its_place),
    "freed": Kind(change=lambda ps, o: free(ps[0]), refused=True),
    "storage cut": Kind(change=lambda ps, o: free(ps[0], 8 * ps[0].numel() - 8), refused=True),
    "freed and filled again": Kind(change=freed_and_filled),
    "in shared memory": Kind(change=lambda ps, o: ps[0].share_memory_()),
    "in another list": Kind(change=lambda ps, o: o.param_groups[-1].update(params=[*o.param_groups[-1]["params"]])),
    "states replaced": Kind(change=states(lambda s: s * 2)),
    "states moved": Kind(change=states(lambda s: set_data(s, s.data * 2))),
    "states of another type": Kind(change=states(lambda s: s.float())),
    "states negated": Kind(change=states(lambda s: torch._neg_view(-s))),
    "states in shared memory": Kind(change=states(lambda s: s.share_memory_())),
    "states resized in place": Kind(change=states(lambda s: s.resize_(2)), refused=True),
    "states of another shape": Kind(change=states(lambda s: s[:2].clone()), refused=True),
    "states freed": Kind(change=states(free), refused=True),
    "states that are one": Kind(lambda: [parameter(normal((4,), i)) for i in range(2)], change=shared_states),
    "a state gone": Kind(change=one_state_gone),
    "all states gone": Kind(change=lambda ps, o: o.state.clear()),
    "something else in a state": Kind(change=lambda ps, o: o.state[ps[0]].update(mine=torch.ones(3))),
    "a count of its own": Kind(change=count(lambda t: torch.tensor(9.0))),
    "a count that is a number": Kind(change=count(lambda t: 9)),
    "a wide count": Kind(change=count(lambda t: torch.tensor([9.0], dtype=torch.float64))),
    "a count moved": Kind(change=count(lambda t: set_data(t, torch.tensor(9.0)))),
}


# Once more where a plan has been made for others.
LATE = {
    f"{name}, later": replace(kind, give=lambda ps, grads, t, give=kind.give: grads if t < 2 else give(ps, grads, t))
    for name, kind in KINDS.items()
    if "gradient" in name
}
KINDS |= LATE


def run(system, kind, options, steps=4):
    """The parameters and states in the end, and how the run was refused, if it was."""
    params = kind.make()
    try:
        optimizer = SYSTEMS[system](params, **options)
        for t in range(steps):
            if t == 2:
                kind.change(params, optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                grads = kind.give(params, [draw(p, t, i) for i, p in enumerate(params)], t)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            if t >= 2:
                kind.twist(params)
            if options == REFERENCE:
                optimizer._plan = None  # nothing is taken over from the last step
            optimizer.step()
    except REFUSALS as error:
        return None, f"{type(error).__name__}: {error}"
    states = [
        state[name] for state in optimizer.state.values() for name in (*optimizer.state_names, "step") if name in state
    ]
    return [p.detach() for p in params] + states, ""


def parts(t):
    if isinstance(t, TwoTensor):
        return [*parts(t.a), *parts(t.b)]
    if not isinstance(t, torch.Tensor):
        return [torch.as_tensor(t, dtype=torch.float64)]
    if torch._is_functional_tensor(t):
        torch._sync(t)
        t = torch._from_functional_tensor(t)
    t = t.detach().as_subclass(torch.Tensor)
    if t.device.type == "meta":
        return [torch.zeros(t.shape)]
    t = t.resolve_conj().resolve_neg()
    return [torch.view_as_real(t) if t.is_complex() else t]


def tolerance(tensors):
    """Of four steps on numbers of order one: a few roundings of the coarsest type."""
    return max(16 * torch.finfo(t.dtype).eps for t in tensors)


def assert_as_the_reference(system, name, *options):
    expected, refused = run(system, KINDS[name], REFERENCE)
    if KINDS[name].refused:
        assert refused, "the reference takes it"
    for chosen in options:
        actual, how = run(system, KINDS[name], chosen)
        assert bool(how) == bool(refused), f"{how or 'taken'}, where the reference: {refused or 'takes it'}"
        if refused:
            assert "INTERNAL ASSERT" not in how
            continue
        pairs = [pair for a, e in zip(actual, expected, strict=True) for pair in zip(parts(a), parts(e), strict=True)]
        bound = tolerance([x for x, _ in pairs])
        for x, y in pairs:
            assert x.shape == y.shape
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, atol=bound, rtol=bound, equal_nan=True)


# What becomes of tensors is the engine's matter, what they are also each rule's.
WHAT = list(KINDS)[: list(KINDS).index("no gradients")]
CASES = [(system, name) for system in SYSTEMS for name in (KINDS if system in THOROUGH else WHAT)]
# Which plan was made for others is no matter of the rule.
CASES = [
    (system, name) for system, name in CASES if name not in LATE or system in ("adan-clip", "adamp", "spam-sparse")
]


@pytest.mark.parametrize(("system", "name"), CASES)
def test_compiled_code_and_lists_are_the_reference_or_refuse(system, name):
    assert_as_the_reference(system, name, {}, dict(foreach=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("through", ["dlpack", "python"])
@pytest.mark.parametrize("system", ["adan-clip", "spam-sparse"])
def test_every_look_sees_it(system, through, name, monkeypatch):
    """Also where there is no C++ compiler, or none at all."""
    monkeypatch.setattr(look, "native", LOOKS[through])
    assert_as_the_reference(system, name, {})


@pytest.mark.parametrize("through", LOOKS)
def test_a_gradient_in_the_place_of_the_last_one(through, monkeypatch):
    """Another object at the same address, of the same memory, that is negated."""
    monkeypatch.setattr(look, "native", LOOKS[through])
    memory = normal((3,), 1)
    params, twins = [parameter(normal((3,), 0))], [parameter(normal((3,), 0))]
    optimizer, reference = SYSTEMS["adan"](params), SYSTEMS["adan"](twins, foreach=False)
    for t in range(8):
        params[0].grad = None
        params[0].grad = torch._neg_view(memory) if t % 2 else memory.detach()
        optimizer.step()
    for t in range(8):
        twins[0].grad = memory * (-1) ** t
        reference.step()
    torch.testing.assert_close(params[0], twins[0], atol=1e-14, rtol=0)


# Triton's interpreter is slow, on large tensors most of all, and cuts bfloat16 off instead of rounding it.
INTERPRETED = [n for n in KINDS if n not in ("large", "tied in part", "low precision", "meta")]
# All that other kernels read for themselves: where tensors lie, and of what type they are.
OF_KERNELS = [
    *(n for n in INTERPRETED if n in WHAT),
    *("expanded gradient", "gradient of other strides", "gradient with gaps", "gradient of another type"),
    *("data transposed", "states of another type", "states replaced", "pruned with a new state"),
]


@pytest.mark.parametrize(
    ("system", "name"),
    [
        (system, n)
        for system in ("adan-clip", "adamp", "spam-sparse")
        for n in (INTERPRETED if system == "adan-clip" else OF_KERNELS)
    ],
)
def test_kernels_are_the_reference_or_refuse(interpreter, system, name):
    assert_as_the_reference(system, name, dict(fused=True))


def test_fused_is_refused_where_there_is_no_memory(interpreter):
    for make in SYSTEMS.values():
        with pytest.raises(
            ValueError, match="fused=True needs parameters on a CUDA device and Triton; got one on meta"
        ):
            make(KINDS["meta"].make(), fused=True)


@pytest.mark.parametrize("options", [dict(), dict(foreach=True), dict(foreach=False), dict(capturable=True)], ids=str)
@pytest.mark.parametrize("system", SYSTEMS)
def test_fake_tensors_step_and_leave_real_ones_alone(system, options):
    """As estimates of memory and traces have them, beside real ones of the same optimizer's making."""
    params = base()
    kept = [p.detach().clone() for p in params]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [parameter(torch.empty(4, 3)), parameter(torch.empty(5))]
        optimizer = SYSTEMS[system](fakes, **options)
        for _ in range(2):
            for p in fakes:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert all(
            s.shape == p.shape for p in fakes for n, s in optimizer.state[p].items() if n == optimizer.state_names[0]
        ) or (system == "spam-sparse")
    for p, old in zip(params, kept, strict=True):
        assert torch.equal(p, old)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_mode_sees_every_operation(system):
    """What watches operations (counters, traces, fakes) finds none in compiled code: there the reference runs."""

    class Watch(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Watch.seen += 1
            return func(*args, **(kwargs or {}))

    results = []
    for options in ({}, dict(foreach=False)):
        params = base()
        optimizer = SYSTEMS[system](params, **options)
        for t in range(4):
            for i, p in enumerate(params):
                p.grad = draw(p, t, i)
            if options or t in (0, 3):
                optimizer.step()
                continue
            Watch.seen = 0
            with Watch():
                optimizer.step()
            assert Watch.seen > 3
        results.append(params)
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-13, rtol=0)


@pytest.fixture(scope="module")
def mesh():
    """A mesh of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("needs torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    distributed.destroy_process_group()


@pytest.mark.parametrize("options", [dict(), dict(foreach=True), dict(foreach=False)], ids=str)
@pytest.mark.parametrize("system", [s for s in SYSTEMS if s != "spam-sparse"])
def test_shards_of_several_meshes_beside_plain_tensors(mesh, system, options):
    """Lists of one kind each: a _foreach_ call on shards of two meshes, or on shards and plain tensors, fails."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placed = [(mesh["a"], [Shard(0)]), (mesh["b"], [Shard(0)]), (mesh["a"], [Replicate()]), None]
    starts = [normal((6, 4), i) for i in range(len(placed))]

    def place(t, i):
        return t if placed[i] is None else distribute_tensor(t, *placed[i])

    results = []
    for make, chosen in ((place, options), (lambda t, i: t, dict(foreach=False))):
        params = [parameter(make(t.clone(), i)) for i, t in enumerate(starts)]
        optimizer = SYSTEMS[system](params, **chosen)
        for t in range(4):
            for i, p in enumerate(params):
                p.grad = make(normal((6, 4), 100 * t + i), i)
            if t == 2:  # moved, as offloading does
                local = getattr(params[0], "_local_tensor", params[0])
                local.data = local.data.clone()
            if t == 3 and make is place:  # another tensor, as resharding does
                params[1]._local_tensor = params[1]._local_tensor.clone()
            optimizer.step()
        results.append([p.full_tensor() if hasattr(p, "full_tensor") else p for p in map(torch.Tensor.detach, params)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=0)


def test_a_transformed_function_is_refused_or_steps():
    """Inside of torch.func's transforms tensors are of the plain type, and have no memory."""
    for system, make in SYSTEMS.items():

        def step(x, make=make):
            p = parameter(x)
            optimizer = make([p])
            p.grad = torch.ones_like(p)
            optimizer.step()
            return p.detach()

        try:
            told = str(torch.vmap(step)(normal((3, 4, 2), 0)).isfinite().all())
        except REFUSALS as error:
            told = str(error)
        assert "INTERNAL ASSERT" not in told, system
        assert told != "tensor(False)", system
