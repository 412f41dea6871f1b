"""Gauge freedom's claim: which part of a learned score decides samples and densities, and which only the local geometry."""

from __future__ import annotations

from collections.abc import Iterator

from polyak.claims._pictures import gauge_freedom as pictures
from polyak.lab.claim import Arm, Claim, Measurement, Metric, Paper, Scale, Task, Trial
from polyak.lab.criteria import Ask


def trial(t: Trial) -> Iterator[Measurement]:
    """A field that is known, or a model that is trained, and what it shows of the law of the data."""
    from polyak.claims.generate import _gauge

    if t.task in ("gaussian", "mixture"):
        yield Measurement(_gauge.exact(t.task, t.seed, t["kappa"], t["stretch"], t))
    elif t.task == "plane":
        yield Measurement(_gauge.plane(t.seed, t["kappa"], t))
    else:
        yield Measurement(_gauge.learned(t["shape"], t["size"], t["energy"], t.seed, t.device, t))


KNOWN, SURFACES = ("gaussian", "mixture"), ("sphere", "roll")
EXACT = {
    "points": 200, "steps": 200, "fit_steps": 300, "batches": 2, "samples": 2000, "ode_steps": 100, "sde_steps": 200,
    "permutations": 60,
}  # fmt: skip
TRAINED = {
    "data": 8192, "points": 200, "width": 128, "batch": 256, "lr": 4e-3, "ema": 0.99, "sigma_lo": 0.05, "sigma_hi": 0.15,
    "ode_steps": 32,
}  # fmt: skip
TASKS = (
    Task(
        "gaussian", "A normal law in 2-D",
        "N(0, diag(4, 1/4)); its exact score; sigma from 8 to 0.02; likelihoods of 200 points, twice 2000 samples", EXACT,
    ),
    Task("mixture", "A mixture of three normal laws in 2-D", "exact score; the same measures", EXACT),
    Task(
        "plane", "A plane in 5-D",
        "N(0, I) on a plane of two dimensions; exact score; 500 noised copies, sigma 0.05, of a point 0.2 from the centre",
        {"points": 500, "steps": 48, "radius": 0.2},
    ),
    Task(
        "sphere", "A sphere in 5-D",
        "8192 points of a two-dimensional sphere; MLP of three layers of 128, EDM; dimension at 200 points by the flow",
        {**TRAINED, "shape": "sphere", "size": 5},
    ),
    Task("roll", "A Swiss roll in 3-D", "likewise", {**TRAINED, "shape": "roll", "size": 3}),
)  # fmt: skip
ARMS = (
    Arm("score", "True score", "baseline", {"kappa": 0.0, "stretch": 1.0}, tasks=(*KNOWN, "plane")),
    Arm("gauge1", "Score and gauge, kappa 1", "method", {"kappa": 1.0, "stretch": 1.0}, tasks=(*KNOWN, "plane")),
    Arm(
        "gauge3", "Score and gauge, kappa 3", "method", {"kappa": 3.0, "stretch": 1.0}, tasks=(*KNOWN, "plane"),
        says="a gauge three times as large as the score",
    ),
    Arm(
        "stretched", "Score of another law", "control", {"kappa": 0.0, "stretch": 1.2}, tasks=KNOWN,
        says="conservative, but wrong: its law's variances are 1.2 times the data's",
    ),
    Arm("free", "Free network", "baseline", {"energy": False, "steps": 1500}, tasks=SURFACES),
    Arm(
        "energy", "Energy network", "method", {"energy": True, "steps": 1500}, tasks=SURFACES,
        says="the gradient of a scalar network",
    ),
    Arm(
        "free_long", "Free network, trained longer", "ablation", {"energy": False, "steps": 4000}, tasks=SURFACES,
        says="for as long a time as the energy network",
    ),
)  # fmt: skip

