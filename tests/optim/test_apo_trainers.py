"""APO on transformers' causal models: rounds, TRL's DPOTrainer as it is, and sampling with two models."""

# ruff: noqa: E402
import copy
import math

import pytest
import torch
from apo_for_tests import same
from apo_models_for_tests import IDS, causal, trained, weights, with_adapter

trl = pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

from polyak.optim import APO
from polyak.optim.apo import APOCallback, ExtrapolatedLogits, collate, extrapolate_, iterate_dpo, train_round

pytestmark = pytest.mark.xdist_group("trl")  # one worker imports it

WORDS = ["<pad>", "<eos>", *"abcdefghijklmn"]


def examples(count=4, seed=0, length=3):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, 16, (count, 3, length), generator=generator).tolist()
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), rows, strict=True)) for rows in drawn]


def adam(params):
    return torch.optim.AdamW(params, lr=1e-2)


# -- rounds ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "ipo", "sppo"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "adapter"])
def test_rounds_learn_the_preference(kind, loss):
    model = with_adapter() if kind == "adapter" else causal(kind)
    apo, batch = APO(0.3), examples(4)
    reference, margins = apo.start(model), []
    for _ in range(2):
        report = train_round(model, reference, [batch] * 6, optimizer=adam, loss=loss, beta=0.5)
        assert report.loss[-1] < report.loss[0]
        assert report.margin[0] == pytest.approx(0.0, abs=1e-5)  # the round starts at its reference
        margins.append(report.margin[-1])
        reference = apo.after_round(model, reference)
    assert min(margins) > 0


def test_trls_collator_makes_what_ours_makes():
    ours, theirs = collate(examples(3)), DataCollatorForPreference(pad_token_id=0)(examples(3))
    assert same(ours, dict(theirs))


def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def text(ids):
    return " ".join(WORDS[i] for i in ids)


def dataset(seed=0):
    rows = [{k.removesuffix("_ids"): " " + text(v) for k, v in e.items()} for e in examples(8, seed)]
    return Dataset.from_list(rows)


def factory(path, *, seen=None, callbacks=(), **options):
    def make(model, ref_model, pairs):
        args = trl.DPOConfig(
            str(path), beta=0.5, learning_rate=1e-2, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            save_strategy="no", logging_steps=1, bf16=False, gradient_checkpointing=False, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model, ref_model, args, train_dataset=pairs, processing_class=tokenizer(), callbacks=list(callbacks)
        )
        if seen is not None:
            seen.append(trainer)
        return trainer

    return make


def first_losses(trainers):
    return [next(entry["loss"] for entry in t.state.log_history if "loss" in entry) for t in trainers]


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_trls_trainer_as_it_is(kind, tmp_path):
    model = with_adapter(lora_dropout=0.0) if kind == "adapter" else causal()
    apo, seen, policies = APO(0.3), [], []

    def sampler(policy, t):
        assert policy is model
        with torch.no_grad():
            policies.append(policy(IDS).logits.clone())
        return t

    result = iterate_dpo(factory(tmp_path, seen=seen), 2, sampler, dataset, apo, model=model, tokenizer=tokenizer())
    assert result is model
    assert apo.round == 3
    # Each round starts at its own reference: log 2.
    assert first_losses(seen) == pytest.approx([math.log(2)] * 2, abs=1e-4)
    assert all(t.state.log_history[-2]["loss"] < math.log(2) for t in seen)
    assert not torch.equal(policies[0], policies[1])
    if kind == "adapter":
        assert [t.ref_model for t in seen] == [None] * 2
    # The result has the trained weights; nothing hangs on its forward pass any more.
    assert apo.swapped
    assert "forward" not in vars(model.get_base_model() if kind == "adapter" else model)


def test_trls_rounds_are_ours(tmp_path):
    """The weights of a loop over TRL's trainer written out by hand."""
    model, plain = causal(), causal()
    iterate_dpo(factory(tmp_path), 2, lambda m, t: t, dataset, APO(0.4), model=model)
    hats = [{k: v.clone() for k, v in plain.state_dict().items()}]
    for t in (1, 2):
        reference = causal()
        reference.load_state_dict(plain.state_dict())
        factory(tmp_path)(plain, reference, dataset(t)).train()
        vars(plain).pop("forward", None)
        hats.append({k: v.clone() for k, v in plain.state_dict().items()})
        if t == 1:
            moved = {k: v + 0.4 * (v - hats[0][k]) for k, v in hats[1].items()}
            plain.load_state_dict(moved)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, hats[2][name], rtol=0, atol=1e-6, msg=name)


