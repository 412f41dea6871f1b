"""The claim of marginalization models: log p of any subset in one call, and training from an energy at a call's price."""

from __future__ import annotations

from collections.abc import Iterator

from polyak.claims._pictures import marginalization as pictures
from polyak.lab.claim import Arm, Claim, Erratum, Measurement, Metric, Paper, Scale, Task, Trial
from polyak.lab.criteria import Ask


def trial(t: Trial) -> Iterator[Measurement]:
    """A table that is a law; or a training on digits, or on the energy of an Ising model, judged by what is known of it."""
    yield from {"exact": _exact, "digits": _digits}.get(t.task, _energy)(t)


def _exact(t: Trial) -> Iterator[Measurement]:
    import torch

    from polyak.claims.generate import _marginals as m
    from polyak.generate.marginalization import MarginalizationModel

    generator = torch.Generator().manual_seed(t.seed)
    law, target = (m.random_law(t["length"], t["values"], generator) for _ in range(2))
    oracle = m.Oracle(law, t["noise"], generator)
    model = MarginalizationModel(oracle, t["values"], t["length"])
    values = m.inconsistencies(model)
    if not t["noise"]:
        values |= m.gradients(model, target)
    yield Measurement(values)


def _digits(t: Trial) -> Iterator[Measurement]:
    from polyak.claims.generate import _marginals as m

    marginal_steps = 0 if t.arm == "untrained" else t["marginal_steps"]
    model = m.on_digits(
        t.seed, marginal_steps=marginal_steps, **{name: t[name] for name in (*NET, "steps", "batch", "lr")}
    )
    yield Measurement(m.likelihoods(model, t["orders"], t["at_once"], t.seed))


def _energy(t: Trial) -> Iterator[Measurement]:
    from polyak.claims.generate import _marginals as m

    names = (*NET, "side", "batch", "lr", "budget", "decay", "alpha")
    model, law, step_ms = m.on_energy(t.arm, t.seed, **{name: t[name] for name in names})
    kl, kl_by_marginals = m.divergence(model, law, t["samples"], t.seed)
    values = dict(kl=kl, step_ms=step_ms)
    if t.arm.startswith("mam"):
        values["kl_by_marginals"] = kl_by_marginals
    if t.task == "subsets":
        values["error"] = m.marginal_error(model, law, t["subsets"], t.seed)
    yield Measurement(values)


