"""GHVB's claim: momentum widens the stability of multistep solvers, so that few steps under strong guidance do not diverge."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from polyak.claims._pictures import ghvb as pictures
from polyak.lab.claim import (
    Arm,
    Claim,
    Erratum,
    Measurement,
    Metric,
    Paper,
    Plot,
    Scale,
    Task,
    Trial,
    Value,
    measure,
)
from polyak.lab.criteria import Ask

STEPS = (8, 10, 15, 20)
BEYOND = 3.5  # of the ring's samples: the exact ones are within 3.4


def trial(t: Trial) -> Iterator[Measurement]:
    """One arm on equations that are solved in closed form; or its guided samples at every number of steps."""
    yield from _solvable(t) if t.task == "solvable" else _samples(t)


def _solvable(t: Trial) -> Iterator[Measurement]:
    """The limit of stability, for a beta that is drawn, and orders of convergence."""
    import random

    from polyak.claims.generate import _momentum as measured

    beta = random.Random(t.seed).uniform(0.3, 0.95)
    limit = measured.limit(_solver(t, beta), t.seed)
    off, wider = measured.compared(t["method"], t["order"], beta if t["beta"] < 1 else 1.0, limit)
    even, uneven = (measured.order(_solver(t), t.seed, ratio) for ratio in (0.0, 1.5))
    yield measure(limit_off=off, wider=wider, order=even, order_uneven=uneven)


def _samples(t: Trial) -> Iterator[Measurement]:
    from polyak.generate import CFG, artifact_score, sample
    from polyak.generate.problems import path_rmse

    denoiser, x_T, truth, pixels = _problem(t.task, t.seed, t.device, t["samples"], t["guidance"], t["reference_nfe"])
    finals: dict[str, float] = {}
    for n in STEPS:
        x = sample(denoiser, x_T, solver=_solver(t), steps=n, grid="time", guidance=CFG(t["guidance"]))
        finals[f"rmse_{n}"] = rmse = path_rmse(x, truth)
        if pixels is None:
            finals[f"artifacts_{n}"] = artifacts = (x.abs().amax(1) > BEYOND).double().mean().item()
        else:
            mean, std = pixels
            score = artifact_score(x.reshape(-1, 1, 8, 8), [mean], [std])
            finals[f"artifacts_{n}"] = artifacts = score.mean().item()
        yield measure({"nfe": n}, rmse=rmse, artifacts=artifacts)
    yield Measurement(finals)


@lru_cache(maxsize=16)
def _problem(
    task: str, seed: int, device: str, samples: int, guidance: float, reference_nfe: int
) -> tuple[Any, Any, Any, tuple[float, float] | None]:
    """The exact denoiser of a class and of all, the seed's starting noise, where the guided ODE takes it; pixels' mean and std."""
    import torch

    from polyak.generate import CFG, VP, DPMSolver, sample
    from polyak.generate.problems import ExactDenoiser, kde, ring

    if task == "digits":
        from polyak.lab.data import digits

        images, labels = map(torch.from_numpy, digits())
        points = (images[:300] / 8 - 1).to(device)
        law, of, pixels = kde(points, 0.2, labels[:300]), seed % 10, (points.mean().item(), points.std().item())
    else:
        law, of, pixels = ring(variance=0.04), 0, None
    denoiser = ExactDenoiser(law.of_class(of), VP(beta0=0.1, beta1=20.0, t_min=1e-3, t_max=1.0), unconditional=law)
    noise = torch.Generator().manual_seed(seed)
    x_T = torch.randn(samples, law.dim, generator=noise, dtype=torch.float64).to(device)
    exact = DPMSolver(order=3, method="singlestep")
    return denoiser, x_T, sample(denoiser, x_T, solver=exact, nfe=reference_nfe, guidance=CFG(guidance)), pixels


def _solver(t: Trial, beta: float | None = None) -> Any:
    """The arm's solver; with the beta that is given in the place of its own, where it has momentum."""
    from polyak.claims.generate._momentum import Averaged
    from polyak.generate import DDIM, GHVB, DPMSolver, HeavyBall, HeavyBallDPM, Nesterov

    kind = t["solver"]
    if kind == "ddim":
        return DDIM()
    if kind == "2m":
        return DPMSolver(order=2, form="data", method="multistep", lower_order_final=False)
    own = t["beta"] if beta is None or t["beta"] == 1 else beta
    if kind == "2m_hb":
        return HeavyBallDPM(own)
    make = {"hb": HeavyBall, "ghvb": GHVB, "nt": Nesterov, "averaged": Averaged}[kind]
    return make(t["order"], own, t.options.get("spacing", "constant"), t.options.get("start", "lower"))


