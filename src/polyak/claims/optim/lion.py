"""Lion-K's claim: with decoupled decay it minimizes a loss under the constraint or penalty that K and the decay determine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyak.claims._pictures import lion as pictures
from polyak.lab.claim import Arm, Claim, Criterion, Erratum, Measurement, Metric, Paper, Plot, Scale, Task, Trial
from polyak.lab.criteria import Ask

VECTOR = ("sign", "l2", "dead_zone", "huber", "entropic")
MATRIX = ("group", "nuclear")
CONVEX = {"logistic": VECTOR, "least_squares": VECTOR, "softmax": MATRIX}
ACCURACY = 1e-9  # to which the minima are known: a smaller gap cannot be told from none
INSIDE = 1e-6  # a point nearer than this to the domain counts as inside; ratios of smaller distances are rounding


def trial(t: Trial) -> Iterator[Measurement]:
    """Minimize a convex problem from a random start, under every K in turn; or train the network."""
    yield from _network(t) if t.task == "network" else _minimize(t)


def _minimize(t: Trial) -> Iterator[Measurement]:
    kappas, final = CONVEX[t.task], {}
    if t["optimizer"] in ("adamw", "sgd"):
        # These know no K: one path is compared with the minimum under each.
        for step, x in _path(t, ""):
            final = {f"gap_{name}": _gap(t, name, x) for name in kappas}
            yield Measurement(final, {"step": step})
    if t["optimizer"] in ("lion", "coupled"):
        feasibility = {"infeasibility": 0.0, "contraction": -1.0}
        for name in kappas:
            for step, x in _path(t, name, feasibility if t["optimizer"] == "lion" else None):
                final[f"gap_{name}"] = _gap(t, name, x)
                yield Measurement({f"gap_{name}": final[f"gap_{name}"]}, {"step": step})
        final |= feasibility if t["optimizer"] == "lion" else {}
    if t["optimizer"] in ("lion", "reversed"):
        final["rises"] = float(sum(_rises(t, name) for name in kappas))
    yield Measurement(final)


def _network(t: Trial) -> Iterator[Measurement]:
    import torch

    from polyak.claims import _problems
    from polyak.optim.lion import Lion

    problem, decay = _problems.digits_mlp(t.seed, t.device), t["weight_decay"]
    weights = list(problem.model.parameters())
    if t["optimizer"] == "adamw":
        optimizer: Any = torch.optim.AdamW(weights, lr=t["lr"], weight_decay=decay, fused=True)
    else:
        optimizer = Lion(weights, lr=t["lr"], weight_decay=decay)
    schedule = _problems.warmup_cosine(t["steps"])
    for point in _problems.train(problem, optimizer, steps=t["steps"], schedule=schedule):
        largest = max(w.abs().max().item() for w in weights)
        yield Measurement({**point.values, "largest_weight": largest, "use_of_bound": largest * decay}, point.at)


def _start(t: Trial, decay: float) -> Any:
    """A random point whose largest coordinate is five times 1/decay."""
    import torch

    from polyak.claims import _convex

    generator = torch.Generator().manual_seed(t.seed)
    x = 2 * torch.rand(_convex.convex(t.task).shape, generator=generator, dtype=torch.float64) - 1
    return x * (5 / decay / x.abs().max())


def _kappa(t: Trial, name: str) -> Any:
    from polyak.optim.lion import kappa

    width = t["width"]
    of = {"sign": kappa.L1, "l2": kappa.L2, "group": kappa.Group, "nuclear": lambda: kappa.Nuclear("svd")}
    smoothed = {"dead_zone": lambda: kappa.DeadZone(width), "huber": lambda: kappa.Huber(width)}
    return {**of, **smoothed, "entropic": lambda: kappa.Entropic(1 / width)}[name]()


def _gap(t: Trial, name: str, x: Any) -> float:
    """``(F - F*) / (|F*| + 1)``, F = f(x) + K*(wd x) / wd, at the point of F's domain that is nearest to x."""
    from polyak.claims import _convex

    f, penalty = _convex.convex(t.task), _convex.penalty(name, t["weight_decay"], t["width"])
    least = _convex.minimum(t.task, name, t["weight_decay"], t["width"], ACCURACY)
    inside = penalty.project(x)
    return max(f.value(inside) + penalty.value(inside) - least, ACCURACY) / (abs(least) + 1)


