"""The seams to other people's programs, over every optimizer: copies, foreign entries in groups, states and checkpoints, hooks."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from every_for_tests import EXTRA, NAMES, PLAIN, make, model, outer, step
from references_for_tests import assert_same, snapshot
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import polyak.optim as po
from polyak.optim import SPAM, AdamP, MoNNA
from polyak.optim._engine.options import warn_of_near_misses

every = pytest.mark.parametrize("name", NAMES)
plain = pytest.mark.parametrize("name", PLAIN)


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": saved_and_loaded}


# Copies.


@every
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_goes_on_as_the_original(name, how, steps):
    module = model()
    optimizer = make(name, module)
    step(module, optimizer, steps)
    twin, other = COPIES[how]((module, optimizer))
    step(module, optimizer, 3, steps)
    step(twin, other, 3, steps)
    assert_same(twin.parameters(), module.parameters())
    # What it is then given, it takes as the original does.
    saved = copy.deepcopy(optimizer.state_dict())
    for m, o in ((module, optimizer), (twin, other)):
        o.load_state_dict(copy.deepcopy(saved))
        o.add_param_group({"params": [m.register_parameter("more", nn.Parameter(torch.ones(3))) or m.more]})
        m.more.grad = torch.ones(3)
        o.step()
        step(m, o, 2, 9)
    assert_same(twin.parameters(), module.parameters())
    assert type(other) is type(optimizer)
    assert other.defaults.keys() == optimizer.defaults.keys()
    _, again = COPIES[how]((twin, other))
    assert str(again.state_dict()) == str(other.state_dict())


@every
def test_a_copy_within_a_step(name):
    """In a hook before the step, with a scheduler and a scaler attached, neither of which comes along."""
    module = model()
    optimizer = make(name, module)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    copies = []
    optimizer.register_step_pre_hook(lambda o, a, k: copies.append(copy.deepcopy((module, o))))
    optimizer.note = lambda: None  # no pickle can name it
    pickle.loads(pickle.dumps(optimizer))
    step(module, optimizer, 2)
    scheduler.step()
    twin, other = copies[1]
    assert "step" not in vars(other)
    for p, q in zip(twin.parameters(), module.parameters(), strict=True):  # deepcopy leaves gradients behind
        p.grad = q.grad.clone()
    other.step()
    assert_same(twin.parameters(), module.parameters())
    assert other.param_groups[0]["lr"] == 2 * optimizer.param_groups[0]["lr"]


@plain
def test_pickles_from_before_work(name):
    """They hold what torch.optim pickles: defaults, state and param groups."""
    module = model()
    optimizer = make(name, module)
    step(module, optimizer, 2)
    other = type(optimizer).__new__(type(optimizer))
    other.__setstate__({k: vars(optimizer)[k] for k in ("defaults", "state", "param_groups")})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    if name == "monna":
        before = snapshot(module.parameters())
        with pytest.raises(
            RuntimeError, match=r"comes from a pickle, without the connections.*load this one's state_dict"
        ):
            other.step()
        assert_same(module.parameters(), before)
    else:
        other.step()
    if name in ("adamp", "sgdp"):
        with pytest.raises(RuntimeError, match="record=True"):
            _ = other.last_projection


def test_what_subclasses_of_users_keep_is_copied():
    class Mine(po.Lion):
        def __init__(self, params, **options):
            self.factor = 3
            super().__init__(params, **options)
            self.seen = []

        def step(self, closure=None):
            self.seen.append(self.factor)
            return super().step(closure)

    module = model()
    other = copy.deepcopy(Mine(module.parameters(), lr=0.1))
    other.step()
    assert other.seen == [3]


def test_options_outside_of_groups_are_copied():
    module = model()
    adamp = AdamP(module.parameters(), record=True)
    step(module, adamp)
    twin, other = copy.deepcopy((module, adamp))
    step(twin, other)
    assert set(other.last_projection) == set(twin.parameters())
    spam = SPAM([{"params": [module[0].weight], "density": 0.5}], generator=torch.Generator().manual_seed(3))
    new = [nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
    for o, p in zip((spam, pickle.loads(pickle.dumps(spam))), new, strict=True):
        o.add_param_group({"params": [p], "density": 0.5})
        p.grad = torch.ones(8, 8)
        o.step()
    assert_same(*([p] for p in new))
    assert not torch.equal(new[0], torch.zeros(8, 8))
    monna = MoNNA(module.parameters(), lr=1.0, f=0, max_norm=0.1, momentum=0.0, buffers=[torch.zeros(2)])
    twin, other = copy.deepcopy((module, monna))
    for p in (*module.parameters(), *twin.parameters()):
        p.grad = torch.ones_like(p)
    monna.step()
    other.step()
    assert_same(twin.parameters(), module.parameters())
    assert other._buffers[0] is not monna._buffers[0]


def _child(optimizer, queue):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    queue.put([p.detach().numpy() for group in optimizer.param_groups for p in group["params"]])


@pytest.mark.slow
def test_optimizers_are_sent_to_other_processes(forks):
    queue = forks.Queue()
    for name in ("adan", "mkor"):
        module = model()
        optimizer = make(name, module)
        step(module, optimizer, 2)
        expected, reference = copy.deepcopy((module, optimizer))
        process = forks.Process(target=_child, args=(optimizer, queue))
        process.start()
        found = queue.get()
        process.join()
        for p in expected.parameters():
            p.grad = torch.ones_like(p)
        reference.step()
        assert_same(map(torch.from_numpy, found), expected.parameters())


# Param groups.

NOTES = {
    "lr_scale": 0.75,
    "rho": 0.05,
    "use_muon": False,
    "adaptive": True,
    "note": "mine",
    3: object,
    "tags": ["a", "b"],
}


@every
def test_notes_in_groups_are_kept_everywhere(name):
    module, twin = model(), model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = [{"params": [module[0].weight], **NOTES}, {"params": [module[0].bias, *module[2].parameters()]}]
        optimizer = make(name, module, groups)
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(2))], **NOTES, "max_momentum": 0.9, "min_lr": 0.0}
        )
        optimizer.param_groups[0]["later"] = 5
        step(module, optimizer, 2)
        for other in (optimizer, copy.deepcopy(optimizer)):
            other.load_state_dict(copy.deepcopy(other.state_dict()))
            assert other.param_groups[0]["later"] == 5
            for group in (other.param_groups[0], other.param_groups[2], other.state_dict()["param_groups"][0]):
                assert {k: group[k] for k in NOTES} == NOTES
    reference = make(name, twin, [{"params": [twin[0].weight]}, {"params": [twin[0].bias, *twin[2].parameters()]}])
    step(twin, reference, 2)
    assert_same(module.parameters(), twin.parameters())


@plain
@pytest.mark.parametrize("wrong", ["weigth_decay", "Lr", "lr_", "weight-decay", "foreech", "capturabel"])
def test_what_is_misspelt_in_a_group_is_told_and_kept(name, wrong):
    module = model()
    says = rf"has no option '{wrong}' \(param group\); did you mean '"
    with pytest.warns(UserWarning, match=says):
        optimizer = make(name, module, [{"params": list(module.parameters()), wrong: 0.1}])
    assert optimizer.param_groups[0][wrong] == 0.1
    with pytest.warns(UserWarning, match=says):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], wrong: 0.1})
    with pytest.warns(UserWarning, match=says):
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0][wrong] == 0.1


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("weight_decy", True), ("weigthdecay", True), ("beta", True), ("bettas", True), ("esp", True), ("momentun", True),
        ("no_weight_decay", False), ("max_momentum", False), ("initial_lr", False), ("max_lr", False), ("swa_lr", False),
        ("lr_mult", False), ("name", False), ("betas_", True), ("rho", False), ("layer_id", False), ((1, 2), False),
    ],
)  # fmt: skip
def test_near_misses(entry, near):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_near_misses("X", {entry: 1, "lr": 2}, ["lr", "betas", "eps", "weight_decay", "momentum"])
    assert bool(found) == near


# States.


@every
def test_foreign_entries_of_states_survive(name):
    module, twin = model(), model()
    optimizer, reference = make(name, module), make(name, twin)
    weight, bias = module[0].weight, module[0].bias
    # Before the first step: that is no state yet. (With a base of torch.optim it would be one.)
    if name in PLAIN:
        optimizer.state[weight]["slow_buffer"] = weight.detach().clone()
    for m, o in ((module, optimizer), (twin, reference)):
        step(m, o, 2)
    optimizer.state[bias].update(slow_buffer=torch.ones(5), counter=7, nested={"a": torch.zeros(2)}, text="mine")
    for m, o in ((module, optimizer), (twin, reference)):
        step(m, o, 2, 2)
    assert_same(module.parameters(), twin.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    for way in (lambda s: s, copy.deepcopy, saved_and_loaded):
        optimizer.load_state_dict(way(before))
        assert ("slow_buffer" in optimizer.state[weight]) == (name in PLAIN)
        kept = optimizer.state[bias]
        assert_same([kept["slow_buffer"], kept["nested"]["a"]], [torch.ones(5), torch.zeros(2)])
        assert kept["counter"] == 7
        assert kept["text"] == "mine" or name not in PLAIN  # (torch.optim takes a text for a container)
    for m, o in ((module, optimizer), (twin, reference)):
        step(m, o, 2, 4)
    assert_same(module.parameters(), twin.parameters())


@plain
def test_a_state_of_foreign_entries_alone_is_loaded_and_is_none(name):
    """As wrappers save it that make their entries before the first step, or for parameters that never had a gradient."""
    module, twin = model(), model()
    optimizer, reference = make(name, module), make(name, twin)
    for p in module.parameters():
        optimizer.state[p]["slow"] = p.detach().clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(module, optimizer, 2)
    step(twin, reference, 2)
    assert_same(module.parameters(), twin.parameters())
    assert all("slow" in optimizer.state[p] for p in module.parameters())


@every
def test_what_had_no_step_has_no_state_after_loading(name):
    module = model()
    optimizer = make(name, module)
    for p in module[2].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert len(outer(optimizer).state) == 2
    assert str(optimizer.state_dict()) == str(saved)


@plain
def test_checkpoints_of_other_optimizers_are_still_refused(name):
    module = model()
    optimizer = make(name, module)
    step(module, optimizer, 2)
    before = str(optimizer.state_dict())
    others = {
        "amsgrad": torch.optim.Adam(module.parameters(), amsgrad=True),
        "nadam": torch.optim.NAdam(module.parameters()),
        "adagrad": torch.optim.Adagrad(module.parameters()),
        "rmsprop": torch.optim.RMSprop(module.parameters(), momentum=0.9),
        "adadelta": torch.optim.Adadelta(module.parameters()),
    }
    if name != "adan":
        others["adan"] = make("adan", module)
    if "momentum_buffer" not in optimizer.state_names:
        others["sgd"] = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for other in others.values():
        step(module, other)
        with pytest.raises(ValueError, match=f"not one of {type(optimizer).__name__}"):
            optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == before


def test_a_restart_leaves_foreign_entries_alone():
    module = model()
    optimizer = po.Adan(module.parameters(), lr=0.1, restart_radius=1e-9)
    optimizer.state[module[0].bias]["slow"] = torch.ones(5)
    for p in module[2].parameters():
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert float(optimizer.state[module[2].bias]["step"]) < 3
    assert_same([optimizer.state[module[0].bias]["slow"]], [torch.ones(5)])


# Distributed checkpoints: what the helpers carry is what stands in states and groups.

THROUGH_HELPERS = {
    **{name: (name, {}) for name in PLAIN},
    "adan that restarts": ("adan", {"restart_radius": 0.5}),
    "adan that has just restarted": ("adan", {"restart_radius": 1e-9}),
    "adan in float64": ("adan", {"state_dtype": torch.float64}),
    "sgdp with momentum": ("sgdp", {"momentum": 0.9}),
    "spam that resets": ("spam", {"reset_interval": 3, "grace": 1, "warmup_steps": 1}),
}


@pytest.mark.parametrize("case", THROUGH_HELPERS)
@pytest.mark.parametrize("flatten", [False, True])
def test_the_helpers_of_distributed_checkpoints_carry_all(case, flatten, tmp_path):
    name, options = THROUGH_HELPERS[case]
    wanted = StateDictOptions(flatten_optimizer_state_dict=flatten)
    module, twin = model(), model(1)
    optimizer, other = make(name, module, **options), make(name, twin, **options)
    optimizer.param_groups[0]["rho"] = other.param_groups[0]["rho"] = 0.5
    step(module, optimizer, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(get_optimizer_state_dict(module, optimizer, options=wanted), checkpoint_id=tmp_path, no_dist=True)
        found = get_optimizer_state_dict(twin, other, options=wanted)
        dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(twin, other, found, options=wanted)
    twin.load_state_dict(module.state_dict())
    assert str(other.state_dict()) == str(optimizer.state_dict())
    step(module, optimizer, 4, 4)
    step(twin, other, 4, 4)
    assert_same(twin.parameters(), module.parameters())


# Checkpoints by name, and hooks.


def by_name(optimizer, saved):
    """The documented way of torch.optim to load by parameters' names."""
    at = {n: i for group in saved["param_groups"] for n, i in zip(group["param_names"], group["params"], strict=True)}
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    group = {**saved["param_groups"][0], "param_names": names, "params": list(range(len(names)))}
    state = {i: saved["state"][at[n]] for i, n in enumerate(names) if at[n] in saved["state"]}
    return {"state": state, "param_groups": [group]}