SAMPLED = ("ring", "ring_strong", "digits")


def _options(solver: str, order: int, beta: float, **more: Value) -> dict[str, Value]:
    return {"solver": solver, "order": order, "beta": beta, "method": {"averaged": "hb"}.get(solver, solver), **more}


ARMS = (
    Arm("plms4", "PLMS4", "baseline", _options("hb", 4, 1.0), says="Adams-Bashforth 4, without momentum"),
    Arm("ddim", "DDIM", "baseline", {"solver": "ddim"}, tasks=SAMPLED),
    Arm("dpmpp_2m", "DPM-Solver++ 2M", "baseline", {"solver": "2m"}, tasks=SAMPLED),
    Arm("hb4", "PLMS4 with HB 0.8", "method", _options("hb", 4, 0.8)),
    Arm("ghvb4", "GHVB 3.8", "method", _options("ghvb", 4, 0.8), says="order 4, beta 0.8"),
    Arm("dpmpp_2m_hb", "DPM-Solver++ 2M with HB 0.8", "method", {"solver": "2m_hb", "beta": 0.8}, tasks=SAMPLED),
    Arm("nt4", "PLMS4 with NT 0.8", "ablation", _options("nt", 4, 0.8), says="Nesterov's momentum"),
    Arm(
        "plms4_actual", "PLMS4, actual steps", "ablation", _options("hb", 4, 1.0, spacing="variable"), tasks=SAMPLED,
        says="no momentum; the weights are those of the steps that are taken",
    ),
    Arm(
        "ghvb4_actual", "GHVB 3.8, actual steps", "ablation", _options("ghvb", 4, 0.8, spacing="variable"), tasks=SAMPLED,
        says="the weights are those of the steps that are taken",
    ),
    Arm(
        "faint", "PLMS4 with HB 0.98", "control", _options("hb", 4, 0.98), tasks=SAMPLED, says="next to no momentum",
    ),
    Arm("hb1", "DDIM with HB 0.8", "control", _options("hb", 1, 0.8), tasks=SAMPLED, says="momentum, order 1"),
    Arm(
        "averaged", "PLMS4 of averages", "control", _options("averaged", 4, 0.8), tasks=SAMPLED,
        says="GHVB without its weights: those of Adams-Bashforth 4 are put on the averages",
    ),
    Arm(
        "averaged_started", "PLMS4 of averages, full start", "control", _options("averaged", 4, 0.8, start="rk"),
        tasks=("solvable",), says="GHVB without its weights; Runge-Kutta start",
    ),
    Arm(
        "ghvb4_started", "GHVB 3.8, full start", "method", _options("ghvb", 4, 0.8, start="rk"), tasks=("solvable",),
        says="Runge-Kutta start",
    ),
    Arm(
        "ghvb4_actual_started", "GHVB 3.8, actual steps, full start", "method",
        _options("ghvb", 4, 0.8, spacing="variable", start="rk"), tasks=("solvable",),
        says="Runge-Kutta start, and the weights of the steps that are taken",
    ),
)  # fmt: skip

PLOTS = (
    Plot("nfe", "rmse", "Path RMSE", x_label="steps", log_y=True),
    Plot("nfe", "artifacts", "Artifacts", x_label="steps"),
)
TASKS = (
    Task(
        "solvable", "Solved in closed form",
        "dy/ds = z y and dy/ds = y sin(a s + b) in s = sigma / alpha, on even and on uneven steps; beta, a and b are drawn",
    ),
    Task(
        "ring", "Ring of 8 Gaussians, guidance 7.5",
        "one of 8 modes on radius 2, deviation 0.2, guided away from all; exact scores; VP(0.1, 20), uniform t from 1 to 1e-3; "
        "2000 paths; an artifact is a sample beyond 3.5",
        {"samples": 2000, "guidance": 7.5, "reference_nfe": 600}, plots=PLOTS,
    ),
    Task(
        "ring_strong", "Ring of 8 Gaussians, guidance 15", "the same with guidance 15",
        {"samples": 500, "guidance": 15.0, "reference_nfe": 600}, plots=PLOTS,
    ),
    Task(
        "digits", "Digits, kernel density estimate, guidance 7.5",
        "one class of 300 of scikit-learn's digits in [-1, 1]^64, bandwidth 0.2, guided away from all; exact scores; 100 paths; "
        "artifacts are the paper's magnitude score, threshold 3",
        {"samples": 100, "guidance": 7.5, "reference_nfe": 600}, plots=PLOTS,
    ),
)  # fmt: skip

