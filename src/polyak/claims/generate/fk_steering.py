"""FK steering's claim: a few interacting particles follow any reward better than the best of as many samples."""

from __future__ import annotations

from collections.abc import Iterator

from polyak.claims._pictures import fk_steering as pictures
from polyak.lab.claim import Arm, Claim, Erratum, Measurement, Metric, Paper, Role, Scale, Task, Trial, Value
from polyak.lab.criteria import Ask


def trial(t: Trial) -> Iterator[Measurement]:
    """A tilted law beside the exact one; or what a reward's samples come to, at equal calls of the denoiser."""
    from polyak.claims.generate import _steered

    measured = {"tilt": _steered.tilt, "rare": _steered.rare}.get(t.task, _steered.asked)
    yield Measurement(measured(t.seed, t.options))


TASKS = (
    Task(
        "tilt", "Two normals on the line, tilted",
        "exact score; VP(0.1, 20), DDIM with eta = 1, 200 steps; reward x, lam from 0.3 to 0.6; 200 systems of 16 particles, 40 of "
        "256; resampled below half of the effective sample size",
        {"steps": 200, "systems": 200},
    ),
    Task(
        "rare", "A component of weight 0.003",
        "ten isotropic normals on a sphere of radius 3 in 8-D, deviation 0.3; exact score; linear betas to 0.1, DDIM with eta = 1, "
        "100 steps; reward minus the distance to the rare mean, lam = 10, asked for at every tenth step; 500 systems",
        {"systems": 500, "share": 0.003},
    ),
    Task(
        "digits", "Digits of a model that is told nothing",
        "MLP of three layers of 128 trained on scikit-learn's digits, VP(0.1, 20), v prediction, DDIM with eta = 1, 50 steps; "
        "reward log p(digit) of a classifier, lam = 3; ten digits, 30 systems of each; judged by a classifier of the other half "
        "of the data",
        {"systems": 300, "steps": 50, "lam": 3.0, "training": 900, "classifying": 400, "told": False},
    ),
    Task(
        "prompted", "Digits of models that are told the digit", "likewise, conditional",
        {"systems": 300, "steps": 50, "lam": 3.0, "training": 900, "classifying": 400, "told": True},
    ),
)  # fmt: skip


def _tilted(name: str, label: str, role: Role, says: str, **options: Value) -> Arm:
    given: dict[str, Value] = {"potential": "diff", "ess_threshold": 0.5, "parity": None}
    return Arm(name, label, role, {**given, **options}, says=says, tasks=("tilt",))


def _rare(name: str, label: str, role: Role, potential: str, particles: int, parity: str | None = None) -> Arm:
    return Arm(name, label, role, {"potential": potential, "particles": particles, "parity": parity}, tasks=("rare",))


def _digits(name: str, label: str, role: Role, potential: str, particles: int, width: int = 128) -> Arm:
    tasks = ("digits", "prompted") if width == 128 else ("prompted",)
    return Arm(name, label, role, {"potential": potential, "particles": particles, "width": width}, tasks=tasks)


ARMS = (
    _rare("bon8", "Best of 8", "baseline", "bon", 8),
    _rare("fk8", "FK steering, k = 8", "method", "diff", 8),
    _rare("bon4", "Best of 4", "baseline", "bon", 4),
    _rare("fk4", "FK steering, k = 4", "method", "diff", 4),
    _rare("max8", "FK steering, max, k = 8", "method", "max", 8),
    _rare("max8_official", "Max as in the official code, k = 8", "control", "max", 8, "official"),
    _digits("one", "One sample", "baseline", "bon", 1),
    _digits("best4", "Best of 4 samples", "baseline", "bon", 4),
    _digits("steered4", "FK steering, 4 particles", "method", "diff", 4),
    _digits("weighed4", "Importance sampling, 4 particles", "control", "is", 4),
    _digits("large", "One sample of a model three times as large", "baseline", "bon", 1, 248),
    _tilted("adaptive", "Resampled below half", "method", "weights are carried between"),
    _tilted("always", "Resampled at every scoring", "method", "at each of four steps and the last", ess_threshold=1.0),
    _tilted("max", "Potential max", "method", "resampled below half", potential="max"),
    _tilted("dropped", "As in the official code", "control", "weights are dropped where it does not resample", parity="official"),
)  # fmt: skip