def test_the_callback_extrapolates_at_the_end_of_each_training(tmp_path):
    model, twin, apo = causal(), causal(), APO(0.3)
    reference = causal()
    for t in (1, 2):
        callback = APOCallback(apo, reference)
        factory(tmp_path, callbacks=[callback])(model, reference, dataset(t)).train()
        vars(model).pop("forward", None)
        assert callback.reference is reference
        assert same(weights(reference), weights(model))
    assert apo.round == 3
    iterate_dpo(factory(tmp_path), 2, lambda m, t: t, dataset, again := APO(0.3), model=twin)
    again.swap(twin)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_trls_losses_are_ours(tmp_path):
    """On one batch of its collator, TRL's own loss against ours: sigmoid, sppo_hard, and ipo on responses of one length."""
    model, reference = causal(), causal(seed=1)
    batch = collate(examples(4))
    for name, kind in (("sigmoid", "dpo"), ("sppo_hard", "sppo"), ("ipo", "ipo")):
        policy, frozen = copy.deepcopy(model), copy.deepcopy(reference).requires_grad_(False)
        trainer = factory(tmp_path, loss_type=[name])(copy.deepcopy(model), copy.deepcopy(reference), dataset())
        with torch.no_grad():
            theirs = trainer.compute_loss(trainer.model, dict(batch)).item()
        # TRL's ipo takes means over a response's 3 tokens: sums / 3, so that tau / 3 in ours is its tau, and its loss is 1/9.
        beta, scale = (0.5 / 3, 1 / 9) if kind == "ipo" else (0.5, 1.0)
        report = train_round(policy, frozen, [batch], optimizer=adam, loss=kind, beta=beta)
        assert report.loss[0] * scale == pytest.approx(theirs, rel=1e-5)


def test_loops_given_something_else(tmp_path):
    model = causal()
    before = weights(model)

    def other_model(_, ref_model, pairs):
        return factory(tmp_path)(causal(), ref_model, pairs)

    def other_reference(policy, _, pairs):
        return factory(tmp_path)(policy, causal(), pairs)

    def moving_reference(policy, ref_model, pairs):
        return factory(tmp_path, sync_ref_model=True)(policy, ref_model, pairs)

    def stale(t):
        return dataset(t).add_column("ref_chosen_logps", [0.0] * 8)

    cases = [
        (dict(trainer_factory=other_model), ValueError, "trains another model"),
        (dict(trainer_factory=other_reference), ValueError, "has a reference of its own"),
        (dict(trainer_factory=moving_reference), ValueError, "sync_ref_model moves the reference"),
        (dict(trainer_factory=lambda *a: 3), TypeError, r"an object with train\(\)"),
        (dict(labeler=stale), ValueError, "the column 'ref_chosen_logps'"),
        (dict(rounds=0), ValueError, "rounds must be at least 1"),
        (dict(apo=0.3), TypeError, "apo must be an APO"),
        (dict(apo=APO(space="logits")), ValueError, "needs space 'parameter'"),
    ]
    for change, error, words in cases:
        given = dict(trainer_factory=factory(tmp_path), rounds=1, sampler=lambda m, t: t, labeler=dataset, apo=APO())
        with pytest.raises(error, match=words):
            iterate_dpo(**{**given, **change}, model=model)
        assert same(weights(model), before)
    with pytest.raises(TypeError, match="apo must be an APO"):
        APOCallback(0.3)


# -- sampling ----------------------------------------------------------------------------------------------------------------


