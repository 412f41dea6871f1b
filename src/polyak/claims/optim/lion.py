"""Lion's claim: weight decay is a constraint, and Lion-K solves the problem that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

from polyak.lab.claim import Arm, Claim, Criterion, Measurement, Metric, Paper, Plot, Scale, Task, Trial, measure

VECTORS = ("logistic", "least_squares")
E_DEAD, E_HUBER, A_ENTROPIC = 0.02, 0.1, 10.0


def trial(t: Trial) -> Iterator[Measurement]:
    """Minimize one convex problem with one arm, and measure against the optimum that theory promises."""
    import torch

    torch.set_default_dtype(torch.float64)
    try:
        yield from _run(t)
    finally:
        torch.set_default_dtype(torch.float32)


def _run(t: Trial) -> Iterator[Measurement]:
    import torch

    from polyak.core.schedules import Cosine
    from polyak.optim.lion import LionK

    f, gradient, shape, lipschitz = _problem(t.task, t["samples"])
    wd = _decay(t.task, t["samples"])
    kappa = _kappa(t["kappa"])
    target = _optimum(t.task, t["samples"], t["kappa"])
    steps, lr = t["steps"], t["lr"]
    generator = torch.Generator().manual_seed(t.seed)
    start = torch.rand(shape, generator=generator) * 2 - 1
    x = (start / start.abs().max() * 5 / wd).requires_grad_()
    method = t["optimizer"]
    if method == "adamw":
        optimizer: Any = torch.optim.AdamW([x], lr=lr, weight_decay=wd)
    elif method == "sgd":
        optimizer = _DecoupledSGD(x, lr, 0.9, wd)
    else:
        optimizer = LionK([x], kappa, lr=lr, weight_decay=wd if method == "lion" else 0.0)
    schedule = Cosine(1.0, 1e-3, steps)
    excess, outside = 0.0, method == "lion"
    for step in range(steps):
        rate = lr * schedule(step)
        optimizer.param_groups[0]["lr"] = rate
        before = float(kappa.distance(wd * x.detach())) if outside else 0.0
        x.grad = gradient(x.detach())
        if method == "coupled":
            x.grad += wd * x.detach()  # type: ignore[operator]
        optimizer.step()
        if outside:
            after = float(kappa.distance(wd * x.detach()))
            excess = max(excess, after - (1 - rate * wd) * before)
            outside = after > 0 and step < 3000
        if step % (steps // 40) == 0:
            yield measure({"step": step}, gap=_gap(f, x, kappa, wd, target, method))
    finals = {"gap": _gap(f, x, kappa, wd, target, method), "infeasibility": float(kappa.distance(wd * x.detach()))}
    if method == "lion":
        finals["contraction_excess"] = excess
        finals["h_increases"] = float(_increases(t, f, gradient, shape, lipschitz, wd, kappa))
    yield measure(**finals)  # type: ignore[arg-type]


class _DecoupledSGD:
    """SGD with momentum and decoupled decay, which torch.optim does not have."""

    def __init__(self, x: Any, lr: float, momentum: float, wd: float) -> None:
        self.x, self.momentum, self.wd, self.buffer = x, momentum, wd, None
        self.param_groups = [{"lr": lr}]

    def step(self) -> None:
        g = self.x.grad
        self.buffer = g.clone() if self.buffer is None else self.momentum * self.buffer + g
        rate = self.param_groups[0]["lr"]
        self.x.data.mul_(1 - rate * self.wd).sub_(rate * self.buffer)


def _gap(f: Callable[[Any], float], x: Any, kappa: Any, wd: float, target: float, method: str) -> float:
    """Relative distance of the objective to the optimum: of Lion-K's at the nearest feasible point, of others' as they are."""
    y = x.detach()
    if method != "lion":
        return abs(f(y) - target) / (abs(target) + 1)
    y = _project(kappa, wd * y) / wd
    return abs(f(y) + float(kappa.conjugate(wd * y)) / wd - target) / (abs(target) + 1)


def _increases(t: Trial, f: Any, gradient: Any, shape: tuple[int, ...], lipschitz: float, wd: float, kappa: Any) -> int:
    """Steps, from a feasible start at a constant rate, in which H grows by more than the discretization allows."""
    import torch

    from polyak.optim.lion import LionK, lyapunov

    generator = torch.Generator().manual_seed(10_000 + t.seed)
    x = _project(kappa, torch.randn(shape, generator=generator)) * (0.5 / wd)
    x = x.clone().requires_grad_()
    lr = t["h_lr"]
    optimizer = LionK([x], kappa, lr=lr, weight_decay=wd)
    e = lr / (1 - lr * wd)
    previous, old, grown = None, x.detach().clone(), 0
    for _ in range(t["h_steps"]):
        x.grad = gradient(x.detach())
        value = lyapunov(optimizer, f(x.detach())).H
        if previous is not None:
            moved = float(((x.detach() - old) / e).square().sum())
            grown += value - previous > lipschitz / 2 * e**2 * moved + 1e-12 * (1 + abs(value))
        previous, old = value, x.detach().clone()
        optimizer.step()
    return grown


def _kappa(name: str) -> Any:
    from polyak.optim.lion import kappa as k

    return {
        "sign": k.L1(), "l2": k.L2(), "dead_zone": k.DeadZone(E_DEAD), "huber": k.Huber(E_HUBER),
        "entropic": k.Entropic(A_ENTROPIC), "group": k.Group(0), "nuclear": k.Nuclear("svd"),
    }[name]  # fmt: skip


def _project(kappa: Any, y: Any) -> Any:
    """The nearest point of the domain of K*."""
    import torch

    name = type(kappa).__name__
    if name == "L2":
        return y / max(1.0, float(torch.linalg.vector_norm(y)))
    if name == "Group":
        return y / torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp(min=1.0)
    if name == "Nuclear":
        u, s, v = torch.linalg.svd(y, full_matrices=False)
        return u * s.clamp(max=1.0) @ v
    return y.clamp(-1.0, 1.0)


@lru_cache(maxsize=4)
def _problem(task: str, samples: int) -> tuple[Any, Any, tuple[int, ...], float]:
    """(f, gradient, shape, Lipschitz constant of the gradient) of a full-batch convex problem, standardized, no bias."""
    import torch

    from polyak.lab import data

    sets = {"logistic": data.breast_cancer, "least_squares": data.diabetes, "softmax": data.digits}
    a, b = sets[task]()
    a = torch.as_tensor(a, dtype=torch.float64).reshape(len(a), -1)[:samples]
    b = torch.as_tensor(b, dtype=torch.float64)[:samples]
    a = (a - a.mean(0)) / a.std(0).clamp(min=1e-8) if task != "softmax" else a / 16
    n, smooth = len(a), float(torch.linalg.matrix_norm(a, 2)) ** 2 / len(a)
    if task == "logistic":
        signs = 2 * b - 1
        rows = a * signs[:, None]
        return (
            lambda x: float(torch.nn.functional.softplus(-(rows @ x)).mean()),
            lambda x: rows.T @ (-torch.sigmoid(-(rows @ x))) / n,
            (a.shape[1],),
            smooth / 4,
        )
    if task == "least_squares":
        b = (b - b.mean()) / b.std()
        return (
            lambda x: float((a @ x - b).square().mean() / 2),
            lambda x: a.T @ (a @ x - b) / n,
            (a.shape[1],),
            smooth,
        )
    onehot = torch.nn.functional.one_hot(b.long(), 10).double()
    return (
        lambda x: float(torch.nn.functional.cross_entropy(a @ x.T, b.long())),
        lambda x: (torch.softmax(a @ x.T, 1) - onehot).T @ a / n,
        (10, a.shape[1]),
        smooth / 2,
    )


@lru_cache(maxsize=4)
def _decay(task: str, samples: int) -> float:
    """The decay of a fixed ladder for which the share of coordinates on Lion's bound is nearest to 45%."""
    import torch

    _, gradient, shape, lipschitz = _problem(task, samples)
    shares = {}
    for wd in (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0):
        x = _accelerated(gradient, lambda y, s, wd=wd: y.clamp(-1 / wd, 1 / wd), torch.zeros(shape), lipschitz, 3000)
        shares[wd] = float((x.abs() > (1 - 1e-6) / wd).double().mean())
    return min(shares, key=lambda wd: abs(shares[wd] - 0.45))


