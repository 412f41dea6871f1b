"""MKOR's checkpoints through torch.distributed.checkpoint: what its helpers save and load is all that a run needs."""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mkor_for_tests import backward, batches, mkor, mlp, sgd, train
from references_for_tests import assert_same, snapshot
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from polyak.optim import MKOR, MKORH, SGDP, AdamP, Adan, Lion

BASES = {
    "sgd": sgd,
    "sgd without momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "two groups": lambda m: torch.optim.Adam([{"params": m[0].parameters()}, {"params": m[2:].parameters(), "lr": 0.1}]),
    "adan": lambda m: Adan(m.parameters(), lr=1e-2),
    "adamp": lambda m: AdamP(m.parameters(), lr=1e-2),
    "sgdp": lambda m: SGDP(m.parameters(), lr=1e-2, momentum=0.9),
    "lion": lambda m: Lion(m.parameters(), lr=1e-3),
}  # fmt: skip


def observed(optimizer):
    """A hybrid's losses, where it is one: they fall, so that it goes on to precondition."""
    if isinstance(optimizer, MKORH):
        optimizer.observe(2.0**-optimizer._steps)
    return optimizer


def run(model, optimizer, inputs):
    for x in inputs:
        train(model, observed(optimizer), [x])


def assert_alike(first, second):
    for (model, optimizer), (twin, other) in [(first, second)]:
        assert_same(model.parameters(), twin.parameters(), atol=0)
        assert optimizer.factors.keys() == other.factors.keys()
        for name, pair in optimizer.factors.items():
            assert_same(other.factors[name], pair, atol=0)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert optimizer.state.get(p, {}).keys() == other.state.get(q, {}).keys()
        assert [g["mkor_steps"] for g in other.param_groups] == [optimizer._steps] * len(other.param_groups)


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Every base, in one layout or the other; and the hybrid, whose own state does not depend on its base, in both.
RESUMED = [(MKOR, base, i % 2 == 0) for i, base in enumerate(BASES)]
RESUMED += [(MKOR, "two groups", True), (MKORH, "sgd", False), (MKORH, "two groups", True), (MKORH, "adan", False)]


@pytest.mark.parametrize(("of", "base", "flatten"), RESUMED)
def test_a_run_resumes_through_the_helpers(of, base, flatten, tmp_path):
    """Save on disk, load into what was made with other weights, and go on: bit for bit the uninterrupted run."""

    def make(seed):
        model = mlp(3, 4, 4, 2, seed=seed)
        own = dict(window=3) if of is MKORH else {}
        return model, of(model, BASES[base](model), inv_freq=2, factor_dtype=torch.float64, **own)

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    first, second = make(0), make(1)
    run(*first, batches(4))
    weights, saved = get_state_dict(*first, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights, "optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
        weights, found = get_state_dict(*second, options=options)
        dcp.load({"model": weights, "optimizer": found}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*second, model_state_dict=weights, optim_state_dict=found, options=options)
    assert_alike(first, second)
    run(*first, batches(5, 4))
    run(*second, batches(5, 4))
    assert_alike(first, second)
    if of is MKORH:
        assert (first[1]._best, first[1]._observed) == (second[1]._best, second[1]._observed)
        assert_same([first[1]._level, first[1]._rate], [second[1]._level, second[1]._rate], atol=0)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_full_states_are_broadcast(base, one_process):
    """As FSDP users and accelerate do it: whole tensors on the CPU of one rank, sent to all."""
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    optimizer, other = (MKOR(m, BASES[base](m), inv_freq=1, factor_dtype=torch.float64) for m in (model, twin))
    run(model, optimizer, batches(3))
    twin.load_state_dict(model.state_dict())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert_alike((model, optimizer), (twin, other))


@pytest.mark.parametrize("of", [MKOR, MKORH])
def test_a_fallback_travels(of):
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    optimizer, other = (of(m, sgd(m)) for m in (model, twin))
    run(model, optimizer, batches(3))
    optimizer.fallback()
    assert {name for state in optimizer.state.values() for name in state} == {"momentum_buffer"}
    set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, optimizer))
    assert not other.preconditions
    assert [g["mkor_preconditions"] for g in other.param_groups] == [False]


