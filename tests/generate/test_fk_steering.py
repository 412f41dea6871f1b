"""Feynman-Kac steering: exact laws, potentials, what is carried along, refusals, and the published code's departures."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from generate_cases import exact, noise
from torch import Tensor

from polyak.core.particles import SCHEMES
from polyak.generate import (
    CFG,
    DDIM,
    VP,
    Denoiser,
    DPMSolverSDE,
    Evaluator,
    FKSteering,
    Prediction,
    Query,
    SteeringState,
    Step,
    sample,
)
from polyak.generate.problems import Recorder
from polyak.generate.rewards import RewardContext

PATHWISE = ("diff", "max", "sum", "rt", lambda r, state: 0.3 * r.sin())
NAMES = [p if isinstance(p, str) else "own" for p in PATHWISE]
every_potential = pytest.mark.parametrize("potential", PATHWISE, ids=NAMES)
ALL = list(range(100))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first(samples: Tensor) -> Tensor:
    """The reward: the first coordinate."""
    return samples.flatten(2)[..., 0]


def walk(steering: Any, rewards: Tensor, **known: Any) -> tuple[list[Any], Tensor]:
    """Steps with given rewards (steps, batch, k) of particles that are these rewards; all states, and the last particles."""
    steps, batch, k = rewards.shape
    state, states = steering.init(batch, k, steps=steps), []
    for i in range(steps):
        x = rewards[i].reshape(-1, 1)
        x, state = steering.step(state, x, x0_hat=x, step=i, last=i == steps - 1, generator=rng(i), **known)
        states.append(state)
    return states, x


def random_rewards(steps: int = 5, batch: int = 3, k: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(steps, batch, k, dtype=torch.float64, generator=rng(seed))


# --- the weights


@every_potential
@pytest.mark.parametrize("lam", [2.0, -1.5, 0.0])
@pytest.mark.parametrize(
    "schedule", [[], [0, 3], ALL[:5], lambda step: step % 2 == 0], ids=["last", "two", "all", "own"]
)
@pytest.mark.parametrize("r_min", [0.0, 0.7, "first"])
def test_the_potentials_of_a_path_telescope(potential: Any, lam: float, schedule: Any, r_min: Any) -> None:
    rewards = random_rewards()
    steering = FKSteering(first, lam=lam, potential=potential, schedule=schedule, r_min=r_min, ess_threshold=0.0)
    *_, state = walk(steering, rewards)[0]
    begin = r_min
    if r_min == "first":
        when = 4 if schedule == [] else 0
        begin = rewards[when].amax(1, keepdim=True)
    want = lam * (rewards[-1] - begin)
    assert torch.allclose(state.total, want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(state.logw, want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(state.log_z, want.logsumexp(1) - math.log(4), rtol=1e-12, atol=1e-12)


@every_potential
def test_what_was_earned_moves_with_the_particles(potential: Any) -> None:
    """After resampling the product along a path is that of the ancestors' potentials, and the last one completes it."""
    rewards = random_rewards(6, 50, 5)
    steering = FKSteering(first, lam=3.0, potential=potential, schedule=ALL[:6], num_particles=5)
    states, x = walk(steering, rewards)
    moved = [s.ancestors for s in states]
    assert sum(bool((m != torch.arange(250)).any()) for m in moved) == 6
    paths = [torch.zeros(250, dtype=torch.float64)]  # sums of log G by hand, row by row
    seen: list[list[float]] = [[] for _ in range(250)]
    for i, state in enumerate(states):
        row = rewards[i].flatten().tolist()
        seen = [[*old, new] for old, new in zip(seen, row, strict=True)]
        if i == 5 or potential == "diff":
            total = torch.tensor([3 * s[-1] for s in seen], dtype=torch.float64)
        else:
            log_g = {
                "max": lambda s: 3 * max(s),
                "sum": lambda s: 3 * sum(s),
                "rt": lambda s: 3 * s[-1],
            }.get(potential if isinstance(potential, str) else "", lambda s: 0.3 * math.sin(s[-1]))
            total = paths[-1] + torch.tensor([log_g(s) for s in seen], dtype=torch.float64)
        assert torch.allclose(state.total.flatten(), total[moved[i]], rtol=1e-11, atol=1e-11)
        paths.append(total[moved[i]])
        seen = [seen[j] for j in moved[i].tolist()]
    assert torch.equal(states[-1].reward.flatten(), x[:, 0])


# A walk x_t = x_{t+1} + z of four steps from 0, whose prediction E[x_0 | x_t] is x_t: the tilt by exp(lam x_0) is N(4 lam, 4).
SYSTEMS, K, WALK = 6000, 8, 4


