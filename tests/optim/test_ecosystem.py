"""The optimizers inside what people train with: schedulers, GradScaler, FSDP, Trainer, accelerate; and beside their peers."""

import copy
import warnings

import pytest
import torch
from references_for_tests import adan, assert_same, give, gradients, normal, numbers, parameters, run, snapshot
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from polyak.core.schedules import Cosine, Warmup
from polyak.optim import SGDP, SPAM, AdamP, Adan, Lion, LionK
from polyak.optim.lion import kappa

SHAPES = [(3,), (4, 2)]
QUICK = dict(reset_interval=3, warmup_steps=2, grace=1, threshold=2.0)  # several resets in a short run
MAKERS = {
    "adan": lambda p, **o: Adan(p, **{"lr": 0.02, "weight_decay": 0.1, **o}),
    "adan-clip": lambda p, **o: Adan(p, **{"lr": 0.02, "max_grad_norm": 0.3, **o}),
    "lion": lambda p, **o: Lion(p, **{"lr": 0.02, "weight_decay": 0.1, **o}),
    "lion-l2-group": lambda p, **o: LionK(p, "l2", **{"lr": 0.02, "weight_decay": 0.1, **o}),
    "adamp": lambda p, **o: AdamP(p, **{"lr": 0.02, "weight_decay": 0.1, "delta": 10.0, **o}),
    "sgdp": lambda p, **o: SGDP(p, **{"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "delta": 10.0, **o}),
    "spam": lambda p, **o: SPAM(p, **{"lr": 0.02, **QUICK, **o}),
}
makers = pytest.mark.parametrize("name", sorted(MAKERS))


# torch.optim's interface.

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, Warmup(Cosine(1.0, 0.1, 6), 2)),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 3), schedulers.CosineAnnealingLR(o, 4)], [3]
    ),
}


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_schedulers(backend, scheduler):
    params = parameters(SHAPES)
    twins = snapshot(params)
    optimizer = Adan(params, lr=0.02, **backend)
    schedule = SCHEDULERS[scheduler](optimizer)
    steps, state = gradients(SHAPES, 7), None
    options = []
    for grads in steps:
        group = optimizer.param_groups[0]
        options.append(dict(lr=float(group["lr"]), betas=tuple(group["betas"])))
        run(optimizer, params, [grads])
        schedule.step()
    assert len({(o["lr"], o["betas"]) for o in options}) > 2, "the schedule moved"
    states = [[torch.zeros_like(p) for p in twins] for _ in range(4)]
    from polyak.optim.adan import adan_step

    state = [torch.tensor(0.0) for _ in twins]
    for grads, o in zip(steps, options, strict=True):
        adan_step(twins, grads, *states, state, **o, foreach=False)
    assert_same(params, twins, atol=1e-12)


def test_reduce_on_plateau_and_averages():
    params = parameters(SHAPES)
    optimizer = Adan(params, lr=0.1)
    plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0)
    model = torch.nn.Linear(3, 2).double()
    swa = torch.optim.swa_utils.SWALR(Adan(model.parameters(), lr=0.1), swa_lr=0.05)
    for grads in gradients(SHAPES, 4):
        run(optimizer, params, [grads])
        plateau.step(1.0)
        swa.step()
    assert optimizer.param_groups[0]["lr"] < 0.1


@makers
def test_closures(name):
    (p,) = params = parameters([(5,)])
    optimizer, calls = MAKERS[name](params), []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses == calls
    assert losses[-1] < losses[0]
    assert optimizer.step() is None
    with torch.no_grad():
        assert optimizer.step(closure).item() == calls[-1]


def test_a_closure_with_restarts():
    (p,) = params = parameters([(5,)])
    optimizer = Adan(params, restart_radius=1e-9)
    p.grad = torch.ones_like(p)
    assert optimizer.step(lambda: torch.tensor(3.0)).item() == 3.0


@makers
def test_hooks_run_once(name):
    params = parameters(SHAPES)
    optimizer, seen = MAKERS[name](params), []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("pre"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("post"))
    run(optimizer, params, gradients(SHAPES, 2))
    assert seen == ["pre", "post"] * 2
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append("saved"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[4:] == ["saved", "loaded"]


@makers
def test_who_listens_late_hears_the_step(name):
    """Steps without a listener go round PyTorch's wrapper, also those of a class whose step others wrapped."""
    params = parameters(SHAPES)
    optimizer, seen = MAKERS[name](params), []
    run(optimizer, params, gradients(SHAPES, 1))
    everywhere = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append("all, before")),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append("all, after")),
    ]
    try:
        run(optimizer, params, gradients(SHAPES, 1))
    finally:
        for handle in everywhere:
            handle.remove()
    own = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("one"))
    run(optimizer, params, gradients(SHAPES, 1))
    own.remove()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, params, gradients(SHAPES, 1))
    run(optimizer, params, gradients(SHAPES, 1))
    assert seen == ["all, before", "all, after", "one"]
    label = f"Optimizer.step#{type(optimizer).__name__}.step"
    assert [event.count for event in profile.key_averages() if event.key == label] == [1]


