"""The global random generators (of random, numpy and torch), shared out among their uses.

Batches, training, evaluation and initial noise may all be drawn from them. Each use has numbers of its own: two that began at one
state would draw the same numbers, and the noise in a loss be the data itself.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any


def number(use: str, seed: int) -> int:
    """A seed of 32 bits for one use of a trial's seed."""
    return int.from_bytes(hashlib.sha256(f"polyak {use} {seed}".encode()).digest()[:4], "big")


def seed_all(seed: int, device: str) -> None:
    """Seed the global generators, an accelerator's among them."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, the global one is what a task draws from
    torch.default_generator.manual_seed(seed)
    if device != "cpu":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class Generators:
    """The global generators' states of one use: inside of its ``with`` blocks they go on from there, outside they are as before.

    Args:
        device: whose generator is among them.
        seed: what they begin at. Default: where the global ones are now.
    """

    def __init__(self, device: str, seed: int | None = None) -> None:
        self._parts = list(_parts(device))
        self._own = now = self._taken()
        if seed is not None:
            seed_all(seed, device)
            self._own = self._taken()
            self._put(now)

    def _taken(self) -> list[Any]:
        return [get() for get, _ in self._parts]

    def _put(self, states: list[Any]) -> None:
        for (_, put), state in zip(self._parts, states, strict=True):
            put(state)

    def __enter__(self) -> None:
        self._others = self._taken()
        self._put(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = self._taken()
        self._put(self._others)


def _parts(device: str) -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    import numpy as np
    import torch

    yield random.getstate, random.setstate
    yield np.random.get_state, np.random.set_state
    yield torch.get_rng_state, torch.set_rng_state
    if device != "cpu":
        yield (lambda: torch.cuda.get_rng_state(device)), (lambda state: torch.cuda.set_rng_state(state, device))