@plain
def test_parameters_of_another_order_are_loaded_by_name(name):
    module, twin = model(), model(1)
    optimizer = make(name, module, list(module.named_parameters()))
    step(module, optimizer, 2)
    names = [n for n, _ in module.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    other = make(name, twin, list(twin.named_parameters())[::-1])
    other.register_load_state_dict_pre_hook(by_name)
    twin.load_state_dict(module.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == names[::-1]
    step(module, optimizer, 2, 2)
    step(twin, other, 2, 2)
    assert_same(twin.parameters(), module.parameters())


@plain
def test_a_hook_translates_before_anything_is_looked_at(name):
    module = model()
    optimizer = make(name, module)
    step(module, optimizer, 2)
    other = type(optimizer).__name__
    wrapped = {"version": 2, "optimizer": copy.deepcopy(optimizer.state_dict())}
    optimizer.register_load_state_dict_pre_hook(lambda o, s: s["optimizer"])
    optimizer.load_state_dict(wrapped)
    assert sorted(wrapped) == ["optimizer", "version"]
    with pytest.raises(KeyError):
        optimizer.load_state_dict({"nothing": other})


class Recorder:
    """Registers every kind of hook twice, in both orders, and notes who was called with what."""

    def __init__(self, optimizer):
        self.seen = []
        for tag, prepend in (("b", False), ("a", True)):
            for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
                getattr(optimizer, f"register_{kind}_hook")(self.hook(kind + tag), prepend=prepend)
            optimizer.register_step_pre_hook(self.hook("step_pre" + tag))
            optimizer.register_step_post_hook(self.hook("step_post" + tag))

    def hook(self, tag):
        def called(*args):
            o, *rest = args
            groups = o.param_groups
            told = [len(a) if isinstance(a, tuple) else sorted(map(str, a)) for a in rest]
            self.seen.append((tag, told, [g["lr"] for g in groups], self.momenta(o)))

        return called

    def momenta(self, o):
        """What a hook finds of the state."""
        kept = [sorted(set(map(str, s)) - {"mkor"}) for s in outer(o).state.values()]
        return len(kept), self.value(o)

    def value(self, o):
        state = next(iter(outer(o).state.values()), {})
        return next(
            (float(v.double().sum()) for v in state.values() if isinstance(v, torch.Tensor) and v.dim() > 1), None
        )


@every
def test_hooks_come_in_torchs_order_and_see_what_torchs_see(name):
    def run(create):
        module = model()
        optimizer = create(module)
        recorder = Recorder(optimizer)
        step(module, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        step(module, optimizer, 1, 1)
        at_save = recorder.value(optimizer)
        optimizer.load_state_dict(saved)
        return recorder, at_save

    ours, before = run(lambda m: make(name, m))
    torchs, _ = run(lambda m: torch.optim.Adam(m.parameters()))
    assert [tag for tag, *_ in ours.seen] == [tag for tag, *_ in torchs.seen]
    for (tag, told, *_), (_, expected, *_) in zip(ours.seen, torchs.seen, strict=True):
        assert [t for t in told if isinstance(t, int)] == [t for t in expected if isinstance(t, int)], tag
        for mine, theirs in zip(told, expected, strict=True):
            assert mine == theirs or set(theirs) <= set(mine), tag
    # A hook before loading finds the old state, one after it the loaded one.
    pre, post = (next(s for s in ours.seen if s[0] == f"load_state_dict_{k}a")[3] for k in ("pre", "post"))
    assert pre[1] == before
    if before is not None:
        assert post[1] != before


@every
def test_hooks_may_change_what_is_saved_loaded_and_done(name):
    module = model()
    optimizer = make(name, module)
    step(module, optimizer, 2)
    optimizer.register_state_dict_post_hook(lambda o, s: {"inner": s})
    saved = optimizer.state_dict()
    assert list(saved) == ["inner"]
    optimizer.register_load_state_dict_pre_hook(lambda o, s: s["inner"])
    before = []
    optimizer.register_load_state_dict_post_hook(lambda o: before.append(len(outer(o).state)))
    optimizer.load_state_dict(saved)
    assert before == [4]
    calls = []
    optimizer.register_step_pre_hook(lambda o, a, k: ((o, lambda: calls.append(1) or 3.5), {}))
    assert optimizer.step() == 3.5
    assert calls == [1]


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "monna"])
def test_a_hook_after_loading_finds_states_in_their_own_type(name):
    """torch.optim has cast them to the parameter's by then."""
    module = model().bfloat16()
    optimizer, seen = make(name, module, state_dtype=torch.float32), []
    for p in module.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.extend(o.state[p][key] for p in module.parameters() for key in o.state_names)
    )
    kept = snapshot(optimizer.state[p][key] for p in module.parameters() for key in optimizer.state_names)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {t.dtype for t in seen} == {torch.float32}
    assert_same(seen, kept)