METRICS = (
    Metric("missed_most", "Largest error of the log-likelihood", unit="nats", exact=True),
    Metric("missed", "Mean error of the log-likelihood", unit="nats", exact=True),
    Metric("residual", "Largest div R + R.s, over the mean of |s|^2", exact=True),
    Metric("curl", "Asymmetry |J - J^T| / |J + J^T| of the Jacobian", exact=True),
    Metric("split", "Relative distance of the conservative part from the score", exact=True),
    Metric("cos", "Cosine between the conservative part and the rest", exact=True),
    Metric("pythagoras", "Error of |s - s*|^2 = |grad phi - s*|^2 + |R|^2", exact=True),
    Metric("z_ode", "Energy distance of ODE samples, deviations above chance"),
    Metric("z_sde", "Energy distance of SDE samples, deviations above chance"),
    Metric("off_score", "Error of the dimension, by the score's singular values", exact=True),
    Metric("off_flow", "Error of the dimension, by the flow's Jacobian", exact=True),
    Metric("angle", "Angle between the true and the estimated normal space", unit="degrees", exact=True),
    Metric("correct", "Share of points with the right dimension", better="higher"),
    Metric("loss", "Test loss"),
)
PROVED = Ask(METRICS, kind="mechanism", rule="every")
SEEN = Ask(METRICS, kind="effect")
IN = {"gaussian": "Normal law", "mixture": "Mixture", "sphere": "Sphere", "roll": "Swiss roll"}

