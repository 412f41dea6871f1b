"""Asking a reward of a population: what it may return, parts, what it is told, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polyak.generate.rewards import RewardContext, Scorer, warn_of_nan, without_nan

ROWS = torch.arange(6.0).reshape(6, 1)


class Net(nn.Module):
    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return samples[..., 0] * nn.Parameter(torch.ones(()))


ANSWERS: dict[str, Any] = {
    "tensor": lambda s: s[..., 0],
    "half": lambda s: s[..., 0].half(),
    "whole": lambda s: s[..., 0].long(),
    "rows": lambda s: s.flatten(),
    "array": lambda s: s.numpy()[..., 0],
    "list": lambda s: s.flatten().tolist(),
    "nested": lambda s: s[..., 0].tolist(),
    "tensors": lambda s: list(s.flatten()),
    "numpy numbers": lambda s: list(s.numpy().flatten()),
    "module": Net(),
    "context": lambda s, context: s[..., 0],
    "a default is no context": lambda s, scale=1.0: scale * s[..., 0],
}


@pytest.mark.parametrize("size", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("reward", ANSWERS.values(), ids=ANSWERS.keys())
def test_what_a_reward_may_return(reward: Any, size: int | None) -> None:
    found = Scorer(reward, batch_size=size)(ROWS, 3)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 12])
def test_parts_are_no_larger_and_know_their_systems(size: int) -> None:
    seen: list[tuple[tuple[int, ...], RewardContext]] = []

    def reward(samples: torch.Tensor, context: RewardContext) -> torch.Tensor:
        seen.append((tuple(samples.shape), context))
        prompts = torch.tensor([10.0, 20.0, 30.0, 40.0])[list(context.systems)]
        return samples[..., 0] + prompts[:, None]

    rows = torch.zeros(12, 1)
    found = Scorer(reward, decode=lambda r: r + 1, batch_size=size)(rows, 3, step=7, t=0.5, last=True)
    assert torch.equal(found, torch.tensor([11.0, 21, 31, 41], dtype=torch.float64)[:, None].expand(4, 3))
    assert all(shape[0] * shape[1] <= size for shape, _ in seen)
    assert sum(shape[0] * shape[1] for shape, _ in seen) == 12
    assert {(c.step, c.t, c.last) for _, c in seen} == {(7, 0.5, True)}


def test_texts_are_lists() -> None:
    def decode(rows: torch.Tensor) -> list[str]:
        return ["a" * int(v) for v in rows]

    assert Scorer(lambda texts: [len(v) for v in texts], decode=decode, batch_size=2)(ROWS, 2).tolist() == [
        [0, 1], [2, 3], [4, 5],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        (lambda s: s, ValueError, r"shape \(2, 3\) or \(6,\), got \(2, 3, 1\)"),
        (lambda s: s[:, :1, 0], ValueError, r"got \(2, 1\)"),
        (lambda s: 1.0, TypeError, "got 1.0"),
        (lambda s: None, TypeError, "real numbers, got None"),
        (lambda s: s[..., 0] > 1, TypeError, "torch.bool"),
        (lambda s: s[..., 0] * 1j, TypeError, "complex"),
        (lambda s: ["a"] * 6, TypeError, "'a'"),
        (lambda s: [], TypeError, r"\[\]"),
        (lambda s: np.ones(5), ValueError, r"got \(5,\)"),
    ],
)
def test_refused(reward: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Scorer(reward)(ROWS, 3)


def test_rows_and_decoded_rows_must_fit() -> None:
    with pytest.raises(ValueError, match="particles=4 for each system, got 6"):
        Scorer(Net())(ROWS, 4)
    with pytest.raises(ValueError, match="keep the number of samples, 6, got 3"):
        Scorer(Net(), decode=lambda r: r[::2])(ROWS, 3)
    assert Scorer(Net())(ROWS[:0], 3).shape == (0, 3)


def test_nan_is_the_worst_and_is_counted() -> None:
    found, count = without_nan(torch.tensor([[1.0, torch.nan], [torch.nan, -torch.inf]]))
    assert torch.equal(found, torch.tensor([[1.0, -torch.inf], [-torch.inf, -torch.inf]]))
    with pytest.warns(RuntimeWarning, match="2 rewards were NaN: their weight is 0"):
        warn_of_nan(count, "their weight is 0")
    warn_of_nan(count * 0, "nothing")