@plain
def test_a_hook_that_fails_leaves_no_hook_of_ours(name):
    module = model()
    optimizer = make(name, module)
    step(module, optimizer)

    def fail(*args):
        raise ArithmeticError

    for register, use in (
        (optimizer.register_state_dict_post_hook, optimizer.state_dict),
        (optimizer.register_load_state_dict_pre_hook, lambda: optimizer.load_state_dict(optimizer.state_dict())),
        (optimizer.register_load_state_dict_post_hook, lambda: optimizer.load_state_dict(optimizer.state_dict())),
    ):
        handle = register(fail)
        with pytest.raises(ArithmeticError):
            use()
        handle.remove()
    kinds = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
    assert [len(getattr(optimizer, f"_optimizer_{kind}_hooks")) for kind in kinds] == [0, 0, 0, 0]
    step(module, optimizer)


# Learning rates.


@plain
@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (torch.tensor(-1e-3), "lr must be finite and >= 0"), (torch.tensor([1e-3, 1e-3]), "Tensor lr must be 1-element"),
        (torch.tensor(float("nan")), "lr must be finite and >= 0"), (torch.tensor([]), "Tensor lr must be 1-element"),
        (torch.tensor([-1.0]), "lr must be finite and >= 0"), (torch.tensor(float("inf")), "lr must be finite and >= 0"),
        (-1e-3, "lr must be >= 0"), (float("nan"), "lr must be finite"),
    ],
)  # fmt: skip
def test_learning_rates_that_are_refused(name, lr, message):
    module = model()
    with pytest.raises(ValueError, match=message):
        make(name, module, lr=lr)
    optimizer = make(name, module)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": lr})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = lr
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.02


