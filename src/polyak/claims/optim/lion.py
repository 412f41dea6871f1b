"""Lion-K's claim: with decoupled weight decay it minimizes a loss under a constraint, which K and the decay determine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyak.lab.claim import Arm, Claim, Criterion, Measurement, Metric, Paper, Plot, Scale, Task, Trial, measure

BOX = ("sign", "l2", "dead_zone", "huber", "entropic")
MATRIX = ("group", "nuclear")
KAPPAS = {"logistic": BOX, "least_squares": BOX, "softmax": MATRIX}
ACCURACY = 1e-9  # to which the minima are known: a smaller gap cannot be told from none
INSIDE = 1e-6  # below this distance a point counts as inside; ratios of distances are rounding there


def trial(t: Trial) -> Iterator[Measurement]:
    """Minimize one convex problem from a random start, under every K; or train the network."""
    yield from _network(t) if t.task == "network" else _convex(t)


def _convex(t: Trial) -> Iterator[Measurement]:
    from polyak.claims import _problems

    f, decay = getattr(_problems, t.task)(), t["weight_decay"]
    penalties = {name: _problems.penalty(name, decay, t["width"]) for name in KAPPAS[t.task]}
    minima = {name: _minimum(t.task, name, decay, t["width"]) for name in penalties}
    start = _start(t, f.shape)

    def gap(name: str, x: Any) -> float:
        nearest = penalties[name].project(x)
        excess = f.value(nearest) + penalties[name].value(nearest) - minima[name]
        return max(excess, ACCURACY) / (abs(minima[name]) + 1)

    # A method that knows no K is run once, and compared with the minimum of each.
    runs = penalties if t["kappa"] else {"": None}
    final: dict[str, float] = {}
    distance = contraction = rises = 0.0
    for run in runs:
        path = _Path(t, f, start.clone(), run, penalties.get(run))
        for step, x in path.walk():
            at = {f"gap_{name}": gap(name, x) for name in ([run] if run else penalties)}
            yield measure({"step": step}, **at)
        final |= at
        distance = max(distance, path.distance())
        contraction = max(contraction, path.contraction)
        rises += path.rises() if t["decoupled"] and run else 0
    yield measure(**final, infeasibility=distance, contraction=contraction, rises=rises)
