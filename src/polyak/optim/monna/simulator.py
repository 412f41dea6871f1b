"""All workers of MoNNA in one process: parameters, momenta and gradients batched over the honest ones, by torch.func.

For experiments with attacks. A step is that of :class:`polyak.optim.MoNNA`: local momentum, half step, exchange, mixing; f
attackers, who see everything, send one vector to all. Every honest worker has parameters of its own from the start (in the
official code all share one tensor before the first mixing, so that its first step adds up all workers' updates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from polyak.core import checks
from polyak.optim.monna.aggregators import RULE, Mixer, check_faulty, lowest, mixer
from polyak.optim.monna.attacks import Attack, View
from polyak.optim.monna.rule import clipping, rule


class Simulator:
    """n workers, of whom the last f attack where there is an attack, and all are honest where there is none.

    Args:
        model: gives the start and the forward pass; it is not changed. Its buffers stay as they are.
        batches: yields (x, y), each with the honest workers' batches along the first dimension: (h, batch, ...).
        n, f: workers, and how many of them the mixer tolerates; 2 f < n, and 3 f < n with wait="n-f".
        lr: learning rate; the attribute of that name may be set between steps.
        momentum: retention b in [0, 1) of ``m = b m + (1 - b) g``.
        mixer: a rule's name, a :func:`~polyak.optim.monna.aggregators.mixer`, or a function of (own, others, f).
        attack: one of :mod:`polyak.optim.monna.attacks`, or None.
        wait: "all": everyone receives all n vectors. "n-f": its own, n - 2 f - 1 of random other honest workers, and those of
            all f attackers: the worst case of not waiting for the f slowest.
        weight_decay: added to the gradient, before clipping. max_norm: each worker's gradient is clipped to it.
        mix_gradients: exchange and mix gradients, too, before the momentum (LEARN, El-Mhamdi et al., arXiv 2008.00742).
        loss: of (outputs, targets) of one worker's batch, one number.
        generator: draws who is received with ``wait="n-f"``.

    Attributes:
        parameters: (h, d). momenta: (h, d). half: the last half steps, (h, d). sent: the attackers' last vector, (d,).
        steps: taken so far. gradients: sample gradients that the honest workers have evaluated.

    Raises:
        ValueError: hyperparameters out of range, 2 f >= n, or batches of another number of workers.
    """

    @checks.arguments(
        model=checks.module, batches=checks.Stream("an iterable of (x, y)"), n=checks.Integer(1), f=checks.Integer(0),
        lr=checks.non_negative, momentum=checks.retention, mixer=RULE,
        attack=checks.Function("a function of the View", 1) | None, wait=checks.Choice("all", "n-f"),
        weight_decay=checks.non_negative, max_norm=checks.positive | None, mix_gradients=checks.flag,
        loss=checks.Function("a function of outputs and targets", 2), generator=checks.generator | None,
    )  # fmt: skip
    def __init__(
        self,
        model: nn.Module,
        batches: Iterator[tuple[Tensor, Tensor]],
        *,
        n: int,
        f: int,
        lr: float,
        momentum: float = 0.99,
        mixer: str | Callable[..., Tensor] | Mixer = "nna",
        attack: Attack | None = None,
        wait: str = "all",
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        mix_gradients: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        generator: torch.Generator | None = None,
    ) -> None:
        self.n, self.f, self.lr, self.momentum = n, check_faulty(n, f), lr, momentum
        if wait == "n-f":
            check_faulty(n - f, f)
        self.weight_decay, self.max_norm, self.wait, self.mix_gradients = weight_decay, max_norm, wait, mix_gradients
        if attack is not None and f == 0:
            raise ValueError("an attack needs attackers: f must be at least 1, got 0")
        self.mixer, self.attack, self.generator = _mixer(mixer), attack, generator
        self.honest = n - f if attack is not None else n
        self._model, self._batches, self._loss = model, iter(batches), loss
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        self.parameters = start.repeat(self.honest, 1)
        self.momenta = torch.zeros_like(self.parameters)
        self.half = self.parameters
        self.sent: Tensor | None = None
        self.steps = self.gradients = 0
        self._grad = vmap(grad(self._loss_of), randomness="different")

    def _loss_of(self, named: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self._loss(functional_call(self._model, named, (x,)), y)

    def named(self, vectors: Tensor) -> dict[str, Tensor]:
        """Views of (..., d) as the model's parameters, each (..., *shape)."""
        parts = vectors.split([shape.numel() for shape in self._shapes.values()], dim=-1)
        return {
            name: part.unflatten(-1, shape) if shape else part[..., 0]
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """(h, d): every honest worker's gradient at its own parameters, without decay."""
        found = self._grad(self.named(self.parameters), x, y)
        return torch.cat([found[name].reshape(self.honest, -1) for name in self._shapes], dim=1)

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """(h, ...): what each honest worker's model makes of the same inputs."""
        return vmap(lambda named: functional_call(self._model, named, (x,)))(self.named(self.parameters))

    @torch.no_grad()
    def step(self) -> None:
        """One step of all workers."""
        x, y = next(self._batches)
        if len(x) != self.honest or len(y) != self.honest:
            raise ValueError(f"batches must be for {self.honest} honest workers, got {len(x)} and {len(y)}")
        g = self.gradient(x, y)
        self.gradients += x.shape[0] * x.shape[1]

        def flipped(change: Callable[[Tensor], Tensor]) -> Tensor:
            return self.gradient(x, change(y)).mean(0)

        heard = self._heard()
        if self.mix_gradients:
            g = self._exchange(g, heard, flipped, None)
        h = SimpleNamespace(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.max_norm is not None:
            norm = (g + self.weight_decay * self.parameters).norm(dim=1, keepdim=True)
            h.clip = clipping(norm, self.max_norm)
        self.half, state = rule(self.parameters, g, SimpleNamespace(exp_avg=self.momenta), h)
        self.momenta = state["exp_avg"]
        self.parameters = self._exchange(self.half, heard, flipped, self.lr)
        self.steps += 1

    def _heard(self) -> Tensor | None:
        """(h, k - 1): whom each honest worker hears beside itself, in the order of ranks; None where it is everybody."""
        if self.wait == "all":
            return None
        count, device = self.n - self.f - 1, self.parameters.device
        attackers = torch.arange(self.honest, self.n, device=device)
        order = torch.rand(self.honest, self.honest, generator=self.generator, device=device)
        order.fill_diagonal_(2.0)  # never itself
        friends = order.argsort(1)[:, : count - len(attackers)]
        return torch.cat([friends.sort(1).values, attackers.expand(self.honest, -1)], 1)

    def _exchange(
        self,
        vectors: Tensor,
        heard: Tensor | None,
        flipped: Callable[[Callable[[Tensor], Tensor]], Tensor],
        lr: float | None,
    ) -> Tensor:
        self.sent = None
        if self.attack is not None:
            plain_nna = self.mixer.name == "nna" and not self.mixer.nnm
            mix = self._nearest(vectors, heard) if plain_nna else lambda attack: self._mix(vectors, attack, heard)
            self.sent = self.attack(View(honest=vectors, f=self.n - self.honest, mix=mix, flipped=flipped, lr=lr))
        return self._mix(vectors, self.sent, heard)

    def _nearest(self, vectors: Tensor, heard: Tensor | None) -> Callable[[Tensor], Tensor]:
        """NNA for attackers that try many vectors: distances between honest ones are taken once, sums are one product."""
        f, keep = self.n - self.honest, (self.n if heard is None else self.n - self.f) - self.f
        table = torch.stack([(vectors - own).norm(dim=1) for own in vectors])
        table.fill_diagonal_(-1.0)  # oneself comes first
        if heard is not None:
            present = torch.eye(self.honest, self.n, dtype=torch.bool, device=vectors.device).scatter(1, heard, True)
            table = table.masked_fill(~present[:, : self.honest], math.inf)

        def mix(attack: Tensor) -> Tensor:
            distances = torch.cat([table, (vectors - attack).norm(dim=1)[:, None].expand(-1, f)], 1)
            weights = lowest(distances, keep).to(vectors.dtype) / keep
            return weights @ torch.cat([vectors, attack.nan_to_num().expand(f, -1)])

        return mix

    def _mix(self, vectors: Tensor, attack: Tensor | None, heard: Tensor | None) -> Tensor:
        everyone = [*vectors.unbind(0), *([attack] * (self.n - self.honest) if attack is not None else [])]
        if not self.mixer.centred and heard is None:
            return self.mixer.mix(everyone[0], everyone, self.f).expand(self.honest, -1).clone()
        own = torch.arange(self.honest, device=vectors.device)[:, None]
        if heard is None:
            all_ranks = torch.arange(self.n, device=vectors.device).expand(self.honest, -1)
            heard = all_ranks[all_ranks != own].view(self.honest, self.n - 1)
        if not self.mixer.centred:
            heard = torch.cat([own, heard], 1).sort(1).values
        return self.mixer.mix(vectors, _Received(torch.stack(everyone), heard), self.f)


class _Received(Sequence):
    """For each j, the j-th vector that every worker hears, (h, d): gathered when it is looked at."""

    def __init__(self, vectors: Tensor, ranks: Tensor) -> None:
        self._vectors, self._ranks = vectors, ranks

    def __len__(self) -> int:
        return self._ranks.shape[1]

    def __getitem__(self, j: Any) -> Any:
        return self._vectors[self._ranks[:, j]]


def _mixer(given: str | Callable[..., Tensor] | Mixer) -> Mixer:
    made = mixer(given)
    if isinstance(given, (Mixer, str)):
        return made

    # A function of single vectors: one worker after the other.
    def each(own: Tensor, rows: Sequence[Tensor], f: int) -> Tensor:
        rows = list(rows)
        return torch.stack([given(own[i], [row[i] for row in rows], f) for i in range(len(own))])

    return Mixer(made.name, each, centred=True)


class Reduction(NamedTuple):
    """How mixing treated the honest workers: spread after over before, and the mean's squared shift over the spread before."""

    alpha: Tensor
    lam: Tensor


def spread(vectors: Tensor) -> Tensor:
    """``sum_i ||x_i - a||^2 / h`` of (h, d) around their mean a."""
    return (vectors - vectors.mean(0)).square().sum(1).mean()


def diameter(vectors: Tensor) -> Tensor:
    """The largest distance between two of (h, d)."""
    return torch.stack([(vectors - v).norm(dim=1).max() for v in vectors]).max()


@checks.arguments(before=checks.Tensor(ndim=2), after=checks.Tensor(ndim=2), of=checks.Choice("spread", "diameter"))
def reduction(before: Tensor, after: Tensor, *, of: str = "spread") -> Reduction:
    """The (alpha, lambda) of one mixing of (h, d), by the mean squared distance ("spread") or the squared "diameter"."""
    if before.shape != after.shape:
        raise ValueError(f"before and after must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    measure = {"spread": spread, "diameter": lambda v: diameter(v).square()}[of]
    size = measure(before)
    return Reduction(measure(after) / size, (after.mean(0) - before.mean(0)).square().sum() / size)


# -- data ------------------------------------------------------------------------------------------------------------------


@checks.arguments(
    labels=checks.Tensor(ndim=1), workers=checks.Integer(1), alpha=checks.Number(0.0, 1e38, "()"), each=checks.Integer(1) | None,
    generator=checks.generator | None,
)  # fmt: skip
def dirichlet_split(
    labels: Tensor, workers: int, alpha: float, *, each: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Which samples each worker has: class shares drawn from Dirichlet(alpha), samples without replacement, workers overlap.

    Args:
        labels: (N,) integers. each: samples of a worker, N // workers where None.

    Returns:
        (workers, each) positions in ``labels``.
    """
    if labels.is_floating_point() or labels.is_complex() or not len(labels) or bool((labels < 0).any()):
        raise ValueError(f"labels must be integers >= 0, got {checks.shown(labels)}")
    each = len(labels) // workers if each is None else checks.integer("each", each, least=1, most=len(labels))
    counts = torch.bincount(labels)
    gammas = torch._standard_gamma(torch.full((workers, len(counts)), float(alpha)), generator)
    shares = gammas.clamp(min=1e-30)
    # Drawn one after the other, a class by its share as long as it lasts; tiny weights fill up when classes run out.
    weights = (shares / shares.sum(1, keepdim=True) / counts.clamp(min=1))[:, labels]
    return torch.multinomial(weights.clamp(min=1e-12), each, replacement=False, generator=generator)


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """Every worker's batches, without end: each goes through its own samples in an order of its own, again and again.

    Args:
        x, y: all samples. split: (h, m) positions of each worker's. size: of a batch, or a function of the step that gives
            it (no more than m).
    """

    @checks.arguments(
        x=checks.Tensor(least_ndim=1), y=checks.Tensor(least_ndim=1), split=checks.Tensor(ndim=2),
        size=checks.Integer(1) | checks.Function("a function of the step", 1), generator=checks.generator | None,
    )  # fmt: skip
    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        split: Tensor,
        size: int | Callable[[int], int],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self._x, self._y, self._split, self._generator = x, y, split, generator
        self._size = size if callable(size) else lambda step: size
        self._order, self._used, self._step = split[:, :0], 0, 0

    def __next__(self) -> tuple[Tensor, Tensor]:
        size = min(checks.integer("size", self._size(self._step), least=1), self._split.shape[1])
        if self._used + size > self._order.shape[1]:
            order = torch.rand(self._split.shape, generator=self._generator).argsort(1)
            self._order, self._used = self._split.gather(1, order), 0
        chosen = self._order[:, self._used : self._used + size].to(self._x.device)
        self._used += size
        self._step += 1
        return self._x[chosen], self._y[chosen]
