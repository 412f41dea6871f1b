"""What APO does once a round and LCSC once a candidate, on the weights of a model, beside plain loops over its tensors.

    python bench/rounds.py
    python bench/rounds.py --model gpt2 --checkpoints 8 --json rows.json

The floor is the words that must be read and written (4 bytes each) over the machine's copy bandwidth: 3 a weight for APO's
extrapolation; for LCSC one for every checkpoint that takes part, and two for the candidate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from optim import MODELS, bandwidth, elapsed_ms, synchronize
from polyak.optim.apo import extrapolate_
from polyak.teachers import CheckpointBank
from polyak.teachers.lcsc.bank import Combination

ALPHA = 0.3
Weights = dict[str, torch.Tensor]


def weights(model: str, device: str, seed: int) -> Weights:
    generator = torch.Generator(device=device).manual_seed(seed)
    return {f"w{i}": torch.randn(s, device=device, generator=generator) for i, s in enumerate(MODELS[model]())}


def plain_extrapolation(p: Weights, previous: Weights) -> None:
    for name, value in p.items():
        value += ALPHA * (value - previous[name])


def plain_combination(checkpoints: list[Weights], a: torch.Tensor) -> Weights:
    return {
        name: sum(
            (c * checkpoint[name] for c, checkpoint in zip(a.tolist(), checkpoints, strict=True)), torch.zeros(())
        )
        for name in checkpoints[0]
    }


def cases(model: str, device: str, count: int) -> list[tuple[str, int, Callable[[], Any]]]:
    """(name, words a weight, what is timed)."""
    checkpoints = [weights(model, device, seed) for seed in range(count)]
    p, previous = weights(model, device, 100), weights(model, device, 101)
    a = torch.full((count,), 1 / count, dtype=torch.float64)
    combination = Combination(CheckpointBank(checkpoints), device=device)
    combination.set(a)
    moved = a.clone()
    changed = max(2, round(0.3 * count))
    moved[:changed] += torch.linspace(-0.1, 0.1, changed, dtype=torch.float64)
    ends = [moved, a]

    def move() -> None:
        combination.move(ends[0])
        ends.reverse()

    return [
        ("polyak APO, extrapolation", 3, lambda: extrapolate_(p, previous, ALPHA)),
        ("a loop over tensors, extrapolation", 3, lambda: plain_extrapolation(p, previous)),
        (f"polyak LCSC, {count} checkpoints anew", count + 2, lambda: combination.set(a)),
        (f"polyak LCSC, {changed} of {count} coefficients changed", changed + 2, move),
        (f"a loop over tensors, {count} checkpoints", count + 2, lambda: plain_combination(checkpoints, a)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=tuple(MODELS), default="resnet50")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--json", default="", help="also write the rows to this file")
    args = parser.parse_args()
    speed = bandwidth(args.device)
    count = sum(torch.Size(s).numel() for s in MODELS[args.model]())
    print(
        f"{args.device}, {torch.get_num_threads()} threads; torch {torch.__version__}; copies at {speed / 1e9:.0f} GB/s\n"
    )
    print(f"| {args.model} | ms | over the floor |\n| --- | ---: | ---: |")
    rows = []
    for name, words, run in cases(args.model, args.device, args.checkpoints):
        run()
        synchronize(args.device)
        ms = elapsed_ms(run, args.device, 3, 3)
        floor = words * 4 * count / speed * 1e3
        rows.append({"name": name, "ms": ms, "floor_ms": floor})
        print(f"| {name} | {ms:.1f} | {ms / floor:.2f} |", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