def walks(steering: Any, drift: float = 0.0) -> tuple[Any, Tensor]:
    generator = rng(11)
    state = steering.init(SYSTEMS, K, steps=WALK)
    x = torch.zeros(SYSTEMS * K, 1, dtype=torch.float64)
    for i in range(WALK):
        z = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        ratio = (-0.5 * (z + drift).square() + 0.5 * z.square())[:, 0]
        x, state = steering.step(
            state, x + drift + z, x0_hat=x, step=i, last=i == WALK - 1, log_ratio=ratio, generator=generator
        )
    return state, x.view(SYSTEMS, K)


@pytest.mark.parametrize(
    ("potential", "options"),
    [
        *((p, {"ess_threshold": t}) for p in ("diff", "rt") for t in (0.0, 0.5, 1.0)),
        *((p, {"ess_threshold": 0.5}) for p in ("max", "sum", PATHWISE[-1])),
        ("is", {}),
        *(("diff", {"scheme": s}) for s in SCHEMES if s != "systematic"),
        ("diff", {"correct_proposal": True, "drift": 0.4, "ess_threshold": 0.5}),
    ],
    ids=lambda v: "own" if callable(v) else str(v),
)
def test_the_evidence_is_unbiased_and_the_law_is_the_tilt(potential: Any, options: dict[str, Any]) -> None:
    """``E[Z f]`` over systems, f = 1 and x: exp(lam^2 V / 2) and lam V times it; five standard errors."""
    lam, options = 0.4, dict(options)
    drift = options.pop("drift", 0.0)
    given = dict(lam=lam, potential=potential, num_particles=K, schedule=[1, 2], **options)
    state, x = walks(FKSteering(first, **given), drift)
    z = math.exp(lam**2 * WALK / 2)
    found = state.log_z.exp() / z
    mean = found * (state.logw.softmax(1) * x).sum(1)
    for values, want in ((found, 1.0), (mean, lam * WALK)):
        assert abs(values.mean().item() - want) < 5 * values.std().item() / SYSTEMS**0.5
    if drift:  # without the ratio the proposal's own law is tilted
        given["correct_proposal"] = False
        state, _ = walks(FKSteering(first, **given), drift)
        shifted = math.exp(lam * drift * WALK)
        found = state.log_z.exp() / z
        assert abs(found.mean().item() - shifted) < 5 * found.std().item() / SYSTEMS**0.5


def test_importance_sampling_is_one_scoring_at_the_end_and_bon_sorts() -> None:
    options: dict[str, Any] = dict(solver=DDIM(1.0), steps=6, return_info=True)
    reward = Scored()
    made = {
        (potential, pick): sample(
            exact(), (5, 1), generator=rng(), steering=FKSteering(reward, potential=potential, schedule=[], pick=pick), **options
        )
        for potential, pick in itertools.product(("diff", "is", "bon"), ("all", "best"))
    }  # fmt: skip
    assert reward.calls == len(made)
    for pick in ("all", "best"):
        assert torch.equal(made["diff", pick][0], made["is", pick][0])
    x, info = made["bon", "all"]
    x = x.view(5, 4)
    assert torch.equal(x, x.sort(1, descending=True).values)
    assert torch.equal(info.steering.reward, x.double())
    assert torch.equal(made["bon", "best"][0], x[:, :1])
    free = sample(exact(), (20, 1), solver=DDIM(1.0), steps=6, generator=rng())
    assert torch.equal(free.view(5, 4).sort(1, descending=True).values, x)  # all of them, and nothing else


