"""The ODE-SDE gap's claim: less residual of the Fokker-Planck equation, less distance between samples of the ODE and of the SDE."""

from __future__ import annotations

from collections.abc import Iterator

from polyak.claims._pictures import fokker_planck_gap as pictures
from polyak.lab.claim import Arm, Claim, Erratum, Measurement, Metric, Paper, Scale, Task, Trial
from polyak.lab.criteria import Ask


def trial(t: Trial) -> Iterator[Measurement]:
    """Equations that are exact; or a potential that is trained, and the laws of its samples."""
    from polyak.claims.generate import _fokker_planck as f

    if t.task == "equations":
        yield Measurement(f.equations(t.seed, t))
    elif t.task == "normal":
        yield Measurement(f.contracted(t.seed, t["stretch"], t))
    else:
        yield Measurement(f.judged(f.train(t, t.seed, t.device), t, t.seed))


LEARNED = ("plain", "anchored")
NET = {"width": 48, "beta": 5.0, "batch": 256, "lr": 3e-3, "ode_steps": 100, "sde_steps": 150}
TASKS = (
    Task(
        "equations", "Exact densities, and a random network",
        "a mixture in the plane under OU, VP and EDM; an untrained potential under OU; float64, 32 points", {"points": 32},
    ),
    Task(
        "normal", "A normal law on the line", "N(0, 0.3) under OU, and a multiple of its score: the gap in closed form",
        {"samples": 500, "bound_steps": 60},
    ),
    Task(
        "plain", "Three spikes, plain network",
        "a mixture of three narrow normal laws on the line, OU up to T = 4; MLP of three layers of 48, 1000 steps, batch 256",
        {**NET, "anchored": False, "t_max": 4.0},
    ),
    Task(
        "anchored", "Three spikes, log prior and network",
        "the same up to T = 8, where the law is the prior; the potential is the prior's log density and the MLP",
        {**NET, "anchored": True, "t_max": 8.0},
    ),
)  # fmt: skip
DSM = {"weight": 0.0, "preset": "data", "only_end": False, "steps": 1000}
ARMS = (
    Arm("dsm", "Score matching", "baseline", DSM, tasks=LEARNED),
    Arm("dsm_long", "Score matching, trained longer", "ablation", {**DSM, "steps": 2000}, tasks=("anchored",),
        says="twice the steps: about as much time as with the residual"),
    Arm("paper", "The paper's recipe, 0.3", "ablation", {**DSM, "weight": 0.3, "preset": "paper"}, tasks=("plain",),
        says="residual at uniform points of a box, score matching without weights, no terminal term"),
    Arm("fp1", "With the residual, 1", "method", {**DSM, "weight": 1.0}, tasks=LEARNED),
    Arm("fp10", "With the residual, 10", "method", {**DSM, "weight": 10.0}, tasks=("anchored",)),
    Arm("end1", "With the terminal term alone, 1", "control", {**DSM, "weight": 1.0, "only_end": True}, tasks=LEARNED),
    Arm("right", "The equation", "method", {"doubled": False, "stretch": 1.0, "ignored": False}, tasks=("equations",)),
    Arm("doubled", "g^2 for g^2 / 2, and R left out", "control", {"doubled": True, "stretch": 1.0, "ignored": True},
        tasks=("equations",)),
    Arm("stretched", "Densities to the power 1.2", "control", {"doubled": False, "stretch": 1.2, "ignored": False},
        tasks=("equations",)),
    Arm("less", "0.8 of the score", "method", {"stretch": 0.8}, tasks=("normal",)),
    Arm("more", "1.2 of the score", "method", {"stretch": 1.2}, tasks=("normal",)),
)  # fmt: skip