METRICS = (
    Metric("product", "Largest error of the product of a path's weights, in nats", exact=True),
    Metric("unsteered", "Largest distance from the unsteered samples, lam = 0", exact=True),
    Metric("bias", "Error of a component's weight, mean over systems of 256"),
    Metric("shrinks", "RMS error of 16 particles over that of 256", better="higher"),
    Metric("evidence", "Relative error of E[exp(lam r)], mean over systems of 16"),
    Metric("success", "Share of systems that find the rare component", better="higher"),
    Metric("rewards", "Calls of the reward for each system", exact=True),
    Metric("accuracy", "Share that another classifier sees as what was asked for", better="higher"),
    Metric("likelihood", "Its log p of what was asked for", better="higher"),
    Metric("spread", "Mean distance between samples of one digit", better="higher"),
)
PROVED = Ask(METRICS, kind="mechanism", task="tilt")
RARE = Ask(METRICS, kind="effect", task="rare", metric="success")
ASKED = Ask(METRICS, kind="effect", task="digits", metric="accuracy", arm="steered4")

CRITERIA = (
    *PROVED.table(
        "at_most", "name arm says",
        ("product", "adaptive", "The weights of a path multiply to exp(lam r(x_0)), with diff"),
        ("product_max", "max", "The weights of a path multiply to exp(lam r(x_0)), with max"),
        metric="product", bound=1e-9, rule="every", control="dropped",
    ),
    PROVED.at_most(
        "unsteered", 0.0, "Without a tilt the samples are the unsteered ones, bit by bit", metric="unsteered", arm="adaptive",
        rule="every",
    ),
    *PROVED.table(
        "at_most", "name arm says",
        ("bias_adaptive", "adaptive", "Components weigh what the exact tilt says, to 0.02, where weights are carried"),
        ("bias_always", "always", "Components weigh what the exact tilt says, to 0.02, where particles are always resampled"),
        ("bias_max", "max", "Components weigh what the exact tilt says, to 0.02, with max"),
        metric="bias", bound=0.02, control="dropped",
    ),
    PROVED.at_least(
        "shrinks", 3.0, "Sixteen times the particles divide the error by 3 and more (4, were they independent)", metric="shrinks",
        arm="adaptive", control="dropped",
    ),
    PROVED.at_most("evidence", 0.1, "The evidence is unbiased, to 0.1", metric="evidence", arm="adaptive"),
    RARE.at_least("rare_fk8", 0.3, "Eight particles find the rare component in 30 % of systems", arm="fk8", control="bon8"),
    RARE.beats("rare_over_bon8", "Eight particles find it more often than the best of eight samples", arm="fk8", minus="bon8"),
    RARE.beats("rare_over_bon4", "Four particles find it more often than the best of four", arm="fk4", minus="bon4"),
    RARE.at_least(
        "rare_max", 0.1, "With max eight particles find it in 10 %; not as in the official code, since rewards are below 0",
        arm="max8", control="max8_official",
    ),
    ASKED.beats("digits_over_best4", "More digits are what was asked for than of the best of 4", minus="best4", control="weighed4"),
    ASKED.beats("digits_over_one", "More digits are what was asked for than of one sample", minus="one"),
    ASKED.at_least("digits_spread", 0.9, "Steered digits vary as the best of 4 do, to a tenth", metric="spread", over="best4"),
    ASKED.at_least(
        "prompted_over_large", 0.0, "A small model, steered, makes at least as many of what it is told as one three times as large",
        task="prompted", minus="large", control="one",
    ),
    ASKED.beats(
        "prompted_over_best4", "It makes more of what it is told than the best of 4 of its own", task="prompted", minus="best4",
        gating=False,
    ),
)  # fmt: skip

