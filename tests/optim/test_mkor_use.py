"""MKOR inside what people train with: DDP, GradScaler, schedulers, checkpoints, copies. What it refuses: test_mkor_input.py."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from mkor_for_tests import OTHERS, backward, batches, conv_net, data, images, mkor, mlp, ranks, run, sgd, train
from references_for_tests import assert_same, snapshot

from polyak.optim import MKOR, MKORH, Adan

# torch.optim's interface.


def test_it_is_an_optimizer_with_the_bases_groups():
    model = mlp(3, 4, 2)
    base = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}])
    optimizer = MKOR(model, base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert (optimizer.state is base.state, optimizer.defaults is base.defaults) == (True, True)
    assert "Parameter Group 1" in repr(optimizer)


@pytest.mark.parametrize("of_base", [False, True])
def test_schedulers(of_base):
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    optimizer, reference = mkor(model), mkor(twin)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.base if of_base else optimizer, 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t, x in enumerate(batches(5)):
            reference.param_groups[0]["lr"] = 0.1 * 0.7**t
            train(model, optimizer, [x])
            train(twin, reference, [x])
            schedule.step()
    assert_same(model.parameters(), twin.parameters(), atol=1e-15)


@pytest.mark.parametrize("of", [MKOR, MKORH])
def test_closures_and_hooks(of):
    mkor(mlp(3, 2))  # torch.optim wraps the step of a class when it is first made: once for both classes
    model = mlp(3, 4, 2)
    optimizer, seen = of(model, sgd(model), inv_freq=2), []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append(s.pop("more")))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(data(4, 3)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert seen == ["pre", "post"] * 5
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[10:] == ["saving", 1, "loaded"]
    assert optimizer.step() is None


def test_a_group_that_is_added_is_preconditioned():
    model = mlp(3, 3, 3)
    optimizer = MKOR(model, torch.optim.SGD(model[0].parameters(), lr=0.1), **OTHERS)
    train(model, optimizer, batches(3))
    assert set(optimizer.factors) == {"0"}
    before = [f.clone() for f in optimizer.factors["0"]]
    optimizer.add_param_group({"params": model[2].parameters()})
    assert set(optimizer.factors) == {"0", "2"}
    assert_same(optimizer.factors["0"], before)
    train(model, optimizer, batches(3, 3))
    assert all(not torch.equal(f, torch.eye(len(f)).double()) for f in optimizer.factors["2"])
    assert [layer.passes for layer in optimizer._layers] == [0, 0]
    assert len(model[0]._forward_hooks) == 1
    optimizer.fallback()
    model.add_module("3", torch.nn.Linear(3, 3).double())
    optimizer.add_param_group({"params": model[3].parameters()})
    assert (optimizer.factors, len(model[0]._forward_hooks)) == ({}, 0)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_grad_scaler(unscale, zero):
    model, twin = mlp(3, 4, 2, dtype=torch.float32), mlp(3, 4, 2, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    optimizer, reference = MKOR(model, sgd(model), scaler=scaler, inv_freq=1), MKOR(twin, sgd(twin), inv_freq=1)
    for t, x in enumerate(batches(8)):
        x = x.float()
        if zero:
            optimizer.zero_grad()
        else:  # as in loops that clear the model's gradients: nothing tells MKOR of the step that was skipped
            model.zero_grad()
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        skipped = t in (0, 3)
        if skipped:
            model[2].weight.grad[0, 0] = float("inf")
        before = [*snapshot(model.parameters()), *(f.clone() for pair in optimizer.factors.values() for f in pair)]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if skipped:
            assert_same([*model.parameters(), *(f for pair in optimizer.factors.values() for f in pair)], before)
        else:
            train(twin, reference, [x])
    assert optimizer._steps == 6
    # The scale is a power of two, so that it leaves no rounding of its own but where float32 is subnormal.
    assert_same(model.parameters(), twin.parameters(), atol=1e-6)
    for name, pair in optimizer.factors.items():
        assert_same(pair, reference.factors[name], atol=1e-6)


def test_a_scaler_that_is_not_known_is_refused():
    model = mlp(3, 2, dtype=torch.float32)
    optimizer, scaler = MKOR(model, sgd(model)), torch.amp.GradScaler("cpu")
    scaler.scale(model(data(4, 3, dtype=torch.float32)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"MKOR\(model, base, scaler=scaler\)"):
        scaler.step(optimizer)
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.step(optimizer)
    optimizer.scaler = off
    backward(model, data(4, 3, dtype=torch.float32))
    off.step(optimizer)


def test_autocast():
    """Low precision in the passes alone: the steps are as without, to bfloat16's rounding."""
    model, twin = mlp(3, 16, 2, dtype=torch.float32), mlp(3, 16, 2, dtype=torch.float32)
    optimizer, reference = MKOR(model, sgd(model), inv_freq=1), MKOR(twin, sgd(twin), inv_freq=1)
    for t in range(4):
        x = data(8, 3, seed=t, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            train(model, optimizer, [x])
        train(twin, reference, [x])
    assert all(f.dtype == torch.float32 for pair in optimizer.factors.values() for f in pair)
    assert_same(model.parameters(), twin.parameters(), atol=20 * torch.finfo(torch.bfloat16).eps)
    assert not torch.equal(model[0].weight, twin[0].weight)


def test_compiled_models_have_the_names_of_their_layers():
    model = mlp(3, 4, 2)
    assert set(MKOR(torch.compile(model, backend="eager"), sgd(model)).factors) == {"0", "2"}


# Processes.


@pytest.mark.slow
def test_two_processes_are_one_with_the_joined_batch(tmp_path, forks):
    queue = forks.Queue()
    processes = [forks.Process(target=ranks, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = {}
    while len(answers) < 2 and all(isinstance(a, dict) for a in answers.values()):
        answers.update([queue.get()])
    for process in processes:
        if not all(isinstance(a, dict) for a in answers.values()):
            process.kill()
        process.join()
    assert all(isinstance(a, dict) for a in answers.values()), answers
    for low in (False, True):
        model = conv_net()
        expected = run(model, model, mkor(model, factor_dtype=torch.float32 if low else torch.float64), images(7))
        for rank in (0, 1):
            # Means of halves instead of the whole: sums in another order.
            assert_same(
                map(torch.from_numpy, answers[rank][low]),
                map(torch.from_numpy, expected),
                atol=1e-6 if low else 1e-12,
            )
    # One call an update, d_in + d_out and a count a layer: 18 + 1 + 3, 27 + 4, 4 + 1 + 2 and a count each; 4 updates of 7 steps.
    assert answers[0]["words"] == [22 + 31 + 7 + 3] * 8
    # A mean over the ranks that have something; where none has, there is no mean and nobody counts.
    nothing = float("nan")
    for rank in (0, 1):
        expected = [[[1.5], [5.0], [nothing]], [[3.0], [10.0], [nothing]], [2.0, 1.0, 0.0]]
        assert_same(map(torch.from_numpy, answers[rank]["average"]), map(torch.tensor, expected))
    assert_same(map(torch.from_numpy, answers[0]["unused"]), map(torch.from_numpy, answers[1]["unused"]))
    assert answers[0]["switched"] == answers[1]["switched"]
    assert answers[0]["switched"][0]


# Checkpoints and copies.


@pytest.mark.parametrize("interrupted", [0, 1, 4])
@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters()), lambda m: Adan(m.parameters())])
def test_a_checkpoint_resumes(interrupted, make):
    model = mlp(3, 4, 4, 4, 2)
    optimizer = MKOR(model, make(model), inv_freq=3, factor_dtype=torch.float64)
    train(model, optimizer, batches(interrupted))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, batches(5, interrupted))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = mlp(3, 4, 4, 4, 2, seed=1)
    again.load_state_dict(saved["model"])
    other = MKOR(again, make(again), inv_freq=3, factor_dtype=torch.float64)
    other.load_state_dict(saved["optimizer"])
    train(again, other, batches(5, interrupted))
    assert_same(again.parameters(), model.parameters(), atol=0)
    for name, pair in optimizer.factors.items():
        assert_same(other.factors[name], pair, atol=0)


