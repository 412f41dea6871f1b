"""The claim of rollover budget forcing: flow models are searched best as SDEs, in the VP interpolant, with forced budgets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyak.claims._pictures import rbf as pictures
from polyak.lab.claim import Arm, Claim, Erratum, Measurement, Metric, Paper, Role, Scale, Task, Trial, Value, measure
from polyak.lab.criteria import Ask

SEARCHED = ("counting", "corner", "blurred")


def trial(t: Trial) -> Iterator[Measurement]:
    """Exact properties of solver, conversion and budgets; or the mean reward of what a search finds for some systems."""
    if t.task == "solvable":
        yield Measurement(_solvable(t))
        return
    found = search(t.options, t.seed, t.device)
    yield measure(reward=found.reward.mean().item(), calls=found.nfe)


def search(options: Any, seed: int, device: str = "cpu") -> Any:
    """What an arm finds on a task."""
    import torch

    from polyak.claims.generate import _flows
    from polyak.generate import SVDD, VP, BestOfN, CoDe, Flow, FlowSDE, RolloverBudget, SoP, convert

    network, reward = getattr(_flows, options["model"]), getattr(_flows, options["reward"])
    flow, process = Flow(), VP() if options["path"] == "vp" else Flow()
    kind, noise = options["search"], torch.Generator(device).manual_seed(seed)
    common: dict[str, Any] = dict(nfe=options["nfe"], finish=options["finish"], generator=noise)
    steps, solver = options["steps"], FlowSDE(norm=3.0 if options["noise"] else 0.0)
    if kind == "sop":
        made: Any = SoP(reward, **common)
    elif kind == "bon":
        made = BestOfN(reward, steps=steps, solver=solver, **common)
    elif kind == "rbf":
        made = RolloverBudget(reward, steps=steps, solver=solver, **common)
    else:  # as many candidates as the budget pays for: the first call of each chain is made once
        left = options["nfe"] - 2 - (steps - 1 if options["finish"] == "ode" else 0)
        made = {"svdd": SVDD, "code": CoDe}[kind](
            reward, steps=steps, candidates=left // (2 * (steps - 1)), solver=solver, **common
        )
    return made.sample(convert(network, flow, process), process, (_flows.DIM,), options["systems"], dtype=torch.float64)


def _solvable(t: Trial) -> dict[str, float]:
    import dataclasses

    from polyak.claims.generate import _flows
    from polyak.generate import FlowSDE

    class Unscored(FlowSDE):
        """The ODE's step, and noise."""

        def table(self, times, process, kind="flow"):
            drifts = FlowSDE(norm=0.0).table(times, process, kind)
            noises = super().table(times, process, kind)
            return [drift._replace(std=noise.std) for drift, noise in zip(drifts, noises, strict=True)]

    made = dataclasses.dataclass(frozen=True)(Unscored) if t.arm == "unscored" else FlowSDE
    x0, velocity = _flows.conversion_errors(t.seed, whole=t.arm != "unscored")
    order = _flows.marginal_order(made, t.seed)
    return {
        "order": order,
        "x0_error": x0,
        "velocity_error": velocity,
        **_flows.account(t.seed, forced=t.arm != "unscored"),
    }


def _arm(name: str, label: str, role: Role, kind: str, path: str, noise: bool, says: str = "") -> Arm:
    options: dict[str, Value] = {"search": kind, "path": path, "noise": noise}
    tasks = SEARCHED if name != "rbf_vp" else ("solvable", *SEARCHED)
    return Arm(name, label, role, options, says=says, tasks=tasks)


ARMS = (
    _arm("bon_ode", "Best of N, ODE", "baseline", "bon", "linear", False, "50 samples of the ODE"),
    _arm("svdd_linear", "SVDD, linear SDE", "baseline", "svdd", "linear", True, "two chains, the best of 27 at each step"),
    _arm("svdd_vp", "SVDD, VP SDE", "ablation", "svdd", "vp", True, "the interpolant alone"),
    _arm("rbf_linear", "RBF, linear SDE", "ablation", "rbf", "linear", True, "the budgets alone"),
    _arm("rbf_vp", "RBF, VP SDE", "method", "rbf", "vp", True),
    _arm("bon_vp", "Best of N, VP SDE", "control", "bon", "vp", True, "the SDE without a search on its way"),
    _arm("code_vp", "CoDe, VP SDE", "baseline", "code", "vp", True, "the best of 27 after every two steps"),
    _arm("sop", "Search over paths", "baseline", "sop", "linear", False, "noise is added to samples, the best is kept"),
    Arm(
        "unscored", "Without score, sigma' t', rollover", "control", {}, tasks=("solvable",),
        says="noise without the score's drift; c' without sigma' t'; equal shares of the budget",
    ),
)  # fmt: skip