METRICS = (
    Metric("limit_off", "Relative distance of the measured limit of stability to the formula's", exact=True),
    Metric("wider", "Measured limit of stability, divided by that without momentum", better="higher", exact=True),
    Metric("order", "Order of convergence on even steps, 160 to 320", better="higher", exact=True),
    Metric("order_uneven", "Order of convergence on uneven steps, 160 to 320", better="higher", exact=True),
    Metric("rmse", "Path RMSE"),
    Metric("artifacts", "Artifacts"),
    *(Metric(f"rmse_{n}", f"Path RMSE, {n} steps", exact=True) for n in STEPS),
    *(Metric(f"artifacts_{n}", f"Artifacts, {n} steps", exact=True) for n in STEPS),
)
PROVED = Ask(METRICS, kind="mechanism", task="solvable", rule="every")
SEEN = Ask(METRICS, kind="effect", task="ring", rule="every")
REPORTED = SEEN.but(gating=False)
COLUMNS = "name bound metric arm over control says"


def _asked(label: str) -> tuple[tuple[Any, ...], ...]:
    """What is asked of samples: at few steps near what is exact, at more steps as near as without momentum."""
    return (
        ("10_hb", 0.5, "rmse_10", "hb4", "plms4", "faint", f"{label}, 10 steps: HB's error is at most half of PLMS4's"),
        ("10_ghvb", 0.8, "rmse_10", "ghvb4", "plms4", "faint", f"{label}, 10 steps: GHVB's error is at most 0.8 of PLMS4's"),
        ("20_hb", 0.9, "rmse_20", "ghvb4", "hb4", "averaged", f"{label}, 20 steps: GHVB's error is at most 0.9 of HB's"),
        ("20_ddim", 0.6, "rmse_20", "ghvb4", "ddim", "hb1", f"{label}, 20 steps: GHVB's error is at most 0.6 of DDIM's"),
    )  # fmt: skip


def _fewer(ask: Ask, task: str, label: str) -> tuple[Any, ...]:
    return tuple(
        ask.beats(
            f"{task}_8_fewer_{arm}", f"{label}, 8 steps: {name} has fewer artifacts than PLMS4", task=task,
            metric="artifacts_8", arm=arm, minus="plms4",
        )
        for arm, name in (("hb4", "HB"), ("ghvb4", "GHVB"))
    )  # fmt: skip


def _named(task: str, label: str) -> list[tuple[Any, ...]]:
    return [(f"{task}_{name}", *rest) for name, *rest in _asked(label)]


