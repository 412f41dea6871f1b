"""Detects edits of a scheduler's public tensors (``timesteps``, ``sigmas``) by identity and version, not by values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.generate.adapters.diffusers.plan import Plan


class Watch:
    """Whether an attribute is still the tensor that was put there, unchanged.

    Of a tensor made under ``torch.inference_mode`` changes in place cannot be told.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, _version(tensor)

    def same(self, tensor: Tensor) -> bool:
        return tensor is self.tensor and _version(tensor) == self.version


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def is_part(labels: Tensor, planned: Sequence[float]) -> bool:
    """Whether timesteps are some of the planned ones, in a row; in another type, too, that rounds them."""
    given = labels.detach().cpu()
    whole = torch.tensor(planned, dtype=torch.float64).to(given.dtype)
    count = len(given) if given.ndim == 1 else 0
    return any(torch.equal(whole[i : i + count], given) for i in range(len(whole) - count + 1) if count)


def times_of_levels(plan: Plan, levels: Tensor, planned: Sequence[float], times: Sequence[float]) -> list[float]:
    """The times of a run whose levels were changed; what was not changed keeps its time.

    Args:
        plan: of the configuration.
        levels: shape (n + 1,), as they are now.
        planned: as they were.
        times: of the plan.

    Raises:
        ValueError: levels of another number, or that do not decrease (the last two may be equal).
    """
    given = levels.detach().double().cpu().tolist()
    falling = [-s for s in given] if plan.config.get("invert_sigmas") else given
    fit = len(given) == len(planned) and all(a > b for a, b in itertools.pairwise(falling[:-1]))
    if not fit or falling[-2] < falling[-1]:
        raise ValueError(f"sigmas were changed to {given}: they must be {len(planned)}, and decrease")
    made = []
    for level, before, t in zip(given, planned, times, strict=True):
        if level == before:
            made.append(t)
        elif plan.is_flow:
            made.append(1 - level if plan.config.get("invert_sigmas") else level)
        elif level == 0:
            made.append(0.0)
        else:
            made.append(plan.process.t_of_lam(-torch.tensor(level, dtype=torch.float64).log()).item())
    if given[-1] == given[-2]:
        made[-1] = made[-2]
    return made
