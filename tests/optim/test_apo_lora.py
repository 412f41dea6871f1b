"""APO on LoRA adapters of PEFT: the change of the weight is extrapolated, exactly."""

import copy

import pytest
import torch
from apo_for_tests import same
from apo_models_for_tests import IDS, causal, deltas, peft, trained, weights, with_adapter
from torch import nn

from polyak.optim import APO
from polyak.optim.apo import FrozenPolicy, extrapolate_, lora


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}}]
)
def test_the_change_of_the_weight_is_extrapolated_and_not_its_factors(options, tmp_path):
    model = with_adapter(**options)
    trained(model, 1)
    old_delta, old = deltas(model), {k: v for k, v in weights(model).items() if "lora" in k}
    trained(model, 2)
    new_delta = deltas(model)
    base = {k: v for k, v in weights(model).items() if "lora" not in k}
    extrapolate_(model, old, 0.5)
    got = deltas(model)
    for name, value in new_delta.items():
        # factors in float32
        torch.testing.assert_close(got[name], 1.5 * value - 0.5 * old_delta[name], rtol=0, atol=1e-6)
    assert {k: v for k, v in weights(model).items() if "lora" not in k}.keys() == base.keys()
    assert same({k: v for k, v in weights(model).items() if "lora" not in k}, base)
    # A saved adapter is the same again when it is loaded, at its new rank.
    assert model.peft_config["default"].r == 4
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(causal(), tmp_path)
    for name, value in deltas(again).items():
        torch.testing.assert_close(value, got[name], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits, rtol=0, atol=1e-5)


def test_extrapolating_factors_would_be_something_else():
    model = with_adapter()
    trained(model, 1)
    before, old = deltas(model), {k: v for k, v in weights(model).items() if "lora" in k}
    trained(model, 2)
    after = deltas(model)
    factors = {k: v.clone() for k, v in weights(model).items() if "lora" in k}
    for name, value in factors.items():
        value += 0.5 * (value - old[name])
    name = next(iter(after))
    wrong = 3.0 * factors[f"{name}.lora_B.default.weight"] @ factors[f"{name}.lora_A.default.weight"]
    right = 1.5 * after[name] - 0.5 * before[name]
    assert float((wrong - right).abs().max()) > 1e-2


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_merged_weights_extrapolate_alike(alpha):
    model = with_adapter(lora_dropout=0.0)
    trained(model, 1)
    old = copy.deepcopy(model).merge_and_unload()
    kept = {k: v for k, v in weights(model).items() if "lora" in k}
    trained(model, 2)
    whole = extrapolate_(copy.deepcopy(model).merge_and_unload().requires_grad_(), old, alpha)
    extrapolate_(model, kept, alpha)
    merged = model.merge_and_unload()
    for (name, a), b in zip(merged.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=2e-6, msg=name)


def test_without_extrapolation_factors_stay_bit_for_bit():
    model, apo = with_adapter(), APO(0.0)
    apo.start(model)
    for t in (1, 2, 3):
        trained(model, t)
        before = weights(model)
        apo.after_round(model)
        assert same(weights(model), before)


def test_the_ranks_of_a_run_and_its_output():
    model, apo = with_adapter(), APO(0.3)
    reference, hats = apo.start(model), [deltas(model)]
    assert isinstance(reference, FrozenPolicy)
    ranks = []
    for t in (1, 2, 3):
        trained(model, t)
        hats.append(deltas(model))
        reference = apo.after_round(model, reference)
        ranks.append(model.peft_config["default"].r)
        for name, value in deltas(model).items():
            expected = 1.3 * hats[t][name] - 0.3 * hats[t - 1][name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(reference(IDS).logits, model.eval()(IDS).logits)
        model.train()
    assert ranks == [2, 4, 6]
    extrapolated = deltas(model)
    apo.swap(model)
    assert model.peft_config["default"].r == 4
    for name, value in deltas(model).items():
        assert torch.equal(value, hats[-1][name])
    apo.swap(model)
    for name, value in deltas(model).items():
        assert torch.equal(value, extrapolated[name])


def test_adapters_as_peft_saves_them():
    model = with_adapter()
    trained(model, 1)
    old, before = deltas(model), peft.get_peft_model_state_dict(model)
    before = {k: v.clone() for k, v in before.items()}
    trained(model, 2)
    new, state = deltas(model), {k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()}
    extrapolate_(state, before, 0.3)
    name = next(iter(new))
    product = 3.0 * state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double()
    torch.testing.assert_close(product, 1.3 * new[name] - 0.3 * old[name], rtol=0, atol=1e-6)
    extrapolate_(model, before, 0.3)
    torch.testing.assert_close(deltas(model)[name], product, rtol=0, atol=1e-6)


def test_an_adapter_over_a_quantized_base():
    model = with_adapter()
    trained(model, 1)
    kept = {k: v for k, v in weights(model).items() if "lora" in k}
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    trained(model, 2)
    extrapolate_(model, kept, 0.3)
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(use_dora=True), "uses DoRA"),
        (dict(target_modules=["embed_tokens"]), "of LoRA only factors A and B of linear layers"),
    ],
)
def test_adapters_that_are_not_products_of_two_matrices(options, words):
    model = with_adapter(**options)
    before = weights(model)
    with pytest.raises(ValueError, match=words):
        APO().start(model)
    assert same(weights(model), before)


def test_other_adapters_and_merged_ones():
    other = peft.get_peft_model(
        causal(), peft.IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="of type IA3; only LoRA"):
        APO().start(other)
    merged = with_adapter()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it"):
        APO().start(merged)


def test_half_of_a_pair_of_factors():
    model = with_adapter()
    for side, words in (("lora_A", "without its factor A"), ("lora_B", "without its factor")):
        with pytest.raises(ValueError, match=words):
            extrapolate_(model, weights(model), 0.3, filter=lambda name, side=side: side not in name)


def test_lora_layers_are_told_from_others():
    assert lora.has_adapter(with_adapter())
    assert not lora.has_adapter(causal())