CRITERIA = (
    *(
        PROVED.at_most(
            f"{task}_likelihood_{arm}", 1e-4, f"{IN[task]}: likelihoods by the ODE are exact to 1e-4 with {words}",
            task=task, metric="missed_most", arm=arm, control="stretched",
        )
        for task in KNOWN
        for arm, words in (
            ("score", "the score"), ("gauge1", "a gauge of the score's size"), ("gauge3", "one three times as large"),
        )
    ),
    *(
        PROVED.at_most(
            f"{task}_residual", 1e-10, f"{IN[task]}: the gauge makes and destroys no mass", task=task, metric="residual",
            arm="gauge3", control="stretched",
        )
        for task in KNOWN
    ),
    *(
        PROVED.at_least(
            f"{task}_curl", 0.5, f"{IN[task]}: that exact field is far from conservative", task=task, metric="curl", arm="gauge3",
            control="score",
        )
        for task in KNOWN
    ),
    *(
        PROVED.at_most(
            f"{task}_conservative", 1e-10, f"{IN[task]}: the score of the stretched law is conservative", task=task, metric="curl",
            arm="stretched", control="gauge1",
        )
        for task in KNOWN
    ),
    *(
        PROVED.at_least(
            f"{task}_wrong", 0.01, f"{IN[task]}: and its likelihoods are wrong by more than 0.01 in the mean", task=task,
            metric="missed", arm="stretched", control="gauge3",
        )
        for task in KNOWN
    ),
    PROVED.at_most(
        "split", 1e-4, "Regression on gradients finds the score in the field with a gauge", task="gaussian", metric="split",
        arm="gauge3", control="stretched",
    ),
    PROVED.at_most("orthogonal", 1e-4, "The two parts are orthogonal", task="gaussian", metric="cos", arm="gauge3"),
    PROVED.at_most("pythagoras", 1e-4, "Their errors add up", task="gaussian", metric="pythagoras", arm="gauge3"),
    PROVED.at_most("plane_residual", 1e-10, "Plane: what is added is a gauge", task="plane", metric="residual", arm="gauge3"),
    PROVED.at_most(
        "plane_dimension", 0, "Plane: the score's singular values show two dimensions, and with a gauge they do not", task="plane",
        metric="off_score", arm="score", control="gauge1",
    ),
    PROVED.at_most(
        "plane_angle", 1, "Plane: the score shows the normal space to a degree", task="plane", metric="angle", arm="score",
        control="gauge1",
    ),
    *(
        PROVED.at_least(
            f"plane_{arm}", 20, f"Plane: a gauge {words} turns the normal space by more than 20 degrees", task="plane",
            metric="angle", arm=arm, control="score",
        )
        for arm, words in (("gauge1", "of the score's size"), ("gauge3", "three times as large"))
    ),
    *(
        PROVED.at_most(
            f"plane_flow_{arm}", 0, f"Plane: the flow's Jacobian shows two dimensions with {words}", task="plane",
            metric="off_flow", arm=arm,
        )
        for arm, words in (("score", "the score"), ("gauge3", "the large gauge, too"))
    ),
    *(
        SEEN.at_most(
            f"{task}_{way}", 2, f"{IN[task]}: samples of the {way.upper()} with the large gauge are distributed as the data are",
            task=task, metric=f"z_{way}", arm="gauge3", control="stretched",
        )
        for task in KNOWN
        for way in ("ode", "sde")
    ),
    *(
        SEEN.at_least(
            f"{task}_{way}_wrong", 2, f"{IN[task]}: samples of the {way.upper()} with the stretched law's score are not",
            task=task, metric=f"z_{way}", arm="stretched", gating=task == "mixture", control="score",
        )
        for task in KNOWN
        for way in ("ode", "sde")
    ),
    *(
        SEEN.at_least(
            f"{task}_{rival}", -0.02, f"{IN[task]}: an energy network shows two dimensions at as many points as {words}",
            task=task, metric="correct", arm="energy", minus=rival, gating=False,
        )
        for task in SURFACES
        for rival, words in (("free", "a free one"), ("free_long", "a free one that was trained for as long a time"))
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="gauge_freedom", room="generate", name="Gauge freedom",
    summary="Which part of a learned score decides samples and likelihoods, and which only what is read off locally",
    says=(
        "A learned score splits into a conservative part and a rest that leaves the density alone (a gauge). Samples and "
        "likelihoods are exact if and only if the conservative part is the score: a model need not be conservative for "
        "that. But for local information, such as the intrinsic dimension of the data, it is desirable that it is."
    ),
    paper=Paper(
        "On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion models", 2024, "2402.03845",
        "ICLR 2024",
    ),
    part="polyak.generate.gauge_freedom:gauge_residual", budget="training steps",
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    scales=(Scale("small", "known fields, and small models of two surfaces: two minutes on two cores", 5, first_seed=100),),
    sources=("polyak.claims.generate._gauge",),
    departures=(
        "The paper's results are theorems and figures; there is no headline number. The fields here are known, so that the "
        "theorems are tested on them: the gauge kappa A s of any density, with A antisymmetric, and that of a matrix field "
        "on the plane.",
        "Likelihoods are those of the law at the smallest sigma, and the density at the largest is the exact one: the "
        "normal prior that samplers use is off by hundredths there, whatever the field.",
        "Whether samples are distributed as the data is asked by the energy distance to as many exact draws, twice 2000, in "
        "standard deviations above its mean over 60 random relabellings, and of the mean over seeds. A bound on the p-value "
        "of each test would reject one true law in a hundred, and there are dozens of tests.",
        "By 2000 samples the energy distance hardly tells the normal law from the one with variances 1.2 times as large, so "
        "that this is reported; the mixture's tells.",
        "On the plane the score's dimension is asked near the centre. One standard deviation away from it the score along "
        "the plane is large enough that the largest ratio of singular values lies within the plane, and the rule shows one "
        "dimension, for the true score, too.",
        "Of the paper's learned models (a Swiss roll and a sphere in 3-D and 5-D, whose networks and training were not "
        "found) there are two, and their criteria are reported. An energy network costs two to three times as much a step, "
        "so that a free one that is trained for as long a time stands beside.",
    ),
    usage=(
        "import torch\n"
        "from polyak.generate import VP, Denoiser, intrinsic_dimension\n"
        "denoiser = Denoiser(network, VP())  # network(x, t) predicts the noise\n"
        "k, singular_values, tangent = intrinsic_dimension(denoiser, VP(), torch.randn(16, 8))  # your data"
    ),
)  # fmt: skip