OTHERS = (("ring_strong", "Ring, guidance 15"), ("digits", "Digits"))
CRITERIA = (
    *PROVED.table(
        "at_most", "name bound metric arm says",
        ("limit_hb", 1e-3, "limit_off", "hb4", "HB's limit of stability is L4 (2 - beta) / beta, to 0.1%"),
        ("limit_ghvb", 1e-3, "limit_off", "ghvb4", "GHVB's limit of stability is 3 (2 - beta) / (11 - beta), to 0.1%"),
        ("limit_nt", 1e-3, "limit_off", "nt4", "Nesterov's limit of stability is L4 (2 - beta) / (beta (3 - 2 beta)), to 0.1%"),
    ),
    *PROVED.table(
        "above", "name bound metric arm says",
        ("wider_hb", 1.01, "wider", "hb4", "HB is stable for longer steps than PLMS4, whatever its beta"),
        ("wider_ghvb", 1.01, "wider", "ghvb4", "GHVB is stable for longer steps than PLMS4, whatever its beta"),
        control="plms4",
    ),
    PROVED.order(
        "order_ghvb", 4, "GHVB of order 4 converges with order 4, and without its weights it does not", slack=0.3,
        metric="order", arm="ghvb4_started", control="averaged_started",
    ),
    PROVED.order(
        "order_uneven", 4, "With the weights of actual steps it does so on uneven steps; with constant weights it does not",
        slack=0.3, metric="order_uneven", arm="ghvb4_actual_started", control="ghvb4_started",
    ),
    PROVED.at_most("order_hb", 1.3, "HB converges with order 1", metric="order", arm="hb4"),
    *SEEN.table("at_most", COLUMNS, *_named("ring", "Ring")),
    *_fewer(SEEN, "ring", "Ring"),
    *(
        criterion
        for task, label in OTHERS
        for criterion in (
            *REPORTED.table("at_most", COLUMNS, *_named(task, label), task=task),
            *_fewer(REPORTED, task, label),
        )
    ),
    *(
        criterion
        for task, label in (("ring", "Ring"), *OTHERS)
        for criterion in REPORTED.table(
            "at_most", "name bound metric arm over says",
            (f"{task}_10_actual", 0.5, "rmse_10", "plms4_actual", "plms4",
             f"{label}, 10 steps: without momentum, the weights of the actual steps alone halve PLMS4's error"),
            (f"{task}_10_ghvb_actual", 1.0, "rmse_10", "ghvb4_actual", "plms4_actual",
             f"{label}, 10 steps: with the weights of the actual steps GHVB's error is at most PLMS4's"),
            (f"{task}_10_dpm", 1.0, "rmse_10", "dpmpp_2m_hb", "dpmpp_2m",
             f"{label}, 10 steps: HB's error on DPM-Solver++ 2M is at most that without it"),
            (f"{task}_20_dpm", 1.0, "rmse_20", "dpmpp_2m_hb", "dpmpp_2m",
             f"{label}, 20 steps: HB's error on DPM-Solver++ 2M is at most that without it"),
            task=task,
        )
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="ghvb", room="generate", name="GHVB",
    summary="Heavy-ball momentum in multistep samplers: larger stability regions at few steps and strong guidance",
    says=(
        "Few-step sampling with strong guidance diverges into artifacts because multistep solvers are unstable there. Heavy-ball "
        "momentum enlarges their regions of stability, and GHVB does so without losing their order: fewer artifacts and better FID "
        "than DPM-Solver++, PLMS4 and LTSP with few steps, on Stable Diffusion, DiT and ADM."
    ),
    paper=Paper(
        "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts", 2023, "2307.11118", "ICLR 2024",
        "https://github.com/sWizad/momentum-diffusion",
    ),
    part="polyak.generate.ghvb:GHVB", budget="network evaluations",
    scales=(Scale("small", "solved equations, and two laws whose scores are known: a minute on two cores", 5, first_seed=100),),
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    departures=(
        "The paper's measures are the magnitude score and FID of latent networks' samples. Here scores are exact, and samples are "
        "compared with where the exact guided equation takes the same noise.",
        "There is no paper scale: it would need Stable Diffusion's and DiT's weights.",
        "Nothing is tuned: order 4 and beta 0.8 for all, as in most of the paper's figures.",
        "On these problems the weights are the larger part of the trouble: the official ones are those of a uniform grid in sigma "
        "/ alpha, and the grid is far from that. With the weights of the actual steps PLMS4 does not diverge, without momentum; "
        "this is reported.",
        "Orders are measured with a Runge-Kutta start. After a start by lower orders all of these methods show order 2.",
        "References are DPM-Solver-3 with 600 evaluations, within 1e-4 of 1200 in path RMSE.",
    ),
    errata=(
        Erratum(
            what="v is started with the network's raw output, before a v-prediction is converted to noise.",
            where="sWizad/momentum-diffusion, stable_diffusion/diffusion/momentum_scheduler.py, PLMSWithHBScheduler.step",
            effect="Of networks that predict v the first steps are drawn towards something that is not the noise.",
            test="tests/generate/test_ghvb.py::test_what_is_averaged_is_the_noise_whatever_the_network_says",
        ),
        Erratum(
            what="Constant weights on steps that are not equal in sigma / alpha, and a first step of Euler's.",
            where="sWizad/momentum-diffusion, momentum_scheduler.py; PLMS in diffusers likewise",
            effect="GHVB and PLMS of any order above 2 have order 2; spacing='variable' and start='rk' restore it.",
            test="tests/generate/test_ghvb.py::test_orders_of_convergence",
        ),
    ),
    usage=(
        "from polyak.generate import GHVB, VP, Denoiser, sample\n\n"
        "denoiser = Denoiser(network, VP())  # network(x, t) predicts the noise\n"
        "x = sample(denoiser, (16, 3, 32, 32), solver=GHVB(4, 0.8), steps=12)"
    ),
)  # fmt: skip