COMMON: dict[str, Value] = {"nfe": 500, "steps": 10, "systems": 4}
STRAIGHT = (
    "16 coordinates, each a mixture of three modes 0.15 wide; the exact straight flow, whose predictions are samples"
)
TASKS = (
    Task(
        "solvable", "Solved in closed form",
        "Gaussian data with random mean and variance for eight strengths of noise in two interpolants; the velocity of a random "
        "mixture of four; a field of sines for the budget",
    ),
    Task(
        "counting", "Counts, straight flow", f"{STRAIGHT}; eleven shall be in the upper and four in the lower mode",
        {**COMMON, "model": "straight", "reward": "counting", "finish": "x0hat"},
    ),
    Task(
        "corner", "A corner, straight flow", f"{STRAIGHT}; less the distance to the corner of alternating modes",
        {**COMMON, "model": "straight", "reward": "corner", "finish": "x0hat"},
    ),
    Task(
        "blurred", "A corner, exact marginal flow",
        "the same law, by the velocity of its marginals, which predicts blends of modes; ends by the ODE",
        {**COMMON, "model": "blurred", "reward": "corner", "finish": "ode"},
    ),
)  # fmt: skip

METRICS = (
    Metric("order", "Lowest order of convergence of mean and variance, 160 to 320 steps", better="higher", exact=True),
    Metric("x0_error", "Largest error of the predicted data after conversion", exact=True),
    Metric("velocity_error", "Largest error of the converted velocity", exact=True),
    Metric("overspent", "Calls beyond the budget, or not reported", exact=True),
    Metric("lost", "Calls that quotas and rollovers do not account for, and falls of the record", exact=True),
    Metric("uneven", "Calls off an equal share, for a constant reward", exact=True),
    Metric("calls_when_climbing", "Calls at a step before the last, for a reward that always improves", exact=True),
    Metric("reward", "Mean reward of what is found", better="higher"),
    Metric("calls", "Calls of the network for each system", exact=True),
)
PROVED = Ask(METRICS, kind="mechanism", task="solvable", arm="rbf_vp", rule="every")
FOUND = Ask(METRICS, kind="effect", task="counting", arm="rbf_vp", metric="reward", rule="mean")
REPORTED = FOUND.but(gating=False)