class Scored:
    """A reward that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, samples: Tensor) -> Tensor:
        self.calls += 1
        return first(samples)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "ssp"])
@every_potential
def test_without_a_tilt_nothing_happens(potential: Any, scheme: str) -> None:
    own = (lambda r, state: 0 * r) if callable(potential) else potential
    options: dict[str, Any] = dict(solver=DDIM(1.0), steps=8)
    for k, lam in ((4, 0.0), (1, 7.0)):
        steering = FKSteering(
            first, lam=lam, potential=own, num_particles=k, schedule=ALL[:8], scheme=scheme, pick="all"
        )
        got, info = sample(exact(), (3, 1), steering=steering, generator=rng(2), return_info=True, **options)
        assert torch.equal(got, sample(exact(), (3 * k, 1), generator=rng(2), **options))
        assert torch.equal(info.steering.ancestors, torch.arange(3 * k))
        assert steering.resamples == (k > 1)


@pytest.mark.parametrize("r_min", [0.0, "first"])
def test_rewards_have_no_zero(r_min: Any) -> None:
    rewards, found = random_rewards(6, 40, 4), []
    for shift in (0.0, 100.0):
        states, x = walk(FKSteering(first, lam=2.0, schedule=ALL[:6], r_min=r_min), rewards + shift)
        found.append(([s.ancestors for s in states], states[-1].log_z, x - shift))
    (a, z, x), (b, shifted, y) = found
    assert all(torch.equal(m, n) for m, n in zip(a, b, strict=True))
    assert torch.allclose(x, y, atol=1e-12)
    assert torch.allclose(shifted - z, torch.tensor(0.0 if r_min == "first" else 200.0).double(), atol=1e-9)


def test_a_system_without_a_first_reward_is_steered_by_the_next_ones() -> None:
    rewards = random_rewards(3, 2, 4)
    rewards[0, 0] = torch.nan
    steering = FKSteering(first, lam=2.0, schedule=ALL[:3], r_min="first", ess_threshold=0.0)
    *_, state = walk(steering, rewards)[0]
    begin = torch.stack([torch.tensor(0.0).double(), rewards[0, 1].amax()])[:, None]
    assert torch.allclose(state.logw, 2 * (rewards[-1] - begin), rtol=1e-12, atol=1e-12)
    assert state.collapsed == 1


def test_adaptive_resampling_carries_its_weights() -> None:
    rewards = random_rewards(4, 30, 4)
    steering = FKSteering(first, lam=1.5, schedule=ALL[:4], ess_threshold=0.5)
    states, _ = walk(steering, rewards)
    state = steering.init(30, 4, steps=4)
    logw, seen, did = torch.zeros(30, 4).double(), torch.zeros(30, 4).double(), 0
    for i, got in enumerate(states):
        logw = logw + 1.5 * (rewards[i] - seen)
        w = logw.softmax(1)
        resampled = 1 / w.square().sum(1) < 2.0
        local = got.ancestors.view(30, 4) - 4 * torch.arange(30)[:, None]
        assert torch.equal(local[~resampled], torch.arange(4).expand(int((~resampled).sum()), 4))
        logw = torch.where(resampled[:, None], 0.0, logw)
        seen = rewards[i].gather(1, local)
        assert torch.allclose(got.logw, logw, atol=1e-12)
        did += int(resampled.sum())
    assert 20 < did < 100
    assert state.index == -1  # states are never written to


# --- the schedule, and what is asked of a reward


@pytest.mark.parametrize(
    ("schedule", "steps", "want"),
    [
        ({"start": 0.2, "stop": 0.8, "every": 0.2}, 100, [20, 40, 60, 80, 99]),
        ({"start": 0.2, "stop": 0.8, "every": 0.2}, 7, [1, 3, 4, 6]),
        ({"start": 0.0, "stop": 1.0, "every": 0.5}, 10, [0, 5, 9]),
        ({"start": 0.0, "stop": 0.3, "every": 0.1}, 10, [0, 1, 2, 3, 9]),  # whatever 0.3 / 0.1 is
        ([19, 39], 41, [19, 39, 40]),
        ((0, 1), 2, [0, 1]),
        (lambda step: step > 6, 9, [7, 8]),
    ],
)
def test_rewards_are_asked_for_on_schedule(schedule: Any, steps: int, want: list[int]) -> None:
    asked: list[RewardContext] = []

    def reward(samples: Tensor, context: RewardContext) -> Tensor:
        asked.append(context)
        return first(samples)

    recorder = Recorder()
    steering = FKSteering(reward, schedule=schedule, lam=0.1)
    sample(exact(), (2, 1), solver=DDIM(1.0), steps=steps, steering=steering, generator=rng(), callback=recorder)
    assert [c.step for c in asked] == want
    assert [c.last for c in asked] == [False] * (len(want) - 1) + [True]
    # The last reward is of the sample at its own time, others of predictions a step before.
    times = [1.0, *recorder.times]
    assert [c.t for c in asked] == pytest.approx([*(times[i] for i in want[:-1]), times[-1]])


def test_the_last_reward_is_of_the_sample_itself() -> None:
    x, info = sample(
        exact(), (6, 1), solver=DDIM(1.0), steps=5, steering=FKSteering(first, pick="all", lam=0.3), generator=rng(),
        return_info=True,
    )  # fmt: skip
    assert torch.equal(info.steering.reward.flatten(), x[:, 0].double())
    best = sample(exact(), (6, 1), solver=DDIM(1.0), steps=5, steering=FKSteering(first, lam=0.3), generator=rng())
    assert torch.equal(best, x.view(6, 4).amax(1, keepdim=True))


def test_black_boxes_in_parts_and_decoded() -> None:
    def texts(rows: Tensor) -> list[str]:
        return [f"{v:.6f}" for v in rows[:, 0].tolist()]

    found = []
    for size in (None, 3, 1):
        steering = FKSteering(
            lambda words: [float(w) for w in words], decode=texts, reward_batch_size=size, schedule=[1, 3], lam=1.0
        )
        found.append(sample(exact(), (5, 1), solver=DDIM(1.0), steps=5, steering=steering, generator=rng()))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("inside", [False, True])
def test_rewards_of_draws(inside: bool) -> None:
    m, lam = 5, 2.0
    draws = torch.randn(m, 6, 2, dtype=torch.float64, generator=rng())

    class Drawing:
        def draw(self, n: int, *, generator: Any = None) -> Tensor:
            assert n == m
            return draws

    steering = FKSteering(
        first, lam=lam, num_particles=3, intermediate="samples", num_x0_samples=m, lam_inside=inside, schedule=[0],
        ess_threshold=0.0,
    )  # fmt: skip
    r = draws[..., 0].T.reshape(2, 3, m)
    want = (lam * r).exp().mean(2).log() if inside else lam * r.exp().mean(2).log()
    for how in ({"pred": Drawing()}, {"x0_sampler": Drawing().draw}):
        x, state = steering.step(steering.init(2, 3, steps=3), draws[0], step=0, **how)
        assert torch.allclose(state.logw, want, rtol=1e-12)
        # The last reward is of what was generated.
        _, state = steering.step(state, x, step=2, last=True, **how)
        assert torch.allclose(state.logw, lam * x[:, 0].view(2, 3), rtol=1e-12)
    with pytest.raises(ValueError, match=r"x0_sampler must return shape \(5, 6, ...\), got \(6, 5, 2\)"):
        steering.step(
            steering.init(2, 3, steps=3), draws[0], step=0, x0_sampler=lambda n, generator: draws.transpose(0, 1)
        )


# --- many systems, and what is carried along


def test_systems_never_mix_and_their_order_does_not_matter() -> None:
    """Rewards of one winner per system: it takes over, whatever is drawn. A generator for each row."""
    x_T, turned = noise(12, 1), torch.tensor([2, 0, 1])
    rows = (turned[:, None] * 4 + torch.arange(4)).flatten()

    def run(x: Tensor, seeds: list[int]) -> Tensor:
        recorder = Recorder()
        steering = FKSteering(first, lam=1e4, schedule=[2, 5], pick="all")
        sample(
            exact(), x, solver=DDIM(1.0), steps=8, steering=steering, generator=[rng(s) for s in seeds], callback=recorder
        )  # fmt: skip
        return torch.stack(recorder.states)

    got = run(x_T, list(range(12)))
    assert torch.equal(run(x_T[rows], rows.tolist()), got[:, rows])
    # Another system's start changes nothing.
    x_T[4:8] += 0.5
    other = run(x_T, list(range(12)))
    keep = [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(other[:, keep], got[:, keep])
    assert len(got[2].unique()) == 3  # one survivor of each, at the step it was chosen
    assert len(got[3].unique()) == 12


def test_what_solver_and_guidance_remember_moves_with_the_particles() -> None:
    """A multistep solver's run in which one particle takes over is the run that goes on from copies of it."""

    class Momentum:
        paired = True

        def init(self) -> dict[str, Any]:
            return {"past": None}

        def __call__(self, cond: Any, uncond: Any, state: Any = None, *, update: bool = True) -> Prediction:
            d = cond.x0 - uncond.x0
            d = d if state["past"] is None else 0.5 * (d + state["past"])
            if update:
                state["past"] = d
            return cond.replace(cond.x0 + d, "sample")

        def reindex(self, state: Any, ancestors: Tensor) -> Any:
            return {"past": state["past"][ancestors]}

    process, solver, guidance = VP(), DPMSolverSDE(order=2), Momentum()
    denoiser = Denoiser(lambda x, t: x.sin(), process, unconditional=lambda x, t: 0.9 * x.cos())
    x_T = noise(8, 1)
    options: dict[str, Any] = dict(solver=solver, steps=8, guidance=guidance)
    steering = FKSteering(first, lam=1e6, num_particles=4, schedule=[3], pick="all", ess_threshold=0.5)
    steered = Recorder()
    moved: list[Any] = []

    def listen(step: Step) -> None:
        steered(step)
        moved.append(step.steering.ancestors)

    sample(denoiser, x_T, steering=steering, generator=[rng(i) for i in range(8)], callback=listen, **options)
    assert moved[3].tolist() != list(range(8))
    assert moved[4] is None

    generators, kept = [rng(i) for i in range(8)], []

    def keep(step: Step) -> None:
        if step.index == 3:
            kept.append((step, [g.get_state() for g in generators]))

    sample(denoiser, x_T, generator=generators, callback=keep, **options)
    (step, states), rows = kept[0], moved[3]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    step.memory, step.guidance = step.memory.take(rows), guidance.reindex(step.guidance, rows)
    again = Recorder()
    taken = replace_x(step, step.x[rows])
    assert step.memory.values[0].shape == x_T.shape
    sample(denoiser, taken, generator=generators, callback=again, **options)
    assert len(again.states) == 4
    for got, want in zip(steered.states[4:7], again.states[:3], strict=True):  # the last step resamples once more
        assert torch.equal(got, want)