def test_the_base_loads_the_rest_of_a_checkpoint():
    model = mlp(3, 4, 2)
    optimizer = mkor(model)
    train(model, optimizer, batches(3))
    alone = sgd(model)
    alone.load_state_dict(optimizer.state_dict())
    assert_same(
        [alone.state[p]["momentum_buffer"] for p in model.parameters()],
        [optimizer.state[p]["momentum_buffer"] for p in model.parameters()],
    )


def test_a_hybrids_checkpoint_keeps_its_progress_and_its_fallback():
    def make(model):
        return MKORH(model, sgd(model), window=2, **OTHERS)

    model = mlp(3, 4, 2)
    optimizer = make(model)
    for x in batches(4):
        optimizer.observe(1 / (1 + optimizer._steps))
        train(model, optimizer, [x])
    assert optimizer.preconditions
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    other_model = mlp(3, 4, 2)
    other_model.load_state_dict(weights)
    other = make(other_model)
    other.load_state_dict(saved)
    for x in batches(8, 4):
        for m, o in ((model, optimizer), (other_model, other)):
            o.observe(5.0)
            train(m, o, [x])
    assert not optimizer.preconditions
    assert not other.preconditions
    assert_same(model.parameters(), other_model.parameters())
    fallen = make(mlp(3, 4, 2))
    fallen.load_state_dict(optimizer.state_dict())
    assert (fallen.preconditions, fallen.factors) == (False, {})
    fallen.load_state_dict(saved)
    assert fallen.preconditions
    assert_same(fallen.factors["0"], [saved["mkor"]["factors"]["0"][side] for side in "AG"])
    assert len(fallen._handles) == 2


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_hooks_of_their_own(way):
    model = mlp(3, 4, 2)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, batches(3))
    twin, other = (
        copy.deepcopy((model, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    )
    assert other.param_groups[0]["params"][0] is twin[0].weight
    assert other.param_groups is other.base.param_groups
    train(model, optimizer, batches(3, 3))
    before = snapshot(twin.parameters())
    assert [layer.passes for layer in other._layers] == [0, 0]
    train(twin, other, batches(3, 3))
    assert_same(twin.parameters(), model.parameters(), atol=0)
    assert not torch.equal(before[0], twin[0].weight)


def test_a_copied_model_leaves_no_statistics():
    model = mlp(3, 2)
    optimizer = mkor(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(other, data(4, 3))
    assert optimizer._layers[0].passes == 0


def test_an_optimizer_that_is_gone_leaves_the_model_alone():
    model = mlp(3, 2)
    optimizer = mkor(model)
    del optimizer
    gc.collect()
    backward(model, data(4, 3))


def test_removed_hooks_leave_the_factors():
    model = mlp(3, 2)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, batches(3))
    before = [f.clone() for f in optimizer.factors["0"]]
    optimizer.remove()
    assert not model[0]._forward_hooks
    train(model, optimizer, batches(3))
    assert_same(optimizer.factors["0"], before)


def test_a_model_that_changes_type_takes_its_factors_along():
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    first, second = mkor(model), mkor(twin)
    train(model, first, batches(3))
    train(twin, second, batches(3))
    model.float()
    for state in first.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float()
    train(model, first, [x.float() for x in batches(3, 3)])
    train(twin, second, batches(3, 3))
    assert_same(model.parameters(), twin.parameters(), atol=1e-5)
    assert first._stacks[0].weight_dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_moves_takes_its_factors_along_and_a_step_waits_for_nothing():
    model, twin = mlp(3, 4, 4, 4, 2), mlp(3, 4, 4, 4, 2)
    first, second = mkor(model, inv_freq=1), mkor(twin, inv_freq=1)
    train(model, first, batches(3))
    train(twin, second, batches(3))
    model.cuda()
    for state in first.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].cuda()
    inputs = [x.cuda() for x in batches(4, 3)]
    for i, x in enumerate(inputs):
        first.zero_grad()
        backward(model, x)
        # The first step takes the factors over from the CPU, which waits for the copies.
        torch.cuda.set_sync_debug_mode("error" if i else "default")
        try:
            first.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    train(twin, second, batches(4, 3))
    assert_same([p.cpu() for p in model.parameters()], twin.parameters(), atol=1e-12)
    assert first.factors["0"][0].is_cuda
