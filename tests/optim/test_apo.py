"""APO against its closed forms and its relatives, on models that are no language models."""

import copy
import gc
import math
import warnings

import pytest
import torch
from apo_for_tests import Small, moved, normal, same, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from polyak.optim import APO
from polyak.optim.apo import ExtrapolatedPolicy, FrozenPolicy, exponent, extrapolate_, tabular

ALPHAS = [0.0, 0.1, 0.5, 0.9]


# -- exact policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.5, 2.0, 8.0])
def test_a_table_follows_the_closed_form(alpha, beta):
    reward, ref = normal(3, 50), normal(3, 50, seed=1).softmax(-1)
    path = tabular(reward, ref, beta, alpha, 10)
    for t in range(11):
        expected = (ref.log() + exponent(alpha, t) * reward / beta).log_softmax(-1)
        # exponents of up to 55 * 3 / 0.5, in float64
        torch.testing.assert_close(path.trained[t], expected, rtol=1e-12, atol=1e-10)
    assert torch.equal(path.trained[0], path.extrapolated[0])
    torch.testing.assert_close(path.trained.exp().sum(-1), torch.ones(11, 3, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_the_exponent_is_the_sum_of_the_recursions_steps(alpha):
    step, total = 0.0, 0.0
    for t in range(1, 30):
        step = 1 + alpha * step
        total += step
        assert exponent(alpha, t) == pytest.approx(total, rel=1e-13)
    assert exponent(alpha, 0) == 0
    assert exponent(alpha, 4000) / 4000 == pytest.approx(1 / (1 - alpha), rel=1e-3)


def test_two_rounds_never_are_three_whatever_alpha():
    assert exponent(0.999, 2) < exponent(0.0, 3) == 3


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_game_ends_at_its_winner(alpha):
    # Response 0 beats all others with 0.9; among them it is a cycle.
    wins = torch.tensor([[0.5, 0.9, 0.9, 0.9], [0.1, 0.5, 0.8, 0.2], [0.1, 0.2, 0.5, 0.8], [0.1, 0.8, 0.2, 0.5]])
    path = tabular(lambda pi: pi @ wins.double().mT, torch.full((4,), 0.25), 0.5, alpha, 40)
    assert path.trained[-1, 0].exp() > 1 - 1e-9
    # P(y beats pi_ref), row 1 of wins against the uniform mixture, is the first round's reward.
    torch.testing.assert_close(path.trained[1], (wins.double().mean(1) / 0.5).log_softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_for_softmax_linear_policies_weights_extrapolate_log_policies(alpha):
    features = normal(20, 6)
    new, old = nn.Linear(6, 1, bias=False, dtype=torch.float64), nn.Linear(6, 1, bias=False, dtype=torch.float64)
    log_new, log_old = ((features @ m.weight[0]).log_softmax(-1).detach() for m in (new, old))
    extrapolate_(new, old, alpha)
    expected = (log_new + alpha * (log_new - log_old)).log_softmax(-1)
    torch.testing.assert_close((features @ new.weight[0]).log_softmax(-1).detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_rounds_of_exact_training_follow_the_closed_form(alpha):
    # A table of logits; the proximal step in its weights is theta + r / beta.
    policy, reward, beta = nn.Embedding(1, 8, dtype=torch.float64), normal(8), 0.7
    start = policy.weight[0].detach().log_softmax(-1)
    apo = APO(alpha)
    reference = apo.start(policy)
    for t in range(1, 6):
        assert torch.equal(reference.weight, policy.weight)
        policy.weight.data.add_(reward / beta)
        trained = policy.weight[0].detach().clone()
        reference = apo.after_round(policy, reference)
        expected = (start + exponent(alpha, t) * reward / beta).log_softmax(-1)
        torch.testing.assert_close(trained.log_softmax(-1), expected, rtol=0, atol=1e-12)
    apo.swap(policy)
    assert torch.equal(policy.weight[0], trained)


def test_pinned_numbers():
    path = tabular(torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), 2.0, 0.5, 3)
    # From the weights p exp(s r / 2), s = 1, 2.5, 4.25, in Python's own floats.
    for t, s in ((1, 1.0), (2, 2.5), (3, 4.25)):
        raw = [0.2 * math.exp(s / 2), 0.3, 0.5 * math.exp(-s)]
        assert path.trained[t].exp().tolist() == pytest.approx([x / sum(raw) for x in raw], abs=1e-15)
    # theta_3 = 2.5 + 0.5 (2.5 - 1) = 3.25
    raw = [0.2 * math.exp(3.25 / 2), 0.3, 0.5 * math.exp(-3.25)]
    assert path.extrapolated[2].exp().tolist() == pytest.approx([x / sum(raw) for x in raw], abs=1e-15)


# -- extrapolate_ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["module", "mapping"])
def test_trained_weights_move_and_nothing_else(alpha, kind):
    old = Small()
    new = moved(copy.deepcopy(old))
    before, buffers = weights(new), {k: v.clone() for k, v in new.named_buffers()}
    assert extrapolate_(new, old if kind == "module" else weights(old), alpha) is new
    for name, p in new.named_parameters():
        then = dict(old.named_parameters())[name]
        if name.startswith("frozen"):
            assert torch.equal(p, before[name])
        else:
            torch.testing.assert_close(p.detach(), before[name] + alpha * (before[name] - then), rtol=1e-15, atol=1e-15)
    assert new.head.weight is new.embed.weight
    assert all(torch.equal(v, buffers[k]) for k, v in new.named_buffers())


def test_in_a_state_dict_tied_weights_move_once_and_integers_stay():
    old, new = Small(), moved(Small())
    state = new.state_dict()
    expected = state["embed.weight"] + 0.5 * (state["embed.weight"] - old.embed.weight.detach())
    extrapolate_(state, old.state_dict(), 0.5, filter=lambda name: name != "scale")
    torch.testing.assert_close(new.head.weight.detach(), expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(state["count"], torch.tensor([3, 4]))
    assert torch.equal(state["scale"], torch.ones(4, dtype=torch.float64))


def test_alpha_zero_changes_no_bit():
    old, new = Small(), moved(Small())
    new.inner.weight.data[0, 0], new.inner.weight.data[0, 1] = -0.0, math.nan
    old.inner.bias.data[0] = math.inf
    before = {k: v.clone().view(torch.int64) for k, v in weights(new).items()}
    extrapolate_(new, old, 0.0)
    assert same({k: v.view(torch.int64) for k, v in weights(new).items()}, before)


def test_a_filter_keeps_weights_out():
    old, new = Small(), moved(Small())
    before = weights(new)
    extrapolate_(new, old, 0.5, filter=lambda name: "inner" not in name)
    assert torch.equal(new.inner.weight, before["inner.weight"])
    assert not torch.equal(new.embed.weight, before["embed.weight"])


def test_half_precision_is_extrapolated_in_float32():
    old = nn.Linear(64, 64, dtype=torch.bfloat16)
    new = copy.deepcopy(old)
    new.weight.data.add_(0.3 * normal(64, 64).bfloat16())
    new.bias.data.add_(0.3 * normal(64).bfloat16())
    a, b = new.weight.detach().float(), old.weight.detach().float()
    extrapolate_(new, old, 0.3)
    assert torch.equal(new.weight, (a + 0.3 * (a - b)).bfloat16())


def test_what_rounding_takes_back_is_told_and_masters_help():
    old = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    # Neighbours in bfloat16 are 2^-7 apart here: half a step rounds to a whole one, 0.3 of a step to none.
    old.weight.data.copy_(1 + torch.arange(4096).view(64, 64) % 100 * 2**-7)
    masters_old = {"weight": old.weight.detach().float()}
    masters = {"weight": masters_old["weight"] + 0.6 * 2**-7}
    new = copy.deepcopy(old)
    new.weight.data.copy_(masters["weight"])
    expected = masters["weight"] + 0.3 * (masters["weight"] - masters_old["weight"])
    plain = copy.deepcopy(new)
    with pytest.warns(UserWarning, match="are rounded back when extrapolated"):
        extrapolate_(plain, old, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extrapolate_(new, masters_old, 0.3, masters=masters)
    torch.testing.assert_close(masters["weight"], expected, rtol=0, atol=1e-6)
    assert torch.equal(new.weight, masters["weight"].bfloat16())


def test_masters_go_through_whole_runs():
    # Steps of 1e-5 on weights of order one: bfloat16 would lose all of them.
    model = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    start = model.weight.detach().float()
    masters, apo, total = {"weight": start.clone()}, APO(0.5), 0.0
    apo.start(model, masters=masters)
    for t in range(1, 4):
        masters["weight"] += 1e-5
        model.weight.data.copy_(masters["weight"])
        trained = masters["weight"].clone()
        apo.after_round(model, masters=masters)
        total = exponent(0.5, t)
    torch.testing.assert_close(trained - start, torch.full_like(start, 1e-5 * total), rtol=0.03, atol=0)
    with pytest.raises(ValueError, match="give masters to swap it"):
        apo.swap(model)
    extrapolated = masters["weight"].clone()
    apo.swap(model, masters=masters)
    assert torch.equal(masters["weight"], trained)
    assert torch.equal(model.weight, trained.bfloat16())
    apo.swap(model, masters=masters)
    assert torch.equal(masters["weight"], extrapolated)


# -- APO ---------------------------------------------------------------------------------------------------------------------


def train(model, t):
    return moved(model, seed=100 * t, by=0.01)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("alpha", [0.3, "fista"])
def test_the_recursion(alpha, device):
    model, apo = Small(), APO(alpha, device=device)
    reference = apo.start(model)
    hats = [weights(model)]
    for t in range(1, 5):
        assert same(weights(reference), weights(model))
        assert not any(p.requires_grad for p in reference.parameters())
        train(model, t)
        hats.append(weights(model))
        following = apo.after_round(model, reference)
        assert following is reference
        a = 0.3 if alpha == 0.3 else (t - 1) / (t + 2)
        for name, p in model.named_parameters():
            expected = hats[t][name] + a * (hats[t][name] - hats[t - 1][name])
            torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-14)
        assert same(apo.kept, {k: v for k, v in hats[t].items() if not k.startswith("frozen")})
    extrapolated = weights(model)
    apo.swap(model)
    assert same(weights(model), hats[-1])
    with pytest.raises(RuntimeError, match="swap them back"):
        apo.after_round(model)
    apo.swap(model)
    assert same(weights(model), extrapolated)


def test_without_extrapolation_it_is_the_plain_loop():
    model, plain, apo = Small(), Small(), APO(0.0)
    reference = apo.start(model)
    for t in range(1, 4):
        train(model, t), train(plain, t)
        reference = apo.after_round(model, reference)
        assert same(weights(model), weights(plain))
        assert same(weights(reference), weights(plain))
    apo.swap(model)
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("space", ["parameter", "logits"])
def test_a_run_goes_on_from_a_saved_state(tmp_path, space):
    def rounds(model, apo, first, last):
        for t in range(first, last + 1):
            train(model, t)
            reference = apo.after_round(model)
        return reference

    model, apo = Small(), APO(0.3, space)
    apo.start(model)
    rounds(model, apo, 1, 2)
    torch.save({"apo": apo.state_dict(), "model": model.state_dict()}, tmp_path / "run.pt")
    last = rounds(model, apo, 3, 4)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other, again = Small(), APO()
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["apo"])
    assert repr(again) == f"APO(alpha=0.3, space={space!r}, round=3)"
    reference = again.reference(other)
    assert isinstance(reference, ExtrapolatedPolicy) == (space == "logits")
    second = rounds(other, again, 3, 4)
    assert same(weights(other), weights(model))
    assert same(again.kept, apo.kept)
    if space == "logits":
        assert same(second.previous.weights, last.previous.weights)


class Logits(nn.Module):
    """A model as transformers' are called."""

    def __init__(self):
        super().__init__()
        self.table, self.drop = nn.Embedding(5, 5, dtype=torch.float64), nn.Dropout(0.5)

    def forward(self, input_ids):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.drop(self.table(input_ids)))


def test_in_the_space_of_logits_the_reference_is_the_mixture_of_both_models():
    model, apo, ids = Logits(), APO(0.4, "logits"), torch.tensor([[0, 1, 4]])
    reference = apo.start(model)
    assert isinstance(reference, FrozenPolicy)
    old = model.table.weight.detach().log_softmax(-1)
    moved(model)
    new = model.table.weight.detach().log_softmax(-1)
    reference = apo.after_round(model, reference)
    moved(model, seed=50)  # the round that follows must not move its reference
    expected = (1.4 * new - 0.4 * old).log_softmax(-1)[ids]
    torch.testing.assert_close(reference(input_ids=ids).logits, expected, rtol=0, atol=1e-12)
    assert model.training
    hat = model.table.weight.detach().clone()
    apo.after_round(model, reference)
    assert torch.equal(model.table.weight, hat)
    apo.swap(model)
    assert torch.equal(model.table.weight, hat)


def live_bytes():
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):  # isinstance would ask deprecated proxies
            storage = item.untyped_storage()
            try:
                address = storage.data_ptr()
            except RuntimeError:  # what other tests left of fake tensors has no memory
                continue
            # Several may be at one address: the largest, whatever their order.
            storages[address] = max(storage.nbytes(), storages.get(address, 0))
    return sum(storages.values())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@pytest.fixture
def nothing_older():
    """Only what a test makes is looked through, and not the hundred thousand objects of what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_older")
@pytest.mark.parametrize("space", ["parameter", "logits"])
def test_a_run_costs_one_copy_of_the_trained_weights_beside_the_reference(space):
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8)))
    model[0].requires_grad_(False)
    whole = 8 * 128 * 128 * 4
    trained = whole - 128 * 128 * 4
    reference_costs = whole if space == "parameter" else trained
    before = live_bytes()
    apo = APO(0.3, space)
    reference = apo.start(model)
    allowed = reference_costs + trained
    assert live_bytes() - before <= allowed
    for t in range(1, 4):
        train(model, t)
        with Largest() as largest:
            reference = apo.after_round(model, reference)
        assert live_bytes() - before <= allowed
        assert largest.bytes <= 128 * 128 * 4
    with Largest() as largest:
        apo.swap(model)
    assert live_bytes() - before <= allowed
    assert largest.bytes <= 128 * 128 * 4


def test_a_copy_for_reference_is_free_of_what_hangs_on_the_forward_pass():
    model, apo = nn.Linear(2, 2), APO()
    inner = model.forward
    model.forward = lambda x: inner(x)
    model(torch.ones(1, 2)).sum().backward()
    reference = apo.start(model)
    expected = reference(torch.ones(1, 2))
    model.weight.data.zero_()
    assert torch.equal(reference(torch.ones(1, 2)), expected)
    assert reference.weight.grad is None
    assert model.weight.grad is not None
