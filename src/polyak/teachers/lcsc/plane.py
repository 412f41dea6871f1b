"""The metric on the plane through three checkpoints, as the paper draws it to motivate the search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.teachers.lcsc.bank import CheckpointBank
from polyak.teachers.lcsc.objective import OBJECTIVE, Evaluator, Objective
from polyak.teachers.lcsc.sources import CHECKPOINT


@checks.arguments(
    theta0=CHECKPOINT, theta1=CHECKPOINT, theta2=CHECKPOINT,
    grid=checks.Each(checks.Numbers(1), words="(values of x, values of y)"), objective=OBJECTIVE, model=checks.module | None,
)  # fmt: skip
def landscape(
    theta0: Any,
    theta1: Any,
    theta2: Any,
    grid: tuple[Sequence[float], Sequence[float]],
    *,
    objective: Objective,
    model: nn.Module | None = None,
) -> Tensor:
    """The objective at ``theta0 + x (theta1 - theta0) + y (theta2 - theta0)``.

    Args:
        theta0, theta1, theta2: checkpoints, each as in :class:`CheckpointBank`.
        grid: the values of x, and those of y.
        objective, model: as in :class:`LCSC`; the model is left with the weights of the last point.

    Returns:
        (len(x), len(y)), float64; inf where the objective is not finite.
    """
    if len(grid) != 2:
        raise ValueError(f"grid must be (values of x, values of y), got {len(grid)} parts")
    xs, ys = ([float(v) for v in part] for part in grid)
    try:
        bank = CheckpointBank([theta0, theta1, theta2])
    except (TypeError, ValueError) as error:
        raise type(error)(f"theta0, theta1, theta2: {error}") from None
    evaluator = Evaluator(bank, model)
    values = torch.empty(len(xs), len(ys), dtype=torch.float64)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            evaluator.note(torch.tensor([1 - x - y, x, y], dtype=torch.float64))
            values[i, j] = evaluator.value(objective)
    return values
