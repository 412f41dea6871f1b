"""Environments: what objects are built of, step by step, and what they are worth.

All is batched: n states are a tensor [n, ...], actions [n]. An environment is a directed graph without cycles, whose edges are
named by actions: a state and an action give the next state, and a state and the action that led to it give the state before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from polyak.core import checks

ENV = checks.Like(
    "an environment", "n_actions", "reset", "step", "forward_mask", "backward_mask", "log_reward"
)  # fmt: skip


@runtime_checkable
class Env(Protocol):
    """What sampling and training ask of an environment. States of one environment have one shape and type.

    Beside these it may have

    - ``energy(s) -> [n]``: of every state, terminal or not, with ``energy(x) = -log_reward(x)`` at terminal ones. The
      forward-looking losses need it. Any function of partial objects is right; a good one says early what an object will be worth.
    - ``max_length``: a number of steps after which every object is finished. Without it sampling looks after each step whether
      all are, which waits for the device.
    - ``features(s) -> [n, d]``: what :class:`FlowNet` is given; by default the state's numbers.

    Where some rows are finished before others they are stepped along, and what comes back for them is not looked at.
    """

    @property
    def n_actions(self) -> int:
        """A, the number of actions."""
        ...

    def reset(self, n: int) -> Tensor:
        """The source, n times."""
        ...

    def step(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The next states, and whether they are terminal, [n]. ``s`` is not changed."""
        ...

    def forward_mask(self, s: Tensor) -> Tensor:
        """[n, A], True for the actions that may be taken in s; none in terminal states."""
        ...

    def backward_mask(self, s: Tensor) -> Tensor:
        """[n, A], True for the actions that may have led to s; none at the source."""
        ...

    def log_reward(self, x: Tensor) -> Tensor:
        """log R of terminal states, [n]."""
        ...


