"""Masked language models of transformers as networks of a marginalization model: a tiny BERT, made from its configuration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyak.generate import MarginalizationModel
from polyak.generate.adapters.transformers import MaskedLMDual
from polyak.generate.marginalization import consistency_loss, data_loss

transformers = pytest.importorskip("transformers")
MASK, CLS, SEP, TOKENS, D = 3, 1, 2, [7, 4, 9], 5


@pytest.fixture(scope="module")
def bert():
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(config).eval()


def dual(bert, **options):
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return MaskedLMDual(bert, D, MASK, **{"first": CLS, "last": SEP, "tokens": TOKENS, **options})


X = torch.tensor([[1, 0, 3, 2, 0], [3, 3, 1, 0, 2]])


@torch.no_grad()
def test_its_logits_are_those_of_the_values_tokens_at_the_positions(bert):
    f, logits = MarginalizationModel(dual(bert), 3, D)(X)
    ids = torch.tensor([[CLS, 7, MASK, 9, 4, MASK, SEP], [CLS, 9, 9, 7, MASK, 4, SEP]])
    torch.testing.assert_close(logits, bert(input_ids=ids).logits[:, 1:-1][..., TOKENS])
    hidden = bert(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(f, dual(bert).of_marginals(hidden[:, 0])[:, 0])
    plain = dual(bert, first=None, last=None)
    torch.testing.assert_close(plain(X)[1], bert(input_ids=ids[:, 1:-1]).logits[..., TOKENS])
    torch.testing.assert_close(plain.conditional(X), plain(X)[1])
    assert dual(bert, tokens=None).num_values == 10


def test_it_samples_scores_and_trains(bert):
    net = dual(bert)
    model, generator = MarginalizationModel(net, net.num_values, D), torch.Generator().manual_seed(0)
    x = model.sample(6, X[0], generator=generator)
    assert ((x == X[0]) | (X[0] == 0)).all()
    assert model.log_marginal(X).shape == (2,)
    assert model.log_prob(x, "chain", generator=generator).max() < 0
    (data_loss(model, x, generator) + consistency_loss(model, x, generator)).backward()
    assert all(p.grad is not None for p in net.of_marginals.parameters())
    bert.zero_grad()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": [4, 4]}, "tokens must differ from each other and from the mask"),
        ({"tokens": [MASK, 4]}, "tokens must differ from each other and from the mask"),
        ({"tokens": [4, 11]}, "tokens must be below the vocabulary's size, 11, got 11"),
        ({"first": 30}, "first must be below the vocabulary's size, 11, got 30"),
    ],
)
def test_tokens_that_there_are_not_are_refused(bert, options, says):
    with pytest.raises(ValueError, match=says):
        dual(bert, **options)


def test_a_model_without_a_configuration_is_refused():
    with pytest.raises(TypeError, match="model must have a config with vocab_size and hidden_size"):
        MaskedLMDual(nn.Linear(2, 2), D, MASK)
