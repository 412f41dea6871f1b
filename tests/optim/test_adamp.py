"""AdamP and SGDP against their equations, the paper's identities, their relatives, and what their users may do wrong."""

import copy
import math

import numpy as np
import pytest
import torch
from references_for_tests import assert_same, give, gradients, normal, numbers, parameters, run, snapshot

from polyak.core.projection import cosines, project_out
from polyak.optim import SGDP, AdamP
from polyak.optim.adamp import effective_step, radial_fraction

SHAPES = [(5,), (3, 3), (2, 3, 3, 3), (2, 1100), (2, 65), (1,), ()]
CLOSE = 1e-12  # float64, a few dozen operations a step on numbers of order one
BACKENDS = {"eager": dict(foreach=False), "compiled": {}, "kernel": dict(fused=True)}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "kernel":
        request.getfixturevalue("interpreter")
    return BACKENDS[request.param]


def orthogonal(g, w, view):
    """``g`` without its part along each row of ``w`` (NumPy)."""
    shape = (len(w), -1) if view == "channel" else (1, -1)
    a, b = g.reshape(shape), w.reshape(shape)
    return (a - b * (a * b).sum(1, keepdims=True) / (b * b).sum(1, keepdims=True)).reshape(g.shape)


def reference_projection(u, w, g, o):
    """The published test and projection in NumPy: the new step and the factor of the weight decay."""
    if w.ndim < 2 or o["projection"] == "never":
        return u, 1.0, None
    for view in ("channel", "layer"):
        shape = (len(w), -1) if view == "channel" else (1, -1)
        w_, g_, u_ = (x.reshape(shape) for x in (w, g, u))
        norms = np.linalg.norm(w_, axis=1), np.linalg.norm(g_, axis=1)
        cosine = np.abs((w_ * g_).sum(1)) / np.maximum(norms[0] * norms[1], o["eps"])
        chosen = (
            o["projection"] == view if o["projection"] != "auto" else cosine.max() < o["delta"] / np.sqrt(w_.shape[1])
        )
        if chosen:
            n = w_ / (norms[0][:, None] + o["eps"])
            return (u_ - n * (u_ * n).sum(1, keepdims=True)).reshape(u.shape), o["wd_ratio"], view
    return u, 1.0, None


COMMON = dict(weight_decay=0.0, delta=0.1, wd_ratio=0.1, nesterov=False, eps=1e-8, projection="auto", maximize=False)


def reference(kind, values, steps, options):
    """AdamP or SGDP in NumPy; ``steps`` are functions (t, i, w) -> gradient. Also returns the views chosen."""
    more = dict(lr=1e-3, betas=(0.9, 0.999), momentum=0.0, dampening=0.0, project_buffer=False)
    o = {**COMMON, **more, **options}
    values = [np.array(v) for v in values]
    first, second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]
    views = []
    for t, give_gradient in enumerate(steps, 1):
        chosen = []
        for i, w in enumerate(values):
            g = give_gradient(i, w)
            g = -g if o["maximize"] else g
            if kind == "adamp":
                b1, b2 = o["betas"]
                first[i] = b1 * first[i] + (1 - b1) * g
                second[i] = b2 * second[i] + (1 - b2) * g * g
                m = b1 * first[i] + (1 - b1) * g if o["nesterov"] else first[i]
                u = m / (np.sqrt(second[i]) / math.sqrt(1 - b2**t) + o["eps"])
                size, decay = o["lr"] / (1 - b1**t), o["lr"] * o["weight_decay"]
            else:
                first[i] = o["momentum"] * first[i] + (1 - o["dampening"]) * g
                u = g + o["momentum"] * first[i] if o["nesterov"] else first[i]
                size, decay = o["lr"], o["lr"] * o["weight_decay"] / (1 - o["momentum"])
            u, ratio, view = reference_projection(u, w, g, o)
            if kind == "sgdp" and o["project_buffer"] and not o["nesterov"]:
                first[i] = u
            values[i] = w * (1 - decay * ratio) - size * u
            chosen.append(view)
        views.append(chosen)
    return values, views