NET = ("hidden", "layers")
ARMS = (
    Arm(
        "arm_mc", "Any-order ARM, one conditional", "baseline", grid={"lr": (3e-5, 1e-4, 3e-4)}, tasks=("energy",),
        says="log p from one random conditional times D, as the paper's baseline that can be trained at size",
    ),
    Arm(
        "arm_full", "Any-order ARM, all conditionals", "baseline", {"lr": 1e-2}, tasks=("energy",),
        says="log p from all D conditionals of a random order: few steps in a budget",
    ),
    Arm(
        "arm_all", "Any-order ARM, all that one call says", "baseline", {"lr": 1e-3}, tasks=("energy",),
        says="log p from the mean over all unknown positions of one call, which costs what one conditional does",
    ),
    Arm(
        "mam", "Marginalization model", "method", grid={"lr": (3e-3, 1e-2, 3e-2)}, tasks=("energy",),
        says="log p from the head of marginals, tied to conditionals by consistency",
    ),
    Arm("mam_fixed", "Marginalization model", "method", tasks=("digits", "subsets")),
    Arm(
        "no_consistency", "No consistency", "control", {"lr": 1e-2}, tasks=("energy",),
        says="the same without the consistency loss",
    ),
    Arm(
        "untied", "No consistency", "control", {"budget": 800_000}, tasks=("subsets",),
        says="without the consistency loss, in a tenth of the passes: nothing ties f of a subset to anything",
    ),
    Arm("untrained", "Marginals that were not trained", "control", tasks=("digits",), says="conditionals are the same"),
    Arm("oracle", "A table that is a law", "method", {"noise": 0.0}, tasks=("exact",)),
    Arm("noisy", "The same with noise", "control", {"noise": 0.1}, tasks=("exact",), says="marginals and conditionals disagree"),
)  # fmt: skip
TASKS = (
    Task(
        "exact", "Networks that are tables",
        "random laws of four variables of three values, all configurations, all subsets and all orders; float64",
        {"length": 4, "values": 3},
    ),
    Task(
        "digits", "Binarized digits",
        "scikit-learn's digits, 8 x 8, black or white; conditionals for 800 steps on 1,437, then marginals by consistency for "
        "3,000; 360 for the test",
        {
            "hidden": 128, "layers": 2, "steps": 800, "marginal_steps": 3000, "batch": 128, "lr": 5e-3, "orders": 20,
            "at_once": 256,
        },
    ),
    Task(
        "energy", "Ising model, 10 x 10",
        "a torus with coupling 0.2 and field 0.2, log Z = 78.688056 exactly; 0.8 million passes of one configuration through one "
        "perceptron, of which one with gradients counts as three",
        {
            "side": 10, "hidden": 64, "layers": 3, "batch": 128, "budget": 800_000, "decay": False, "alpha": 4.0,
            "samples": 2000,
        },
        tune="kl",
    ),
    Task(
        "subsets", "Marginals of an Ising model, 4 x 4",
        "trained on the energy alone; log p(x_S) of 200 random subsets beside the sum over all states",
        {
            "side": 4, "hidden": 512, "layers": 1, "batch": 256, "budget": 8_000_000, "decay": True, "alpha": 0.25, "lr": 1e-2,
            "samples": 1000, "subsets": 200,
        },
    ),
)  # fmt: skip
METRICS = (
    Metric("error_of_law", "Largest error of consistency", exact=True),
    Metric("spread", "Largest spread of a chain's log p over orders", exact=True),
    Metric("sums", "Largest error of a sum over one variable", exact=True),
    Metric("total", "Logarithm of the sum of all probabilities, absolute", exact=True),
    Metric("gradient", "Relative error of the gradient", exact=True),
    Metric("stationary", "Gradient at the target", exact=True),
    Metric("pearson", "Correlation of one call's log p with 20 chains'", better="higher"),
    Metric("spearman", "Rank correlation of the same", better="higher"),
    Metric("pearson_chain", "Correlation of one chain's log p with 20 chains'", better="higher"),
    Metric("gap", "Difference of the mean log p, absolute", unit="nats"),
    Metric("log_p", "Mean log p of test digits, by chains", better="higher", unit="nats"),
    Metric("speedup", "Time of one chain over that of one call", better="higher"),
    Metric("kl", "Divergence of the law of samples from the target", unit="nats"),
    Metric("kl_by_marginals", "The same by the head of marginals", unit="nats"),
    Metric("step_ms", "Processor time of a step", unit="ms"),
    Metric("error", "Mean absolute error of log p(x_S)", unit="nats"),
)
PROVED = Ask(METRICS, kind="mechanism", task="exact", arm="oracle", rule="every")
DIGITS = Ask(METRICS, kind="effect", task="digits", arm="mam_fixed")
ENERGY = Ask(METRICS, kind="effect", task="energy", arm="mam", metric="kl")
CRITERIA = (
    *PROVED.but(control="noisy").table(
        "at_most", "name bound metric says",
        ("consistent", 1e-12, "error_of_law", "Marginals and conditionals of one law leave no error of consistency"),
        ("orders", 1e-12, "spread", "Then log p by conditionals is the same in every order"),
        ("sums", 1e-12, "sums", "Then log p of a subset is that of its extensions, summed over a variable"),
        ("normalized", 1e-12, "total", "Then the probabilities of one call, f(x) - f(nothing), add up to 1"),
    ),
    *PROVED.table(
        "at_most", "name bound metric says",
        ("reinforce", 1e-9, "gradient", "REINFORCE's mean is the gradient of the divergence, over the deviation of the reward"),
        ("stationary", 1e-12, "stationary", "It is zero where the law is the target, whatever the target's normalizer"),
    ),
    DIGITS.at_least(
        "digits_pearson", 0.7, "Digits: log p in one call correlates with that of 20 chains by 0.7 or more", metric="pearson",
        control="untrained",
    ),
    DIGITS.at_most(
        "digits_gap", 0.5, "Digits: mean log p of one call is within 0.5 nats of that of chains", metric="gap", control="untrained"
    ),
    DIGITS.at_least("digits_speed", 16.0, "Digits: one call takes at most a sixteenth of a chain's time", metric="speedup"),
    ENERGY.at_most(
        "energy_mc", 0.7, "Ising 10 x 10: at most 0.7 of the divergence of an ARM with one conditional, in equal passes",
        over="arm_mc", control="no_consistency",
    ),
    ENERGY.at_most(
        "energy_steps", 0.1, "Ising 10 x 10: a step takes at most a tenth of one of an ARM with all conditionals",
        metric="step_ms", over="arm_full",
    ),
    Ask(METRICS, kind="effect", task="subsets").at_most(
        "subsets", 0.1, "Ising 4 x 4: log p of a random subset is off by at most 0.1 nats, in the mean", metric="error",
        arm="mam_fixed", control="untied",
    ),
    *ENERGY.but(gating=False).table(
        "beats", "name over says",
        ("energy_full", "arm_full", "Ising 10 x 10: nearer than an ARM with all conditionals, in equal passes"),
        ("energy_all", "arm_all", "Ising 10 x 10: nearer than an ARM that takes all that one call says, in equal passes"),
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="marginalization", room="generate", name="Marginalization models",
    summary="One network that says log p of any subset of discrete variables in one call, trained on data or on an energy",
    says=(
        "Marginals of any subset in one call, at a quality near that of any-order autoregressive models (ARMs), which need one for "
        "each variable: orders of magnitude faster on binary MNIST, text8 and molecules. From an energy they train at sizes (Ising "
        "models of 30 x 30, molecules) where an ARM's D calls a step do not, and are better than ARMs with one-sample estimates."
    ),
    paper=Paper(
        "Generative Marginalization Models", 2024, "2310.12920", "ICML 2024", "https://github.com/PrincetonLIPS/MaM"
    ),
    part="polyak.generate.marginalization:MarginalizationModel", budget="passes of one configuration through one perceptron",
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    scales=(Scale("small", "tables, digits and two Ising models: two to three minutes on two cores", 5, first_seed=100),),
    sources=("polyak.claims.generate._marginals", "polyak.generate.marginalization.losses"),
    departures=(
        "The budget on the 10 x 10 model is counted, not timed, so that a trial depends on its seed alone: passes of one "
        "configuration through one of the two perceptrons, which are of one size; one with gradients counts as three. A step "
        "costs 16 a configuration for the marginalization model, 8 for ARMs with one call, 304 for one with all conditionals. By "
        "the clock the last is somewhat cheaper than counted, since its passes go through the network together.",
        "Steps are timed on the processor's clock, and log p at a batch of 256, all steps of a chain together.",
        "The official ARM draws new samples from D calls in every step, even with one-sample estimates. Here all arms have "
        "persistent chains, which are cheaper.",
        "The two arms of the claim are tuned by three rates each. Rates of the others, which are only reported or timed, were "
        "found in pilots on seeds below 10; 3e-2 was worse than 1e-2 for the ARM with all conditionals.",
        "An ARM whose one call's conditionals are all used, not one of them, is no baseline of the paper. It costs the same.",
        "Perceptrons of 64 to 512 units in one to three layers, for seconds; the paper's have 2048 in four, and U-Nets and "
        "transformers on data. Marginals are trained with the conditionals held fixed, and on data alone, as the official code "
        "does on images. On the 4 x 4 model alpha is 0.25, not 4, with which it learned slower: "
        "a pilot was off by 0.39 nats, and by 0.20 with 0.5.",
    ),
    errata=(
        Erratum(
            what="x'Jx with a symmetric adjacency in J counts every bond twice.",
            where="PrincetonLIPS/MaM, mam/utils/ising_utils.py, LatticeIsingModel.forward",
            effect="sigma is half of a bond's coupling: the published sigma = 0.1 is the Ising model with J = 0.2.",
            test="tests/generate/test_marginalization.py::test_a_form_with_the_adjacency_counts_bonds_twice",
        ),
        Erratum(
            what="An order is said by ranks, and conditional samples are drawn from the highest rank down, all others upwards.",
            where="PrincetonLIPS/MaM, cond_sample in mam/models/mam.py, mam_eb.py and mam_image.py",
            effect="\"forward\" goes left to right without a condition, and right to left with one.",
            test="tests/generate/test_marginalization.py::test_an_order_goes_the_same_way_with_and_without_what_is_given",
        ),
        Erratum(
            what="When samples are renewed, the network is told a mask of positions that are erased, as if these were known.",
            where="PrincetonLIPS/MaM, mam/models/mam_image.py, censor_and_sample: mask_curr = rand_order < i",
            effect="With on-policy samples of images the chain does not leave the model's law as it is.",
            test="tests/generate/test_marginalization.py::test_a_chain_with_exact_conditionals_stays_in_its_law",
        ),
    ),
    usage=(
        "from polyak.generate import MarginalizationModel, MLPDual\n"
        "model = MarginalizationModel(MLPDual(num_values=2, length=64, hidden=256), num_values=2, length=64)\n"
        "x = model.sample(4)  # [4, 64] of values 1 and 2; yours may have 0 where nothing is known\n"
        "log_p = model.log_marginal(x)"
    ),
)  # fmt: skip