def replace_x(step: Step, x: Tensor) -> Step:
    return replace(step, x=x)


def test_a_corrector_that_is_a_proposal_leaves_the_tilt() -> None:
    """Guided by the reward's gradient, with the ratio of transitions, the same law: a normal one's mean moves by lam times its
    variance, that of the model of forty steps."""
    from polyak.generate.problems import ExactDenoiser, Gaussian

    lam, c = 1.0, 0.5
    law, process = Gaussian([0.3], [c]), VP()
    denoiser = ExactDenoiser(law, process)

    class Pull:
        paired = False

        def init(self) -> None:
            return None

        def __call__(self, cond: Any, uncond: Any, state: Any = None, *, update: bool = True) -> Prediction:
            shift = 0.6 * lam * float(process.sigma(cond.t)) ** 2 * c
            return cond.replace(cond.x0 + shift, "sample")

        def reindex(self, state: Any, ancestors: Tensor) -> None:
            return None

    options: dict[str, Any] = dict(solver=DDIM(1.0), steps=40, generator=rng(), dtype=torch.float64)
    means = {}
    for correct in (True, False):
        steering = FKSteering(
            first, lam=lam, num_particles=8000, correct_proposal=correct, ess_threshold=0.5, pick="all"
        )
        x, info = sample(denoiser, (1, 1), steering=steering, guidance=Pull(), return_info=True, **options)
        means[correct] = (info.steering.logw.softmax(1)[0] * x[:, 0]).sum().item()
    free = sample(denoiser, (20_000, 1), **options)
    want = (free.mean() + lam * free.var()).item()
    assert abs(means[True] - want) < 0.03
    assert means[False] > want + 0.1
    assert sample(denoiser, (2000, 1), guidance=Pull(), **options).mean() > free.mean() + 0.1  # it does pull