@makers
def test_named_parameters(name):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).double()
    optimizer = MAKERS[name](model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    model(torch.ones(4, 3).double()).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    other = MAKERS[name](copy.deepcopy(model).named_parameters())
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]
    assert name in ("lion-l2-group",) or "Parameter Group 0" in repr(optimizer)


@makers
def test_backward_hooks_that_step_at_once(name):
    """One optimizer a parameter, stepping inside backward, as memory-saving loops do."""
    params, twins = parameters(SHAPES), parameters(SHAPES)
    if name == "adan-clip":
        pytest.skip("the norm needs all gradients")
    own = {p: MAKERS[name]([p]) for p in params}
    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: own[p].step())
        p.register_post_accumulate_grad_hook(lambda p: own[p].zero_grad())
    reference = MAKERS[name](twins)
    for grads in gradients(SHAPES, 3):
        sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
        run(reference, twins, [grads])
    assert_same(params, twins, atol=1e-12)


@makers
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_on_the_cpu(backend, name, unscale):
    params, twins = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    optimizer, reference = MAKERS[name](params, **backend), MAKERS[name](twins, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for t, grads in enumerate(gradients(SHAPES, 6)):
        scaled = scaler.scale(torch.ones(())).item()
        give(params, [g * scaled for g in grads])
        if t in (0, 3):
            params[1].grad[0, 0] = float("inf")
        before, state = snapshot(params), copy.deepcopy(optimizer.state_dict())
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if t in (0, 3):
            assert_same(params, before)
            assert str(optimizer.state_dict()) == str(state)
        else:
            run(reference, twins, [grads])
    assert_same(params, twins, atol=1e-6)


# Differentiation through a step.


@pytest.mark.parametrize("name", ["adan", "adan-clip", "entropic", "half_square"])
def test_differentiable(name):
    make = {
        "adan": lambda p: Adan(p, lr=0.1, betas=(0.9, 0.8, 0.9), weight_decay=0.1, differentiable=True),
        "adan-clip": lambda p: Adan(p, lr=0.1, max_grad_norm=0.5, differentiable=True),
        "entropic": lambda p: LionK(p, kappa.Entropic(2.0), lr=0.1, differentiable=True),
        "half_square": lambda p: LionK(p, "half_square", lr=0.1, weight_decay=0.1, differentiable=True),
    }[name]  # fmt: skip

    def two_steps(start, first, second):
        p = start.clone()
        optimizer = make([p])
        for g in (first, second):
            p.grad = g
            optimizer.step()
        return p

    arguments = [normal((4,), i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(two_steps, arguments, eps=1e-6, atol=1e-6)


# Shards.


def _network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=False)).double()


SHARDED = {
    "adan": lambda p: Adan(p, lr=0.05, weight_decay=0.1, state_dtype=torch.float64),
    "adan-clip": lambda p: Adan(p, lr=0.05, max_grad_norm=0.05),
    "adan-loop": lambda p: Adan(p, lr=0.05, max_grad_norm=0.05, foreach=False),
    "lion": lambda p: Lion(p, lr=0.05, weight_decay=0.1),
    "lion-l2": lambda p: LionK(p, "l2", lr=0.05, weight_decay=0.1),
    "lion-l2-all": lambda p: LionK(p, kappa.L2("all"), lr=0.05),
    "adamp": lambda p: AdamP(p, lr=0.05, weight_decay=0.1),
    "adamp-channel": lambda p: AdamP([{"params": list(p), "projection": "channel"}], lr=0.05, weight_decay=0.1),
    "sgdp-layer": lambda p: SGDP([{"params": list(p), "projection": "layer"}], lr=0.05, momentum=0.9, weight_decay=0.1),
    "spam": lambda p: SPAM(p, lr=0.05, weight_decay=0.1, **QUICK),
}


def _train(model, optimizer, steps, start=0):
    for t in range(start, start + steps):
        optimizer.zero_grad()
        model(normal((6, 5), 50 + t)).square().mean().backward()
        optimizer.step()


def _worker(rank, folder, queue):
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoint
    import torch.distributed.checkpoint.state_dict as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        results = {}
        for name, make in SHARDED.items():
            model = _network()
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = make(model.parameters())
            _train(model, optimizer, 2)
            # A checkpoint in the middle, through the distributed checkpoint's own functions.
            options = dcp.StateDictOptions(full_state_dict=True)
            saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
            weights = copy.deepcopy(dcp.get_model_state_dict(model, options=options))
            _train(model, optimizer, 2, start=2)
            results[name] = [p.full_tensor().detach().numpy() for p in model.parameters()]
            again = _network()
            fully_shard(again[0], mesh=mesh)
            fully_shard(again, mesh=mesh)
            other = make(again.parameters())
            restore = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            dcp.set_model_state_dict(again, weights, options=restore)
            dcp.set_optimizer_state_dict(again, other, saved, options=restore)
            _train(again, other, 2, start=2)
            results[name + " restored"] = [p.full_tensor().detach().numpy() for p in again.parameters()]
            # And each rank's own shards, in files: from the present state, and back into a model that has gone on.
            state = {"model": dcp.get_model_state_dict(again), "optimizer": dcp.get_optimizer_state_dict(again, other)}
            checkpoint.save(state, checkpoint_id=f"{folder}/{name}")
            _train(again, other, 3, start=7)
            state = {"model": dcp.get_model_state_dict(again), "optimizer": dcp.get_optimizer_state_dict(again, other)}
            checkpoint.load(state, checkpoint_id=f"{folder}/{name}")
            dcp.set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            _train(again, other, 2, start=4)
            results[name + " from files"] = [p.full_tensor().detach().numpy() for p in again.parameters()]
        if rank == 0:
            queue.put(results)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        import traceback

        queue.put(traceback.format_exc())
        raise


@pytest.mark.slow
def test_shards_of_two_processes(tmp_path, forks):
    """FSDP2 on gloo: the parameters of the run on one process, the clipping norm over all shards, checkpoints included."""
    queue = forks.Queue()
    processes = [forks.Process(target=_worker, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = queue.get()
    for process in processes:
        if not isinstance(results, dict):
            process.kill()
        process.join()
    assert isinstance(results, dict), results
    for name, make in SHARDED.items():
        model = _network()
        optimizer = make(model.parameters())
        _train(model, optimizer, 4)
        # Gradients are reduced over two halves of nothing: the same batch on both, so that sums differ by rounding only.
        assert_same([torch.from_numpy(r) for r in results[name]], model.parameters(), atol=1e-11)
        assert_same([torch.from_numpy(r) for r in results[name + " restored"]], model.parameters(), atol=1e-11)
        _train(model, optimizer, 2, start=4)
        assert_same([torch.from_numpy(r) for r in results[name + " from files"]], model.parameters(), atol=1e-11)


# Other libraries.


def test_lion_of_pytorch_optimizer():
    theirs = pytest.importorskip("pytorch_optimizer")
    params, twins = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    options = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    steps = gradients(SHAPES, 8)
    run(Lion(params, **options), params, steps)
    run(theirs.Lion(twins, weight_decouple=True, **options), twins, steps)
    assert_same(params, twins, atol=1e-6)


@pytest.mark.parametrize("no_prox", [False, True])
def test_adan_of_pytorch_optimizer(no_prox):
    theirs = pytest.importorskip("pytorch_optimizer")
    params, twins = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    options = dict(lr=0.01, betas=(0.98, 0.92, 0.99), weight_decay=0.1)
    steps = gradients(SHAPES, 8)
    run(Adan(params, no_prox=no_prox, **options), params, steps)
    run(theirs.Adan(twins, weight_decouple=no_prox, **options), twins, steps)
    assert_same(params, twins, atol=2e-6)


def test_optimi():
    theirs = pytest.importorskip("optimi")
    steps = gradients(SHAPES, 8)
    params, twins = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    run(Lion(params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1), params, steps)
    run(theirs.Lion(twins, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1), twins, steps)
    assert_same(params, twins, atol=1e-6)
    params, twins = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    run(Adan(params, lr=0.01, weight_decay=0.02), params, steps)
    run(theirs.Adan(twins, lr=0.01, weight_decay=0.02), twins, steps)
    assert_same(params, twins, atol=2e-6)


def test_the_reference_of_these_tests_is_independent_of_the_engine():
    """Adan's equations in NumPy against torch's Adam, where both are the same: the reference itself is right there."""
    twins = parameters(SHAPES)
    steps = gradients(SHAPES, 6)
    expected = adan(numbers(twins), steps, dict(lr=0.01, betas=(0.9, 0.0, 0.99)))
    run(torch.optim.Adam(twins, lr=0.01, betas=(0.9, 0.99)), twins, steps)
    assert_same(twins, expected, atol=1e-12)