def mixture(new, old, ids, alpha):
    with torch.no_grad():
        a, b = (m.eval()(ids).logits.log_softmax(-1) for m in (new, old))
    return ((1 + alpha) * a - alpha * b).log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_follows_the_mixture(kind, beams):
    new, old = causal(kind).eval(), trained(causal(kind), 3, by=0.02)
    processor = ExtrapolatedLogits(old, 0.4, model=new)
    options = dict(do_sample=False, max_new_tokens=6, num_beams=beams, pad_token_id=0, eos_token_id=None)
    out = new.generate(
        IDS, attention_mask=torch.ones_like(IDS), logits_processor=[processor], output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    assert out.sequences.shape == (2, 10)
    logp = mixture(new, old, out.sequences, 0.4)
    if beams == 1:
        for i, scores in enumerate(out.scores):
            torch.testing.assert_close(scores, logp[:, 3 + i], rtol=0, atol=1e-5)
        assert torch.equal(logp[:, 3:9].argmax(-1), out.sequences[:, 4:])
    else:
        path = logp[:, 3:9].gather(-1, out.sequences[:, 4:, None]).squeeze(-1).sum(1)
        torch.testing.assert_close(out.sequences_scores * 6, path, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_that_are_padded_on_the_left(kind):
    new, old = causal(kind).eval(), trained(causal(kind), 3, by=0.02)
    padded, mask = torch.tensor([[0, 0, 2, 5], [3, 3, 8, 15]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = dict(do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=None)
    both = new.generate(padded, attention_mask=mask, logits_processor=[ExtrapolatedLogits(old, 0.4, mask)], **options)
    alone = new.generate(
        padded[:1, 2:], attention_mask=mask[:1, 2:], logits_processor=[ExtrapolatedLogits(old, 0.4)], **options
    )
    assert torch.equal(both[0, 4:], alone[0, 2:])


def test_alpha_zero_asks_the_previous_model_nothing_and_what_is_excluded_stays_so():
    scores = torch.tensor([[0.0, -math.inf, 1.0]])
    assert ExtrapolatedLogits(torch.nn.Module(), 0.0)(IDS, scores) is scores
    new, old = causal(), trained(causal(), 1)
    given = new(IDS).logits[:, -1].detach().index_fill(1, torch.tensor([4]), -math.inf)
    got = ExtrapolatedLogits(old, 0.3)(IDS, given)
    assert (got[:, 4] == -math.inf).all()
    torch.testing.assert_close(got.logsumexp(-1), torch.zeros(2), rtol=0, atol=1e-5)


def test_models_of_other_vocabularies():
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="different tokenizers: vocab_size is 16 in the model and 17 in previous"):
        ExtrapolatedLogits(other, 0.3, model=causal())
    with pytest.raises(ValueError, match="different tokenizers"):
        extrapolate_(causal(), other, 0.3)
    with pytest.raises(ValueError, match="other tokenizers"):
        ExtrapolatedLogits(other, 0.3)(IDS, causal()(IDS).logits[:, -1])
    with pytest.raises(ValueError, match="alpha must be"):
        ExtrapolatedLogits(other, 1.0)


def test_rounds_in_the_space_of_logits():
    model, apo = causal(), APO(0.3, "logits")
    reference = apo.start(model)
    old = copy.deepcopy(model)
    train_round(model, reference, [examples(4)] * 3, optimizer=adam, beta=0.5)
    reference, hat = apo.after_round(model, reference), copy.deepcopy(model)
    report = train_round(model, reference, [examples(4, 1)] * 3, optimizer=adam, beta=0.5)
    assert report.loss[-1] < report.loss[0]
    with torch.no_grad():
        torch.testing.assert_close(reference(IDS).logits, mixture(hat, old, IDS, 0.3), rtol=0, atol=1e-5)
    # The mixture samples through the model that is trained, whose weights it replaces.
    model.load_state_dict(hat.state_dict())
    options = dict(
        do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(IDS)
    )
    a = model.generate(IDS, logits_processor=[ExtrapolatedLogits(reference.previous, 0.3)], **options)
    b = hat.generate(IDS, logits_processor=[ExtrapolatedLogits(old, 0.3)], **options)
    assert torch.equal(a, b)


def test_tied_embeddings_of_a_language_model_move_once():
    new, old = trained(causal("gpt2"), 1), causal("gpt2")
    before = new.lm_head.weight.detach().clone()
    extrapolate_(new, old, 0.5)
    assert new.lm_head.weight is new.transformer.wte.weight
    torch.testing.assert_close(
        new.lm_head.weight.detach(), before + 0.5 * (before - old.lm_head.weight.detach()), rtol=0, atol=1e-6
    )