def test_frozen_weights_are_left_out_as_the_helpers_leave_them():
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    for m in (model, twin):
        m[2].requires_grad_(False)
    optimizer, other = mkor(model, inv_freq=1), mkor(twin, inv_freq=1)
    run(model, optimizer, batches(3))
    set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, optimizer))
    assert_same(other.factors["0"], optimizer.factors["0"], atol=0)
    # PyTorch's helpers skip what is frozen: its factors start anew where it thaws.
    assert_same(other.factors["2"], [torch.eye(4).double(), torch.eye(2).double()], atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_keep_their_type_beside_weights_of_another(dtype):
    """torch.optim casts what it loads to the parameter's type."""
    model, twin = mlp(3, 4, 2, dtype=dtype), mlp(3, 4, 2, dtype=dtype)
    optimizer, other = (MKOR(m, sgd(m), inv_freq=1, factor_dtype=torch.float64) for m in (model, twin))
    run(model, optimizer, [x.to(dtype) for x in batches(3)])
    set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, optimizer))
    for name, pair in optimizer.factors.items():
        assert_same(other.factors[name], pair, atol=0)
        assert other.factors[name][0].dtype == torch.float64


def test_the_entries_are_the_factors_themselves():
    """No copies: what is written into one is in the other, after copies of the optimizer and moves of the model, too."""
    model = mlp(3, 4, 2)
    optimizer = mkor(model, inv_freq=1)
    assert not optimizer.state
    run(model, optimizer, batches(2))
    for made in (optimizer, copy.deepcopy(optimizer), _pickled(optimizer)):
        run_model = made._layers[0].module
        run_model.weight.grad = torch.ones_like(run_model.weight)
        entry = made.state[run_model.weight]["mkor_A"]
        entry.fill_diagonal_(0.5)
        assert made.factors["0"][0].diagonal().tolist() == [0.5] * 4
    model.float()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float()
    run(model, optimizer, [x.float() for x in batches(1)])
    assert optimizer.state[model[0].weight]["mkor_A"].data_ptr() == optimizer.factors["0"][0].data_ptr()


def _pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_checkpoints_from_before_load():
    """Those have the "mkor" entry alone."""
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    optimizer, other = mkor(model, inv_freq=1), mkor(twin, inv_freq=1)
    run(model, optimizer, batches(3))
    twin.load_state_dict(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in [name for name in group if name.startswith("mkor")]:
            del group[name]
    saved["state"] = {i: {"momentum_buffer": s["momentum_buffer"]} for i, s in saved["state"].items()}
    other.load_state_dict(saved)
    for m, o in ((model, optimizer), (twin, other)):
        run(m, o, batches(3, 3))
    assert_alike((model, optimizer), (twin, other))


def test_a_checkpoint_of_the_base_is_refused_through_the_helpers():
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    plain, optimizer = sgd(twin), mkor(model)
    run(model, optimizer, batches(2))
    train(twin, plain, batches(2))
    before = snapshot(f for pair in optimizer.factors.values() for f in pair)
    with pytest.raises(ValueError, match="not one of MKOR"):
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(twin, plain))
    assert_same([f for pair in optimizer.factors.values() for f in pair], before)


def test_a_weight_without_a_step_yet_does_not_look_as_if_the_base_had_its_state():
    """torch.optim takes a state that is not empty for one it has made."""
    model = mlp(3, 4, 2)
    base = torch.optim.Adam(model.parameters())
    optimizer = MKOR(model, base, inv_freq=1, factor_dtype=torch.float64)
    backward(model, batches(1)[0])
    model[0].weight.grad = model[0].bias.grad = None
    optimizer.step()
    assert model[0].weight not in base.state
    optimizer.load_state_dict(optimizer.state_dict())
    run(model, optimizer, batches(2))
    assert set(base.state[model[0].weight]) >= {"exp_avg", "mkor_A"}
    alone = torch.optim.Adam(model.parameters())
    alone.load_state_dict(optimizer.state_dict())
    backward(model, batches(1)[0])
    alone.step()
