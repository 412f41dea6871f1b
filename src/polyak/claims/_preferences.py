"""Preference problems with a known reward: tables of responses, and a character model that should write vowels.

This module imports torch: a claim imports it inside its trial function.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak.claims import _problems
from polyak.lab import data
from polyak.optim.apo import APO
from polyak.optim.apo.losses import dpo_loss, sequence_logps
from polyak.optim.apo.training import train_round

# -- tables ------------------------------------------------------------------------------------------------------------------


class Bandits(NamedTuple):
    """``count`` problems of K responses each: rewards (count, K) from N(0, 1), and a reference policy's log-probabilities."""

    reward: Tensor
    ref: Tensor


def bandits(seed: int, count: int, responses: int) -> Bandits:
    """Drawn from the seed, in float64; the reference is uniform."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(count, responses, generator=generator, dtype=torch.float64)
    return Bandits(reward, torch.full_like(reward, -math.log(responses)))


def suboptimality(problems: Bandits, log_policy: Tensor) -> Tensor:
    """``(max r - E_pi r) / (max r - E_ref r)`` of each problem; 1 for the reference, 0 for the best response."""
    best = problems.reward.amax(-1)
    first, now = ((p.exp() * problems.reward).sum(-1) for p in (problems.ref, log_policy))
    return (best - now) / (best - first)


class Table(nn.Module):
    """A policy per problem: the soft-max of a row of logits."""

    def __init__(self, ref: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(ref.clone())

    def forward(self) -> Tensor:
        """Log-probabilities (count, K)."""
        return self.logits.log_softmax(-1)


def sampled_pairs(problems: Bandits, policy: Table, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chosen and rejected responses (count, pairs): two draws from the policy, labelled by Bradley and Terry's model."""
    drawn = torch.multinomial(policy().detach().exp(), 2 * pairs, replacement=True, generator=generator)
    first, second = drawn.chunk(2, -1)
    odds = problems.reward.gather(-1, first) - problems.reward.gather(-1, second)
    wins = torch.rand(odds.shape, generator=generator, dtype=odds.dtype) < odds.sigmoid()
    return torch.where(wins, first, second), torch.where(wins, second, first)


def fit_table(policy: Table, chosen: Tensor, rejected: Tensor, beta: float, steps: int, lr: float) -> None:
    """DPO from the policy as it is, which is also the reference: full-batch steps of Adam."""
    with torch.no_grad():
        ref = policy()
        ref_w, ref_l = ref.gather(-1, chosen), ref.gather(-1, rejected)
    optimizer = torch.optim.Adam([policy.logits], lr=lr)
    for _ in range(steps):
        logp = policy()
        loss = dpo_loss(logp.gather(-1, chosen), logp.gather(-1, rejected), ref_w, ref_l, beta).loss
        optimizer.zero_grad()
        # The problems are apart: each gets the gradient of its own mean.
        loss.mean(-1).sum().backward()
        optimizer.step()


def exact_rounds(problems: Bandits, arm: str, alpha: float, beta: float, seed: int) -> Iterator[Tensor]:
    """Log-policies (count, K) after 1, 2, ... rounds, without end, each of which maximizes its objective exactly."""
    policy = Table(problems.ref)
    between = Between(policy, arm, alpha, seed)
    while True:
        with torch.no_grad():
            policy.logits.add_(problems.reward, alpha=1 / beta)
            yield policy()
        between.after_round()


def sampled_rounds(
    problems: Bandits, arm: str, alpha: float, beta: float, seed: int, *, rounds: int, pairs: int, steps: int, lr: float
) -> list[Tensor]:
    """Expected rewards (count,) of the trained policies after 0, 1, ... rounds of DPO on sampled pairs."""
    generator = torch.Generator().manual_seed(seed)
    policy = Table(problems.ref)
    between = Between(policy, arm, alpha, seed)
    expected = [(policy().detach().exp() * problems.reward).sum(-1)]
    for _ in range(rounds):
        chosen, rejected = sampled_pairs(problems, policy, pairs, generator)
        fit_table(policy, chosen, rejected, beta, steps, lr)
        expected.append((policy().detach().exp() * problems.reward).sum(-1))
        between.after_round()
    return expected


# -- between rounds ----------------------------------------------------------------------------------------------------------


class Between:
    """What happens to a model between rounds, by arm.

    "dpo": nothing. "apo": extrapolation. "random": a step as long as extrapolation's, weight by weight, in a random direction.
    "from_reference": extrapolation of what the round moved, ``theta^_{t+1} - theta_t``, in place of ``theta^_{t+1} - theta^_t``.
    """

    def __init__(self, model: nn.Module, arm: str, alpha: float, seed: int) -> None:
        self.model, self.arm, self.alpha = model, arm, alpha
        self.apo = APO(alpha if arm == "apo" else 0.0)
        self.reference = self.apo.start(model)
        self.generator = torch.Generator().manual_seed(seed + 1_000_003)

    @torch.no_grad()
    def after_round(self) -> None:
        origin = self.apo.kept if self.arm == "random" else dict(self.reference.named_parameters())
        steps = {name: p - origin[name] for name, p in self.model.named_parameters()}
        self.reference = self.apo.after_round(self.model, self.reference)
        if self.arm in ("dpo", "apo"):
            return
        for name, p in self.model.named_parameters():
            step = steps[name]
            if self.arm == "random":
                noise = torch.randn(p.shape, generator=self.generator, dtype=p.dtype).to(p.device)
                step = noise * (step.norm() / noise.norm())
            p.add_(step, alpha=self.alpha)
        self.reference = self.apo.reference(self.model, self.reference)


# -- a language model --------------------------------------------------------------------------------------------------------