def scripted(seed):
    """Four steps of gradients that are orthogonal by rows (tensors 1, 3), as a whole (2, 4), or, at the third, to nothing."""

    def at(t):
        def gradient(i, w):
            g = normal(w.shape, 1000 * (t + 1) + 10 * seed + i).numpy()
            if w.ndim < 2 or t == 2:
                return g
            return orthogonal(g, w, "channel" if i in (1, 3) else "layer")

        return gradient

    return [at(t) for t in range(4)]


MAKERS = {"adamp": AdamP, "sgdp": SGDP}
CASES = {
    "adamp": ("adamp", dict(lr=0.02)),
    "adamp-decay": ("adamp", dict(lr=0.02, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3, wd_ratio=0.25)),
    "adamp-nesterov": ("adamp", dict(lr=0.02, weight_decay=0.1, nesterov=True, maximize=True)),
    "adamp-channel": (
        "adamp",
        dict(lr=0.02, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3, wd_ratio=0.25, projection="channel"),
    ),
    "adamp-layer": ("adamp", dict(lr=0.02, weight_decay=0.1, projection="layer")),
    "adamp-never": ("adamp", dict(lr=0.02, weight_decay=0.1, projection="never")),
    "adamp-infinite": ("adamp", dict(lr=0.02, delta=math.inf)),
    "sgdp": ("sgdp", dict(lr=0.02)),
    "sgdp-momentum": ("sgdp", dict(lr=0.02, momentum=0.9, dampening=0.3, weight_decay=0.1)),
    "sgdp-nesterov": ("sgdp", dict(lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)),
    "sgdp-buffer": ("sgdp", dict(lr=0.02, momentum=0.9, weight_decay=0.1, project_buffer=True)),
}


# Of each branch in the kernels one.
KERNELS = (
    "adamp-nesterov",
    "adamp-channel",
    "adamp-never",
    "sgdp-momentum",
    "sgdp-nesterov",
    "sgdp-buffer",
)


def make(kind, params, options, **more):
    options = dict(options)
    group = {"params": params, "projection": options.pop("projection", "auto")}
    return MAKERS[kind]([group], **options, **more)


@pytest.mark.parametrize("name", CASES)
def test_trajectory_equals_the_equations(name, backend):
    kind, options = CASES[name]
    if "fused" in backend and name not in KERNELS:
        pytest.skip("Triton's interpreter is slow")
    params = parameters(SHAPES)
    expected, views = reference(kind, numbers(params), scripted(3), options)
    optimizer = make(kind, params, options, record=True, **backend)
    steps = scripted(3)
    for gradient, chosen in zip(steps, views, strict=True):
        give(params, [torch.from_numpy(np.asarray(gradient(i, p.detach().numpy()))) for i, p in enumerate(params)])
        optimizer.step()
        assert [optimizer.last_projection[p] for p in params] == chosen
    assert_same(params, expected, atol=CLOSE)
    assert any("channel" in c for c in views) or options.get("projection") in ("layer", "never")
    if options.get("projection", "auto") == "auto" and "delta" not in options:
        assert {view for chosen in views for view in chosen} == {None, "channel", "layer"}


# The paper's identities, on the Rayleigh quotient of its toy problem: h(w / ||w||) does not depend on ||w||.


class Rayleigh:
    def __init__(self, seed, dims=10):
        self.spectrum = torch.linspace(0.1, 1.0, dims, dtype=torch.float64)
        w = normal((1, dims), seed)
        self.w = torch.nn.Parameter(0.5 * w / w.norm())

    def loss(self):
        n = self.w / self.w.norm()
        return (self.spectrum * n * n).sum()

    def train(self, optimizer, steps):
        norms, updates = [self.w.detach().norm() ** 2], []
        for _ in range(steps):
            before = self.w.detach().clone()
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
            updates.append((self.w.detach() - before).norm() ** 2)
            norms.append(self.w.detach().norm() ** 2)
        return torch.stack(norms), torch.stack(updates)


def test_projected_norms_grow_by_the_step_alone(backend):
    problem = Rayleigh(0)
    # The default eps in ||w|| + eps would leave 2 eps / ||w|| of the radial part, 1e-8 here.
    optimizer = SGDP([problem.w], lr=0.5, momentum=0.9, delta=math.inf, eps=1e-30, **backend)
    norms, updates = problem.train(optimizer, 20)
    assert_same([norms[1:] - norms[:-1]], [updates], atol=1e-10)


