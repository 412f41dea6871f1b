"""MoNNA's claim: attacked, it stays near fault-free training, where momentum-free or coordinate-wise rules do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyak.claims._pictures import monna as pictures
from polyak.lab.claim import (
    Arm,
    Claim,
    Criterion,
    Erratum,
    Measurement,
    Metric,
    Paper,
    Plot,
    Scale,
    Task,
    Trial,
    measure,
)
from polyak.lab.criteria import Ask

ATTACKS = ("sign_flip", "foe", "alie", "label_flip")
DIGITS, MNIST = ("digits_1", "digits_5"), ("mnist_1", "mnist_5")


def trial(t: Trial) -> Iterator[Measurement]:
    """One arm under every attack in turn (the ceiling: under none), each from the same start on the same data."""
    yield from _quadratic(t) if t.task == "quadratic" else _classification(t)


def _classification(t: Trial) -> Iterator[Measurement]:
    final: dict[str, float] = {}
    for attack in (None,) if t["ceiling"] else ATTACKS:
        name = "accuracy" if attack is None else f"accuracy_{attack}"
        for step, values in _train(t, attack):
            renamed = {name if k == "accuracy" else k: v for k, v in values.items()}
            if step < t["steps"]:
                yield measure({"step": step}, **{name: renamed[name]})
            else:
                worst = {k: max(v, final.get(k, 0.0)) for k, v in renamed.items() if k in ("alpha", "lam")}
                final |= renamed | worst
    found = [final[k] for k in final if k.startswith("accuracy")]
    final["worst"] = min(found)
    if not t["ceiling"]:
        final["worst_flip_foe"] = min(final["accuracy_sign_flip"], final["accuracy_foe"])
    yield Measurement(final)


def _train(t: Trial, attack: str | None) -> Iterator[tuple[int, dict[str, float]]]:
    import torch

    from polyak.optim.monna import Batches, Simulator, dirichlet_split, mixer, reduction
    from polyak.optim.monna.attacks import ALIE, FOE, LabelFlip, SignFlip

    model, (x, y), (test_x, test_y) = _problem(t)
    n, f = (t["n"], t["f"]) if attack else (t["n"] - t["f"], 0)
    generator = torch.Generator().manual_seed(t.seed)
    split = dirichlet_split(y.cpu(), t["n"] - t["f"], t["dirichlet"], generator=generator)
    size = (lambda step: step + 1) if t["rule"] == "learn" else t["batch"]
    options = {"tau": t["tau"]} if t["rule"] == "self_centered_clip" else {}
    draws = torch.Generator(device=t.device).manual_seed(t.seed)
    made = {"sign_flip": SignFlip, "foe": FOE, "alie": ALIE, "label_flip": LabelFlip}
    simulator = Simulator(
        model, Batches(x, y, split, size, generator=generator), n=n, f=f, lr=t["lr"], momentum=t["momentum"],
        mixer=mixer("trimmed_mean" if t["rule"] == "learn" else t["rule"], **options), mix_gradients=t["rule"] == "learn",
        attack=made[attack]() if attack else None, wait="n-f" if attack else "all", weight_decay=t["l2"], generator=draws,
    )  # fmt: skip
    alpha = lam = torch.zeros((), device=t.device)
    for step in range(t["steps"]):
        if step % t["decay"] == 0:
            simulator.lr = t["lr"] / (step / t["decay"] + 1)
        simulator.step()
        found = reduction(simulator.half, simulator.parameters)
        alpha, lam = torch.maximum(alpha, found.alpha), torch.maximum(lam, found.lam)
        done = step + 1
        if done % max(1, t["steps"] // 6) == 0 or done == t["steps"]:
            # A model that is not finite says class 0 of everything, as argmax has it.
            accuracy = (simulator.outputs(test_x).argmax(-1) == test_y).double().mean().item()
            numbers = {"alpha": _finite(alpha), "lam": _finite(lam)}
            yield done, {"accuracy": accuracy, "gradients": float(simulator.gradients), **numbers}


def _finite(value: Any) -> float:
    return value.nan_to_num(nan=1e30, posinf=1e30).clamp(max=1e30).item()


def _problem(t: Trial) -> tuple[Any, tuple[Any, Any], tuple[Any, Any]]:
    import torch
    from torch import nn

    from polyak.claims import _problems
    from polyak.lab import data

    if t.task in DIGITS:
        x, y = _problems.digit_images(t.device)
        model = _problems.seeded(lambda: _problems.dense(64, 32, 10, activation=nn.ReLU), t.seed, t.device)
        last = _problems.TEST_DIGITS
        x = (x - x[:-last].mean()) / x[:-last].std()
        return model, (x[:-last], y[:-last]), (x[-last:], y[-last:])

    def images(split: Any) -> tuple[Any, Any]:
        pixels, labels = data.mnist(split)
        x = (torch.from_numpy(pixels).to(t.device)[:, None].float() / 255 - 0.1307) / 0.3081
        return x, torch.from_numpy(labels).to(t.device)

    if t.options.get("hidden"):
        # MNIST's test set, a fifth of which is held out, and a network like the digits'.
        (x, y), hidden = images("test"), t["hidden"]
        edge = len(x) * 4 // 5
        model = _problems.seeded(lambda: _problems.dense(784, hidden, 10, activation=nn.ReLU), t.seed, t.device)
        return model, (x[:edge].flatten(1), y[:edge]), (x[edge:].flatten(1), y[edge:])

    def network() -> nn.Module:
        first = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))

    return _problems.seeded(network, t.seed, t.device), images("train"), images("test")


# -- the exact part --------------------------------------------------------------------------------------------------------


def _quadratic(t: Trial) -> Iterator[Measurement]:
    """Losses ||x - c_i||^2 / 2, full gradients, everyone hears all n: the honest mean's distance to the honest optimum."""
    import torch
    from torch import nn

    from polyak.optim.monna import Simulator
    from polyak.optim.monna.attacks import ALIE, FOE, Mimic, SignFlip
    from polyak.optim.monna.simulator import diameter

    n, f = t["n"], t["f"]
    c = torch.randn(n - f, 10, generator=torch.Generator().manual_seed(t.seed), dtype=torch.float64)
    optimum, size = c.mean(0), diameter(c)

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(10, dtype=torch.float64))

        def forward(self, centre: Any) -> Any:
            return self.x - centre

    def batches() -> Iterator[Any]:
        while True:
            yield c[:, None], c[:, None]

    def distance(attack: Any) -> float:
        simulator = Simulator(
            Point(), batches(), n=n, f=f, lr=t["lr"], momentum=t["momentum"], mixer=t["rule"], attack=attack,
            loss=lambda difference, _: difference.square().sum() / 2,
        )  # fmt: skip
        for _ in range(t["steps"]):
            simulator.step()
        return _finite((simulator.parameters.mean(0) - optimum).norm())

    attacks = [SignFlip(), FOE(1.1), FOE(1000.0), ALIE(1.5), ALIE(1000.0), ALIE(), Mimic()]
    bound = constant(n, f, t["lr"], t["momentum"])
    final = {"excess": max(distance(a) for a in attacks) / (bound * size.item())}
    if t["rule"] == "mean":
        deviation = c.std(0).norm().item()
        exact = {z: f / n * z * deviation for z in (10.0, 100.0, 1000.0)}
        final["nonlinearity"] = max(abs(distance(ALIE(z)) / e - 1) for z, e in exact.items())
    yield Measurement(final)