def test_golden() -> None:
    """Plain arithmetic with the same draws: DDIM with eta = 1, systematic resampling of carried weights, three systems of four."""
    process, lam, k = VP(), 4.0, 4
    steering = FKSteering(
        first, lam=lam, num_particles=k, schedule=[1, 3, 4], ess_threshold=0.7, pick="all", generator=rng(9)
    )
    got, info = sample(
        exact(), (3, 1), solver=DDIM(1.0), steps=6, steering=steering, generator=rng(4), return_info=True, dtype=torch.float64
    )  # fmt: skip
    times = process.grid(6, "time").tolist()
    noises, own = rng(4), rng(9)
    x = process.prior((12, 1), generator=noises, dtype=torch.float64)
    logw, before, log_z, resamplings = [[0.0] * k for _ in range(3)], [[0.0] * k for _ in range(3)], [0.0] * 3, 0
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        x0 = exact()(x, s).x0
        a, b, c, d = (float(v) for v in (process.alpha(s), process.sigma(s), process.alpha(t), process.sigma(t)))
        std = d * math.sqrt(1 - (a * d / (b * c)) ** 2)
        eps = (x - a * x0) / b
        x = c * x0 + math.sqrt(d**2 - std**2) * eps + std * torch.randn(12, 1, dtype=torch.float64, generator=noises)
        if i not in (1, 3, 4, 5):
            continue
        reward = (x if i == 5 else x0).view(3, k).tolist()
        uniforms = torch.rand(3, dtype=torch.float64, generator=own).tolist()
        rows = list(range(12))
        for j in range(3):
            new = [w + lam * (r - p) for w, r, p in zip(logw[j], reward[j], before[j], strict=True)]
            log_z[j] += math.log(sum(map(math.exp, new)) / sum(map(math.exp, logw[j])))
            weights = [math.exp(w) / sum(map(math.exp, new)) for w in new]
            ancestors = list(range(k))
            if 1 / sum(w * w for w in weights) < 0.7 * k:
                resamplings += 1
                sums = list(itertools.accumulate(weights))
                ancestors = [sum((m + uniforms[j]) / k >= total for total in sums[:-1]) for m in range(k)]
                new = [0.0] * k
            logw[j], before[j] = new, [reward[j][m] for m in ancestors]
            rows[j * k : (j + 1) * k] = [j * k + m for m in ancestors]
        x = x[rows]
    assert 3 <= resamplings <= 9
    assert torch.allclose(got, x, rtol=1e-9, atol=1e-9)
    assert torch.allclose(info.steering.log_z, torch.tensor(log_z, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert torch.allclose(info.steering.logw, torch.tensor(logw, dtype=torch.float64), rtol=1e-9, atol=1e-9)


# --- rewards that are no numbers


def test_a_reward_that_is_nan_has_no_weight() -> None:
    rewards = random_rewards(4, 6, 4)
    rewards[1, :, 2] = torch.nan
    rewards[1, 0, 3] = -torch.inf
    for threshold in (1.0, 0.0):
        states, x = walk(FKSteering(first, lam=0.1, schedule=ALL[:4], ess_threshold=threshold, pick="all"), rewards)
        if threshold:
            assert not (states[1].ancestors % 4 == 2).any()
            assert 3 not in states[1].ancestors
        else:  # carried, it stays without weight
            assert (states[-1].logw[:, 2] == -torch.inf).all()
            assert states[-1].logw[0, 3] == -torch.inf
        assert not states[-1].logw.isnan().any()
        assert states[-1].nan == 6
        assert not states[-1].collapsed
    with pytest.warns(RuntimeWarning, match="6 rewards were NaN: the weight of these particles is 0"):
        FKSteering(first).select(states[-1], x)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("at", [1, 3])
@every_potential
def test_a_system_without_rewards_stays_as_it_is(potential: Any, bad: float, at: int) -> None:
    rewards = random_rewards(4, 2, 4)
    rewards[at, 1] = bad
    given: dict[str, Any] = dict(lam=0.2, potential=potential, schedule=ALL[:4], ess_threshold=0.0)
    states, x = walk(FKSteering(first, **given), rewards)
    assert states[at].collapsed == 1
    assert torch.equal(states[at].logw[1], states[at - 1].logw[1])
    assert (states[at].logw[0] != states[at - 1].logw[0]).all()
    resampled, _ = walk(FKSteering(first, **{**given, "ess_threshold": 1.0}), rewards)
    assert resampled[at].ancestors is not None
    with pytest.warns(RuntimeWarning) as warned:
        FKSteering(first).select(states[-1], x)
    said = [str(w.message) for w in warned]
    assert "1 times no particle of a system had a finite reward" in said[-1]
    assert len(said) == (2 if math.isnan(bad) else 1)
    if at == 1 and potential == "diff":  # what came before the gap counts
        assert torch.allclose(states[-1].logw, 0.2 * rewards[-1], atol=1e-12)


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": math.inf}, "lam must be finite"),
        ({"potential": "mean"}, "potential must be one of 'diff', 'max'"),
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"ess_threshold": 1.1}, "ess_threshold must be in"),
        ({"scheme": "sytematic"}, "scheme must be one of.*'systematic'"),
        ({"intermediate": "x1"}, "intermediate must be one of"),
        ({"num_x0_samples": 0}, "num_x0_samples must be at least 1"),
        ({"r_min": "last"}, "r_min must be one of 'first'"),
        ({"reward_batch_size": 0}, "reward_batch_size must be at least 1"),
        ({"parity": "paper"}, "parity must be one of"),
        ({"pick": "mean"}, "pick must be one of"),
        ({"schedule": [3, 2]}, r"schedule must be increasing step indices, got \[3, 2\]"),
        ({"schedule": [3, 3]}, "schedule must be increasing"),
        ({"schedule": [-1, 3]}, r"schedule\[0\] must be at least 0, got -1"),
        ({"schedule": {"start": 0.2}}, "schedule must have start, stop and every"),
        ({"schedule": {"start": 0.2, "stop": 0.8, "every": 0.0}}, r"schedule\['every'\] must be in \(0, 1\]"),
        ({"schedule": {"start": 0.9, "stop": 0.8, "every": 0.1}}, "schedule must start before it stops"),
        ({"parity": "official", "r_min": "first"}, 'parity="official" needs a number as r_min'),
        ({"parity": "official", "potential": lambda r, state: r}, "needs .* a potential by its name"),
        ({"parity": "official", "correct_proposal": True}, "needs .* no correct_proposal"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FKSteering(first, **options)


def test_runs_that_are_refused() -> None:
    run: dict[str, Any] = dict(solver=DDIM(1.0), steps=5, generator=rng())
    with pytest.raises(ValueError, match=r"deterministic solver DDIM.*resampled copies never separate.*eta > 0"):
        sample(exact(), (2, 1), steering=FKSteering(first), **{**run, "solver": DDIM()})
    for fine in ({"potential": "is"}, {"potential": "bon"}, {"num_particles": 1}, {"ess_threshold": 0.0}):
        sample(exact(), (2, 1), steering=FKSteering(first, **fine), **{**run, "solver": DDIM()})
    with pytest.raises(ValueError, match="schedule must have indices below the number of steps, 5, got 5"):
        sample(exact(), (2, 1), steering=FKSteering(first, schedule=[1, 5]), **run)
    with pytest.raises(ValueError, match=r"reward must return shape \(2, 4\) or \(8,\), got \(2, 4, 1\)"):
        sample(exact(), (2, 1), steering=FKSteering(lambda s: s), **run)
    with pytest.raises(ValueError, match="needs the number of steps"):
        FKSteering(first).init(2, 4)
    steering = FKSteering(first, schedule=[0, 1])
    x, state = steering.step(steering.init(2, 4), noise(8, 1), x0_hat=noise(8, 1), step=1)
    for again in (1, 0):
        with pytest.raises(ValueError, match=f"step must increase, got {again} after 1"):
            steering.step(state, x, x0_hat=x, step=again)
    with pytest.raises(ValueError, match='intermediate="x0" needs x0_hat'):
        steering.step(steering.init(2, 4), x, step=0)
    with pytest.raises(ValueError, match='intermediate="samples" needs x0_sampler'):
        FKSteering(first, schedule=[0], intermediate="samples").step(steering.init(2, 4), x, x0_hat=x, step=0)
    with pytest.raises(ValueError, match=r"potential must return log G of shape \(2, 4\)"):
        FKSteering(first, schedule=[0], potential=lambda r, state: r[0]).step(steering.init(2, 4), x, x0_hat=x, step=0)


def test_half_precision_is_weighed_in_double() -> None:
    x, info = sample(
        Denoiser(lambda x, t: x * 0.1, VP()), (2, 3), solver=DDIM(1.0), steps=5, generator=rng(), dtype=torch.bfloat16,
        steering=FKSteering(lambda s: s.half()[..., 0], schedule=[1, 2]), return_info=True,
    )  # fmt: skip
    assert x.dtype == torch.bfloat16
    assert x.shape == (2, 3)
    assert info.steering.logw.dtype == info.steering.reward.dtype == torch.float64
    assert sample(exact(), (0, 1), solver=DDIM(1.0), steps=5, steering=FKSteering(first)).shape == (0, 1)


def test_steering_is_asked_after_guidance() -> None:
    """With a guidance the reward is of the guided prediction, and its ratio does not count unless it is asked to."""
    from polyak.generate.problems import ExactDenoiser, ring

    law = ring(4)
    denoiser = ExactDenoiser(law.of_class(1), VP(), unconditional=law)
    seen: list[Tensor] = []

    def reward(samples: Tensor) -> Tensor:
        seen.append(samples)
        return samples.flatten(2).sum(2)

    x_T = noise(4, 2)
    sample(
        denoiser,
        x_T,
        solver=DDIM(1.0),
        steps=4,
        guidance=CFG(3.0),
        steering=FKSteering(reward, schedule=[0]),
        generator=rng(),
    )
    want = Evaluator(denoiser, guidance=CFG(3.0))(Query(x_T, 1.0)).x0
    assert torch.equal(seen[0].view(4, 2), want)


# --- the published code


def published(rewards: Tensor, potential: str, lam: float, adaptive: bool, ancestors: list[Tensor]) -> list[Tensor]:
    """Weights of one system, from the description of FKD.resample, along given resamplings."""
    k = rewards.shape[1]
    before, product, weights = torch.zeros(k).double(), torch.ones(k).double(), []
    for i, r in enumerate(rewards):
        last = i == len(rewards) - 1
        if potential == "max":
            r = torch.maximum(r, before)
        elif potential == "sum":
            r = r + before
        w = torch.exp(lam * (r - before if potential == "diff" else r))
        if last and potential != "diff":
            w = torch.exp(lam * r) / product
        w = w.clamp(0, 1e10).nan_to_num(0.0)
        weights.append(w)
        p = w / w.sum()
        if not (adaptive or last) or 1 / p.square().sum() < 0.5 * k:
            r, product = r[ancestors[i]], product[ancestors[i]] * w[ancestors[i]]
        else:
            assert torch.equal(ancestors[i], torch.arange(k))
        before = r
    return weights


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("potential", ["diff", "max", "sum", "rt"])
def test_parity_has_the_published_weights(potential: str, adaptive: bool, monkeypatch: Any) -> None:
    """What it resamples by, at each scoring, against the description; particles are drawn in proportion to it."""
    import polyak.generate.fk_steering as module

    seen: list[Tensor] = []
    plain = module.resample

    def spy(logw: Tensor, **how: Any) -> Tensor:
        assert how["scheme"] == "multinomial"
        seen.append(logw)
        return plain(logw, **how)

    monkeypatch.setattr(module, "resample", spy)
    rewards = random_rewards(5, 1, 6, seed=3)
    rewards[2, 0, 1] = 40.0  # where weights are clamped
    steering = FKSteering(
        first, lam=1.3, potential=potential, num_particles=6, schedule=ALL[:5], parity="official",
        ess_threshold=0.5 if adaptive else 1.0,
    )  # fmt: skip
    states, _ = walk(steering, rewards)
    want = published(rewards[:, 0], potential, 1.3, adaptive, [s.ancestors for s in states])
    for got, w in zip(seen, want, strict=True):
        assert torch.allclose(got[0].exp(), w, rtol=1e-9)
    assert states[-1].log_z.isnan().all()


def test_erratum_weights_are_dropped_where_nothing_is_resampled() -> None:
    """A gentle tilt: the effective sample size never falls below one half, and the law stays that of the model."""
    lam, found = 0.25, {}
    for parity in (None, "official"):
        steering = FKSteering(
            first, lam=lam, num_particles=K, schedule=[1, 2], ess_threshold=0.5 if parity else 0.1, parity=parity
        )
        state, x = walks(steering)
        found[parity] = (state.logw.softmax(1) * x).sum(1)
        resampled = (state.ancestors.view(SYSTEMS, K) != torch.arange(SYSTEMS * K).view(SYSTEMS, K)).any(1)
        assert resampled.double().mean() < 0.01
    ours, theirs = (found[p].mean().item() for p in (None, "official"))
    spread = found["official"].std().item() / SYSTEMS**0.5
    assert abs(theirs) < 0.1 * lam * WALK + 5 * spread
    assert ours > 0.75 * lam * WALK  # the self-normalised mean of eight particles falls short by its own bias


def test_erratum_the_last_weight_of_max_is_of_the_running_maximum() -> None:
    """Two steps; the best prediction comes to nothing. Theirs is drawn as if it had not; ours by its final reward."""
    k = 6
    rewards = torch.tensor([[3.0, *[1.0] * 5], [0.5, *[1.0] * 5]]).double()[:, None].expand(2, 20_000, k)
    for parity, weight in ((None, math.exp(0.5)), ("official", math.exp(3.0))):
        steering = FKSteering(
            first, potential="max", lam=1.0, num_particles=k, schedule=[], parity=parity, scheme="multinomial"
        )
        # Seen at an earlier step that did not resample.
        state = replace(steering.init(20_000, k, steps=2), seen=rewards[0])
        _, state = steering.step(state, rewards[1].reshape(-1, 1), step=1, last=True, generator=rng())
        assert state.ancestors is not None
        share = (state.ancestors % k == 0).double().mean().item()
        assert abs(share - weight / (weight + 5 * math.e)) < 0.01


def test_erratum_weights_are_clamped() -> None:
    """Log-likelihoods of 30 and 40: beyond 1e10 all weigh the same."""
    rewards = torch.tensor([30.0, 40.0, 0.0, 0.0, 0.0, 0.0]).double().expand(1, 4000, 6)
    share = {}
    for parity in (None, "official"):
        steering = FKSteering(first, lam=1.0, num_particles=6, schedule=[], parity=parity, scheme="multinomial")
        state = walk(steering, rewards)[0][-1]
        share[parity] = (state.ancestors % 6 == 1).double().mean().item()
    assert share[None] == 1.0 or abs(share[None] - 1 / (1 + math.exp(-10))) < 1e-3
    assert abs(share["official"] - 0.5) < 0.02


def test_erratum_the_maximum_begins_at_zero() -> None:
    """Rewards below 0, as those of log-likelihoods: the published potential does not see them."""
    rewards = -5 + random_rewards(2, 5000, 4)
    moved = {}
    for parity in (None, "official"):
        steering = FKSteering(first, lam=3.0, potential="max", schedule=[0], parity=parity, scheme="multinomial")
        state = walk(steering, rewards)[0][0]
        best = rewards[0].argmax(1, keepdim=True)
        moved[parity] = (state.ancestors.view(-1, 4) % 4 == best).double().mean().item()
    assert moved[None] > 0.6
    assert abs(moved["official"] - 0.25) < 0.02


def test_without_a_tilt_too_rewards_that_are_nan_have_no_weight() -> None:
    """Theirs are exp(0 NaN) = NaN, which becomes 0."""
    rewards = random_rewards(2, 400, 4)
    rewards[0, :, 2] = torch.nan
    for parity in (None, "official"):
        steering = FKSteering(first, lam=0.0, schedule=[0], parity=parity, scheme="multinomial")
        assert not (walk(steering, rewards)[0][0].ancestors % 4 == 2).any()


def test_parity_of_rewards_that_are_nan() -> None:
    rewards = random_rewards(4, 5, 4)
    rewards[1, :, 2] = torch.nan
    rewards[2, 1] = torch.nan
    states, x = walk(FKSteering(first, lam=1.0, schedule=ALL[:4], parity="official"), rewards)
    assert not (states[1].ancestors % 4 == 2).any()
    assert states[2].collapsed == 1
    with pytest.warns(RuntimeWarning):
        assert FKSteering(first, parity="official").select(states[-1], x).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu_no_step_waits_for_the_device() -> None:
    cases = [dict(potential=p) for p in ("diff", "max", "bon")] + [dict(parity="official"), dict(r_min="first")]
    x = torch.randn(4000, 3, device="cuda")
    for options in cases:
        steering = FKSteering(first, num_particles=8, schedule=[0, 1], **options)  # type: ignore[arg-type]
        for watched in ("default", "error"):  # kernels are made at the first one
            state = steering.init(500, 8, device="cuda", steps=3)
            generator = torch.Generator("cuda").manual_seed(0)
            torch.cuda.set_sync_debug_mode(watched)
            try:
                y, state = steering.step(state, x, x0_hat=x, step=0, generator=generator)
                y, state = steering.step(state, y, x0_hat=y, step=2, last=True, generator=generator)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert steering.select(state, y).shape == (500, 3)


def test_the_state_is_one_of_steering() -> None:
    state = FKSteering(first, schedule=[]).init(2, 3)
    assert isinstance(state, SteeringState)
    assert state.moved(None).ancestors is None