def test_momentum_grows_norms_faster():
    """||w||^2 grows by lr^2 ||p_t||^2 + 2 lr^2 sum_k b^(t-k) ||p_k||^2 with heavy-ball momentum: the paper's identity."""
    problem, lr, b = Rayleigh(0), 0.5, 0.9
    norms, updates = problem.train(torch.optim.SGD([problem.w], lr=lr, momentum=b), 200)
    for t in range(200):
        past = sum(b ** (t - k) * updates[k] for k in range(t))
        assert float(norms[t + 1] - norms[t]) == pytest.approx(float(updates[t] + 2 * past), abs=1e-10)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_step_is_orthogonal_and_norms_never_shrink(kind, backend):
    params = [torch.nn.Parameter(normal((6, 40), 0)), torch.nn.Parameter(normal((3, 4, 5), 1))]
    optimizer = make(kind, params, dict(lr=0.1, projection="channel"), **backend)
    for grads in gradients([(6, 40), (3, 4, 5)], 5):
        before = snapshot(params)
        run(optimizer, params, [grads])
        for p, w in zip(params, before, strict=True):
            step, rows = (p.detach() - w).flatten(1), w.flatten(1)
            # eps in ||w|| + eps leaves 2 eps / ||w|| of the radial part.
            assert (step * rows).sum(1).abs().max() <= 1e-6
            assert (p.detach().flatten(1).norm(dim=1) >= rows.norm(dim=1) - 1e-7).all()


# Relatives.


def test_without_a_threshold_it_is_adamw(backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer = AdamP(params, lr=0.01, weight_decay=0.1, delta=0.0, **backend)
    adamw = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.1)
    for grads in gradients(SHAPES, 3):
        run(optimizer, params, [grads])
        run(adamw, twins, [grads])
    assert_same(params, twins, atol=CLOSE)


