"""Which elements of a tensor an optimizer keeps state for: sorted indices, in one byte each where they lie close."""

from __future__ import annotations

from typing import NamedTuple

import torch

EVERY = 1024  # entries for which one base is kept: a kernel's block


class Places(NamedTuple):
    """Sorted places in a flat tensor, as the gaps between them.

    gaps: place k minus place k - 1 (the first: itself), in the smallest type that holds them all, of shape (count,).
    bases: the place before every ``EVERY``-th entry (0 before the first), int64.
    """

    gaps: torch.Tensor
    bases: torch.Tensor

    @classmethod
    def of(cls, places: torch.Tensor) -> Places:
        """From sorted places (int64). Looks at the largest gap, which waits for the device."""
        gaps = torch.diff(places, prepend=places.new_zeros(1))
        try:
            largest = int(gaps.max())
        except RuntimeError:  # fake tensors have no values
            largest = 2**31 - 1
        kind = torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32
        before = torch.cat([places.new_zeros(1), places[EVERY - 1 :: EVERY]])[: -(-len(places) // EVERY)]
        return cls(gaps.to(kind), before)

    def indices(self) -> torch.Tensor:
        """The places (int64)."""
        return self.gaps.cumsum(0, dtype=torch.int64)