@plain
@pytest.mark.parametrize("foreach", [None, False, True])
def test_learning_rates_that_are_tensors_are_numbers(name, foreach):
    own = {} if name == "monna" else {"foreach": foreach}
    results = []
    for lr in (0.03, torch.tensor(0.03, dtype=torch.float64), torch.tensor([0.03], dtype=torch.float64)):
        module = model()
        optimizer = make(name, module, lr=lr, **own)
        step(module, optimizer, 2)
        if isinstance(lr, torch.Tensor):
            optimizer.param_groups[0]["lr"].fill_(0.01)  # as schedulers do it
        else:
            optimizer.param_groups[0]["lr"] = 0.01
        step(module, optimizer, 2, 2)
        results.append(snapshot(module.parameters()))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    module, twin = model(), model()
    step(module, make(name, module, lr=torch.tensor(0.0), **own), 2)
    assert_same(module.parameters(), twin.parameters())


@plain
def test_a_learning_rate_without_a_value_is_let_be(name):
    """On the meta device, where memory is estimated: torch.optim makes such an optimizer, too."""
    module = model().to("meta")
    assert make(name, module, lr=torch.tensor(0.1, device="meta")).param_groups[0]["lr"].device.type == "meta"


# Refusals.

HUGE = {
    "tensor": lambda: torch.randn(200, 100),
    "list": lambda: [torch.randn(50) for _ in range(40)],
    "module": lambda: nn.Sequential(*[nn.Linear(9, 9) for _ in range(30)]),
}