def test_without_a_threshold_it_is_sgd(backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer = SGDP(params, lr=0.01, momentum=0.9, weight_decay=0.1, delta=0.0, **backend)
    sgd = torch.optim.SGD(twins, lr=0.01, momentum=0.9)
    for grads in gradients(SHAPES, 3):
        run(optimizer, params, [grads])
        with torch.no_grad():
            for p in twins:
                p.mul_(1 - 0.01 * 0.1 / (1 - 0.9))
        run(sgd, twins, [grads])
    assert_same(params, twins, atol=CLOSE)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_official_code(kind, backend):
    """Bit for bit the same decisions, and the same numbers to rounding, as the authors' package."""
    official = pytest.importorskip("adamp")
    options = dict(lr=0.02, weight_decay=0.1) | (dict(momentum=0.9, project_buffer=True) if kind == "sgdp" else {})
    params, twins = parameters(SHAPES[:5]), parameters(SHAPES[:5])
    optimizer = MAKERS[kind](params, **options, **backend)
    options.pop("project_buffer", None)
    other = getattr(official, kind.upper() if kind == "sgdp" else "AdamP")(twins, **options)
    for gradient in scripted(1):
        for opt, ps in ((optimizer, params), (other, twins)):
            give(ps, [torch.from_numpy(np.asarray(gradient(i, p.detach().numpy()))) for i, p in enumerate(ps)])
            opt.step()
    assert_same(params, twins, atol=CLOSE)


# The test.


@pytest.mark.parametrize("shape", [(4, 100), (2, 5, 10), (3, 2000)])
def test_the_threshold_is_delta_over_the_root_of_the_row_length(shape, backend):
    length = math.prod(shape[1:])
    w = normal(shape, 0)
    for factor, expected in ((0.99, "channel"), (1.01, None)):
        cosine = factor * 0.1 / math.sqrt(length)
        rows, noise = (
            w.flatten(1),
            torch.from_numpy(orthogonal(normal(shape, 1).numpy(), w.numpy(), "channel")).flatten(1),
        )
        n, m = rows / rows.norm(dim=1, keepdim=True), noise / noise.norm(dim=1, keepdim=True)
        g = m.clone()
        g[-1] = cosine * n[-1] + math.sqrt(1 - cosine**2) * m[-1]  # one row of all decides
        p = torch.nn.Parameter(w.clone())
        optimizer = AdamP([p], record=True, **backend)
        # The other rows are exactly orthogonal: the layer's cosine is far from its threshold for one of these only if
        assert cosines(g.view(shape), w, "channel").max() == pytest.approx(cosine, rel=1e-9)
        by_layer = cosines(g.view(shape), w, "layer").item() < 0.1 / math.sqrt(w.numel())
        give([p], [g.view(shape)])
        optimizer.step()
        assert optimizer.last_projection[p] == (expected or ("layer" if by_layer else None))


def test_the_layers_threshold_is_delta_over_the_root_of_all_elements(backend):
    w = normal((4, 30), 0)
    noise = torch.from_numpy(orthogonal(normal((4, 30), 1).numpy(), w.numpy(), "layer"))
    for factor, expected in ((0.99, "layer"), (1.01, None)):
        cosine = factor * 0.1 / math.sqrt(120)
        g = cosine * w / w.norm() + math.sqrt(1 - cosine**2) * noise / noise.norm()
        assert cosines(g, w, "channel").max() > 0.1 / math.sqrt(30)  # not by rows
        p = torch.nn.Parameter(w.clone())
        optimizer = AdamP([p], record=True, **backend)
        give([p], [g])
        optimizer.step()
        assert optimizer.last_projection[p] == expected


def test_the_test_uses_the_raw_gradient(backend):
    """After a step along the weight, momentum is radial; the present gradient is orthogonal, and that decides."""
    w = normal((3, 50), 0)
    p = torch.nn.Parameter(w.clone())
    optimizer = SGDP([p], lr=1e-6, momentum=0.9, record=True, **backend)
    give([p], [w])
    optimizer.step()
    assert optimizer.last_projection[p] is None
    give([p], [torch.from_numpy(orthogonal(normal((3, 50), 1).numpy(), p.detach().numpy(), "channel"))])
    optimizer.step()
    assert optimizer.last_projection[p] == "channel"


def test_momentum_is_not_projected_unless_asked(backend):
    w = normal((3, 50), 0)
    buffers = {}
    for project_buffer in (False, True):
        p = torch.nn.Parameter(w.clone())
        optimizer = SGDP([p], lr=0.1, momentum=0.9, project_buffer=project_buffer, delta=math.inf, **backend)
        give([p], [w])
        optimizer.step()
        buffers[project_buffer] = optimizer.state[p]["momentum_buffer"]
    assert torch.equal(buffers[False], w)
    assert buffers[True].abs().max() < 1e-7


def test_views_are_equivariant(backend):
    shape, order = (6, 30), torch.tensor([3, 1, 5, 0, 2, 4])
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=torch.float64)[:, None]
    w, g = normal(shape, 0), normal(shape, 1)

    def step(w, g, view):
        p = torch.nn.Parameter(w.clone())
        give([p], [g])
        make("sgdp", [p], dict(lr=0.1, projection=view), **backend).step()
        return p.detach()

    assert_same([step(w[order], g[order], "layer")], [step(w, g, "layer")[order]], atol=CLOSE)
    assert_same([step(signs * w, signs * g, "channel")], [signs * step(w, g, "channel")], atol=CLOSE)


def test_a_normalized_convolution_is_found_and_a_plain_layer_is_not(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(8, 5),
    ).double()  # fmt: skip
    optimizer = AdamP(model.parameters(), lr=1e-3, record=True, **backend)
    loss = torch.nn.functional.cross_entropy(model(normal((16, 3, 8, 8), 0)), torch.arange(16) % 5)
    loss.backward()
    conv, linear = model[0].weight, model[5].weight
    assert cosines(conv.grad, conv.detach(), "channel").max() < 1e-4  # batch norm's own eps is what is left
    optimizer.step()
    assert optimizer.last_projection[conv] == "channel"
    assert optimizer.last_projection[linear] is None
    assert optimizer.last_projection[model[1].weight] is None


