"""APO's claim: two rounds of accelerated preference optimization are worth three of iterative DPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyak.lab.claim import Arm, Claim, Criterion, Measurement, Metric, Paper, Plot, Scale, Task, Trial, measure

BETAS = {"half": 0.5, "two": 2.0, "eight": 8.0}
ROUNDS = 3


def trial(t: Trial) -> Iterator[Measurement]:
    """One arm's rounds: exact ones on tables, sampled ones on tables, or those of a language model."""
    yield from {"exact": _exact, "sampled": _sampled, "vowels": _vowels}[t.task](t)


def _exact(t: Trial) -> Iterator[Measurement]:
    """Rounds until the mean sub-optimality over the problems is 1%, and the distance of ten rounds to the closed form."""
    import torch

    from polyak.claims import _preferences
    from polyak.optim.apo import exponent, tabular

    problems = _preferences.bandits(t.seed, t["problems"], t["responses"])
    final: dict[str, float] = {}
    for name, beta in BETAS.items():
        needed = t["most"] + 1
        for number, policy in enumerate(_preferences.exact_rounds(problems, t["arm"], t["alpha"], beta, t.seed), 1):
            gap = _preferences.suboptimality(problems, policy).mean().item()
            if number <= 10:
                yield Measurement({f"gap_{name}": gap}, {"round": number})
            if gap <= t["target"] or number == t["most"]:
                needed = number if gap <= t["target"] else needed
                break
        final |= {f"rounds_{name}": float(needed), f"allowed_{name}": 0.65 * needed + 1}
    if t["arm"] in ("dpo", "apo"):
        alpha = t["alpha"] if t["arm"] == "apo" else 0.0
        error = 0.0
        for beta in BETAS.values():
            path = tabular(problems.reward, problems.ref, beta, alpha, 10, log=True).trained
            run = _preferences.exact_rounds(problems, t["arm"], alpha, beta, t.seed)
            for number, policy in zip(range(1, 11), run, strict=False):
                closed = (problems.ref + exponent(alpha, number) * problems.reward / beta).log_softmax(-1)
                both = torch.stack([path[number] - closed, policy - closed])
                error = max(error, both.abs().max().item())
        final["error"] = error
    yield Measurement(final)


def _sampled(t: Trial) -> Iterator[Measurement]:
    """How often two rounds of this arm come up to three of iterative DPO, on one seed's problems."""
    from polyak.claims import _preferences

    problems = _preferences.bandits(t.seed, t["problems"], t["responses"])
    fit: dict[str, Any] = {name: t[name] for name in ("pairs", "steps", "lr")}
    own, dpo = (
        _preferences.sampled_rounds(problems, arm, t["alpha"], t["beta"], t.seed, rounds=ROUNDS, **fit)
        for arm in (t["arm"], "dpo")
    )
    for number, expected in enumerate(own):
        yield measure({"round": number}, expected=expected.mean().item())
    yield measure(
        matches=(own[2] >= dpo[3] - t["slack"]).double().mean().item(),
        expected=own[3].mean().item(),
        expected_two=own[2].mean().item(),
    )


def _vowels(t: Trial) -> Iterator[Measurement]:
    """Three rounds of a character model that is to write vowels: gains in true reward over the pretrained model."""
    import numpy as np
    import torch

    from polyak.claims import _preferences

    world = _preferences.Vowels(
        t.seed,
        t.device,
        given=t["given"],
        length=t["length"],
        dim=t["dim"],
        steps=t["pretraining"],
        lr=t["pretraining_lr"],
    )
    model, generator = world.model(), torch.Generator().manual_seed(t.seed)
    between = _preferences.Between(model, t["arm"], t["alpha"], t.seed)
    rewards, divergences = [world.judged(model, t["judged"])[0]], [0.0]
    yield measure({"round": 0}, reward=rewards[0], kl=0.0)
    final: dict[str, float] = {}
    for number in range(1, ROUNDS + 1):
        world.round(
            between,
            model,
            generator,
            prompts=t["prompts"],
            batch=t["batch"],
            updates=t["updates"],
            beta=t["beta"],
            lr=t["lr"],
        )
        for values, value in zip((rewards, divergences), world.judged(model, t["judged"]), strict=True):
            values.append(value)
        between.after_round()
        yield measure({"round": number}, reward=rewards[-1], kl=divergences[-1])
        final[f"gain_{number}"] = rewards[-1] - rewards[0]
    extrapolated = world.judged(model, t["judged"])[0] - rewards[0]
    # Along one path rewards grow about as the root of the divergence.
    at_kl = float(np.interp(t["at_kl"] ** 0.5, np.sqrt(np.maximum.accumulate(divergences)), rewards)) - rewards[0]
    yield Measurement(
        {**final, "gain_extrapolated": extrapolated, "gain_at_kl": at_kl, "reward": rewards[-1], "kl": divergences[-1]}
    )


