"""MoNNA's optimizer by itself and with a transport that is made up: steps, options, and what its users may do wrong."""

import copy
import math

import pytest
import torch
from references_for_tests import assert_same, give, gradients, normal, parameters, run, snapshot

from polyak.optim import Adan, MoNNA
from polyak.optim.monna import nna
from polyak.optim.monna.transport import Alone, Patience

CLOSE = 1e-12  # float64, a dozen steps on numbers of order one
SHAPES = [(3,), (2, 4), (), (5, 1)]


def test_alone_it_is_sgd_with_averaged_momentum():
    params = parameters(SHAPES)
    steps = gradients(SHAPES, 12, absent={(0, 1), (4, 2)})
    expected, momenta = snapshot(params), [torch.zeros_like(p) for p in params]
    for grads in steps:
        for i, g in enumerate(grads):
            if g is not None:
                momenta[i] = 0.9 * momenta[i] + 0.1 * (g + 0.1 * expected[i])
                expected[i] = expected[i] - 0.3 * momenta[i]
    optimizer = run(MoNNA(params, lr=0.3, momentum=0.9, f=0, weight_decay=0.1), params, steps)
    assert_same(params, expected, atol=CLOSE)
    assert_same([optimizer.state[p]["exp_avg"] for p in params], momenta, atol=CLOSE)


def test_the_norm_that_is_clipped_is_over_all_groups_and_includes_the_decay():
    params = parameters([(4,), (3,)])
    optimizer = MoNNA(
        [{"params": [params[0]], "lr": 0.5}, {"params": [params[1]], "weight_decay": 0.3}],
        lr=0.1,
        momentum=0.0,
        f=0,
        max_norm=0.7,
    )
    (grads,) = gradients([(4,), (3,)], 1)
    full = [grads[0], grads[1] + 0.3 * params[1].detach()]
    factor = 0.7 / math.sqrt(sum(g.square().sum().item() for g in full))
    assert factor < 1
    expected = [p - lr * factor * g for p, lr, g in zip(snapshot(params), (0.5, 0.1), full, strict=True)]
    run(optimizer, params, [grads])
    assert_same(params, expected, atol=CLOSE)


class Fixed(Alone):
    """A transport whose other workers always send the same."""

    def __init__(self, others, size=None):
        self.others, self.size, self.rank = others, size or len(others) + 1, 0

    def exchange(self, vector, patience):
        self.sent, self.patience = vector.clone(), patience
        return [vector, *self.others]


def test_half_steps_are_sent_and_parameters_are_mixed():
    params = parameters([(2, 2), (3,)])
    others = [normal((7,), 50 + r) for r in range(4)]
    transport = Fixed(others)
    optimizer = MoNNA(params, lr=0.3, momentum=0.5, f=1, group=transport)
    half = torch.cat([p.detach().reshape(-1) for p in params])
    (grads,) = gradients([(2, 2), (3,)], 1)
    half = half - 0.3 * 0.5 * torch.cat([g.reshape(-1) for g in grads])
    run(optimizer, params, [grads])
    assert_same([transport.sent], [half], atol=CLOSE)
    assert transport.patience == Patience(need=4, everyone=True, timeout=30.0)
    assert_same([torch.cat([p.reshape(-1) for p in params])], [nna(half, others, 1)], atol=CLOSE)
    # Momenta are not mixed.
    assert_same([optimizer.state[p]["exp_avg"] for p in params], [0.5 * g for g in grads], atol=CLOSE)


@pytest.mark.parametrize(("wait", "left"), [("all", 1), ("n-f", 2)])
def test_who_is_missing_counts_to_the_faulty_where_all_are_waited_for(wait, left):
    p = torch.nn.Parameter(torch.zeros(3).double())
    others = [normal((3,), r) for r in range(5)]
    optimizer = MoNNA([p], lr=0.1, f=2, wait=wait, group=Fixed([*others, None]))
    give([p], [torch.zeros(3)])
    optimizer.step()
    assert_same([p], [nna(torch.zeros(3).double(), others, left)], atol=CLOSE)