def constant(n: int, f: int, lr: float, momentum: float, steps: int = 100_000) -> float:
    """C such that NNA's honest mean ends within C times the largest distance of two c_i from their mean, whatever is sent.

    With a = 4 f / (n - f), the most by which NNA shrinks a diameter, those of the parameters stay below D = a H and of the
    half steps below H = lr Dc / (1 - a (1 + lr)). Mixing moves the mean by 2 f / (n - f) H at most, and the mean's own
    recursion, x' = x - lr m', m' = b m + (1 - b) x, answers a push by what is summed up here.

    Raises:
        ValueError: a (1 + lr) >= 1, where this says nothing.
    """
    a = 4 * f / (n - f)
    if a * (1 + lr) >= 1:
        raise ValueError(
            f"no bound for n={n}, f={f}, lr={lr}: 4 f / (n - f) (1 + lr) must be below 1, got {a * (1 + lr)}"
        )
    x, m, total = 1.0, 0.0, 0.0
    for _ in range(steps):
        total += abs(x)
        m = momentum * m + (1 - momentum) * x
        x -= lr * m
        if abs(x) + abs(m) < 1e-15:
            break
    return 2 * f / (n - f) * lr / (1 - a * (1 + lr)) * total


ALL = (*DIGITS, *MNIST)
SOME = ("digits_1", *MNIST)


def _arm(name: str, label: str, role: Any, rule: str, momentum: float, tasks: Any = SOME, says: str = "") -> Arm:
    options = {"ceiling": name == "ceiling", "tau": 2.0, "rule": rule, "momentum": momentum}
    return Arm(name, label, role, options, tasks=tasks, says=says)