ARMS = (
    Arm(name="dpo", label="Iterative DPO", role="baseline", options={"arm": "dpo"}, says="alpha = 0"),
    Arm(
        name="apo", label="APO", role="method", options={"arm": "apo"},
        says="alpha = 0.5 on tables, 0.3 on the network; judged by the trained policies, not by the extrapolated ones",
    ),
    Arm(
        name="random", label="Iterative DPO, random steps", role="control", options={"arm": "random"},
        says="between rounds a step as long as extrapolation's, in a random direction",
    ),
    Arm(
        name="from_reference", label="Extrapolation from the reference", role="control", tasks=("exact",),
        options={"arm": "from_reference"},
        says="theta^_{t+1} + alpha (theta^_{t+1} - theta_t): a constant step, 1 + alpha times as long",
    ),
)  # fmt: skip

WORDS = {"half": "0.5", "two": "2", "eight": "8"}
TASKS = (
    Task(
        name="exact",
        label="Tables, exact rounds",
        says="200 problems with 50 responses each, rewards from N(0, 1), uniform reference; beta 0.5, 2 and 8",
        options={"problems": 200, "responses": 50, "alpha": 0.5, "target": 0.01, "most": 400},
        plots=tuple(
            Plot(x="round", y=f"gap_{name}", log_y=True, title=f"Mean sub-optimality, beta {beta}")
            for name, beta in WORDS.items()
        ),
    ),
    Task(
        name="sampled",
        label="Tables, sampled pairs",
        says="30 problems with 50 responses each; 2000 pairs a round from pi_t, DPO with beta 0.5 by 200 steps of Adam",
        options={
            "problems": 30, "responses": 50, "alpha": 0.5, "beta": 0.5, "pairs": 2000, "steps": 200, "lr": 0.05, "slack": 0.01,
        },
        plots=(Plot(x="round", y="expected", title="Expected reward, mean over the problems"),),
    ),
    Task(
        name="vowels",
        label="A character model writes vowels",
        says=(
            "GPT of width 64, depth 2, pretrained for 300 steps; 3 rounds of 256 prompts, 2 continuations of 32 characters each, "
            "40 DPO steps of 16 pairs (AdamW 1e-4, beta 0.1)"
        ),
        options={
            "alpha": 0.3, "given": 16, "length": 32, "dim": 64, "pretraining": 300, "pretraining_lr": 3e-3, "prompts": 256,
            "batch": 16, "updates": 40, "beta": 0.1, "lr": 1e-4, "judged": 512, "at_kl": 15.0,
        },
        plots=(
            Plot(x="round", y="reward", title="Vowels in 32 characters"),
            Plot(x="round", y="kl", title="KL divergence to the pretrained model, nats"),
        ),
    ),
)  # fmt: skip

