"""APO's losses and its own round of training, against formulas, against closed forms, and against what users may do wrong."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from apo_for_tests import normal
from torch import nn

from polyak.optim import APO
from polyak.optim.apo import collate, sequence_logps, train_round
from polyak.optim.apo.losses import dpo_loss, ipo_loss, sppo_loss

LOGPS = [normal(6, seed=s) * 5 - 20 for s in range(4)]


# -- losses ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_losses_are_their_formulas(beta):
    w, v, rw, rl = LOGPS
    h = (w - rw) - (v - rl)
    got = dpo_loss(w, v, rw, rl, beta)
    torch.testing.assert_close(got.loss, torch.log1p((-beta * h).exp()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.chosen_rewards, beta * (w - rw))
    torch.testing.assert_close(got.rejected_rewards, beta * (v - rl))
    torch.testing.assert_close(ipo_loss(w, v, rw, rl, beta).loss, (h - 1 / (2 * beta)) ** 2)
    hard = (w - rw - 0.5 * beta) ** 2 + (v - rl + 0.5 * beta) ** 2
    torch.testing.assert_close(sppo_loss(w, v, rw, rl, beta).loss, hard)
    p, q = torch.full((6,), 0.8, dtype=torch.float64), 0.3
    soft = (w - rw - 0.3 * beta) ** 2 + (v - rl + 0.2 * beta) ** 2
    torch.testing.assert_close(sppo_loss(w, v, rw, rl, beta, p, q).loss, soft)


def test_gradients_of_dpo():
    w, v, rw, rl = (x.clone().requires_grad_() for x in LOGPS)
    beta = 0.3
    dpo_loss(w, v, rw, rl, beta).loss.sum().backward()
    expected = -beta * torch.sigmoid(-beta * ((w - rw) - (v - rl))).detach()
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(v.grad, -expected, rtol=1e-12, atol=1e-14)
    assert rw.grad is None
    assert rl.grad is None


def test_where_losses_start_and_end():
    w, v, *_ = LOGPS
    assert torch.equal(dpo_loss(w, v, w, v, 0.7).loss, torch.full_like(w, math.log(2)))
    tau = 0.4
    assert float(ipo_loss(w + 1 / (2 * tau), v, w, v, tau).loss.max()) < 1e-25


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_populations_minimizer_of_dpo_is_the_tilted_policy(beta):
    reward, ref = normal(9), normal(9, seed=1).log_softmax(-1)
    theta = (ref + reward / beta).log_softmax(-1).requires_grad_()
    logp = theta.log_softmax(-1)
    i, j = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    first = dpo_loss(logp[i], logp[j], ref[i], ref[j], beta).loss
    weight = ref.exp()[i] * ref.exp()[j] * torch.sigmoid(reward[i] - reward[j])
    (2 * (weight * first).sum()).backward()
    assert float(theta.grad.abs().max()) < 1e-15
    assert float(weight.sum()) == pytest.approx(0.5)  # each unordered pair, with either response for the chosen one


def test_log_probabilities_of_responses():
    logits, labels = normal(2, 5, 7), torch.tensor([[1, 2, 3, 4, 0], [6, 5, 4, -100, -100]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    got = sequence_logps(logits, labels, mask)
    logp = logits.log_softmax(-1)
    expected = [
        logp[0, 1, 3] + logp[0, 2, 4] + logp[0, 3, 0],
        logp[1, 0, 5] + logp[1, 1, 4],  # nothing predicts the first token
    ]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-13, atol=0)
    assert sequence_logps(logits.bfloat16(), labels, mask).dtype == torch.float32
    assert torch.equal(sequence_logps(logits, labels, torch.zeros(2, 5)), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, sppo_loss])
def test_losses_given_something_else(loss):
    w, v, rw, rl = LOGPS
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be"):
            loss(w, v, rw, rl, value)
    with pytest.raises(ValueError, match="must have one shape"):
        loss(w, v[:3], rw, rl, 0.1)
    bad = v.clone()
    bad[4] = math.nan
    with pytest.raises(ValueError, match=r"logp_l\[4\] must be finite, got nan"):
        loss(w, bad, rw, rl, 0.1)


def test_probabilities_that_are_none():
    for wins, words in (
        (1.5, "wins_w must be in"),
        (torch.full((6,), 1.5), "must lie in"),
        (torch.ones(2), "must have the log"),
    ):
        with pytest.raises(ValueError, match=words):
            sppo_loss(*LOGPS, 1.0, wins)


def test_logits_of_other_shapes():
    with pytest.raises(ValueError, match="logits, labels and mask must have shapes"):
        sequence_logps(torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.zeros(2, 4))


# -- a round -----------------------------------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """A causal model as transformers' are called: the next token's logits are a row of a table, with dropout on top."""

    def __init__(self, vocabulary=5, dropout=0.0, seed=0):
        super().__init__()
        self.table, self.drop = nn.Embedding(vocabulary, vocabulary, dtype=torch.float64), nn.Dropout(dropout)
        self.table.weight.data.copy_(normal(vocabulary, vocabulary, seed=seed))

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.drop(self.table(input_ids)))


PAIRS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [0]},
    {"prompt_ids": [4], "chosen_ids": [1], "rejected_ids": [2, 2, 1]},
    {"prompt_ids": [0, 0], "chosen_ids": [2, 3], "rejected_ids": [3, 2]},
]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def score(table, prompt, response):
    ids = [*prompt, *response]
    return sum(table.log_softmax(-1)[a, b] for a, b in zip(ids[len(prompt) - 1 :], response, strict=False))


def test_examples_become_tensors():
    data = collate(PAIRS[:2], pad_token_id=9)
    assert data["input_ids"].tolist() == [[1, 2, 3, 4], [4, 1, 9, 9], [1, 2, 0, 9], [4, 2, 2, 1]]
    assert data["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert data["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1]]
    rated = collate([{**p, "chosen_wins": 0.9, "rejected_wins": 0.25} for p in PAIRS])
    assert rated["rejected_wins"].tolist() == [0.25] * 3


@pytest.mark.parametrize("form", ["lists", "tensors"])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "sppo"])
def test_two_steps_are_those_of_the_formulas(loss, form):
    model, beta = Bigram(), 0.5
    reference = APO().start(model)
    table = model.table.weight.detach().clone().requires_grad_()
    fixed, losses, margins = table.detach().clone(), [], []
    for _ in range(2):
        each, margin = [], []
        for pair in PAIRS:
            up, down = (
                score(table, pair["prompt_ids"], pair[side]) - score(fixed, pair["prompt_ids"], pair[side])
                for side in ("chosen_ids", "rejected_ids")
            )
            each.append(
                {
                    "dpo": lambda up=up, down=down: -F.logsigmoid(beta * (up - down)),
                    "ipo": lambda up=up, down=down: (up - down - 1 / (2 * beta)) ** 2,
                    "sppo": lambda up=up, down=down: (up - 0.5 / beta) ** 2 + (down + 0.5 / beta) ** 2,
                }[loss]()
            )
            margin.append(beta * (up - down).item())
        mean = torch.stack(each).mean()
        losses.append(mean.item())
        margins.append(sum(margin) / 3)
        (slope,) = torch.autograd.grad(mean, table)
        table = (table - 0.1 * slope).detach().requires_grad_()
    batch = PAIRS if form == "lists" else collate(PAIRS)
    report = train_round(model, reference, [batch, batch], optimizer=sgd, loss=loss, beta=beta)
    torch.testing.assert_close(model.table.weight.detach(), table.detach(), rtol=0, atol=1e-13)
    assert report.loss == pytest.approx(losses, abs=1e-13)
    assert report.margin == pytest.approx(margins, abs=1e-13)
    assert report.accuracy[0] == 0.0
    assert (report.steps, report.degenerate) == (2, 0)
    assert torch.equal(reference.table.weight, fixed)


def test_soft_labels_reach_sppo():
    rated = [{**p, "chosen_wins": 0.75, "rejected_wins": 0.5} for p in PAIRS]
    model = Bigram()
    report = train_round(model, APO().start(model), [rated], optimizer=sgd, loss="sppo", beta=0.5)
    assert report.loss == pytest.approx([(0.25 / 0.5) ** 2])  # both ratios are 0 at the start


def test_without_extrapolation_two_rounds_are_iterative_dpo():
    model, plain = Bigram(), Bigram()
    apo = APO(0.0)
    reference = apo.start(model)
    for _ in range(2):
        train_round(model, reference, [PAIRS] * 3, optimizer=sgd)
        reference = apo.after_round(model, reference)
        frozen = Bigram()
        frozen.load_state_dict(plain.state_dict())
        train_round(plain, frozen, [PAIRS] * 3, optimizer=sgd)
        assert torch.equal(model.table.weight, plain.table.weight)


def test_pairs_without_a_preference_teach_nothing_and_are_counted():
    none = [
        {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 3]},
        {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]},
    ]
    model = Bigram()
    reference, before = APO().start(model), model.table.weight.detach().clone()
    with pytest.warns(UserWarning, match="4 pairs have equal responses, or an empty one"):
        report = train_round(model, reference, [none, none], optimizer=sgd)
    assert report.degenerate == 4
    assert report.loss == [math.log(2)] * 2
    assert torch.equal(model.table.weight, before)
    with pytest.warns(UserWarning, match="1 pairs"):
        report = train_round(model, reference, [[*PAIRS, none[0]]], optimizer=sgd)
    assert not torch.equal(model.table.weight, before)


def test_dropout_is_off_within_a_round_and_back_after_it():
    model, plain = Bigram(dropout=0.5), Bigram()
    model.drop.eval()
    train_round(model, APO().start(model), [PAIRS] * 2, optimizer=sgd)
    train_round(plain, APO().start(plain), [PAIRS] * 2, optimizer=sgd)
    assert torch.equal(model.table.weight, plain.table.weight)
    assert model.drop.p == 0.5
    assert (model.training, model.drop.training) == (True, False)


def test_gradients_are_clipped_and_gone_afterwards():
    model = Bigram()
    before = model.table.weight.detach().clone()
    train_round(model, APO().start(model), [PAIRS], optimizer=sgd, beta=5.0, max_grad_norm=0.01)
    assert float((model.table.weight.detach() - before).norm()) == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert model.table.weight.grad is None


def test_a_log_probability_that_is_not_finite_is_told_with_its_place():
    model = Bigram()
    reference = APO().start(model)
    model.table.weight.data[4] = math.nan  # pair 1 alone has a response that follows token 4
    before = model.table.weight.detach().clone()
    first = [PAIRS[2], PAIRS[2]]
    with pytest.raises(ValueError, match=r"batch 1: log_probability\[1\] must be finite, got nan"):
        train_round(model, reference, [first, [PAIRS[2], PAIRS[1]]], optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    torch.testing.assert_close(model.table.weight.detach(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(beta=0.0), ValueError, "beta must be > 0"),
        (dict(loss="dop"), ValueError, "did you mean 'dpo'"),
        (dict(max_grad_norm=-1.0), ValueError, "max_grad_norm must be > 0"),
        (dict(optimizer=3), TypeError, "optimizer must be a function"),
        (dict(batches=[]), ValueError, "holds no batch"),
        (dict(batches=[[]]), ValueError, "at least one example"),
        (dict(batches=[[{"prompt_ids": [1], "chosen_ids": [1]}]]), ValueError, "example 0 has no 'rejected_ids'"),
        (dict(batches=[[{**PAIRS[0], "prompt_ids": []}]]), ValueError, "prompt_ids must hold at least one token"),
        (dict(batches=[[{**PAIRS[0], "ref_chosen_logps": 1.0}]]), ValueError, "another round's reference"),
        (dict(batches=[{"input_ids": torch.zeros(3, 2)}]), ValueError, "batch 0: input_ids must be a tensor"),
        (dict(batches=[{"input_ids": torch.zeros(2, 2)}]), ValueError, "batch 0: attention_mask must be a tensor"),
    ],
)
def test_rounds_given_something_else(change, error, words):
    model = Bigram()
    given = dict(batches=[PAIRS], optimizer=sgd)
    reference, before = APO().start(model), model.table.weight.detach().clone()
    with pytest.raises(error, match=words):
        train_round(model, reference, **{**given, **change})
    assert torch.equal(model.table.weight, before)
    with pytest.raises(ValueError, match="got the model that is trained"):
        train_round(model, model, **given)
    with pytest.raises(ValueError, match="no trainable parameter"):
        train_round(Bigram().requires_grad_(False), reference, **given)
