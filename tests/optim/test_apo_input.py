"""What APO's users may do wrong: a clear error, and everything as it was."""

import math

import pytest
import torch
from apo_for_tests import Small, same, weights
from torch import nn

from polyak.optim import APO, apo
from polyak.optim.apo import exponent, extrapolate_, tabular


@pytest.mark.parametrize("alpha", [-0.1, 1.0, 2.0, math.nan, math.inf])
def test_alpha_out_of_range(alpha):
    for call in (
        lambda: APO(alpha),
        lambda: extrapolate_(Small(), Small(), alpha),
        lambda: tabular(torch.zeros(2), torch.full((2,), 0.5), 1.0, alpha, 1),
        lambda: exponent(alpha, 1),
    ):
        with pytest.raises(ValueError, match="alpha must be"):
            call()


def test_misspelt_options():
    with pytest.raises(ValueError, match="did you mean 'fista'"):
        APO("fist")
    with pytest.raises(ValueError, match="did you mean 'logits'"):
        APO(space="logit")
    with pytest.raises(ValueError, match="device= is for space 'parameter'"):
        APO(space="logits", device="cpu")
    with pytest.raises(TypeError):
        APO(alhpa=0.3)


def other_shape(state):
    state["inner.weight"] = torch.zeros(4, 5)


def other_key(state):
    state["inner.wieght"] = state.pop("inner.weight")


def other_type(state):
    state["inner.weight"] = torch.zeros(4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_shape, r"'inner.weight' has shape \(4, 4\) in the model and \(4, 5\) in previous"),
        (other_key, "no weight 'inner.weight'"),
        (other_type, "must hold a floating-point tensor 'inner.weight', got torch.int64"),
    ],
)
def test_weights_that_do_not_belong_together(spoil, words):
    model, run = Small(), APO()
    before, state = weights(model), weights(model)
    spoil(state)
    with pytest.raises(ValueError, match=words):
        extrapolate_(model, state, 0.3)
    run.start(model)
    run._kept = state
    with pytest.raises(ValueError, match=words):
        run.after_round(model)
    assert same(weights(model), before)
    assert run.round == 1


def test_more_weights_than_the_model_trains():
    model, run = Small(), APO()
    run.start(model)
    model.inner.requires_grad_(False)
    with pytest.raises(ValueError, match=r"a weight 'inner\.bias', which the model does not have or does not train"):
        run.after_round(model)
    state = {"a": torch.ones(2)}
    with pytest.raises(ValueError, match="a weight 'b', which the model does not have"):
        extrapolate_(state, {"a": torch.ones(2), "b": torch.ones(2)}, 0.3)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model must be a torch"):
        extrapolate_([1.0], [1.0], 0.3)
    with pytest.raises(TypeError, match="previous must be a torch"):
        extrapolate_(Small(), [1.0], 0.3)
    with pytest.raises(TypeError, match=r"model\['a'\] must be a tensor, got 1.0"):
        extrapolate_({"a": 1.0}, {"a": 1.0}, 0.3)
    with pytest.raises(ValueError, match="nothing to extrapolate"):
        extrapolate_(Small().requires_grad_(False), Small(), 0.3)


class Int8(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(3))


def test_quantized_weights():
    model = Int8()
    with pytest.raises(ValueError, match=r"'weight' is quantized .*dequantize, or extrapolate the adapter"):
        APO().start(model)
    with pytest.raises(ValueError, match="is quantized"):
        extrapolate_(model.state_dict(), model.state_dict(), 0.3)
    packed = nn.Linear(2, 2)
    packed.weight.quant_state = object()  # as bitsandbytes marks its 4-bit parameters
    with pytest.raises(ValueError, match="is quantized"):
        extrapolate_(packed, packed, 0.3)
    extrapolate_(model, {"norm": torch.zeros(3)}, 0.5, filter=lambda name: name == "norm")
    assert torch.equal(model.norm.detach(), torch.full((3,), 1.5))


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_another_tokenizer():
    model, run = Small(), APO()
    run.start(model, tokenizer=Tokenizer("a", "b"))
    before = weights(model)
    with pytest.raises(ValueError, match="tokenizer must be the one that the run started with"):
        run.after_round(model, tokenizer=Tokenizer("b", "a"))
    assert same(weights(model), before)
    assert run.round == 1
    run.after_round(model, tokenizer=Tokenizer("a", "b"))


def test_calls_out_of_order():
    model, run = Small(), APO()
    for call in (run.after_round, run.swap, run.reference):
        with pytest.raises(RuntimeError, match="comes after start"):
            call(model)
    run.start(model)
    with pytest.raises(RuntimeError, match="it is in round 1"):
        run.start(model)


def test_references_that_are_none():
    model, run = Small(), APO()
    with pytest.raises(ValueError, match="got the model that is trained"):
        run.start(model, model)
    with pytest.raises(TypeError, match="reference must be a torch"):
        run.start(model, "theta")
    with pytest.raises(ValueError, match="is absent in the reference"):
        run.start(model, nn.Linear(2, 2))
    assert run.round == 0


def test_states_of_something_else():
    run = APO(0.2)
    state = run.state_dict()
    state["alhpa"] = state.pop("alpha")
    with pytest.raises(ValueError, match=r"missing or unknown: \['alhpa', 'alpha'\]"):
        run.load_state_dict(state)
    with pytest.raises(ValueError, match="alpha must be"):
        run.load_state_dict({**run.state_dict(), "alpha": 1.5})
    assert run.alpha == 0.2


def test_masters_of_something_else():
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    for masters, words in (
        ({"wieght": torch.ones(2, 2)}, "no trained weight"),
        ({"weight": torch.ones(2)}, "must be float32"),
    ):
        with pytest.raises(ValueError, match=words):
            APO().start(model, masters=masters)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(beta=0.0), "beta must be > 0"),
        (dict(T=0), "T must be at least 1"),
        (dict(ref=torch.tensor([0.5, 0.6])), "must sum to 1"),
        (dict(ref=torch.tensor([0.0, 1.0])), "positive probabilities"),
        (dict(reward=torch.zeros(3)), "reward must have shape"),
    ],
)
def test_tables_that_are_none(change, words):
    given = dict(reward=torch.zeros(2), ref=torch.tensor([0.5, 0.5]), beta=1.0, alpha=0.3, T=2)
    with pytest.raises(ValueError, match=words):
        tabular(**{**given, **change})


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="nothing"):
        _ = apo.nothing