def test_channels_last_weights(backend):
    w = normal((8, 4, 3, 3), 0)
    params = [torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.clone().to(memory_format=torch.channels_last))]
    for p in params:
        give([p], [normal((8, 4, 3, 3), 1)])
        AdamP([p], lr=0.1, delta=math.inf, **backend).step()
    assert_same([params[1]], [params[0]], atol=CLOSE)


def test_a_transposed_weight(backend):
    w = normal((30, 20), 0)
    params = [torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.t().contiguous().t())]
    for p in params:
        give([p], [normal((30, 20), 1)])
        AdamP([p], lr=0.1, delta=math.inf, **backend).step()
    assert_same([params[1]], [params[0]], atol=CLOSE)


# Edges.


def test_zero_rows_gradients_and_tensors_without_elements(backend):
    zero_row = normal((3, 20), 0)
    zero_row[1] = 0
    params = [torch.nn.Parameter(t) for t in (zero_row, normal((3, 20), 1), torch.zeros(0, 4, dtype=torch.float64))]
    before = snapshot(params)
    optimizer = AdamP(params, lr=0.1, weight_decay=1.0, delta=math.inf, record=True, **backend)
    give(params, [normal((3, 20), 2), torch.zeros(3, 20), torch.zeros(0, 4)])
    optimizer.step()
    assert torch.isfinite(params[0]).all()
    assert (params[0][1].abs() > 0.09).all()  # a zero row has no direction to take out
    # A zero gradient counts as orthogonal: decay is multiplied by wd_ratio.
    assert_same([params[1]], [before[1] * (1 - 0.1 * 1.0 * 0.1)], atol=CLOSE)
    assert optimizer.last_projection[params[2]] is None


def test_a_nan_stays_in_its_row(backend):
    p = torch.nn.Parameter(normal((3, 20), 0))
    g = normal((3, 20), 1)
    g[0, 0] = math.nan
    give([p], [g])
    make("adamp", [p], dict(lr=0.1, projection="channel"), **backend).step()
    assert torch.isnan(p[0]).all()
    assert torch.isfinite(p[1:]).all()
    q = torch.nn.Parameter(normal((3, 20), 0))
    give([q], [g])
    AdamP([q], lr=0.1, **backend).step()  # a NaN cosine is not below the threshold
    assert torch.isnan(q).sum() == 1


@pytest.mark.parametrize("kind", MAKERS)
def test_an_infinity_fails_the_test_and_stays_where_it_is(kind, backend):
    p = torch.nn.Parameter(normal((3, 20), 0))
    g = torch.from_numpy(orthogonal(normal((3, 20), 1).numpy(), p.detach().numpy(), "channel"))
    g[0, 0] = math.inf
    give([p], [g])
    optimizer = make(kind, [p], dict(lr=0.1), record=True, **backend)
    optimizer.step()
    assert optimizer.last_projection[p] is None
    assert (~torch.isfinite(p)).nonzero().tolist() == [[0, 0]]


def test_low_precision_is_computed_in_float32(backend):
    """Exact float64 arithmetic, rounded to bfloat16 once a step, is at most two numbers away."""
    w = normal((8, 200), 0).bfloat16()
    p, q = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.double())
    g = normal((8, 200), 1).bfloat16()
    for x in (p, q):
        give([x], [g.to(x.dtype)])
        AdamP([x], lr=0.01, delta=math.inf, state_dtype=torch.float32, **(backend if x is p else {})).step()
    # The interpreter of the kernels truncates instead of rounding.
    assert ((p - q).abs() <= 2**-7 * q.abs().clamp(min=2**-6)).all()


def test_complex_matrices():
    values = [torch.view_as_complex(normal((*s, 2), i)) for i, s in enumerate([(4, 6), (9,)])]
    grads = [torch.view_as_complex(normal((*s, 2), 10 + i)) for i, s in enumerate([(4, 6), (9,)])]
    results = []
    for options in (dict(foreach=False), {}):
        params = [torch.nn.Parameter(v.clone()) for v in values]
        give(params, grads)
        optimizer = AdamP(params, lr=0.1, delta=math.inf, record=True, **options)
        optimizer.step()
        assert [optimizer.last_projection[p] for p in params] == ["channel", None]
        results.append(snapshot(params))
    assert_same([torch.view_as_real(t) for t in results[1]], [torch.view_as_real(t) for t in results[0]], atol=CLOSE)
    step = torch.view_as_real(results[0][0] - values[0]).flatten(1)
    assert (step * torch.view_as_real(values[0]).flatten(1)).sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("projection", ["auto", "channel", "layer", "never"])