def test_buffers_are_mixed_where_asked():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    buffers = [model[1].running_mean, model[1].running_var]
    others = [normal((14,), r, torch.float32) for r in range(2)]
    before = torch.cat([t.detach().reshape(-1) for t in (*model.parameters(), *buffers)])
    MoNNA(model.parameters(), lr=0.1, f=0, group=Fixed(others), buffers=buffers).step()
    found = torch.cat([t.detach().reshape(-1) for t in (*model.parameters(), *buffers)])
    assert_same([found], [nna(before, others, 0)])
    with pytest.raises(ValueError, match=r"buffers must be floating-point tensors, got torch\.int64"):
        MoNNA(model.parameters(), lr=0.1, f=0, buffers=[model[1].num_batches_tracked])


def test_types_are_exchanged_as_the_widest():
    params = [torch.nn.Parameter(torch.ones(2, dtype=t)) for t in (torch.bfloat16, torch.float32)]
    transport = Fixed([torch.tensor([3.0, 3.0, 3.0, 3.0])])
    MoNNA(params, lr=0.1, f=0, group=transport).step()
    assert transport.sent.dtype == torch.float32
    assert [p.dtype for p in params] == [torch.bfloat16, torch.float32]
    assert_same(params, [torch.full((2,), 2.0)] * 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ones_own_bad_gradient_shows_and_others_do_not_hear_it(value):
    params = parameters([(3,), (2,)])
    give(params, [torch.full((3,), value), torch.zeros(2)])
    transport = Fixed([torch.zeros(5).double()] * 4)
    MoNNA(params, lr=0.1, f=1, group=transport).step()
    assert not params[0].isfinite().any()
    others = [transport.sent, *(torch.zeros(5).double() for _ in range(3))]
    assert_same([nna(torch.ones(5).double(), others, 1)], [torch.full((5,), 0.25)])


def test_closures_schedulers_and_checkpoints():
    params = parameters(SHAPES)
    optimizer = MoNNA(params, lr=0.3, momentum=0.9, f=0)
    steps = gradients(SHAPES, 6)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for grads in steps[:3]:
        run(optimizer, params, [grads])
        scheduler.step()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = MoNNA(twins, lr=7.0, momentum=0.1, f=0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, opt in ((params, optimizer), (twins, again)):
        run(opt, group, steps[3:])
    assert_same(params, twins)
    loss = optimizer.step(lambda: (params[0] ** 2).sum())
    assert loss.ndim == 0


def refused(call, error, message, optimizer, params):
    """The call fails with this message, and parameters and state are as before."""
    before, state = snapshot(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        call()
    assert_same(params, before)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for i, values in state["state"].items():
        assert_same(after["state"][i].values(), values.values())


@pytest.mark.parametrize(("options", "error", "message"), [
    (dict(lr=-0.1), ValueError, "lr must be >= 0, got -0.1"),
    (dict(lr=math.nan), ValueError, "lr must be finite"),
    (dict(lr="fast"), TypeError, "lr must be a number"),
    (dict(momentum=1.0), ValueError, r"momentum must be in \[0, 1\), got 1.0"),
    (dict(momentum=-0.5), ValueError, r"momentum must be in \[0, 1\)"),
    (dict(momentum=math.nan), ValueError, "momentum must be finite"),
    (dict(weight_decay=-1.0), ValueError, "weight_decay must be >= 0"),
    (dict(weight_decay=math.inf), ValueError, "weight_decay must be finite"),
    (dict(max_norm=0.0), ValueError, "max_norm must be > 0"),
    (dict(max_norm=math.nan), ValueError, "max_norm must be finite"),
    (dict(timeout=0.0), ValueError, "timeout must be > 0"),
    (dict(timeout=math.nan), ValueError, "timeout must be finite"),
    (dict(f=-1), ValueError, "f must be at least 0, got -1"),
    (dict(f=1.0), TypeError, "f must be an integer"),
    (dict(f=1), ValueError, "no rule tolerates half or more faulty: f=1 of 1"),
    (dict(f=2, group=Fixed([None] * 3)), ValueError, "half or more faulty: f=2 of 4"),
    (dict(f=2, group=Fixed([None] * 5), wait="n-f"), ValueError, "half or more faulty: f=2 of 4"),
    (dict(mixer="nan"), ValueError, "mixer must be one of .* got 'nan'; did you mean 'nna'"),
    (dict(mixer=3), TypeError, "mixer must be one of"),
    (dict(wait="some"), ValueError, "wait must be one of 'all', 'n-f', got 'some'"),
    (dict(server=1), ValueError, "server must be at most 0, got 1"),
    (dict(group="gloo"), ValueError, "group must be None, a torch.distributed process group or Peers, got str"),
    (dict(momentun=0.9), TypeError, "unexpected keyword argument 'momentun'"),
])  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        MoNNA(parameters(SHAPES), **{**dict(lr=0.1, f=0), **options})


def test_bad_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        MoNNA([], lr=0.1, f=0)
    with pytest.raises(ValueError, match=r"floating-point or complex parameters, got torch\.int64"):
        MoNNA([torch.zeros(3, dtype=torch.int64)], lr=0.1, f=0)
    with pytest.raises(ValueError, match="real parameters that are not sharded"):
        MoNNA([torch.zeros(3, dtype=torch.complex64)], lr=0.1, f=0)
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'meta'\]"):
        MoNNA([torch.zeros(3), torch.zeros(3, device="meta")], lr=0.1, f=0)
    with pytest.warns(UserWarning, match=r"has no option 'momentun'.*did you mean 'momentum'"):
        MoNNA([{"params": [torch.zeros(3)], "momentun": 0.5}], lr=0.1, f=0)


def test_bad_gradients_and_groups_change_nothing():
    params = parameters([(4,), (3,)])
    optimizer = run(MoNNA(params, lr=0.1, f=0), params, gradients([(4,), (3,)], 2))
    give(params, [torch.ones(4), None])
    params[1].grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), dtype=torch.float64, check_invariants=True)
    refused(optimizer.step, RuntimeError, "does not support sparse gradients", optimizer, params)
    params[1].grad = None
    for wrong in (torch.ones(3, dtype=torch.float32), torch.ones(3, dtype=torch.float64, device="meta")):
        with pytest.raises(RuntimeError):  # torch itself does not let such a gradient be set
            params[1].grad = wrong
    refused(
        lambda: optimizer.add_param_group({"params": [torch.zeros(2)], "lr": -1.0}),
        ValueError,
        "lr must be >= 0",
        optimizer,
        params,
    )
    extra = torch.nn.Parameter(torch.zeros(3))
    extra.grad_dtype = None  # lets the gradient have another type
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(3, dtype=torch.float64)
    refused(
        optimizer.step, RuntimeError, r"type and device \(torch.float32, cpu\), got torch.float64", optimizer, params
    )


def test_checkpoints_of_others_change_nothing():
    params = parameters([(4,), (3,)])
    optimizer = run(MoNNA(params, lr=0.1, f=0), params, gradients([(4,), (3,)], 2))

    def saved(cls, shapes, **options):
        twins = parameters(shapes)
        return run(cls(twins, **options), twins, gradients(shapes, 1)).state_dict()

    for other, message in (
        (saved(torch.optim.SGD, [(4,), (3,)], lr=0.1, momentum=0.9), "not one of MoNNA: state .'momentum_buffer'."),
        (saved(torch.optim.Adam, [(4,), (3,)]), "not one of MoNNA"),
        (saved(Adan, [(4,), (3,)]), "not one of MoNNA"),
        (saved(MoNNA, [(4,), (2,)], lr=0.1, f=0), r"exp_avg of parameter 1 has shape \(2,\), where \(3,\) is needed"),
        (saved(MoNNA, [(4,)], lr=0.1, f=0), "doesn't match the size"),
    ):
        refused(lambda other=other: optimizer.load_state_dict(other), ValueError, message, optimizer, params)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["momentum"] = 2.0
    refused(lambda: optimizer.load_state_dict(bad), ValueError, r"momentum must be in \[0, 1\)", optimizer, params)