@every
@pytest.mark.parametrize("what", HUGE)
def test_no_refusal_prints_what_it_was_given(name, what):
    value = HUGE[what]()
    allowed = [o for o in inspect.signature(po.info(name).optimizer).parameters if o not in ("params", "model")]
    refused = 0
    for option in allowed:
        module = model()
        wraps = po.info(name).wraps
        given = {"base": torch.optim.SGD(module.parameters(), lr=0.1)} if wraps else {"lr": 0.1, **EXTRA.get(name, {})}
        said = ""
        try:
            po.create(name, module, **{**given, option: value})
        except (TypeError, ValueError, AttributeError) as error:
            said = str(error)
            refused += 1
        assert len(said) < 400, option
        assert "tensor(" not in said, option
        assert "Linear(" not in said, option
    assert refused > len(allowed) // 2
    with pytest.raises((TypeError, ValueError)) as error:
        po.create(value, model())
    assert len(str(error.value)) < 400


@every
def test_a_wrapped_optimizer_needs_a_module_and_says_so_in_few_words(name):
    module = nn.Linear(200, 100)
    given = (
        {"base": torch.optim.SGD(module.parameters(), lr=0.1)}
        if po.info(name).wraps
        else EXTRA.get(name, {}) | {"lr": -1}
    )
    with pytest.raises((TypeError, ValueError)) as error:
        po.create(name, module.parameters(), **given)
    assert len(str(error.value)) < 200