METRICS = (
    Metric("missed", "Largest residual of true log densities", exact=True),
    Metric("shift", "Error of the residual of u + c(t)", exact=True),
    Metric("gradient", "Relative distance of the score's residual from grad R", exact=True),
    Metric("density", "Error of the ODE's log density by the residual", unit="nats", exact=True),
    Metric("over_bound", "Gap over its bound"),
    Metric("gap", "Gap in closed form"),
    Metric("bound", "Bound on the gap"),
    Metric("ode_sde", "W2 between the ODE's and the SDE's law"),
    Metric("ode_data", "W2 between the ODE's law and the data's"),
    Metric("sde_data", "W2 between the SDE's law and the data's"),
    Metric("residual", "Root mean square of sigma^2 R on data"),
    Metric("loss", "Denoising loss"),
)
PROVED = Ask(METRICS, kind="mechanism", task="equations", arm="right", rule="every")
BOUNDED = Ask(METRICS, kind="mechanism", task="normal", metric="over_bound", rule="mean")
PLAIN = Ask(METRICS, kind="effect", task="plain", metric="ode_sde", arm="fp1", over="dsm")
ANCHORED = Ask(METRICS, kind="effect", task="anchored", metric="ode_sde", over="dsm")
CRITERIA = (
    PROVED.at_most("densities", 1e-8, "True log densities have no residual, under OU, VP and EDM", metric="missed",
                   control="doubled"),
    PROVED.at_most("score", 1e-8, "And densities to a power have one", metric="missed", control="stretched"),
    PROVED.at_most("shift", 1e-8, "c(t) added to a potential adds c'(t) to its residual", metric="shift"),
    PROVED.at_most("gradient", 1e-8, "The residual of a score is the gradient of that of its potential", metric="gradient"),
    PROVED.at_most("ode_density", 1e-4, "u, its end and the integral of R are the ODE's log density, for any network",
                   metric="density", control="doubled"),
    *BOUNDED.table("at_most", "name bound arm says",
        ("bound_less", 1.0, "less", "The gap is within its bound, with 0.8 of the score"),
        ("bound_more", 1.0, "more", "And with 1.2 of the score")),
    *BOUNDED.table("at_least", "name bound arm says",
        ("near_less", 0.25, "less", "The bound is at most four times the gap, with 0.8 of the score"),
        ("near_more", 0.25, "more", "And with 1.2 of the score")),
    PLAIN.at_most("gap", 0.65, "Plain network: with the residual the gap is at most 0.65 of what it was"),
    PLAIN.beats("gap_residual", "Plain network: and less than with the terminal term alone", over="end1"),
    PLAIN.at_most("ode", 0.85, "Plain network: the ODE's law is at most 0.85 as far from the data", metric="ode_data"),
    PLAIN.at_most("sde", 1.0, "Plain network: the SDE's law is no farther from the data", metric="sde_data", gating=False),
    PLAIN.at_most("paper_gap", 0.65, "Plain network: the paper's recipe does as well in so few steps", arm="paper", gating=False),
    PLAIN.beats("paper_residual", "Plain network: the paper's recipe has less residual on the data than score matching",
                arm="paper", metric="residual", gating=False),
    ANCHORED.at_most("anchored_gap", 0.8, "With the log prior: the gap is at most 0.8 of what it was", arm="fp1", control="end1"),
    ANCHORED.at_most("anchored_gap10", 0.5, "With the log prior: with weight 10 at most half", arm="fp10", control="end1"),
    ANCHORED.beats("anchored_ode", "With the log prior: the ODE's law is nearer to the data", arm="fp1", metric="ode_data",
                   gating=False),
    ANCHORED.at_least("anchored_sde10", 1.0, "With the log prior: with weight 10 the SDE's law is farther from it", arm="fp10",
                      metric="sde_data", gating=False),
    ANCHORED.beats("anchored_time", "With the log prior: the gap is less than of score matching with twice the steps", arm="fp1",
                   over="dsm_long", gating=False),
    ANCHORED.beats("anchored_time_ode", "With the log prior: so is the ODE's distance from the data", arm="fp1",
                   metric="ode_data", over="dsm_long", gating=False),
)  # fmt: skip

CLAIM = Claim(
    slug="fokker_planck_gap", room="generate", name="ODE-SDE gap",
    summary="By how much a score misses the Fokker-Planck equation, and how far that parts the ODE's samples from the SDE's",
    says=(
        "With a learned score the probability-flow ODE and the reverse SDE make different laws; W2 between them is bounded by a "
        "residual of the Fokker-Planck equation. Added to score matching, it brings them nearer by up to an order of magnitude; "
        "the ODE's samples become better, the SDE's worse."
    ),
    paper=Paper(
        "Closing the ODE-SDE gap in score-based diffusion models through the Fokker-Planck equation", 2023, "2311.15996",
        "Phil. Trans. R. Soc. A 383, 20240503 (2025)", "https://github.com/teojd/ODESDEGap",
    ),
    part="polyak.generate.fokker_planck_gap:log_fp_residual", budget="optimizer steps",
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    scales=(Scale("small", "equations, and potentials on the line: three minutes on two cores", 5, first_seed=100),),
    sources=("polyak.claims.generate._fokker_planck", "polyak.claims.generate._interpolants"),
    departures=(
        "Data on the line, not in the plane: the ODE takes quantiles to quantiles, and the SDE's law solves its Fokker-Planck "
        "equation on a grid, so that distances have no noise of sampling. In the plane 3 million samples serve for that.",
        "1000 steps with batches of 256, not 100,000 with 200,000. With so few the paper's recipe, at uniform points of a box "
        "and without a terminal term, opens the gap although its residual falls, and is reported as it is. Ours takes the "
        "residual at the noised data, times the noise's variance, and has a terminal term.",
        "With a plain network a part of the gain is the terminal term's; in a pilot with 2000 steps all of it was (gap 0.211, "
        "with the residual 0.106, with the terminal term alone 0.107, seed 0). So the second potential has the prior built in, "
        "where the terminal term alone gains nothing.",
        "Nothing is tuned; settings are those of pilots on seeds below 10. Score matching for twice the steps is reported beside.",
        "The bound is our own, with all constants, in the manner of the paper's; on a normal law it is computed and compared.",
        "Softplus has beta 5, not 100, whose second derivative is a spike.",
    ),
    errata=(
        Erratum(
            what="Histograms are made on a grid over [-3.5, 3.5]^2, and W2 between them is taken on one over [-4, 4]^2.",
            where="teojd/ODESDEGap, experiment_plotting.py and experiment_plotting_precomputed.py (make_grid)",
            effect="All W2 from the stored histograms are 8/7 of what they are, W2 squared 1.31 of it; their ratios stand.",
            test="tests/generate/test_fokker_planck_gap.py::test_histograms_of_one_box_judged_in_another_are_too_far_apart",
        ),
    ),
    usage=(
        "import torch\n"
        "from polyak.generate import VP, Denoiser, ode_sde_gap, score_fp_residual\n"
        "denoiser = Denoiser(network, VP())  # network(x, t) predicts the noise\n"
        "r, gap = score_fp_residual(denoiser, VP(), torch.randn(16, 2), 0.5), ode_sde_gap(denoiser, VP(), shape=(2,))"
    ),
)  # fmt: skip