ARMS = (
    _arm("ceiling", "D-SGD without attack", "baseline", "mean", 0.0, ALL, "the n - f honest workers alone"),
    _arm("dsgd", "D-SGD", "baseline", "mean", 0.0, (*ALL, "quadratic"), "plain averaging"),
    _arm("monna", "MoNNA", "method", "nna", 0.99, (*ALL, "quadratic"), "nearest neighbours, momentum 0.99"),
    _arm("nna", "NNA without momentum", "ablation", "nna", 0.0),
    _arm("bridge", "Trimmed mean (BRIDGE)", "baseline", "trimmed_mean", 0.0),
    _arm("trimmed", "Trimmed mean, momentum 0.99", "baseline", "trimmed_mean", 0.99),
    _arm("gm", "Geometric median, momentum 0.99", "baseline", "geometric_median", 0.99),
    _arm("scc", "Self-centred clipping", "baseline", "self_centered_clip", 0.9, says="tau 2, momentum 0.9"),
    _arm(
        "learn", "LEARN", "baseline", "learn", 0.0, MNIST,
        "batches of t + 1; gradients are mixed, then parameters, by trimmed means",
    ),
)  # fmt: skip
RIVALS = ("nna", "bridge", "trimmed", "gm", "scc")


def _task(name: str, data: str, share: float) -> Task:
    says = f"each worker's classes from Dirichlet({share:g}); attacks: sign flip, FOE, ALIE, label flip"
    options = {"dirichlet": share, "l2": 1e-4, "batch": 25, "decay": 50}
    title = "Mean accuracy of honest workers"
    plots = (Plot("step", f"accuracy_{a}", f"{title}, {a.replace('_', ' ')}") for a in ATTACKS)
    return Task(name, f"{data}, Dirichlet {share:g}", says, options, plots=tuple(plots))


TASKS = (
    _task("digits_1", "Digits", 1.0),
    _task("digits_5", "Digits", 5.0),
    Task(
        "quadratic", "Quadratic losses",
        "||x - c_i||^2 / 2 in 10 dimensions, full gradients, 11 workers of whom 2 attack; seven attacks",
        {"n": 11, "f": 2, "lr": 0.05, "momentum": 0.9, "steps": 400},
    ),
    _task("mnist_1", "MNIST", 1.0),
    _task("mnist_5", "MNIST", 5.0),
)  # fmt: skip


def _accuracy(name: str, label: str) -> Metric:
    return Metric(name, label, better="higher", worst=0.0)


METRICS = (
    _accuracy("worst", "Accuracy under the worst attack"),
    _accuracy("worst_flip_foe", "Accuracy under the worse of sign flip and FOE"),
    _accuracy("accuracy", "Accuracy without attack"),
    *(_accuracy(f"accuracy_{a}", f"Accuracy under {a.replace('_', ' ')}") for a in ATTACKS),
    Metric("gradients", "Sample gradients evaluated", exact=True),
    Metric("alpha", "Largest spread after over before mixing"),
    Metric("lam", "Largest squared shift of the mean over the spread"),
    Metric("excess", "Distance to the optimum over the bound", exact=True),
    Metric("nonlinearity", "D-SGD's distance over what is linear in z, minus one", exact=True),
)
PROVED = Ask(METRICS, kind="mechanism", task="quadratic", arm="monna", rule="every")


def _criteria(one: str, five: str) -> Iterator[Criterion]:
    ask = Ask(METRICS, kind="effect", task=one, metric="worst", arm="monna")
    yield ask.at_least(
        f"{five}_near_ceiling", -0.05, "MoNNA's worst accuracy under attack is at most 5 points below D-SGD's without attack",
        task=five, minus="ceiling", against_metric="accuracy", control="dsgd",
    )  # fmt: skip
    yield ask.at_least(
        f"{one}_best", -0.01, "MoNNA's accuracy under its worst attack is at most a point below every baseline's under theirs",
        minus=RIVALS, control="dsgd",
    )  # fmt: skip
    yield ask.below(
        f"{one}_dsgd_falls", -0.2, "Sign flip or FOE costs D-SGD more than 20 points",
        arm="dsgd", metric="worst_flip_foe", minus="ceiling", against_metric="accuracy",
    )  # fmt: skip
    yield ask.beats(
        f"{one}_momentum", "Under ALIE, momentum makes NNA more accurate", metric="accuracy_alie", minus="nna"
    )
    counted = PROVED.but(task=one, metric="gradients", over="dsgd")
    yield counted.at_most(f"{one}_gradients", 1.0, "MoNNA evaluates no more gradients than D-SGD")


CRITERIA = (
    *_criteria("digits_1", "digits_5"),
    PROVED.at_most(
        "quadratic_bounded", 1.0,
        "Whatever is sent, MoNNA's honest mean ends within the theory's constant times the spread of the optima",
        metric="excess", control="dsgd",
    ),
    PROVED.at_most(
        "quadratic_dsgd_linear", 1e-6, "ALIE moves D-SGD by f / n z times the optima's deviation, without limit",
        arm="dsgd", metric="nonlinearity",
    ),
    *_criteria("mnist_1", "mnist_5"),
)  # fmt: skip