_CODE = "zacharyhorvitz/Fk-Diffusion-Steering, fkd_class.py, FKD.resample"
_TEST = "tests/generate/test_fk_steering.py::test_erratum_"
CLAIM = Claim(
    slug="fk_steering", room="generate", name="Feynman-Kac steering",
    summary="Steers any diffusion model by any reward, by weighing and resampling a few trajectories",
    says=(
        "Interacting diffusions that are resampled by rewards of their predictions on the way sample the model's law tilted by the "
        "reward, without gradients or training. With four particles a model of 0.8 B parameters is ahead of a fine-tuned one of "
        "2.6 B in prompt fidelity; in text, with eight, the share of toxic samples goes from 0.3 % to 69.7 %, beyond best-of-n and "
        "gradient guidance."
    ),
    paper=Paper(
        "A General Framework for Inference-time Scaling and Steering of Diffusion Models", 2025, "2501.06848", "ICML 2025",
        "https://github.com/zacharyhorvitz/Fk-Diffusion-Steering",
    ),
    part="polyak.generate.fk_steering:FKSteering", budget="denoiser evaluations for each particle",
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    scales=(Scale("small", "known laws and small models of digits: two minutes on two cores", 6, first_seed=100),),
    sources=("polyak.claims.generate._steered", "polyak.generate.rewards", "polyak.core.particles"),
    departures=(
        "Rewards and models are small: known mixtures, and digits of 8 x 8, with classifiers of the two halves of the data as the "
        "reward and as the judge. The paper's are Stable Diffusion with preference models, and masked text models.",
        "Arms have equal numbers of particles and of denoiser evaluations. Steering asks the reward at each scoring, ten times for "
        "the rare component where best-of-n asks once; both numbers are reported.",
        "What is returned is the best of each system by the reward, for all arms, and judged by what the reward did not see.",
        "The tilt is compared with that of the exact law; the model of 200 steps is not quite it.",
        "Weights are logarithms, carried where particles are not resampled; resampling is systematic.",
    ),
    errata=(
        Erratum(
            what="With adaptive resampling rewards are overwritten where nothing is resampled, and the weight since then is lost. "
            "By the paper weights multiply until particles are resampled.",
            where=f"{_CODE} (both versions)",
            effect="A gentle tilt, under which the effective sample size stays above one half, gives the unsteered law.",
            test=f"{_TEST}weights_are_dropped_where_nothing_is_resampled",
        ),
        Erratum(
            what="The last weight of max and sum has the running maximum or sum in its numerator, in place of r(x_0).",
            where=_CODE,
            effect="The target is exp(lam max r), of the best that a trajectory was ever predicted to become.",
            test=f"{_TEST}the_last_weight_of_max_is_of_the_running_maximum",
        ),
        Erratum(
            what="Weights are exponentials, clamped to 1e10.",
            where=_CODE,
            effect="Beyond lam r = 23, as of log-likelihoods, all particles weigh the same.",
            test=f"{_TEST}weights_are_clamped",
        ),
        Erratum(
            what="The running maximum begins at reward_min_value, which is 0 by default.",
            where=_CODE,
            effect="With rewards below 0 the potential max is constant, and nothing is steered.",
            test=f"{_TEST}the_maximum_begins_at_zero",
        ),
    ),
    usage=(
        "from polyak.generate import DDIM, VP, Denoiser, FKSteering, sample\n"
        "denoiser = Denoiser(network, VP())  # network(x, t) predicts the noise\n"
        "steering = FKSteering(lambda x: x.flatten(2).mean(2), lam=10.0, num_particles=4)  # your reward\n"
        "x = sample(denoiser, (2, 3, 8, 8), solver=DDIM(eta=1.0), steps=20, steering=steering)"
    ),
)  # fmt: skip
