"""How MoNNA's workers exchange vectors: the interface of an exchange, and the one over a process group of torch.distributed.

A process group (gloo, NCCL) trusts its members: they may send wrong numbers, NaN included, but not die, stay silent or send
another shape. One that does takes the others with it: NCCL waits until its watchdog aborts, gloo ends the whole group at the
first timeout and at the first message that is too long. Where that may happen, use :class:`polyak.optim.monna.peers.Peers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from polyak.optim.monna.alike import differing

Received = Sequence[Tensor | None]  # by rank, one's own among them; None where nothing came


@dataclass(frozen=True)
class Patience:
    """For whom an exchange waits.

    Attributes:
        need: how many vectors there must be, one's own included: n - f.
        everyone: wait for the others, too, for up to ``timeout`` seconds once there are enough.
        timeout: see there.
    """

    need: int
    everyone: bool
    timeout: float


class Transport(Protocol):
    """What MoNNA needs of its connections."""

    rank: int
    size: int

    def exchange(self, vector: Tensor, patience: Patience) -> Received:
        """Send a vector to all, and receive theirs. RuntimeError where too few answer."""
        ...

    def serve(self, vector: Tensor, patience: Patience, server: int, mix: Callable[[Received], Tensor]) -> Tensor:
        """Send a vector to the rank ``server``, which mixes all; returns what it made of them. RuntimeError as above."""
        ...


class Alone:
    """One worker by itself."""

    rank, size = 0, 1

    def exchange(self, vector: Tensor, patience: Patience) -> Received:
        return [vector]

    def serve(self, vector: Tensor, patience: Patience, server: int, mix: Callable[[Received], Tensor]) -> Tensor:
        return mix([vector])


class Group:
    """Collectives of a process group, on the vectors' own device; its timeout is the group's own."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._all: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a copy of the optimizer is in the same group

    def __reduce__(self) -> Any:
        return _joined, (self._group is None, self.rank, self.size)

    def check_alike(self, facts: Mapping[str, int], device: torch.device) -> None:
        """Raise ValueError, on all ranks, where these numbers differ between ranks."""
        mine = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self._group)
        if found := differing(list(facts), [t.tolist() for t in everyone]):
            raise ValueError(f"all ranks must have the same {found}")

    def _buffer(self, vector: Tensor) -> list[Tensor]:
        if self._all is None or self._all.shape[1:] != vector.shape or self._all.dtype != vector.dtype:
            self._all = vector.new_empty(self.size, len(vector))
        return list(self._all.unbind(0))

    def exchange(self, vector: Tensor, patience: Patience) -> Received:
        received = self._buffer(vector)
        dist.all_gather(received, vector, group=self._group)
        return received

    def serve(self, vector: Tensor, patience: Patience, server: int, mix: Callable[[Received], Tensor]) -> Tensor:
        root = server if self._group is None else dist.get_global_rank(self._group, server)
        received = self._buffer(vector) if self.rank == server else None
        dist.gather(vector, received, dst=root, group=self._group)
        result = mix(received).contiguous() if received is not None else torch.empty_like(vector)
        dist.broadcast(result, src=root, group=self._group)
        return result


class Lost:
    """What a pickle has in the place of connections, which cannot be saved."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def refuse(self) -> NoReturn:
        raise RuntimeError(
            f"this MoNNA comes from a pickle, without the connections of rank {self.rank} of {self.size}: make one with "
            "group=... and load this one's state_dict()"
        )

    def exchange(self, vector: Tensor, patience: Patience) -> Received:
        self.refuse()

    def serve(self, vector: Tensor, patience: Patience, server: int, mix: Callable[[Received], Tensor]) -> Tensor:
        self.refuse()


def _joined(default: bool, rank: int, size: int) -> Transport:
    """From a pickle: the default process group, where it is the same here."""
    if default and dist.is_available() and dist.is_initialized():
        group = Group()
        if (group.rank, group.size) == (rank, size):
            return group
    return Lost(rank, size)