CRITERIA = (
    PROVED.order(
        "marginals", 1, "With every strength of noise the SDE has the flow's marginals, to first order",
        metric="order", control="unscored",
    ),
    *PROVED.table(
        "at_most", "name bound metric says control",
        ("x0", 1e-9, "x0_error", "Conversion does not change the predicted data", "unscored"),
        ("velocity", 1e-9, "velocity_error", "The converted velocity is that of the new interpolant", "unscored"),
        ("budget", 0.0, "overspent", "No more calls than the budget, and all are reported", ""),
        ("account", 0.0, "lost", "What is left over is granted again, and the record never falls", ""),
        ("equal", 0.0, "uneven", "If nothing ever improves, each step has an equal share", ""),
        ("climbing", 1.0, "calls_when_climbing", "If all improves, each step before the last takes one call", "unscored"),
    ),
    FOUND.at_least(
        "bon", 1.5, "Counts: RBF on the VP SDE is above the best of 50 ODE samples by at least 1.5",
        minus="bon_ode", control="bon_vp",
    ),
    FOUND.beats("svdd", "Counts: RBF on the VP SDE is above SVDD on the linear SDE", minus="svdd_linear", control="bon_vp"),
    *(
        REPORTED.beats(f"{task}_{rival}", f"{label}: RBF on the VP SDE is above {who}", task=task, minus=rival)
        for task, label in (("counting", "Counts"), ("corner", "Corner"))
        for rival, who in (
            ("svdd_vp", "SVDD on the VP SDE"), ("rbf_linear", "RBF on the linear SDE"), ("code_vp", "CoDe on the VP SDE"),
            ("sop", "search over paths"),
        )
    ),
    *(
        REPORTED.beats(f"corner_{rival}", f"Corner: RBF on the VP SDE is above {who}", task="corner", minus=rival)
        for rival, who in (("bon_ode", "the best of 50 ODE samples"), ("svdd_linear", "SVDD on the linear SDE"))
    ),
    *(
        REPORTED.beats(f"blurred_{rival}", f"Blurred predictions: RBF on the VP SDE is above {who}", task="blurred", minus=rival)
        for rival, who in (
            ("bon_ode", "the best of ODE samples"), ("svdd_linear", "SVDD on the linear SDE"), ("svdd_vp", "SVDD on the VP SDE"),
            ("rbf_linear", "RBF on the linear SDE"),
        )
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="rbf", room="generate", name="RBF",
    summary="Inference-time scaling of flow models: an SDE in the VP interpolant, searched with budgets that roll over",
    says=(
        "A flow model can be searched like a diffusion model once its ODE is made an SDE and its interpolant variance preserving, "
        "and a budget of network calls is spent best by rolling over what a step did not need: with 500 calls in 10 steps of "
        "FLUX.1-schnell every search improves from linear ODE to linear SDE to VP SDE, and rollover budget forcing is the best of "
        "them, with 4 to 6 times the counting accuracy of the base model."
    ),
    paper=Paper(
        "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing", 2025, "2503.19385",
        "NeurIPS 2025", "https://github.com/KAIST-Visual-AI-Group/Flow-Inference-Time-Scaling",
    ),
    part="polyak.generate.rbf:RolloverBudget", budget="network calls for a sample",
    scales=(Scale("small", "flows of 16 coordinates that are known in closed form: a minute on two cores", 60, first_seed=100),),
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    departures=(
        "The paper's model is FLUX.1-schnell, its rewards VQAScore and counts by detectors. Here the flow is known in closed form: "
        "straight, as distillation to few steps makes it, so that a prediction at any time is a sample.",
        "The gain needs predictions that are samples. With the exact velocity of the marginals, whose predictions are blends of "
        "modes, the order is reversed, also with an end by the ODE; the task of blurred predictions reports it.",
        "SVDD and CoDe have 27 candidates where the paper's 500 / (10 * 2) is 25: the official code asks the network 25 times "
        "about copies of one noise at the first step, which we ask once, and spend the rest.",
        "Each seed is the mean of four systems. Nothing is tuned: g = 3 t^2, 10 steps, two chains and 25 first noises are the "
        "paper's.",
        "Steps in the VP interpolant are on its grid of small steps first, in the linear one uniform, as in the paper's best arms.",
        "Rewards are compared by their value; the paper's potential exp(r / 0.5) has the same order.",
    ),
    errata=(
        Erratum(
            what="Candidates are compared by exp(reward / weight) in double precision, not by the reward.",
            where="KAIST-Visual-AI-Group/Flow-Inference-Time-Scaling, rbf/corrector/rgrp_sampler.py, get_potential and argmax",
            effect="Rewards below -745 weights are all 0, and above 709 all infinite: the first candidate is taken.",
            test="tests/generate/test_rbf_search.py::test_rewards_far_from_zero_are_told_apart",
        ),
        Erratum(
            what="SVDD and CoDe ask the network about every copy of a chain's one noise at the first step.",
            where="the same, rbf/general_trainer.py, train_single_step: repeat_interleave before the first velocity",
            effect="A tenth of 500 calls buys nothing, and the baselines are compared with fewer candidates than they could have.",
            test="tests/generate/test_rbf_search.py::test_calls_are_counted_and_never_more_than_the_budget",
        ),
    ),
    usage=(
        "from polyak.generate import VP, Flow, RolloverBudget, convert\n\n"
        "model = convert(network, Flow(), VP())  # network(x, t) is the velocity of a rectified flow\n"
        "found = RolloverBudget(reward, nfe=500, steps=10).sample(model, VP(), (16, 64, 64), batch=4)"
    ),
)  # fmt: skip
