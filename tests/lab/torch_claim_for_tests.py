"""A claim whose trial looks at how torch is set up. A module of its own: workers import torch where a claim's module does."""

from __future__ import annotations

from collections.abc import Iterator

import claims_for_tests as examples

from polyak.lab.claim import Arm, Claim, Measurement, Scale, Trial, measure


def look(_: Trial) -> Iterator[Measurement]:
    """The number of threads that torch uses, and a draw from its global generator."""
    import torch

    yield measure(loss=torch.get_num_threads(), global_draw=torch.rand(()).item())


def make() -> Claim:
    """One arm, two seeds."""
    return examples.make(
        "torch",
        arms=(Arm(name="plain", label="Plain", role="baseline"),),
        scales=(Scale(name="small", says="seconds", seeds=2),),
        criteria=(),
        trial=look,
    )