def _path(t: Trial, name: str, feasibility: dict[str, float] | None = None) -> Iterator[tuple[int, Any]]:
    """An optimizer's points on its way from the seed's start, under one K where it has one.

    ``feasibility`` takes in two maxima. ``infeasibility``: the distance of wd x to the domain, over the points yielded from the
    second half. ``contraction``: a step's ratio of distances less ``1 - lr wd``, over the steps until inside.
    """
    import torch

    from polyak.claims import _convex
    from polyak.core.schedules import Cosine
    from polyak.optim.lion import LionK

    f, decay, steps = _convex.convex(t.task), t["weight_decay"], t["steps"]
    x = _start(t, decay)
    coupled = t["optimizer"] == "coupled"
    if t["optimizer"] == "adamw":
        optimizer: Any = torch.optim.AdamW([x], lr=t["lr"], weight_decay=decay, fused=True)
    elif t["optimizer"] == "sgd":
        optimizer = torch.optim.SGD([x], lr=t["lr"], momentum=0.9)
    else:
        optimizer = LionK([x], _kappa(t, name), lr=t["lr"], weight_decay=0.0 if coupled else decay)
    group, rate = optimizer.param_groups[0], Cosine(t["lr"], t["last_lr"], steps)

    def distance() -> float:
        return decay * (x - _convex.penalty(name, decay, t["width"]).project(x)).norm().item()

    far, every = distance() if feasibility else 0.0, max(1, steps // 25)
    for step in range(1, steps + 1):
        group["lr"] = lr = rate(step - 1)
        x.grad = f.gradient(x)
        if coupled:
            x.grad.add_(x, alpha=decay)
        if t["optimizer"] == "sgd":
            x.mul_(1 - lr * decay)
        optimizer.step()
        if feasibility and far > INSIDE:
            before, far = far, distance()
            feasibility["contraction"] = max(feasibility["contraction"], far / before - (1 - lr * decay))
        if step % every == 0 or step == steps:
            if feasibility and 2 * step >= steps:
                feasibility["infeasibility"] = max(feasibility["infeasibility"], distance())
            yield step, x


def _rises(t: Trial, name: str) -> int:
    """How many of the first steps from a feasible start, at a constant rate, raise H by more than the theory's second order.

    That is ``f(x') - f(x) - <grad f(x), x' - x>``, which is ``Lip |x' - x|^2 / 2`` at most.
    """
    import warnings

    from polyak.claims import _convex
    from polyak.optim.lion import LionK, lyapunov

    f, decay = _convex.convex(t.task), t["watched_decay"]
    x = _convex.penalty(name, decay, t["width"]).project(_start(t, decay)).clone()
    betas = (0.99, 0.9) if t["optimizer"] == "reversed" else (0.9, 0.99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # reversed betas are what the control is about
        optimizer = LionK([x], _kappa(t, name), lr=t["watched_lr"], betas=betas, weight_decay=decay)
    count, plane, h = 0, lambda _: 0.0, float("inf")
    for _ in range(t["watched_steps"]):
        loss, x.grad = f.value(x), f.gradient(x)
        former, h = h, lyapunov(optimizer, loss).H
        count += not h - former <= loss - plane(x) + 1e-12 * (1 + abs(h))
        plane = _tangent(loss, x.grad, x.clone())
        optimizer.step()
    return count


def _tangent(loss: float, gradient: Any, x: Any) -> Any:
    """``y -> f(x) + <grad f(x), y - x>``."""
    return lambda y: loss + (gradient * (y - x)).sum().item()


LION, COUPLED = {"optimizer": "lion"}, {"optimizer": "coupled"}
ALL = tuple(CONVEX)
SAYS = {
    "sign": "|x_i| <= 1/wd",
    "l2": "|x| <= 1/wd",
    "dead_zone": "|x_i| <= 1/wd and a penalty e |x|_1",
    "huber": "|x_i| <= 1/wd and a penalty (e wd / 2) |x|^2",
    "entropic": "|x_i| < 1/wd and an entropy's penalty",
    "group": "every row's norm <= 1/wd",
    "nuclear": "the spectral norm <= 1/wd",
}
NETWORK = ("network",)
ARMS = (
    Arm("adamw", "AdamW", "baseline", {"optimizer": "adamw"}, tasks=ALL),
    Arm("sgd", "SGD, decoupled decay", "baseline", {"optimizer": "sgd"}, tasks=ALL, says="momentum 0.9"),
    Arm("lion", "Lion-K", "method", LION, tasks=ALL, says="one run for every K"),
    Arm(
        "coupled", "Lion-K, coupled decay", "control", COUPLED, tasks=("logistic", "least_squares"),
        says="wd x is added to the gradient, and so passes through K",
    ),
    Arm(
        "reversed", "Lion-K, b1 > b2", "control", {"optimizer": "reversed"}, tasks=ALL,
        says="betas (0.99, 0.9), for which the theory does not hold; H alone is watched",
    ),
    Arm(
        "network_adamw", "AdamW, wd 0.01", "baseline", {"optimizer": "adamw", "weight_decay": 0.01}, {"lr": (2e-2, 4e-2, 8e-2)},
        tasks=NETWORK,
    ),
    Arm("network_lion_1", "Lion, wd 1", "method", {**LION, "weight_decay": 1.0}, {"lr": (3e-3, 1e-2, 3e-2)}, tasks=NETWORK),
    Arm("network_lion_3", "Lion, wd 3", "method", {**LION, "weight_decay": 3.0}, {"lr": (1e-2, 3e-2, 1e-1)}, tasks=NETWORK),
)  # fmt: skip


def _task(name: str, label: str, says: str, **options: float) -> Task:
    plots = (Plot("step", f"gap_{k}", f"{k.replace('_', ' ')}: gap to the minimum", log_y=True) for k in CONVEX[name])
    return Task(name, label, says, options, plots=tuple(plots))


TASKS = (
    _task(
        "logistic", "Logistic regression",
        "breast_cancer, 30 standardized features, full batch; wd 1, which puts 16 of 30 weights on sign's bound",
        weight_decay=1.0, width=2e-3, watched_decay=0.1,
    ),
    _task(
        "least_squares", "Least squares",
        "diabetes, 10 standardized features, full batch; wd 5, which puts 4 of 10 weights on sign's bound",
        weight_decay=5.0, width=2e-2, watched_decay=1.0,
    ),
    _task(
        "softmax", "Softmax regression",
        "the first 300 digits, a 10 x 64 matrix, full batch; wd 1, which puts all rows and 9 of 10 singular values on the bound",
        weight_decay=1.0, width=0.0, watched_decay=1.0,
    ),
    Task(
        "network", "Network on digits",
        "1,437 digits, 64-128-10 with ReLU, batch 128, 60 epochs; rates tuned by the test loss of another seed",
        {"steps": 660}, tune="test_loss",
        plots=(
            Plot("step", "largest_weight", "Largest weight", log_y=True),
            Plot("step", "train_loss", "Training loss (mean since the last point)", log_y=True),
        ),
    ),
)  # fmt: skip

METRICS = (
    *(Metric(f"gap_{k}", f"Gap to the minimum, {k.replace('_', ' ')}", exact=True) for k in (*VECTOR, *MATRIX)),
    Metric("infeasibility", "Distance to the domain", exact=True),
    Metric("contraction", "Contraction above 1 - lr wd", exact=True),
    Metric("rises", "Steps that raise H", unit="steps", exact=True),
    Metric("train_loss", "Training loss"),
    Metric("test_loss", "Test loss"),
    Metric("accuracy", "Test accuracy", better="higher", worst=0.0),
    Metric("largest_weight", "Largest weight"),
    Metric("use_of_bound", "Largest weight times wd", exact=True),
)


def _criteria(task: str) -> Iterator[Criterion]:
    proved = Ask(METRICS, kind="mechanism", task=task, arm="lion", rule="every")
    coupled = "coupled" if task != "softmax" else ""
    for name in CONVEX[task]:
        words, ask = name.replace("_", " "), proved.but(metric=f"gap_{name}")
        yield ask.below(
            f"{task}_{name}_minimum", 1e-5,
            f"Lion-K with K = {words} ends at the minimum under {SAYS[name]}: its relative gap is below 1e-5",
            control=coupled or "sgd",
        )  # fmt: skip
        yield ask.below(
            f"{task}_{name}_baselines", 0.1,
            f"AdamW's and SGD's gaps to the minimum under {SAYS[name]} are more than ten times that of Lion-K ({words})",
            over=("adamw", "sgd"), control=coupled,
        )  # fmt: skip
    yield proved.below(
        f"{task}_feasible", 1e-6, "For every K, in the run's second half wd x is never 1e-6 or more outside the domain of K*",
        metric="infeasibility",
    )  # fmt: skip
    yield from proved.table(
        "at_most", "name bound metric control says",
        (f"{task}_contraction", 1e-9, "contraction", "",
         "For every K, until wd x is inside the domain of K*, each step shrinks its distance by 1 - lr wd or more"),
        (f"{task}_descent", 0.0, "rises", "reversed",
         "For every K, from a feasible start no step raises H by more than the theory's term of second order"),
    )  # fmt: skip


BOUND = Ask(METRICS, kind="mechanism", task="network", metric="use_of_bound", rule="every", gating=False)
TRAINED = Ask(METRICS, kind="effect", task="network", gating=False)
CRITERIA = (
    *(c for task in CONVEX for c in _criteria(task)),
    *(
        BOUND.at_most(
            f"network_bound_{wd}", 1 + 1e-6, f"Lion with wd {wd} keeps every weight of the network within 1/wd",
            arm=f"network_lion_{wd}",
        )
        for wd in (1, 3)
    ),
    TRAINED.above(
        "network_adamw_beyond", 1 / 3, "AdamW's weights go beyond 1/3, the bound of Lion with wd 3",
        arm="network_adamw", metric="largest_weight",
    ),
    *(
        TRAINED.at_least(
            f"network_accuracy_{wd}", -0.01, f"Lion with wd {wd} is at most one point of accuracy below AdamW",
            arm=f"network_lion_{wd}", minus="network_adamw", metric="accuracy", gating=True,
        )
        for wd in (1, 3)
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="lion", room="optim", name="Lion-K",
    summary="Lion's weight decay is a constraint: |x| <= 1/wd in every weight, and other K give other constraints",
    says=(
        "Lion with decoupled decay wd minimizes f under ||x||_inf <= 1/wd; with any convex K in place of the l1 norm, Lion-K "
        "minimizes f(x) + K*(wd x) / wd. In a first phase the distance of wd x to the domain of K* falls as exp(-wd t); in a "
        "second a Lyapunov function H decreases, up to a term of second order in the step. The paper's claim is this theory, "
        "with pictures of networks' weights, and no table of accuracies."
    ),
    paper=Paper("Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts", 2023, "2310.05898", "ICLR 2024"),
    part="polyak.optim.lion:LionK", budget="optimizer steps",
    scales=(
        Scale(
            "small", "three convex problems whose constrained minima are known, and a small network: a minute on two cores", 5,
            first_seed=300, options={"steps": 20_000, "lr": 1e-2, "last_lr": 1e-5, "watched_lr": 0.1, "watched_steps": 500},
        ),
    ),
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    departures=(
        "The paper shows networks on ImageNet and language models, whose details it does not give: there is no paper scale here. "
        "Its theorems are checked on convex problems, where the minimum is known.",
        "Minima are computed to 1e-9 by accelerated proximal gradients, with a Fenchel gap as certificate; smaller gaps count as "
        "1e-9. A gap is taken at the nearest point of the domain, which flatters whoever is outside.",
        "20,000 full-batch steps in float64 from a random point with ||x||_inf = 5/wd; the rate falls from 1e-2 to 1e-5 along a "
        "cosine, for all alike and untuned: ten times larger or smaller rates change AdamW's gaps by a factor of five at most, "
        "SGD's not at all. SGD solves f + wd |x|^2 / 2, another problem, which is the point.",
        "H is watched on a run of its own: 500 steps at a constant rate of 0.1 from the start's projection, decays 0.1, 1 and 1. "
        "The order of the betas decides the sign of <u' - c, D(u') - D(c)> / (b2 - b1), next to nothing where K's subgradient "
        "D does not turn: where the constraint binds as a whole, as l2's does at the decays above, or where steps are too small. "
        "H was watched there before, at rate 0.01, and reversed betas passed on softmax. On the present run, chosen in pilots on "
        "seeds below 10, they raise H under every K. More is asked of Lion-K, too: the theory's term of second order is taken "
        "exactly, f(x') - f(x) - <g, x' - x>, and not by its bound Lip |x' - x|^2 / 2.",
        "The nuclear K takes exact polar factors in place of Newton-Schulz iterations.",
        "The network's weights start inside the bound, so that they stay there by arithmetic. What is asked of its accuracy is our "
        "own question, what the bound costs; it was only reported before, on seeds 200 to 204, and counts from seed 300 on.",
        "Here the gradient's sign is the usual one; the paper's momentum is minus this one. The explicit step of size lr is the "
        "paper's implicit one of size lr / (1 - lr wd).",
        "Until 2026-11-30 criteria on what training reaches asked every seed, so that more seeds made passing harder. Before this "
        "run they were reset to ask the mean, with the same bounds; the small scale's seeds, from 200 on, had not been run.",
    ),
    errata=(
        Erratum(
            what="bitsandbytes' 32-bit Lion added the weight decay to the gradient, so that it passed through the sign.",
            where="bitsandbytes-foundation/bitsandbytes, CUDA, Triton and default kernels until July 2026 (issue 1992)",
            effect="Weights are not held within 1 / wd: they go to the minimum of f + wd |x|^2 / 2, however far outside that is.",
            test="tests/optim/test_errata.py::test_lion_with_coupled_decay_leaves_its_bound",
        ),
    ),
    usage=(
        "from polyak.optim import Lion\n\n"
        "optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=1.0)  # every weight stays within 1 / weight_decay"
    ),
)  # fmt: skip