class SetEnv:
    """Sets of k of A elements, built one by one; ``R(x) = exp(-sum of the elements' energies)``.

    A state is a row of A truths. Any partial set has an energy. There are k! ways to build a set.

    Args:
        energies: of the elements, [A].
        k: how many are chosen.

    Its law is known: :class:`polyak.core.exact.rewards.SubsetLaw` of minus the energies.

    Raises:
        ValueError: k is larger than A.
    """

    @checks.arguments(energies=checks.Numbers(), k=checks.Integer(1))
    def __init__(self, energies: Tensor | Sequence[float], k: int) -> None:
        given = torch.as_tensor(energies)
        self.energies = given if given.is_floating_point() else given.to(torch.get_default_dtype())
        if k > len(self.energies):
            raise ValueError(f"k must be at most {len(self.energies)}, the number of energies, got {k}")
        self.k = self.max_length = k
        self.n_actions = len(self.energies)

    def reset(self, n: int) -> Tensor:
        return torch.zeros(n, self.n_actions, dtype=torch.bool, device=self.energies.device)

    def step(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        new = s.scatter(1, a[:, None], True)
        return new, new.sum(1) >= self.k

    def forward_mask(self, s: Tensor) -> Tensor:
        return ~s & (s.sum(1, keepdim=True) < self.k)

    def backward_mask(self, s: Tensor) -> Tensor:
        return s

    def energy(self, s: Tensor) -> Tensor:
        return s.to(self.energies.dtype) @ self.energies

    def log_reward(self, x: Tensor) -> Tensor:
        return -self.energy(x)


class HyperGrid:
    """Points of a grid of ``height`` in each of ``ndim`` directions, reached from the corner 0 by steps up, and left by a stop.

    ``R(x) = R0 + R1 prod_d [1/4 < u_d] + R2 prod_d [3/10 < u_d < 4/10]`` with ``u = |x / (height - 1) - 1/2|``: modes near the
    2^ndim corners, with little between them (Bengio et al., arXiv 2106.04399, section 4.1). A state is [ndim + 1] integers: the
    point, and 1 where it was stopped at. Action d < ndim is a step in direction d; action ndim stops, at any point.
    The energy of a point on the way is that of stopping there.

    Args:
        R0, R1, R2: of the reward; R0 is what is between the modes.
        dtype: of rewards.
        device: of states.

    Its law is known: :class:`polyak.core.exact.rewards.HyperGrid`.
    """

    @checks.arguments(
        ndim=checks.Integer(1, 1000), height=checks.Integer(2, 10**6), R0=checks.non_negative, R1=checks.non_negative,
        R2=checks.non_negative, dtype=checks.dtype | None, device=checks.device | None,
    )  # fmt: skip
    def __init__(
        self,
        ndim: int,
        height: int,
        R0: float = 0.1,
        R1: float = 0.5,
        R2: float = 2.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.ndim, self.height, self.R0, self.R1, self.R2 = ndim, height, R0, R1, R2
        self.n_actions, self.max_length = ndim + 1, ndim * (height - 1) + 1
        self.dtype, self.device = dtype or torch.get_default_dtype(), device
        self._moves = torch.eye(self.n_actions, dtype=torch.int64, device=device)

    def reset(self, n: int) -> Tensor:
        return torch.zeros(n, self.n_actions, dtype=torch.int64, device=self.device)

    def step(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        new = s + self._moves[a]
        return new, new[:, -1] > 0

    def forward_mask(self, s: Tensor) -> Tensor:
        below = s < self.height - 1
        below[:, -1] = True  # stopping
        return below & (s[:, -1:] == 0)

    def backward_mask(self, s: Tensor) -> Tensor:
        stopped = s[:, -1:] > 0
        mask = (s > 0) & ~stopped
        mask[:, -1] = stopped[:, 0]  # whoever has stopped came from where it stands
        return mask

    def energy(self, s: Tensor) -> Tensor:
        last = self.height - 1
        off = (2 * s[:, :-1] - last).abs()  # 2 (height - 1) u: whole numbers, of which none is on both sides of a bound
        outer = (2 * off > last).all(1).to(self.dtype)
        mode = ((5 * off > 3 * last) & (5 * off < 4 * last)).all(1).to(self.dtype)
        return -(self.R0 + self.R1 * outer + self.R2 * mode).log()

    def log_reward(self, x: Tensor) -> Tensor:
        return -self.energy(x)

    def features(self, s: Tensor) -> Tensor:
        """One-hot coordinates, and whether it was stopped: [n, ndim height + 1]."""
        point = torch.nn.functional.one_hot(s[:, :-1], self.height).flatten(1)
        return torch.cat([point, s[:, -1:]], 1).to(self.dtype)


class BitSequence:
    """Sequences of bits, written word by word from the left; ``R(x) = exp(-beta min_m |x - m|_1)`` over given modes m.

    (Malkin et al., arXiv 2201.13259, section 5.3.) A state is a row of numbers: a bit, or -1 where none is written. An action is a
    word, a number in [0, 2^word), its first bit the highest. The energy of a partial sequence is the distance of what is written
    from the modes' beginnings, times beta. Each state has one parent.

    Args:
        modes: [M, L] of zeros and ones.
        word: bits of a word; it divides L.
        beta: how fast R falls with the distance.
    """

    @checks.arguments(modes=checks.Array(whole=True), word=checks.Integer(1, 20), beta=checks.non_negative)
    def __init__(self, modes: Tensor | Sequence[Sequence[int]], word: int = 1, beta: float = 1.0) -> None:
        given = torch.as_tensor(modes)
        if given.ndim != 2 or not given.numel() or not bool(((given == 0) | (given == 1)).all()):
            raise ValueError(f"modes must be a matrix of zeros and ones, [modes, bits], got {checks.shown(modes)}")
        if given.shape[1] % word:
            raise ValueError(f"word must divide the modes' {given.shape[1]} bits, got {word}")
        self.modes, self.word, self.beta = given.to(torch.int8), word, beta
        self.length, self.n_actions = given.shape[1], 2**word
        self.max_length = self.length // word
        self._place = torch.arange(word, device=given.device)
        values = torch.arange(self.n_actions, device=given.device)
        self._bits = (values[:, None] >> (word - 1 - self._place) & 1).to(torch.int8)  # [A, word]

    def reset(self, n: int) -> Tensor:
        return torch.full((n, self.length), -1, dtype=torch.int8, device=self.modes.device)

    def step(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        start = (s >= 0).sum(1).clamp(max=self.length - self.word)
        new = s.scatter(1, start[:, None] + self._place, self._bits[a])
        return new, new[:, -1] >= 0

    def forward_mask(self, s: Tensor) -> Tensor:
        return (s[:, -1:] < 0).expand(-1, self.n_actions)

    def backward_mask(self, s: Tensor) -> Tensor:
        written = (s >= 0).sum(1, keepdim=True)
        last = s.gather(1, (written - self.word).clamp(min=0) + self._place)
        return (last[:, None] == self._bits).all(2) & (written > 0)

    def energy(self, s: Tensor) -> Tensor:
        wrong = (s[:, None] != self.modes) & (s[:, None] >= 0)  # [n, M, L]
        return self.beta * wrong.sum(2).amin(1).to(torch.get_default_dtype())

    def log_reward(self, x: Tensor) -> Tensor:
        return -self.energy(x)

    def features(self, s: Tensor) -> Tensor:
        """1 and -1 for bits, 0 where none is written: [n, L]."""
        return torch.where(s < 0, 0, 2 * s - 1).to(torch.get_default_dtype())


class IsingGrow:
    """Spins on a torus of ``size`` times ``size``, set one by one in any order; ``R(x) = exp(J sum_bonds s_i s_j + h sum_i s_i)``.

    A state is a row of spins 1 and -1, and 0 where none is set. Action 2 i sets spin i down, 2 i + 1 up. The energy of a partial
    configuration is that of the bonds between spins that are set. On a torus of size 2 two neighbours share two bonds.

    Args:
        size: of the torus.
        coupling: J, negative for an antiferromagnet.
        field: h.

    Its law is known: :class:`polyak.core.exact.ising.Ising`.
    """

    @checks.arguments(
        size=checks.Integer(2, 1000), coupling=checks.real, field=checks.real, dtype=checks.dtype | None,
        device=checks.device | None,
    )  # fmt: skip
    def __init__(
        self,
        size: int,
        coupling: float,
        field: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.size, self.coupling, self.field = size, coupling, field
        self.sites = self.max_length = size * size
        self.n_actions = 2 * self.sites
        self.dtype, self.device = dtype or torch.get_default_dtype(), device

    def reset(self, n: int) -> Tensor:
        return torch.zeros(n, self.sites, dtype=torch.int8, device=self.device)

    def step(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        spin = (2 * (a % 2) - 1).to(s.dtype)
        new = s.scatter(1, (a // 2)[:, None], spin[:, None])
        return new, (new != 0).all(1)

    def forward_mask(self, s: Tensor) -> Tensor:
        return (s == 0).repeat_interleave(2, 1)

    def backward_mask(self, s: Tensor) -> Tensor:
        return torch.stack([s < 0, s > 0], 2).flatten(1)

    def energy(self, s: Tensor) -> Tensor:
        spins = s.to(self.dtype).reshape(-1, self.size, self.size)
        bonds = spins * (spins.roll(-1, 1) + spins.roll(-1, 2))
        return -(self.coupling * bonds + self.field * spins).sum((1, 2))

    def log_reward(self, x: Tensor) -> Tensor:
        return -self.energy(x)
