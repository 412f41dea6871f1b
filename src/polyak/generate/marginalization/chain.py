"""Samples of the model that are kept from step to step of training, and renewed a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.marginalization.model import MarginalizationModel
from polyak.generate.marginalization.values import MANY, SIZE


class PersistentChain(nn.Module):
    """A batch of configurations that follows a model as it is trained, by block Gibbs steps.

    A module whose state x, [batch, D] of int64, is a buffer: it is saved, and moves with ``to``. It begins uniformly random.

    Args:
        batch: how many chains.
        length: D.
        num_values: K.
        generator: of the beginning, on the CPU.
    """

    x: Tensor

    @checks.arguments(batch=SIZE, length=SIZE, num_values=MANY, generator=checks.generator | None)
    def __init__(self, batch: int, length: int, num_values: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.num_values = num_values
        self.register_buffer("x", torch.randint(1, num_values + 1, (batch, length), generator=generator))

    @checks.arguments(
        model=checks.Instance(MarginalizationModel, words="a MarginalizationModel"), steps=checks.Integer(1),
        generator=checks.generator | None,
    )  # fmt: skip
    @torch.no_grad()
    def refresh(
        self, model: MarginalizationModel, steps: int = 4, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Erase ``steps`` random positions of each row, draw them again, one after another, from the conditionals; return x.

        It leaves the model's law as it is where the conditionals are those of one law. As many calls of the network as steps.

        Args:
            generator: of positions and draws, on the chain's device.
        """
        batch, length = self.x.shape
        if (model.length, model.num_values) != (length, self.num_values):
            raise ValueError(
                f"model must have length {length} and {self.num_values} values, as the chain has, got {model.length} and "
                f"{model.num_values}"
            )
        if steps > length:
            raise ValueError(f"steps must be at most the {length} positions that there are, got {steps}")
        turns = torch.rand(batch, length, device=self.x.device, generator=generator).topk(steps, 1).indices
        self.x = model.fill(self.x.scatter(1, turns, 0), turns, generator)
        return self.x