CLAIM = Claim(
    slug="monna", room="optim", name="MoNNA",
    summary="Momentum and nearest-neighbour averaging: training among faulty workers at the gradient cost of plain SGD",
    says=(
        "Under ALIE, FOE, sign flip and label flip, on heterogeneous MNIST (26 workers, 5 faulty) and CIFAR-10 (16 workers, 3 "
        "faulty), MoNNA stays near D-SGD without faults, while every momentum-free or coordinate-wise rule fails under one attack "
        "at least. Workers evaluate as many gradients as in D-SGD; LEARN needs batches that grow with the step. The paper has "
        "figures only, no table."
    ),
    paper=Paper(
        "Robust Collaborative Learning with Linear Gradient Overhead", 2022, "2209.10931", "ICML 2023",
        "https://github.com/LPD-EPFL/robust-collaborative-learning",
    ),
    part="polyak.optim.monna:MoNNA", budget="optimizer steps",
    scales=(
        Scale(
            "small", "digits, 64-32-10, 11 workers of whom 2 attack, 300 steps: minutes on two cores", 5,
            first_seed=200, tasks=(*DIGITS, "quadratic"), options={"n": 11, "f": 2, "lr": 0.5, "steps": 300},
        ),
        Scale(
            "gpu", "MNIST's 10,000 test images, 784-64-10, 26 workers of whom 5 attack, 100 steps: minutes on one accelerator", 10,
            first_seed=200, tasks=MNIST, options={"n": 26, "f": 5, "lr": 0.5, "steps": 100, "hidden": 64},
        ),
        Scale(
            "paper", "MNIST, the paper's network and 26 workers of whom 5 attack, 600 steps: hours on one accelerator", 5,
            tasks=MNIST, options={"n": 26, "f": 5, "lr": 0.75, "steps": 600},
        ),
    ),
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    departures=(
        "Small scale: scikit-learn's digits and a network 64-32-10 in place of MNIST's convolutional one; 11 workers, 300 steps. "
        "Scale gpu: MNIST's test set, the paper's numbers of workers, and a network 784-64-10. "
        "Nothing is tuned: rates and momenta are the paper's (0.5 / (t / 50 + 1) in place of 0.75 / (t / 50 + 1)).",
        "Accuracy is the mean over all honest workers; the official code evaluates worker 0.",
        "Every worker hears itself, n - 2 f - 1 random honest others and all attackers, as in the official code. The exact part "
        "lets everyone hear all, for which the bound is proved here (n > 5 f); the paper's own constants were not at hand.",
        "Krum, median and MVA are not run; CIFAR-10 is not, either. LEARN is run on MNIST only.",
        "Until 2026-11-30 criteria on what training reaches asked every seed, so that more seeds made passing harder. Before this "
        "run they were reset to ask the mean, with the same bounds; the small scale's seeds, from 200 on, had not been run.",
    ),
    errata=(
        Erratum(
            what="All honest workers share one tensor of parameters until the first mixing.",
            where="LPD-EPFL/robust-collaborative-learning, peerToPeer.py",
            effect="The first step of each is the sum of all their steps: with n honest workers, n times the learning rate.",
            test="tests/optim/test_monna_simulator.py::test_the_first_step_is_each_workers_own",
        ),
        Erratum(
            what="The geometric median, a baseline, is three smoothed Weiszfeld steps from zero.",
            where="LPD-EPFL/robust-collaborative-learning, aggregators/rfa.py",
            effect="Far from zero, where parameters are, it is still between the plain mean and the geometric median.",
            test="tests/optim/test_errata.py::test_three_weiszfeld_steps_from_zero_depend_on_where_the_origin_is",
        ),
        Erratum(
            what="Krum, a baseline, adds up plain distances to n - f - 1 others; Krum's paper has squared ones to n - f - 2.",
            where="LPD-EPFL/robust-collaborative-learning, aggregators/krum.py",
            effect="Often it chooses another vector; variant='original' is Krum.",
            test="tests/optim/test_errata.py::test_krum_of_the_papers_code_is_not_krum",
        ),
    ),
    sources=(
        "polyak.optim.monna.aggregators",
        "polyak.optim.monna.attacks",
        "polyak.optim.monna.rule",
        "polyak.optim.monna.simulator",
    ),
    usage=(
        "from polyak.optim import MoNNA\n"
        "from polyak.optim.monna import Peers\n\n"
        "optimizer = MoNNA(model.parameters(), lr=0.5, f=2, group=Peers.connect())  # one process per worker, no DDP"
    ),
)  # fmt: skip
