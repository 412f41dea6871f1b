"""MKOR inside what people train with: DDP, GradScaler, schedulers, checkpoints, copies; and what it refuses."""

import copy
import gc
import io
import os
import pickle
import warnings

import pytest
import torch
from mkor_for_tests import conv_net, data, mkor, mlp, sgd, train
from references_for_tests import assert_same, snapshot
from torch import nn

from polyak.optim import MKOR, MKORH, Adan

OTHERS = dict(inv_freq=1, factor_dtype=torch.float64)


def batches(count, start=0):
    return [data(4, 3, seed=start + t) for t in range(count)]


def backward(model, x):
    model(x).square().mean().backward()


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


def test_closures_and_hooks():
    model = mlp(3, 4, 2)
    optimizer, seen = mkor(model), []
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
    backward(model, data(4, 3))
    optimizer._steps = 0
    assert len(model[0]._forward_hooks) == 1


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


def test_compiled_models():
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    optimizer, reference = mkor(model), mkor(twin)
    compiled = torch.compile(model, backend="eager")
    assert set(MKOR(compiled, sgd(model)).factors) == {"0", "2"}
    train(compiled, optimizer, batches(5))
    train(twin, reference, batches(5))
    assert_same(model.parameters(), twin.parameters(), atol=1e-14)
    assert_same(optimizer.factors["0"], reference.factors["0"], atol=1e-14)


# Processes.


def _run(model, net, optimizer, inputs):
    """Two accumulated passes a step, the first without reduction where there is DDP."""
    from contextlib import nullcontext

    for x in inputs:
        optimizer.zero_grad()
        first, second = x.chunk(2)
        with net.no_sync() if net is not model else nullcontext():
            (net(first).square().mean() / 2).backward()
        (net(second).square().mean() / 2).backward()
        optimizer.step()
    return [p.detach().numpy() for p in model.parameters()]


def _inputs(count):
    return [data(8, 2, 5, 5, seed=t) for t in range(count)]


def _worker(rank, port, queue):
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        results, words = {}, []
        reduce = dist.all_reduce
        dist.all_reduce = lambda t, *a, **k: (words.append(t.numel()), reduce(t, *a, **k))[1]
        for half in (False, True):
            model = conv_net()
            net = nn.parallel.DistributedDataParallel(model)
            optimizer = mkor(net, factor_dtype=torch.float32 if half else torch.float64)
            assert set(optimizer.factors) == {"0", "3", "5"}
            # Each pass of both ranks together sees the half of the batch that one process's pass sees.
            mine = [torch.cat([half.chunk(2)[rank] for half in x.chunk(2)]) for x in _inputs(7)]
            results[half] = _run(model, net, optimizer, mine)
        results["words"] = words
        # A layer that one rank does not use.
        model = conv_net()
        optimizer = mkor(model, inv_freq=1)
        for x in _inputs(3):
            optimizer.zero_grad()
            out = model[:5](x) if rank else model(x)
            out.square().mean().backward()
            optimizer.step()
        results["unused"] = [f.numpy() for f in optimizer.factors["5"]]
        hybrid = MKORH(model, sgd(model), window=1, process_group=None)
        switched = []
        for t in range(4):
            hybrid.observe([8.0, 4.0, 3.9, 3.8][t] if rank else [8.0, 4.0, 2.0, 1.0][t])
            hybrid.step()
            switched.append(hybrid.preconditions)
        results["switched"] = switched
        queue.put((rank, results))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        import traceback

        queue.put((rank, traceback.format_exc()))
        raise


@pytest.mark.slow
def test_two_processes_are_one_with_the_joined_batch():
    import queue as queues
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_worker, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        answers = dict(queue.get(timeout=120) for _ in processes)
    except queues.Empty:
        answers = {0: "no answer"}
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    assert all(isinstance(a, dict) for a in answers.values()), answers
    for half in (False, True):
        model = conv_net()
        expected = _run(model, model, mkor(model, factor_dtype=torch.float32 if half else torch.float64), _inputs(7))
        for rank in (0, 1):
            # Means of halves instead of the whole: sums in another order.
            assert_same(
                map(torch.from_numpy, answers[rank][half]),
                map(torch.from_numpy, expected),
                atol=1e-6 if half else 1e-12,
            )
    # One call an update, d_in + d_out and a count a layer: 18 + 1 + 3, 27 + 4, 4 + 1 + 2 and a count each; 4 updates of 7 steps.
    assert answers[0]["words"] == [22 + 31 + 7 + 3] * 8
    # Where one rank has statistics alone, they count as the mean.
    model = conv_net()
    optimizer = mkor(model, inv_freq=1)
    assert_same(answers[0]["unused"], map(torch.from_numpy, answers[1]["unused"]))
    assert not torch.equal(torch.from_numpy(answers[0]["unused"][0]), torch.eye(5).double())
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


# What is left out, and what is refused.


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
        with pytest.raises(ValueError, match=r"MKOR needs a model|MKOR found no Linear or Conv2d"):
            MKOR(nothing, sgd(model))
    for wrong in (3, [3], [("a", 3)], [("a", model, 1)]):
        with pytest.raises(TypeError, match="MKOR needs"):
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
        with pytest.raises(RuntimeError, match="assigned grad|assign a gradient"):
            p.grad = wrong
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
    return {
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


@pytest.mark.parametrize("name", ["of SGD", "nonsense", "another base", "other shapes", "other layers", "other groups"])
def test_a_wrong_checkpoint_changes_nothing(name):
    saved, message = _others()[name]
    model = mlp(3, 4, 2, seed=5)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, batches(4))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


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
    for x in inputs:
        first.zero_grad()
        backward(model, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            first.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    train(twin, second, batches(4, 3))
    assert_same([p.cpu() for p in model.parameters()], twin.parameters(), atol=1e-12)
    assert first.factors["0"][0].is_cuda
