"""Denoising MCMC's claim: short integrations from a Markov chain near the data are as good as much longer ones from noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

from polyak.claims._pictures import dmcmc as pictures
from polyak.lab.claim import (
    Arm,
    Claim,
    Diverged,
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

# Evaluations a sample, and how the chains spend them: Langevin steps, and the integrator's.
BUDGETS = {7: (2, 5), 9: (2, 7), 15: (4, 11)}
FROM_NOISE = (7, 9, 11, 15, 21)
FEW, MANY = 5, 40  # samples of a chain


def trial(t: Trial) -> Iterator[Measurement]:
    """What is exact, on the line; or energy distances of samples from noise, or from chains."""
    if t.task == "line":
        yield _line(t)
    elif t["chain"]:
        yield from _chained(t)
    else:
        yield from _from_noise(t)


def _line(t: Trial) -> Measurement:
    from polyak.claims.generate import _chains

    values: dict[str, float] = {}
    if t["levels"] == "own":
        coarse, fine = (_chains.bias(t.seed, t["update"], eta) for eta in (0.1, 0.05))
        values |= {"bias": fine, "bias_order": math.log2(coarse / fine)}
    if t["update"] == "sample":
        coarse, fine = (_chains.heun_error(t.seed, n, t["levels"] == "shared") for n in (64, 128))
        values["heun_order"] = math.log2(coarse / fine)
    if t.arm == "gibbs":
        values["exchange"], values["uncounted"] = _chains.exchange(t.seed)
    return Measurement(values)


def _problem(t: Trial):
    from polyak.claims.generate import _chains

    if t.task == "known":
        return _chains.known(t.seed)
    return _chains.trained(t.seed, t["steps"], t["width"], t["classifier_steps"], t["classes"])


def _from_noise(t: Trial) -> Iterator[Measurement]:
    from polyak.claims.generate import _chains

    problem, few, many = _problem(t), FEW * t["chains"], MANY * t["chains"]
    values = {}
    for nfe in FROM_NOISE if t["all"] else (9,):
        # Without a chain the control integrates for as long as with one.
        spent = nfe if t["level"] == _chains.TOP else nfe - BUDGETS[nfe][0]
        values[nfe] = _chains.from_noise(problem, t.seed, t["integrator"], spent, few, t["level"])
        yield measure({"nfe": nfe}, energy=values[nfe])
    finals = {"nine": values[9]}
    if t["all"]:
        forty = _chains.from_noise(problem, t.seed, t["integrator"], 11, many)
        finals |= {"fifteen": values[15], "five": values[21], "forty": forty}
    yield Measurement(finals)


def _chained(t: Trial) -> Iterator[Measurement]:
    from polyak.claims.generate import _chains

    problem, names = _problem(t), {9: "nine", 15: "fifteen"}
    finals = {}
    try:
        for nfe in BUDGETS if t["all"] else (9,):
            n_skip, evaluations = BUDGETS[nfe]
            chains, samples = _chains.from_chains(problem, t.seed, t["integrator"], t.options, n_skip, evaluations)
            made = [next(samples) for _ in range(FEW)]
            value = _chains.distance(made)
            yield measure({"nfe": nfe}, energy=value)
            if nfe in names:
                finals[names[nfe]] = value
            if nfe == 9:
                finals |= {"five": value, "nfe_five": chains.nfe_per_sample(with_warmup=True)}
            if nfe == 9 and t["all"]:
                made += [next(samples) for _ in range(MANY - FEW)]
                finals |= {"forty": _chains.distance(made), "nfe_forty": chains.nfe_per_sample(with_warmup=True)}
            if nfe == 9:
                finals |= _chains.of_chains(made)
    except ValueError as error:
        if "astray" not in str(error):
            raise
        raise Diverged(str(error)) from error
    yield Measurement(finals)


DATA, KNOWN = ("known", "trained"), ("known",)
CHAIN = {"chain": True, "integrator": "heun", "update": "argmax", "select": "min", "eta": 0.5, "all": False}
NOISE = {"chain": False, "integrator": "heun", "level": 50.0, "all": False}
ARMS = (
    Arm("heun", "Heun from noise (KAR1)", "baseline", {**NOISE, "all": True}, tasks=DATA),
    Arm("dlg", "DLG, Heun", "method", {**CHAIN, "all": True}, tasks=DATA),
    Arm(
        "no_chain", "Heun from noise of level 1.2", "control", {**NOISE, "level": 1.2}, tasks=DATA,
        says="as short an integration from a level as low, without a chain",
    ),
    Arm("churn", "Heun with churn from noise (KAR2)", "baseline", {**NOISE, "integrator": "churn"}, tasks=KNOWN),
    Arm("dlg_churn", "DLG, Heun with churn", "method", {**CHAIN, "integrator": "churn"}, tasks=KNOWN),
    Arm(
        "dpm", "DPM-Solver++ 2M from noise", "baseline", {**NOISE, "integrator": "dpm"}, tasks=DATA,
        says="a solver that the paper does not have",
    ),
    Arm("dlg_dpm", "DLG, DPM-Solver++ 2M", "method", {**CHAIN, "integrator": "dpm"}, tasks=DATA),
    Arm("dlg_sample", "DLG, sigma drawn", "ablation", {**CHAIN, "update": "sample"}, tasks=KNOWN),
    Arm(
        "dlg_fresh", "DLG, no state twice", "ablation", {**CHAIN, "select": "fresh"}, tasks=KNOWN,
        says="the smallest level among the states since the last sample, without the one that it was made from",
    ),
    Arm("gibbs", "Levels drawn", "method", {"update": "sample", "levels": "own"}, tasks=("line",)),
    Arm(
        "likeliest", "Likeliest levels", "control", {"update": "argmax", "levels": "own"}, tasks=("line",),
        says="sigma is the most probable one, as in the paper's runs",
    ),
    Arm(
        "one_level", "One level for all rows", "control", {"update": "sample", "levels": "shared"}, tasks=("line",),
        says="the batch's median level in the place of each row's own",
    ),
)  # fmt: skip

METRICS = (
    Metric("bias", "Total variation of the chain's law from the true one, eta = 0.05", exact=True),
    Metric("bias_order", "Order in eta of this distance", better="higher", exact=True),
    Metric("heun_order", "Order of Heun's method from a level for each row", better="higher", exact=True),
    Metric("exchange", "Largest change of a chain by the order of the batch", exact=True),
    Metric("uncounted", "Evaluations that are not as many as they should be", exact=True),
    Metric("energy", "Energy distance to the digits"),
    Metric("nine", "Energy distance, 9 evaluations"),
    Metric("fifteen", "Energy distance, 15 evaluations"),
    Metric("five", "Energy distance, about 20 evaluations: 9, and the warm-up shared by 5 samples"),
    Metric("forty", "Energy distance, about 11 evaluations: 9, and the warm-up shared by 40 samples"),
    Metric("nfe_five", "Evaluations with the warm-up, 5 samples of a chain"),
    Metric("nfe_forty", "Evaluations with the warm-up, 40 samples of a chain"),
    Metric("copies", "Share of samples that copy the one before"),
    Metric("lag_1", "Correlation of a chain's neighbouring samples"),
    Metric("effective", "Independent samples, as a share of all", better="higher"),
)
TASKS = (
    Task(
        "line", "On the line",
        "the chain's stationary law for a random mixture of two normals and 24 levels, by quadrature; Heun's method from 16 levels "
        "on a normal law; six chains in another order",
    ),
    Task(
        "known", "Digits, exact score",
        "400 digits in [-1, 1]^64 as normals of deviation 0.15; sigma 0.01 to 50; the exact posterior of 100 levels; 60 chains of "
        "5 samples, eta 0.5; energy distance to all 1,797 digits",
        {"chains": 60}, plots=(Plot("nfe", "energy", "Energy distance", x_label="evaluations", log_y=True),),
    ),
    Task(
        "trained", "Digits, trained",
        "the same with a denoiser of all digits, an MLP of width 256 trained by EDM's recipe for 1500 steps, and a classifier of "
        "100 levels, trained for 400",
        {"chains": 60, "steps": 1500, "width": 256, "classifier_steps": 400, "classes": 100},
        plots=(Plot("nfe", "energy", "Energy distance", x_label="evaluations", log_y=True),),
    ),
)  # fmt: skip

PROVED = Ask(METRICS, kind="mechanism", task="line", arm="gibbs", rule="every")
SEEN = Ask(METRICS, kind="effect", task="known", arm="dlg", over="heun")
REPORTED = SEEN.but(gating=False)
CRITERIA = (
    PROVED.at_least(
        "order", 0.9, "With levels drawn the chain tends to the joint law: its bias is of first order in eta", metric="bias_order",
        control="likeliest",
    ),
    PROVED.at_most(
        "bias", 0.02, "At eta = 0.05 the bias is at most 0.02 in total variation", metric="bias", control="likeliest"
    ),
    PROVED.at_least(
        "likeliest", 0.05, "With likeliest levels it does not tend to it", metric="bias", arm="likeliest", control="gibbs"
    ),
    PROVED.order(
        "heun", 2, "Heun's method is of second order from a level for each row", metric="heun_order", control="one_level"
    ),
    PROVED.at_most("exchange", 1e-9, "Chains do not depend on the others of their batch", metric="exchange"),
    PROVED.at_most("counted", 0, "A sample takes n_skip + 2 steps - 1 evaluations", metric="uncounted"),
    SEEN.at_most(
        "nine", 0.2, "9 evaluations: DLG's distance is at most 0.2 of Heun's from noise", metric="nine", control="no_chain"
    ),
    SEEN.at_most(
        "nine_churn", 0.2, "9 evaluations, with churn: at most 0.2", metric="nine", arm="dlg_churn", over="churn",
        control="no_chain",
    ),
    SEEN.at_most(
        "forty", 0.6, "About 11 evaluations, the warm-up shared by 40 samples of a chain: at most 0.6", metric="forty"
    ),
    SEEN.at_most(
        "trained_nine", 0.25, "Trained model, 9 evaluations: at most 0.25 of Heun's from noise", task="trained", metric="nine",
        control="no_chain",
    ),
    SEEN.at_most(
        "trained_forty", 0.6, "Trained model, the warm-up shared by 40 samples: at most 0.6", task="trained", metric="forty"
    ),
    REPORTED.beats("fifteen", "15 evaluations: DLG is better than Heun from noise", metric="fifteen"),
    REPORTED.beats("five", "About 20 evaluations, the warm-up shared by 5 samples: DLG is better", metric="five"),
    REPORTED.beats(
        "dpm", "9 evaluations: DLG is better than from noise with DPM-Solver++, too", metric="nine", arm="dlg_dpm", over="dpm"
    ),
    REPORTED.beats(
        "trained_dpm", "Trained model, 9 evaluations of DPM-Solver++: likewise", task="trained", metric="nine", arm="dlg_dpm",
        over="dpm",
    ),
    REPORTED.beats("drawn", "9 evaluations: with levels drawn DLG is better", metric="nine", arm="dlg_sample", over="dlg"),
    REPORTED.at_least(
        "copies", 0.02, "With Heun at least one sample in fifty is a copy of the one before", metric="copies", over="",
        control="dlg_fresh",
    ),
    REPORTED.at_least(
        "independent", 0.5, "Of a chain's samples at least half are independent", metric="effective", over=""
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="dmcmc", room="generate", name="Denoising MCMC",
    summary="A Markov chain in data and noise level stays near the data, so that samples need short integrations only",
    says=(
        "MCMC in the product of data and noise level (Denoising Langevin Gibbs) visits states of moderate noise, from which a "
        "reverse integrator needs few evaluations. This speeds up all six integrators that were tried: with those of Karras et "
        "al. and the models of Song et al. FID 3.86 on CIFAR-10 at about 10 evaluations and 2.63 at about 20; on CelebA-HQ-256 "
        "6.99 at about 160, where the best before was 7.16 at 4000."
    ),
    paper=Paper(
        "Denoising MCMC for Accelerating Diffusion-Based Generative Models", 2023, "2209.14593", "ICML 2023",
        "https://github.com/1202kbs/DMCMC",
    ),
    part="polyak.generate.dmcmc:DenoisingLangevinGibbs", budget="network evaluations a sample",
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    scales=(Scale("small", "exact problems, and a small model of digits: two minutes on two cores", 5, first_seed=100),),
    sources=("polyak.claims.generate._chains", "polyak.claims._images"),
    departures=(
        "The paper's measure is the FID of 50,000 images by pretrained networks on a GPU; there is no paper scale here. The energy "
        "distance of 300 samples cannot fall below about 0.04.",
        "Nothing is tuned for each seed. Of 9 evaluations the chains spend 2 on Langevin steps, the best split in pilots on seeds "
        "below 10; with 4 their distance is twice as large. eta is the paper's 0.5, in pixels of [-1, 1].",
        "The paper does not count the evaluations of the warm-up, 57 for each chain. They are counted here in a criterion of their "
        "own: with 5 samples a chain they double the cost, and Heun's method from noise is then better.",
        "Samples end at sigma = 0, where the last step of Tweedie's formula that the paper takes has nothing to remove.",
        "DPM-Solver++ is newer than the paper's integrators. That DLG is to be better with it is asked, and decides nothing.",
    ),
    errata=(
        Erratum(
            what="The state of the smallest level, from which a sample is made, is sought from the state before the Langevin steps "
            "on. That state may have made the sample before, and makes the same again.",
            where='1202kbs/DMCMC, "Sampling Demo.ipynb" (x_min = x before the loop)',
            effect="With a deterministic integrator and two Langevin steps about one sample in ten is a copy of the chain's last; "
            'churn changes it only a little. select="fresh" leaves that state out.',
            test="tests/generate/test_dmcmc.py::test_official_selection_repeats_samples",
        ),
    ),
    usage=(
        "from polyak.generate import EDM, Denoiser, DenoisingLangevinGibbs, NoiseClassifier\n"
        "classifier = NoiseClassifier((3, 32, 32))  # trained by noise_classifier_loss\n"
        'chains = DenoisingLangevinGibbs(Denoiser(network, EDM(), "edm"), EDM(), classifier, eta=0.5, n_skip=4)\n'
        "def many(n): chains.warmup((200, 3, 32, 32)); return chains.sample(n)  # 9 evaluations each"
    ),
)  # fmt: skip