def test_differentiation_through_two_steps(kind, projection):
    options = dict(lr=0.1, weight_decay=0.1, delta=math.inf, projection=projection)
    options |= dict(momentum=0.9, nesterov=True) if kind == "sgdp" else {}

    def two_steps(start, first, second):
        p = start.clone()
        optimizer = make(kind, [p], options, differentiable=True)
        for g in (first, second):
            p.grad = g
            optimizer.step()
        return p

    arguments = [normal((3, 4), i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(two_steps, arguments, eps=1e-6, atol=1e-6)


# Peers.


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("options", [dict(), dict(delta=10.0), dict(nesterov=True, delta=10.0)], ids=str)
def test_the_same_as_pytorch_optimizer(kind, options):
    theirs = pytest.importorskip("pytorch_optimizer")
    # Its AdamP adds eps before the correction of the bias: without eps both are the same.
    options = dict(lr=0.02, weight_decay=0.1, **options) | (dict(momentum=0.9) if kind == "sgdp" else dict(eps=1e-30))
    params, twins = parameters(SHAPES[:5]), parameters(SHAPES[:5])
    optimizer = MAKERS[kind](params, record=True, **options)
    other = getattr(theirs, {"adamp": "AdamP", "sgdp": "SGDP"}[kind])(twins, **options)
    for gradient in scripted(1):
        for opt, ps in ((optimizer, params), (other, twins)):
            give(ps, [torch.from_numpy(np.asarray(gradient(i, p.detach().numpy()))) for i, p in enumerate(ps)])
            opt.step()
    assert_same(params, twins, atol=CLOSE)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_checkpoint_of_pytorch_optimizer_goes_on(kind):
    """It counts the steps of AdamP in the param group, and has foreach=False by default."""
    theirs = pytest.importorskip("pytorch_optimizer")
    options = dict(lr=0.02, weight_decay=0.1) | (dict(momentum=0.9) if kind == "sgdp" else dict(eps=1e-30))
    params = parameters(SHAPES[:3])
    other = getattr(theirs, {"adamp": "AdamP", "sgdp": "SGDP"}[kind])(params, **options)
    steps = gradients(SHAPES[:3], 6)
    run(other, params, steps[:4])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = MAKERS[kind](copies, **options)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert "step" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["foreach"] is None
    run(other, params, steps[4:])
    run(optimizer, copies, steps[4:])
    assert_same(copies, params, atol=CLOSE)


def test_moments_without_a_count_of_steps_are_refused():
    params = parameters([(3, 4)])
    optimizer = AdamP(params)
    state = {0: {"exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(3, 4)}}
    with pytest.raises(ValueError, match="parameter 0 has no step, which AdamP counts"):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    assert not optimizer.state


@pytest.mark.parametrize("kind", MAKERS)
def test_a_checkpoint_goes_on_where_it_was(kind, backend):
    options = dict(lr=0.02, weight_decay=0.1) | (dict(momentum=0.9) if kind == "sgdp" else {})
    params = parameters(SHAPES)
    optimizer = MAKERS[kind](params, **options, **backend)
    steps = gradients(SHAPES, 4)
    run(optimizer, params, steps[:2])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = MAKERS[kind](copies, **options, **backend)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, steps[2:])
    run(other, copies, steps[2:])
    assert_same(copies, params)


def test_a_checkpoint_of_the_official_sgdp():
    params = parameters([(3, 4)])
    optimizer = SGDP(params, lr=0.1, momentum=0.9)
    theirs = dict(lr=0.1, momentum=0.9, dampening=0, weight_decay=0, nesterov=False, eps=1e-8, delta=0.1, wd_ratio=0.1)
    buffer = normal((3, 4), 5)
    optimizer.load_state_dict({"state": {0: {"momentum": buffer}}, "param_groups": [{**theirs, "params": [0]}]})
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], buffer)


# Diagnostics.


def test_radial_fraction_and_effective_step():
    w = normal((3, 50), 0)
    p, bias = torch.nn.Parameter(w.clone()), torch.nn.Parameter(normal((3,), 1))
    optimizer = SGDP([p, bias], lr=0.1, momentum=0.9, delta=math.inf)
    assert radial_fraction(optimizer) == {}
    tangent = torch.from_numpy(orthogonal(normal((3, 50), 2).numpy(), w.numpy(), "channel"))
    tangent *= (w.norm(dim=1) / tangent.norm(dim=1))[:, None]
    give([p, bias], [w + tangent, bias.detach()])
    optimizer.param_groups[0]["lr"] = 0.0  # the weight stays, the buffer fills
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    assert list(radial_fraction(optimizer)) == [p]
    assert float(radial_fraction(optimizer)[p]) == pytest.approx(math.sqrt(0.5), abs=1e-12)
    assert float(effective_step(optimizer)[p]) == pytest.approx(0.1, abs=1e-12)
    adamw = torch.optim.AdamW([p], lr=0.1)
    adamw.step()
    assert 0 < float(radial_fraction(adamw)[p]) < 1
    assert float(effective_step(adamw)[p]) > 0


def test_project_out():
    w, u = normal((3, 4, 5), 0), normal((3, 4, 5), 1)
    by_rows, whole = project_out(u, w, "channel", 0.0), project_out(u, w, "layer", 0.0)
    assert (by_rows.flatten(1) * w.flatten(1)).sum(1).abs().max() < CLOSE
    assert (whole * w).sum().abs() < CLOSE
    assert_same([project_out(by_rows, w, "channel", 0.0)], [by_rows], atol=CLOSE)
    with pytest.raises(ValueError, match="view"):
        project_out(u, w, "row")


def test_last_projection_is_kept_on_request():
    optimizer = AdamP(parameters([(3, 4)]))
    with pytest.raises(RuntimeError, match="record=True"):
        _ = optimizer.last_projection


# Bad input.


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("adamp", dict(delta=-0.1), "delta"), ("adamp", dict(delta=math.nan), "delta"),
        ("adamp", dict(wd_ratio=1.1), "wd_ratio"), ("adamp", dict(wd_ratio=-0.1), "wd_ratio"),
        ("adamp", dict(eps=0.0), "eps"), ("adamp", dict(lr=-1.0), "lr"), ("adamp", dict(lr=math.nan), "lr"),
        ("adamp", dict(weight_decay=-1.0), "weight_decay"), ("adamp", dict(betas=(0.9, 1.0)), "betas"),
        ("adamp", dict(betas=(0.9,)), "two betas"), ("adamp", dict(nesterov="yes"), "nesterov"),
        ("adamp", dict(projection="row"), "projection"), ("adamp", dict(record=1.5), "record"),
        ("sgdp", dict(lr=0.1, momentum=1.0), "momentum"), ("sgdp", dict(lr=0.1, momentum=-0.1), "momentum"),
        ("sgdp", dict(lr=0.1, nesterov=True), "Nesterov"), ("sgdp", dict(lr=0.1, dampening=-1.0), "dampening"),
        ("sgdp", dict(lr=0.1, momentum=0.9, dampening=0.1, nesterov=True), "Nesterov"),
        ("sgdp", dict(lr=0.1, project_buffer="yes"), "project_buffer"),
    ],
)  # fmt: skip
def test_bad_hyperparameters(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(kind, parameters([(3, 4)]), options)


def test_other_bad_input():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamP([])
    with pytest.warns(UserWarning, match="did you mean 'projection'"):
        AdamP([{"params": parameters([(3, 4)]), "projecton": "never"}])
    with pytest.raises(TypeError, match="lr"):
        SGDP(parameters([(3, 4)]))
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.zeros(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamP([p]).step()
    optimizer = AdamP(parameters([(3, 4)]))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="not one of AdamP"):
        optimizer.load_state_dict(
            {"state": {0: {"momentum_buffer": torch.zeros(3, 4)}}, "param_groups": before["param_groups"]}
        )
    assert optimizer.state_dict() == before