def _accelerated(gradient: Any, prox: Any, x: Any, lipschitz: float, steps: int) -> Any:
    """FISTA with restarts: the proximal gradient method with Nesterov's momentum (Beck and Teboulle 2009)."""
    y, momentum = x, 1.0
    for _ in range(steps):
        new = prox(y - gradient(y) / lipschitz, 1 / lipschitz)
        if float(((y - new) * (new - x)).sum()) > 0:
            y, momentum = x, 1.0
            new = prox(y - gradient(y) / lipschitz, 1 / lipschitz)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        y, x, momentum = new + (momentum - 1) / following * (new - x), new, following
    return x


@lru_cache(maxsize=16)
def _optimum(task: str, samples: int, name: str) -> float:
    """The least value of ``f + K*(wd .) / wd``, by a method that knows nothing of Lion."""
    import numpy as np
    import torch
    from scipy.optimize import minimize

    f, gradient, shape, lipschitz = _problem(task, samples)
    wd, kappa = _decay(task, samples), _kappa(name)
    if name == "entropic":
        edge = (1 - 1e-12) / wd

        def smooth(x: Any) -> tuple[float, Any]:
            y = torch.as_tensor(x)
            penalty = float(kappa.conjugate(wd * y)) / wd
            slope = torch.atanh((wd * y).clamp(-1 + 1e-12, 1 - 1e-12)) / kappa.a
            return f(y) + penalty, (gradient(y) + slope).numpy()

        options = {"maxiter": 20000, "maxfun": 50000, "ftol": 1e-16, "gtol": 1e-12}
        bounds = [(-edge, edge)] * int(np.prod(shape))
        return float(minimize(smooth, np.zeros(shape), jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun)

    def prox(y: Any, s: float) -> Any:
        if name == "dead_zone":
            y = torch.sign(y) * (y.abs() - s * E_DEAD).clamp(min=0)
        elif name == "huber":
            y = y / (1 + s * E_HUBER * wd)
        return _project(kappa, wd * y) / wd

    x = _accelerated(gradient, prox, torch.zeros(shape), lipschitz, 20000)
    return f(x) + float(kappa.conjugate(_project(kappa, wd * x))) / wd


def _arm(name: str, label: str, *tasks: str, says: str = "") -> Arm:
    options = {"optimizer": "lion", "kappa": name}
    return Arm(name=name, label=label, role="method", tasks=tasks, options=options, says=says)


PROMISES: tuple[tuple[str, Literal["<", "<="], float, str], ...] = (
    ("gap", "<", 1e-5, "reaches the constrained optimum to 1e-5"),
    ("infeasibility", "<", 1e-6, "ends within its constraint to 1e-6"),
    ("contraction_excess", "<=", 1e-9, "approaches its constraint by the factor 1 - lr wd in every step"),
    ("h_increases", "<=", 0.0, "never increases H beyond the discretization's term"),
)
WHERE = (
    *((task, k) for task in VECTORS for k in ("sign", "l2", "dead_zone", "huber", "entropic")),
    ("softmax", "group"),
    ("softmax", "nuclear"),
)
PLOT = Plot(x="step", y="gap", log_y=True, title="Relative gap to the optimum")

CLAIM = Claim(
    slug="lion",
    room="optim",
    name="Lion",
    summary="Lion and Lion-K: sign-like momentum whose weight decay is a constraint, with a Lyapunov function",
    says=(
        "Lion with weight decay wd minimizes the loss under the constraint that every weight stays within 1/wd; Lion-K, with any "
        "convex K in place of the l1 norm, minimizes f + K*(wd x)/wd. The distance to the constraint shrinks exponentially and a "
        "Lyapunov function falls monotonically."
    ),
    paper=Paper(
        title="Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
        year=2023,
        arxiv="2310.05898",
        venue="ICLR 2024",
    ),
    part="polyak.optim.lion:Lion",
    usage="from polyak.optim import Lion\noptimizer = Lion(model.parameters(), lr=1e-4, weight_decay=1.0)",
    budget="full-batch steps",
    tasks=(
        Task(
            name="logistic",
            label="Logistic regression",
            says="scikit-learn's breast cancer set, standardized, 30 weights, full batch",
            options={"samples": 100_000},
            plots=(PLOT,),
        ),
        Task(
            name="least_squares",
            label="Least squares",
            says="scikit-learn's diabetes set, standardized, 10 weights, full batch",
            options={"samples": 100_000},
            plots=(PLOT,),
        ),
        Task(
            name="softmax",
            label="Softmax regression",
            says="300 of scikit-learn's digits, weights of shape 10 x 64, full batch",
            options={"samples": 300},
            plots=(PLOT,),
        ),
    ),
    arms=(
        Arm(
            name="adamw", label="AdamW", role="baseline", tasks=VECTORS, options={"optimizer": "adamw", "kappa": "sign"},
            says="measured against Lion's box",
        ),
        Arm(
            name="sgd", label="SGD, decoupled decay", role="baseline", tasks=VECTORS,
            options={"optimizer": "sgd", "kappa": "sign"}, says="momentum 0.9; measured against Lion's box",
        ),
        _arm("sign", "Lion", *VECTORS),
        _arm("l2", "Lion-K, l2", *VECTORS),
        _arm("dead_zone", "Lion-K, dead zone", *VECTORS, says=f"e = {E_DEAD}"),
        _arm("huber", "Lion-K, Huber", *VECTORS, says=f"e = {E_HUBER}"),
        _arm("entropic", "Lion-K, entropic", *VECTORS, says=f"a = {A_ENTROPIC}"),
        _arm("group", "Lion-K, rows", "softmax"),
        _arm("nuclear", "Lion-K, nuclear", "softmax", says="polar factor by SVD"),
        Arm(
            name="coupled", label="Lion with coupled decay", role="control", tasks=VECTORS,
            options={"optimizer": "coupled", "kappa": "sign"}, says="wd x is added to the gradient, before the sign",
        ),
    ),
    scales=(
        Scale(
            name="small",
            says="Convex problems on real data, float64; 20,000 steps, learning rate 1e-2 to 1e-5 by a cosine",
            seeds=5,
            options={"steps": 20_000, "lr": 1e-2, "h_steps": 300, "h_lr": 1e-3},
        ),
    ),
    metrics=(
        Metric(name="gap", label="relative gap to the optimum"),
        Metric(name="infeasibility", label="distance of wd x to the domain of K*"),
        Metric(name="contraction_excess", label="worst excess over the promised contraction"),
        Metric(name="h_increases", label="steps in which H increased too much"),
    ),
    criteria=(
        *(
            Criterion(
                name=f"{task}_{k}_{metric}", says=f"Lion-K with K = {k.replace('_', ' ')} {says}", task=task, metric=metric,
                arm=k, compare="value", op=op, bound=bound, rule="every",
                control="coupled" if (k, metric) == ("sign", "gap") else "",
            )
            for task, k in WHERE
            for metric, op, bound, says in PROMISES
        ),
        *(
            Criterion(
                name=f"{task}_{rival}", says=f"Lion's gap to the box-constrained optimum is less than a tenth of {label}'s",
                task=task, metric="gap", arm="sign", against=rival, op="<", bound=0.1, rule="every",
            )
            for task in VECTORS
            for rival, label in (("adamw", "AdamW"), ("sgd", "SGD"))
        ),
    ),
    trial=trial,
    departures=(
        "The paper shows histograms of the weights of ImageNet and language models; here the theory itself is tested, on convex "
        "problems whose constrained optimum is known.",
        "H is watched on 300 steps of their own, at a constant learning rate of 1e-3 from a feasible start.",
        "The learning check of the specification (bounded weights of a trained network) is not part of this claim yet.",
    ),
)  # fmt: skip