class Writer(nn.Module):
    """A character model, called as causal models of transformers are."""

    def __init__(self, gpt: _problems.GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.gpt(input_ids))


@torch.no_grad()
def write(gpt: _problems.GPT, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Prompts (n, given) with ``length`` sampled tokens behind them; keys and values are kept, so that a token costs one pass."""
    caches: list[list[Tensor]] = [[] for _ in gpt.blocks]
    written, new, at = [prompts], prompts, 0
    for _ in range(length):
        x = gpt.embed(new) + gpt.positions[at : at + new.shape[1]]
        for block, cache_ in zip(gpt.blocks, caches, strict=True):
            x = _extend(block, x, cache_)
        at += new.shape[1]
        chances = gpt.head(gpt.norm(x[:, -1])).softmax(-1)
        new = torch.multinomial(chances.cpu(), 1, generator=generator).to(prompts.device)
        written.append(new)
    return torch.cat(written, 1)


def _extend(block: Any, x: Tensor, cache_: list[Tensor]) -> Tensor:
    """A block's output at new positions, given the keys and values of the former ones, to which the new ones are added."""
    batch, length, dim = x.shape
    heads = block.qkv(block.before_attention(x)).view(batch, length, 3, block.heads, dim // block.heads)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    cache_[:] = [torch.cat(pair, 2) for pair in zip(cache_, (k, v), strict=True)] if cache_ else [k, v]
    scores = (q * block.scale) @ cache_[0].transpose(-1, -2)
    if length > 1:
        scores = scores + block.mask[:length, :length]
    x = x + block.out((scores.softmax(-1) @ cache_[1]).transpose(1, 2).reshape(batch, length, dim))
    return x + block.mlp(block.before_mlp(x))


@cache
def _pretrained(seed: int, device: str, dim: int, context: int, steps: int, lr: float) -> _problems.GPT:
    problem = _problems.char_lm(seed, device, dim=dim, depth=2, context=context)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=lr)
    for _ in _problems.train(problem, optimizer, steps=steps, schedule=_problems.warmup_cosine(steps)):
        pass
    assert isinstance(problem.model, _problems.GPT)
    return problem.model


class Vowels:
    """The task of writing vowels: a pretrained character model, prompts from its text, and a reward that counts.

    The reward of a continuation is the number of vowels in it; of two continuations Bradley and Terry's model prefers one.

    Args:
        seed: decides the model, the prompts and all draws.
        given, length: characters of a prompt and of its continuation.
        dim, steps, lr: of the model, and of its pretraining.
    """

    def __init__(self, seed: int, device: str, *, given: int, length: int, dim: int, steps: int, lr: float) -> None:
        self.seed, self.device, self.given, self.length = seed, device, given, length
        self.pretrained = _pretrained(seed, device, dim, given + length, steps, lr)
        tokens, vocabulary = _problems._characters()
        text = data.text().text
        self.tokens = torch.from_numpy(tokens[: len(tokens) * 9 // 10]).to(device)
        self.worth = torch.zeros(vocabulary, device=device)
        for vowel in "aeiouAEIOU":
            self.worth[int(tokens[text.index(vowel)])] = 1.0

    def model(self) -> Writer:
        """The pretrained model, a new copy."""
        return Writer(copy.deepcopy(self.pretrained))

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(self.tokens) - self.given, (count, 1), generator=generator).to(self.device)
        return self.tokens[starts + torch.arange(self.given, device=self.device)]

    def reward(self, written: Tensor) -> Tensor:
        return self.worth[written[:, self.given :]].sum(1)

    def pairs(
        self, model: Writer, count: int, batch: int, generator: torch.Generator
    ) -> tuple[list[dict[str, Tensor]], float]:
        """An epoch of batches as TRL's collator makes them, from two continuations of each prompt; their mean reward."""
        prompts = self.prompts(count, generator)
        first, second = write(model.gpt, prompts.repeat(2, 1), self.length, generator).chunk(2)
        rewards = self.reward(first), self.reward(second)
        wins = torch.rand(count, generator=generator).to(self.device) < (rewards[0] - rewards[1]).sigmoid()
        chosen, rejected = (torch.where(w[:, None], first, second) for w in (wins, ~wins))
        mask = torch.zeros_like(chosen)
        mask[:, self.given :] = 1
        batches = []
        for part in torch.arange(count).split(batch):
            ids, responses = torch.cat([chosen[part], rejected[part]]), torch.cat([mask[part], mask[part]])
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": responses})
        return batches, float(torch.cat(rewards).mean())

    @torch.no_grad()
    def judged(self, model: Writer, count: int) -> tuple[float, float]:
        """Mean true reward, and the KL divergence to the pretrained model in nats, over the same draws in every call."""
        generator = torch.Generator().manual_seed(self.seed + 2_000_003)
        prompts = self.prompts(count, generator)
        written = write(model.gpt, prompts, self.length, generator)
        mask = torch.zeros_like(written)
        mask[:, self.given :] = 1
        own, ref = (sequence_logps(gpt(written), written, mask) for gpt in (model.gpt, self.pretrained))
        return float(self.reward(written).mean()), float((own - ref).mean())

    def round(self, between: Between, model: Writer, generator: torch.Generator, **options: Any) -> float:
        """Sample, label and train once; the sampled continuations' mean reward."""
        epoch, sampled = self.pairs(model, options["prompts"], options["batch"], generator)
        batches = [epoch[i % len(epoch)] for i in range(options["updates"])]
        train_round(
            model, between.reference, batches, beta=options["beta"],
            optimizer=lambda params: torch.optim.AdamW(params, lr=options["lr"]),
        )  # fmt: skip
        return sampled