EXACT = (
    *(
        Criterion(
            name=f"exact_rounds_{name}",
            says=f"At beta {beta}, APO with alpha 0.5 needs at most 0.65 T + 1 rounds where iterative DPO needs T, to 1%",
            task="exact", metric=f"rounds_{name}", arm="apo", against="dpo", against_metric=f"allowed_{name}", rule="every",
            control="from_reference" if name == "eight" else "random",
        )
        for name, beta in WORDS.items()
    ),
    Criterion(
        name="exact_closed_form",
        says="Ten rounds of the part and of its table agree with pi_ref exp(s_T r / beta) to 1e-10",
        task="exact", metric="error", arm="apo", compare="value", bound=1e-10, rule="every",
    ),
)  # fmt: skip
SAMPLED = (
    Criterion(
        name="sampled_two_for_three",
        says="Two rounds of APO come within 0.01 of three of iterative DPO on at least 80% of 30 problems",
        task="sampled", metric="matches", arm="apo", compare="value", op=">=", bound=0.8, control="random",
    ),
    *(
        Criterion(
            name=f"sampled_equal_{word}",
            says=f"After {word} rounds APO's expected reward is above iterative DPO's",
            task="sampled", metric=metric, arm="apo", against="dpo", compare="difference", op=">", bound=0.0,
            control="random", gating=False,
        )
        for word, metric in (("two", "expected_two"), ("three", "expected"))
    ),
)  # fmt: skip
VOWELS = (
    Criterion(
        name="vowels_two_for_three",
        says="Two rounds of APO gain at least 90% of what three rounds of iterative DPO gain",
        task="vowels", metric="gain_2", arm="apo", against="dpo", against_metric="gain_3", op=">=", bound=0.9,
        control="random",
    ),
    *(
        Criterion(
            name=f"vowels_equal_{number}",
            says=f"After {number} rounds APO has gained more than iterative DPO",
            task="vowels", metric=f"gain_{number}", arm="apo", against="dpo", compare="difference", op=">", bound=0.0,
            control="random",
        )
        for number in (2, 3)
    ),
    Criterion(
        name="vowels_equal_kl",
        says="At 15 nats from the pretrained model APO's gain is at least 90% of iterative DPO's: a faster way, not a worse one",
        task="vowels", metric="gain_at_kl", arm="apo", against="dpo", op=">=", bound=0.9, gating=False,
    ),
    Criterion(
        name="vowels_extrapolated",
        says="The extrapolated model after three rounds, which is not the method's output, gains more than the trained one",
        task="vowels", metric="gain_extrapolated", arm="apo", against="apo", against_metric="gain_3", compare="difference",
        op=">", bound=0.0, gating=False,
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="apo",
    room="optim",
    name="APO",
    summary="Nesterov's extrapolation between rounds of preference optimization: two rounds for three of iterative DPO",
    says=(
        "Iterative preference optimization is a proximal-point method; extrapolating between its rounds speeds it up by "
        "1 / (1 - alpha). On AlpacaEval 2.0, Mistral-7B reaches a length-controlled win rate of 31.73% after three rounds, 1.78 "
        "points above iterative DPO and 5.34 above Snorkel-Mistral-PairRM-DPO; APO after two rounds matches iterative DPO after "
        "three."
    ),
    paper=Paper(
        title="Accelerated Preference Optimization for Large Language Model Alignment",
        year=2024,
        arxiv="2410.06293",
    ),
    part="polyak.optim.apo:APO",
    budget="rounds of sampling, labelling and training",
    tasks=TASKS,
    arms=ARMS,
    scales=(
        Scale(
            name="small",
            says="tables with known optima, and a character model with a reward that can be counted: minutes on two cores",
            seeds=5,
            first_seed=100,
        ),
    ),
    metrics=(
        *(Metric(name=f"gap_{n}", label=f"Mean sub-optimality, beta {b}") for n, b in WORDS.items()),
        *(
            Metric(name=f"rounds_{n}", label=f"Rounds to 1%, beta {b}", unit="rounds", exact=True)
            for n, b in WORDS.items()
        ),
        *(
            Metric(name=f"allowed_{n}", label=f"0.65 T + 1, beta {b}", unit="rounds", exact=True)
            for n, b in WORDS.items()
        ),
        Metric(name="error", label="Largest distance to the closed form", exact=True),
        Metric(name="matches", label="Problems where two rounds match DPO's three", better="higher"),
        Metric(name="expected", label="Expected reward", better="higher"),
        Metric(name="expected_two", label="Expected reward after two rounds", better="higher"),
        Metric(name="reward", label="Vowels in 32 characters", better="higher"),
        Metric(name="kl", label="KL divergence to the pretrained model", unit="nats"),
        *(
            Metric(name=f"gain_{k}", label=f"Vowels gained, {k} round{'s' if k > 1 else ''}", better="higher")
            for k in range(1, ROUNDS + 1)
        ),
        Metric(name="gain_extrapolated", label="Vowels gained by the extrapolated model", better="higher"),
        Metric(name="gain_at_kl", label="Vowels gained at 15 nats", better="higher"),
    ),
    criteria=(*EXACT, *SAMPLED, *VOWELS),
    trial=trial,
    departures=(
        "There is no paper scale: it needs Mistral-7B, a ranker of 0.4B weights and sampling in three rounds, and the paper's "
        "alpha, beta and learning rates are not known. The claim about two rounds is put to small problems with known rewards.",
        "With exact rounds and a fixed reward, T rounds of APO are s_T of iterative DPO, s_2 = 2 + alpha < 3: along one path, two "
        "rounds come up to three only where the reward saturates, whatever alpha. That decides 'sampled' and "
        "'vowels_two_for_three', which ask for it; 'exact' asks for many rounds, where the rate is 1 / (1 - alpha).",
        "Exact tables: rounds are counted on the mean sub-optimality over 200 problems, relative to the reference's, as far as 400 "
        "rounds; at beta 8 none gets to 1% within ten. A random step is the control at beta 0.5 and 2; at 8 it is "
        "extrapolation from the reference, which in few rounds cannot be told from the method: both then allow 0.65 T + 1.",
        "Sampled tables: 30 problems in each of five seeds, and at least 80% on average, in place of 30 seeds. alpha is 0.5 and "
        "beta 0.5, of the values in 'exact' the one that is nearest to saturation. In two rounds, "
        "extrapolation from the reference is the method itself, so that a random step is the control.",
        "Vowels: the reward is their number in 32 characters, not their fraction, whose differences are below 0.2 and would make "
        "the labels of Bradley and Terry's model tosses of a coin. 'More in 4 of 5 seeds' is asked of the mean, with an interval.",
        "Vowels: the divergences reached, tens of nats, are large, as the learning rate and the number of steps are fixed and DPO "
        "does not hold a policy that is still rising; gains at equal divergence are read between rounds, linearly in its root.",
        "Until 2026-11-30 criteria on what training reaches asked every seed, so that more seeds made passing harder. Before this "
        "run they were reset to ask the mean, with the same bounds; the small scale's seeds, from 100 on, had not been run.",
    ),
    usage=(
        "from polyak.optim import APO\n\n"
        "apo = APO(alpha=0.3); reference = apo.start(model)\n"
        "reference = apo.after_round(model, reference)  # after each round of DPO; in the end apo.swap(model)"
    ),
)
