"""Time of one update of MKOR's two factors against their width d, beside what K-FAC does in its place; and the exponents.

    python bench/mkor.py                         # the CPU, and the GPU where there is one
    python bench/mkor.py --device cpu --max-d 2048 --json rows.json

All methods hold two d x d factors in float32, one of a layer's inputs and one of its outputs. *MKOR* takes one vector into each by
Sherman-Morrison; *K-FAC* damps both and inverts them by Cholesky; *eigh* decomposes both, as eigenvalue K-FAC and Shampoo do.
*Covariances* is what the latter two need before that and MKOR does not: ``x^T x`` of ``--rows`` rows, twice. *Precondition* is
``G [d x d] A`` with MKOR's scaling, which every method does at every step. The exponent is the slope of log time over log d,
by least squares over the three largest widths that were timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import polyak
from polyak.optim.mkor.factors import Rule, Stack
from polyak.optim.mkor.layers import Layer

WIDTHS = (512, 1024, 2048, 4096, 8192)
METHODS = ("MKOR", "K-FAC", "eigh", "covariances", "precondition")


@dataclass
class Row:
    device: str
    method: str
    d: int
    ms: float


def covariance(d: int, rows: int, device: str) -> torch.Tensor:
    x = torch.randn(rows, d, device=device)
    return x.T @ x / rows


def methods(d: int, rows: int, device: str) -> dict[str, Callable[[], Any]]:
    """Name -> what is timed, at width d."""
    module = torch.nn.Linear(d, d, bias=False, device=device)
    module.weight.grad = torch.randn_like(module.weight)
    stack = Stack([Layer.of("", module)], torch.float32)
    a, g, present = torch.randn(1, d, device=device), torch.randn(1, d, device=device), torch.ones(1, device=device)
    rule = Rule(0.95, False, 2.0, 1.0)
    stack.update(a, g, present, rule)  # the first sets both to I
    factors = [covariance(d, 2 * d, device) for _ in range(2)]
    x, y = torch.randn(rows, d, device=device), torch.randn(rows, d, device=device)
    eye = torch.eye(d, device=device)

    def invert() -> None:
        for factor in factors:
            torch.cholesky_inverse(torch.linalg.cholesky(factor + 1e-3 * eye))

    return {
        "MKOR": lambda: stack.update(a, g, present, rule),
        "K-FAC": invert,
        "eigh": lambda: [torch.linalg.eigh(factor) for factor in factors],
        "covariances": lambda: (x.T @ x, y.T @ y),
        "precondition": lambda: list(stack.precondition()),
    }


def milliseconds(run: Callable[[], Any], device: str, budget: float) -> float:
    """Median of at least three repetitions, of as many calls each as make a timing long enough; one alone if it is slow."""

    def timed(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    first = timed(1)
    if first > budget:
        return 1e3 * first
    first = timed(1)  # without what is made at the first call
    times = max(1, min(100, math.ceil(0.05 / first)))
    return 1e3 * statistics.median(timed(times) for _ in range(3 if first > 0.1 * budget else 7))


def exponent(rows: list[Row]) -> float:
    """The slope of log ms over log d, by least squares over the three largest widths."""
    points = [(math.log(r.d), math.log(r.ms)) for r in sorted(rows, key=lambda r: r.d)[-3:]]
    x, y = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    return sum((p[0] - x) * (p[1] - y) for p in points) / sum((p[0] - x) ** 2 for p in points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), default="all")
    parser.add_argument("--max-d", type=int, default=8192, help="the largest width")
    parser.add_argument("--rows", type=int, default=1024, help="rows of the batch whose covariances are taken")
    parser.add_argument(
        "--slow", type=float, default=20.0, help="seconds from which a method is timed at no larger width"
    )
    parser.add_argument("--json", default="", help="also write the rows and exponents to this file")
    args = parser.parse_args()
    widths = [d for d in WIDTHS if d <= args.max_d]
    if len(widths) < 2:
        parser.error(f"--max-d must be at least {WIDTHS[1]}, got {args.max_d}")
    devices = [d for d in ("cpu", "cuda") if args.device in (d, "all") and (d == "cpu" or torch.cuda.is_available())]
    if not devices:
        parser.error("there is no CUDA device")
    rows: list[Row] = []
    exponents: dict[str, dict[str, float]] = {}
    for device in devices:
        torch.manual_seed(0)
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"\n{name}; torch {torch.__version__}; polyak {polyak.__version__}; float32, both factors, ms\n")
        heads = (*METHODS, "K-FAC / MKOR", "eigh / MKOR")
        print(f"| d | {' | '.join(heads)} |\n| ---: |{' ---: |' * len(heads)}")
        slow: set[str] = set()
        for d in widths:
            found: dict[str, float] = {}
            for method, run in methods(d, args.rows, device).items():
                if method not in slow:
                    found[method] = milliseconds(run, device, args.slow)
                    rows.append(Row(name, method, d, found[method]))
                    # The next width takes eight times as long.
                    slow |= {method} if found[method] > 1e3 * args.slow / 8 else set()
            cells = [f"{found[m]:.3f}" if m in found else "" for m in METHODS]
            cells += [f"{found[m] / found['MKOR']:.0f}" if m in found else "" for m in ("K-FAC", "eigh")]
            print(f"| {d} | {' | '.join(cells)} |", flush=True)
        mine = {m: [r for r in rows if (r.device, r.method) == (name, m)] for m in METHODS}
        exponents[name] = {m: exponent(found) for m, found in mine.items() if len(found) > 1}
        cells = [f"{exponents[name][m]:.2f}" if m in exponents[name] else "" for m in METHODS]
        print(f"| exponent | {' | '.join(cells)} | | |", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": [asdict(row) for row in rows], "exponents": exponents}, file, indent=1)


if __name__ == "__main__":
    main()
