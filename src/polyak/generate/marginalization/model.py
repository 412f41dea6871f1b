"""The model: marginals and conditionals from one network, likelihoods, and samples in any order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.discrete import categorical
from polyak.generate.marginalization.values import (
    MANY,
    SIZE,
    VALUES,
    configurations,
    random_ranks,
    ranks,
    whole,
    widened,
)

_ORDERS = checks.Integer(1, 1_000_000) | checks.tensor
_ROWS = 8192  # of a network's call where the steps of a chain are evaluated together


class MarginalizationModel(nn.Module):
    """A network of two heads as a distribution over {1..K}^D: its marginals, conditionals, likelihoods and samples.

    Args:
        net: ``net(x) -> (f, logits)`` for x of int64, [B, D], 0 for unknown: unnormalized log marginals f, [B], and logits
            [B, D, K] of every position given those that are known. Where it has methods ``marginal(x) -> f`` and
            ``conditional(x) -> logits`` they are called instead when one of the two is wanted.
        num_values: K.
        length: D.

    Values are 1 to K, and 0 is unknown. They are looked at on the CPU alone.
    """

    @checks.arguments(net=checks.module, num_values=MANY, length=SIZE)
    def __init__(self, net: nn.Module, num_values: int, length: int) -> None:
        super().__init__()
        self.net, self.num_values, self.length = net, num_values, length

    def extra_repr(self) -> str:
        return f"num_values={self.num_values}, length={self.length}"

    @checks.arguments(x=VALUES)
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the network says of x, [B, D]: f, [B], which is not normalized, and logits, [B, D, K]."""
        return self.heads(configurations("x", x, self.length, self.num_values), len(x))

    def f(self, x: Tensor) -> Tensor:
        """The head of marginals alone, [B], in float32 at least: ``log p(x_S) + f(nothing)``. x is not looked at."""
        one: Any = getattr(self.net, "marginal", None)
        said: Any = one(x) if callable(one) else self.net(x)[0]
        return self._f(said, len(x))

    def logits(self, x: Tensor) -> Tensor:
        """The head of conditionals alone, [B, D, K], in float32 at least. x is not looked at."""
        one: Any = getattr(self.net, "conditional", None)
        said: Any = one(x) if callable(one) else self.net(x)[1]
        return self._logits(said, len(x))

    def heads(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """f of all of x, [B], and logits of its first rows, in one call where both heads share their work."""
        if callable(getattr(self.net, "marginal", None)) and callable(getattr(self.net, "conditional", None)):
            return self.f(x), self.logits(x[:rows])
        f, logits = self.net(x)
        return self._f(f, len(x)), self._logits(logits[:rows], rows)

    def _f(self, f: Tensor, rows: int) -> Tensor:
        if f.shape != (rows,):
            raise ValueError(f"net must give f of shape ({rows},), got {tuple(f.shape)}")
        return widened(f)

    def _logits(self, logits: Tensor, rows: int) -> Tensor:
        if logits.shape != (want := (rows, self.length, self.num_values)):
            raise ValueError(f"net must give logits of shape {want}, got {tuple(logits.shape)}")
        return widened(logits)

    @checks.arguments(x_partial=VALUES)
    def log_marginal(self, x_partial: Tensor) -> Tensor:
        """``log p(x_S) = f(x_S) - f(nothing)``, [B], of what is known in x_partial, [B, D]: one call of the network.

        Of a row in which nothing is known it is 0. With gradients.
        """
        x = configurations("x_partial", x_partial, self.length, self.num_values)
        f = self.f(torch.cat([x, x.new_zeros(1, self.length)]))
        return f[:-1] - f[-1]

    @checks.arguments(
        x=VALUES, method=checks.Choice("marginal", "chain"), orders=_ORDERS, generator=checks.generator | None
    )
    def log_prob(
        self,
        x: Tensor,
        method: str = "marginal",
        orders: int | Tensor = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``log p(x)``, [B], of complete configurations x, [B, D]. With gradients.

        Args:
            method: "marginal" is one call of the head of marginals, ``f(x) - f(nothing)``, whose probabilities add up to 1 as
                far as the model is consistent; "chain" is the product of conditionals in some order, which always add up
                to 1: D evaluations of the network for every order.
            orders: of "chain": how many random orders for every row, whose probabilities are averaged; or a tensor of one
                order for all rows, (D,), or one for each, (B, D), as ranks: position j is number ``orders[..., j]``, from 0.
            generator: of the random orders, on x's device.
        """
        x = configurations("x", x, self.length, self.num_values, complete=True)
        if method == "marginal":
            return self.log_marginal(x)
        if isinstance(orders, Tensor):
            return self._chain(x, ranks("orders", orders, len(x), self.length, x.device))
        each = [self._chain(x, random_ranks(len(x), self.length, x.device, generator)) for _ in range(orders)]
        return torch.stack(each).logsumexp(0) - math.log(orders)

    def _chain(self, x: Tensor, rank: Tensor) -> Tensor:
        """The sum over positions of ``log p_phi(x_j | what has a lower rank)``: all is known, so that steps go together."""
        total = torch.zeros((), device=x.device)
        for steps in torch.arange(self.length, device=x.device).split(max(1, _ROWS // max(len(x), 1))):
            known = rank[None] < steps[:, None, None]  # [steps, B, D]
            at = (rank[None] == steps[:, None, None]).int().argmax(2).flatten()
            logits = self.logits(torch.where(known, x, 0).flatten(0, 1))
            said = log_probabilities(logits, at, x.repeat(len(steps), 1))
            total = total + said.unflatten(0, (len(steps), len(x))).sum(0)
        return total

    @checks.arguments(x=VALUES, positions=checks.array)
    def conditional(self, x: Tensor, positions: int | Tensor | list[int]) -> Tensor:
        """``log p_phi(x_j = v | x_S)`` of positions j that are unknown in every row of x, [B, D]: [B, P, K]. With gradients.

        ``positions`` is P numbers in [0, D), or one, for which P is 1.
        """
        x = configurations("x", x, self.length, self.num_values)
        at = torch.as_tensor(positions, device=x.device)
        at = at[None] if at.ndim == 0 else at
        if not whole(at) or at.ndim != 1 or not len(at):
            raise ValueError(f"positions must be whole numbers, one or more, got {checks.shown(positions)}")
        if at.device.type == "cpu":
            if int(at.min()) < 0 or int(at.max()) >= self.length:
                raise ValueError(f"positions must be in [0, {self.length}), got {at.tolist()}")
            if known := at[(x[:, at] != 0).any(0)].tolist():
                raise ValueError(f"positions must be unknown (0) in x, got {known}, which are known there")
        return self.logits(x)[:, at].log_softmax(-1)

    @checks.arguments(
        n=checks.Integer(0), given=checks.tensor | None, order=checks.Choice("random", "forward") | checks.tensor,
        generator=checks.generator | None,
    )  # fmt: skip
    @torch.no_grad()
    def sample(
        self,
        n: int,
        given: Tensor | None = None,
        order: str | Tensor = "random",
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n draws from the conditionals, [n, D] of int64, position by position: as many calls as positions are unknown.

        Args:
            given: what is known and stays, (D,), (1, D) or (n, D), 0 for unknown.
            order: in which positions are drawn: "random", another one for every draw; "forward", the first to the last; or
                ranks, (D,) or (n, D), of whole numbers: position j is number ``order[..., j]``. It is not a list of
                positions, for which it is easily taken: that is ``order.argsort()``. Those that are given are passed over.
            generator: of orders and draws, on the network's device.
        """
        tensors = (*self.net.parameters(), *self.net.buffers())
        device = tensors[0].device if tensors else torch.device("cpu")
        x = torch.zeros(n, self.length, dtype=torch.long, device=device)
        steps = self.length
        if given is not None:
            rows = (given[None] if given.ndim == 1 else given).to(device)
            rows = configurations("given", rows, self.length, self.num_values)
            if len(rows) not in (1, n):
                raise ValueError(f"given must have one row, or one for each of n={n} draws, got {len(rows)}")
            x = rows.expand(n, -1).clone()
            steps = int((x == 0).sum(1).max()) if n else 0
        if isinstance(order, Tensor):
            rank = ranks("order", order, n, self.length, device)
        elif order == "random":
            rank = random_ranks(n, self.length, device, generator)
        else:
            rank = torch.arange(self.length, device=device).expand(n, -1)
        turns = torch.where(x == 0, rank, rank + self.length).argsort(1)[:, :steps]
        return self.fill(x, turns, generator) if n else x

    def fill(self, x: Tensor, turns: Tensor, generator: torch.Generator | None) -> Tensor:
        """x with positions turns, [B, steps], drawn one after another where they are unknown; x is not looked at."""
        for at in turns.T[..., None]:
            logits = self.logits(x).gather(1, at[..., None].expand(-1, -1, self.num_values))[:, 0]
            drawn = categorical(logits, generator=generator)[:, None] + 1
            now = x.gather(1, at)
            x = x.scatter(1, at, torch.where(now == 0, drawn, now))
        return x


def log_probabilities(logits: Tensor, at: Tensor, x: Tensor) -> Tensor:
    """``log p(x_j)`` for one position j of each row: logits [B, D, K], at [B], complete x [B, D]; [B]."""
    here = logits.gather(1, at[:, None, None].expand(-1, -1, logits.shape[2]))[:, 0].log_softmax(-1)
    return here.gather(1, x.gather(1, at[:, None]) - 1)[:, 0]
