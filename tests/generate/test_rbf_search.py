"""Searches: every call is counted, none is lost; the forcing of budgets against a plain program; what each of them chooses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from polyak.generate import SVDD, VP, BestOfN, CoDe, Denoiser, Flow, FlowSDE, RolloverBudget, SearchResult, SoP, convert
from polyak.generate.rewards import Scorer

SHAPE = (3,)
TARGET = torch.tensor([0.8, -0.5, 0.1])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(x: torch.Tensor) -> torch.Tensor:
    """Larger is nearer; ties have no probability."""
    return -(x - TARGET.to(x)).square().sum(-1)


def velocity(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return torch.sin(2 * x) + 0.3 * label[:, None].to(x) * x


class Counting:
    """A network that counts its rows, and may say for which system each was."""

    def __init__(self, network: Any = velocity) -> None:
        self.network, self.rows, self.calls = network, 0, 0

    def __call__(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        return self.network(x, label)


def searched(search: Any, batch: int = 1, process: Any = None, dtype: Any = torch.float64) -> SearchResult:
    model = velocity if process is None else convert(velocity, Flow(), process)
    return search.sample(model, process or Flow(), SHAPE, batch, dtype=dtype)


SEARCHES = [
    (RolloverBudget(near, 97, 5, 2, 6), 96),  # the last batch of two would reach 97? no: it stops before it would
    (RolloverBudget(near, 98, 5, 2, 6), 96),
    (RolloverBudget(near, 97, 5, 2, 6, "ode"), 96),
    (RolloverBudget(near, 97, 5, 1, 6, lookahead=4), 94),
    (BestOfN(near, 97, 5), 95),
    (BestOfN(near, 97, 5, "ode"), 94),
    (SVDD(near, 97, 5), 2 + 2 * 9 * 4),
    (SVDD(near, 97, 5, candidates=11), 2 + 2 * 11 * 4),
    (CoDe(near, 97, 5, 3, 4, "ode"), 3 + 3 * 4 * 4 + 4),
    (SoP(near, 97), 2 * (1 + 4 * 5) * 2),
    (SoP(near, 97, finish="ode"), 84),
]


@pytest.mark.parametrize("path", [None, VP()], ids=["linear", "vp"])
@pytest.mark.parametrize(("search", "spent"), SEARCHES)
def test_calls_are_counted_and_never_more_than_the_budget(search: Any, spent: int, path: Any) -> None:
    network = Counting()
    model = network if path is None else convert(network, Flow(), path)
    found = search.sample(model, path or Flow(), SHAPE, 3)
    assert network.rows == 3 * found.nfe
    assert found.nfe == spent <= search.nfe
    assert found.x.shape == (3, *SHAPE)
    assert found.reward.shape == (3,)
    assert torch.allclose(near(found.x[:, None])[:, 0].double(), found.reward, atol=1e-6)
    assert found.trace.nfe[-1] <= spent
    assert bool((torch.diff(found.trace.best, dim=2) >= 0).all())
    assert bool((torch.diff(found.trace.step, dim=2) >= 0).all())
    if search.__class__ is not SoP and search.finish == "x0hat":
        assert bool((found.reward <= found.trace.best[..., -1].amax(1) + 1e-9).all())


# ----------------------------------------------------------------------------------------------------- rollover budgets


def forced(nfe: int, steps: int, chains: int, init: int, process: Any, reward: Any, seed: int) -> tuple[Any, list[Any]]:
    """The official program with lists, chain by chain; the noise is drawn for all chains at once, as there."""
    model, noise = convert(velocity, Flow(), process), rng(seed)
    times = FlowSDE().times(process, steps=steps).tolist()

    def ask(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        u = model(x[None], torch.tensor([t], dtype=torch.float64))[0]
        alpha, sigma, d_alpha, d_sigma = (f(t) for f in (process.alpha, process.sigma, process.dalpha, process.dsigma))
        return u, (sigma * u - d_sigma * x) / (d_alpha * sigma - d_sigma * alpha)

    first = torch.randn(1, chains * init, *SHAPE, dtype=torch.float64, generator=noise)[0]
    state: list[Any] = []
    for b in range(chains):
        tried = [(x, *ask(x, times[0])) for x in first[b * init : (b + 1) * init] * process.prior_std]
        x, u, x0 = max(tried, key=lambda one: reward(one[2]))
        state.append(dict(x=x, u=u, record=reward(x0), best=-math.inf, stored=None, step=0, count=1))
    own = (nfe - init * chains) // (steps * chains)
    spent, log = init * chains, []
    for one in state:
        one["quota"] = own
    while spent + chains < nfe:
        fresh = torch.randn(1, chains, *SHAPE, dtype=torch.float64, generator=noise)[0]
        spent += chains
        for one, z in zip(state, fresh, strict=True):
            t, end = times[one["step"]], times[one["step"] + 1]
            u, x, h, g = one["u"], one["x"], t - end, 3 * t**2
            alpha, sigma, d_alpha, d_sigma = (
                f(t) for f in (process.alpha, process.sigma, process.dalpha, process.dsigma)
            )
            score = (alpha * u - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))
            x = x + (-u + g**2 / 2 * score) * h + g * math.sqrt(h) * z
            u, x0 = ask(x, end)
            r = reward(x0)
            if r > one["best"]:
                one.update(stored=(x, u, x0), best=r, shown=(x0, r))
            improved, may_go = r > one["record"], one["step"] < steps - 2
            if improved:
                one["record"] = r
            if improved and may_go:
                one.update(
                    x=x, u=u, quota=one["quota"] - one["count"] + own, count=0, step=one["step"] + 1, best=-math.inf
                )
            elif one["count"] % one["quota"] == 0 and may_go:
                x, u, _ = one["stored"]
                one.update(x=x, u=u, quota=own, count=0, step=one["step"] + 1, best=-math.inf)
            one["count"] += 1
        log.append([(one["record"], one["step"]) for one in state])
    return max((one["shown"] for one in state), key=lambda shown: shown[1]), log


@pytest.mark.parametrize("process", [Flow(), VP()], ids=["linear", "vp"])
@pytest.mark.parametrize(("nfe", "steps", "chains", "init"), [(150, 6, 2, 5), (61, 3, 3, 1), (40, 2, 1, 4)])
def test_budgets_are_forced_as_in_the_official_program(
    process: Any, nfe: int, steps: int, chains: int, init: int
) -> None:
    reward = lambda x0: near(x0).item()  # noqa: E731
    for seed in range(3):
        (x, r), log = forced(nfe, steps, chains, init, process, reward, seed)
        found = searched(RolloverBudget(near, nfe, steps, chains, init, generator=rng(seed)), 1, process)
        assert torch.allclose(found.x[0], x, rtol=1e-9, atol=1e-9)
        assert found.reward.item() == pytest.approx(r, rel=1e-9)
        for b in range(chains):
            assert found.trace.best[0, b, 1:].tolist() == pytest.approx([row[b][0] for row in log], rel=1e-9)
            assert found.trace.step[0, b, 1:].tolist() == [row[b][1] for row in log]


def draws_at_each_step(found: SearchResult) -> torch.Tensor:
    """How many draws the first chain made at each step."""
    return found.trace.step[0, 0, :-1].bincount()


def test_a_reward_that_is_the_same_everywhere_gives_every_step_its_quota() -> None:
    search = RolloverBudget(lambda x: 0 * x.sum(-1), generator=rng())
    found = searched(search)
    assert search.quota == 22
    assert draws_at_each_step(found).tolist() == [22] * 8 + [48]  # 25 + 224 calls: the last step has what is left
    assert found.trace.granted.tolist() == [[9 * 22] * 2]
    assert found.trace.rolled.tolist() == [[0, 0]]


def test_a_reward_that_always_improves_spends_all_at_the_last_step() -> None:
    calls = iter(range(10_000))

    def later(x: torch.Tensor) -> list[float]:
        return [float(next(calls)) for _ in range(x.shape[0] * x.shape[1])]

    found = searched(RolloverBudget(later, chains=1, init=25, nfe=201, generator=rng()))
    assert draws_at_each_step(found).tolist() == [1] * 8 + [167]
    assert found.trace.step[0, 0, -1] == 8


def test_what_is_left_over_is_granted_again() -> None:
    """The quotas of all steps are those of equal shares and what rolled over; what rolled over at one step is not lost later."""
    search = RolloverBudget(near, 300, 8, 2, 10, generator=rng(2))
    found = searched(search, 4, VP())
    entered = found.trace.step[..., -1] + 1
    assert torch.equal(found.trace.granted, search.quota * entered + found.trace.rolled)
    assert bool((found.trace.rolled > 0).any())
    # A record is never lowered, so that a chain may spend its quota without one.
    assert bool((torch.diff(found.trace.best, dim=2) >= 0).all())


def test_systems_and_chains_are_searched_for_themselves() -> None:
    """One system's reward does not matter to another, nor to another chain of its own."""
    base = searched(RolloverBudget(near, 120, 5, 2, 5, generator=rng()), 2)

    def changed(x: torch.Tensor, context: Any) -> torch.Tensor:
        return near(x) * torch.tensor([1.0, -1.0])[list(context.systems)][:, None]

    other = searched(RolloverBudget(changed, 120, 5, 2, 5, generator=rng()), 2)
    assert torch.equal(base.x[0], other.x[0])
    assert not torch.equal(base.x[1], other.x[1])

    def second(x: torch.Tensor) -> torch.Tensor:
        return near(x) - 1e3 * torch.arange(x.shape[1]).ge(x.shape[1] // 2)

    lone = searched(RolloverBudget(second, 120, 5, 2, 5, generator=rng()), 2)
    assert torch.equal(lone.trace.best[:, 0], base.trace.best[:, 0])
    assert torch.equal(lone.trace.step[:, 1], base.trace.step[:, 1])


def test_looking_ahead_spends_more_calls_at_once_and_keeps_the_account() -> None:
    search = RolloverBudget(lambda x: 0 * x.sum(-1), 200, 6, 1, 8, lookahead=5, generator=rng())
    network = Counting()
    found = search.sample(network, Flow(), SHAPE, 2)
    assert network.calls == 1 + 38
    assert found.nfe == 198
    # A quota of 32 is overdrawn by three, which the next one is charged with.
    assert draws_at_each_step(found).tolist() == [7, 6, 7, 6, 12]
    assert found.trace.granted[0, 0] == 5 * 32 + found.trace.rolled[0, 0]


def test_an_end_by_the_ode_is_the_exact_one_where_the_model_is_straight() -> None:
    """Of a point mass, with the velocity (x - target) / t, both ends are the same."""
    straight = Denoiser(lambda x, label: (x - TARGET.to(x)) / label[:, None].to(x), Flow(), "flow")
    for process in (Flow(), VP()):
        model = convert(straight, Flow(), process)
        for finish in ("x0hat", "ode"):
            found = RolloverBudget(near, 60, 4, 2, 3, finish, generator=rng()).sample(model, process, SHAPE)
            assert torch.allclose(found.x[0], TARGET, atol=1e-4), (process, finish)


def test_an_end_by_the_ode_solves_it() -> None:
    """The winner, which is the best of two noises, follows its flow to t = 0: against 4000 Euler steps."""
    search = BestOfN(near, 2 * 1000 + 999, 1000, "ode", generator=rng())
    found = search.sample(velocity, Flow(), SHAPE, dtype=torch.float64)
    start = torch.randn(1, 2, *SHAPE, dtype=torch.float64, generator=rng())[0]
    x, n = start.clone(), 4000
    for i in range(n):
        x = x - velocity(x, torch.full((2,), 1 - i / n, dtype=torch.float64)) / n
    best = near(x).argmax()
    assert torch.allclose(found.x[0], x[best], atol=3e-3)
    assert found.reward.item() == pytest.approx(near(found.x[0]).item())


def test_an_end_by_the_ode_begins_at_the_winners_time() -> None:
    """That of its last draw: with a reward that is the same everywhere a chain ends at the last time but one."""
    asked: list[float] = []

    def network(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        asked.append(float(label[0]))
        return velocity(x, label)

    search = RolloverBudget(lambda x: 0 * x.sum(-1), 60, 4, 1, 3, "ode", generator=rng())
    search.sample(network, Flow(), SHAPE, dtype=torch.float64)
    begin = FlowSDE().times(Flow(), steps=4)[-2].item()
    assert asked[-4:] == pytest.approx([begin * part for part in (1.0, 0.75, 0.5, 0.25)])
    # A model is not asked before t_min, though the ODE ends at 0.
    search.sample(network, Flow(0.1), SHAPE, dtype=torch.float64)
    assert asked[-1] == 0.1


# ----------------------------------------------------------------------------------------------------- the other searches


def written_out(chains: int, k: int, block: int, steps: int, seed: int) -> torch.Tensor:
    """SVDD and CoDe, in loops."""
    noise, process = rng(seed), Flow()
    times = FlowSDE().times(process, steps=steps).tolist()
    x = torch.randn(1, chains, *SHAPE, dtype=torch.float64, generator=noise)[0]
    for i in range(steps - 1):
        t, h = times[i], times[i] - times[i + 1]
        if i % block == 0:
            x = x.repeat_interleave(k, 0)
        u = velocity(x, torch.full((len(x),), t, dtype=torch.float64))
        eps = x + (1 - t) * u
        z = torch.randn(1, len(x), *SHAPE, dtype=torch.float64, generator=noise)[0]
        x = x - h * u - h * 9 * t**4 / 2 * eps / t + 3 * t**2 * math.sqrt(h) * z
        x0 = x - times[i + 1] * velocity(x, torch.full((len(x),), times[i + 1], dtype=torch.float64))
        if (i + 1) % block == 0 or i == steps - 2:
            rows = [c * k + int(near(x0[c * k : (c + 1) * k]).argmax()) for c in range(chains)]
            x, x0 = x[rows], x0[rows]
    return x0[near(x0).argmax()]


@pytest.mark.parametrize(("chains", "k", "block"), [(2, 4, 1), (1, 3, 2), (2, 1, 1), (3, 2, 3)])
def test_svdd_and_code_go_on_from_the_best(chains: int, k: int, block: int) -> None:
    """With one candidate it is the plain sampler of the SDE."""
    options = dict(nfe=300, steps=6, chains=chains, candidates=k, generator=rng(4))
    search: Any = SVDD(near, **options) if block == 1 else CoDe(near, **options, block=block)
    assert torch.allclose(searched(search).x[0], written_out(chains, k, block, 6, 4), rtol=1e-9)


def test_search_over_paths_is_written_out() -> None:
    search = SoP(near, 90, 2, 3, generator=rng(1))
    found, noise = searched(search), rng(1)
    n = 90 // (2 * (1 + 4 * 3))

    def down(x: torch.Tensor, high: float, low: float) -> tuple[torch.Tensor, torch.Tensor]:
        x0 = x
        for i in range(n):
            s, t = (high + (low - high) * j / n for j in (i, i + 1))
            u = velocity(x, torch.full((len(x),), s, dtype=torch.float64))
            x, x0 = x + (t - s) * u, x - s * u
        return x, x0

    x, x0 = down(torch.randn(1, 2, *SHAPE, dtype=torch.float64, generator=noise)[0], 1.0, 0.12)
    for low in (0.12, 0.09, 0.06, 0.03):
        high = low + 0.78
        ratio = (1 - high) / (1 - low)
        x = ratio * x.repeat_interleave(3, 0)
        x = (
            x
            + math.sqrt(high**2 - ratio**2 * low**2)
            * torch.randn(1, 6, *SHAPE, dtype=torch.float64, generator=noise)[0]
        )
        x, x0 = down(x, high, low - 0.03)
        rows = [int(near(x0[:3]).argmax()), 3 + int(near(x0[3:]).argmax())]
        x, x0 = x[rows], x0[rows]
    assert (search.rounds, found.nfe) == (4, n * 26)
    assert torch.allclose(found.x[0], x0[near(x0).argmax()], rtol=1e-6, atol=1e-8)


def test_best_of_n_is_the_best_of_the_odes_samples() -> None:
    found = searched(BestOfN(near, 60, 10, generator=rng()), 2)
    x = torch.randn(2, 6, *SHAPE, dtype=torch.float64, generator=rng()).flatten(0, 1)
    for i in range(10):
        x = x - velocity(x, torch.full((12,), 1 - i / 10, dtype=torch.float64)) / 10
    x = x.view(2, 6, *SHAPE)
    assert torch.allclose(found.x, x[torch.arange(2), near(x).argmax(1)], rtol=1e-9)


# --------------------------------------------------------------------------------------------------------------- rewards


def test_rewards_far_from_zero_are_told_apart() -> None:
    """Compared as exp(r), as the official code does, all of these are 0: the first candidate would win."""
    for offset in (-1e4, 1e4):
        for make in (
            lambda r: RolloverBudget(r, 80, 4, 2, 5, generator=rng()),
            lambda r: SVDD(r, 80, 4, generator=rng()),
            lambda r: BestOfN(r, 80, 4, generator=rng()),
        ):
            far = searched(make(lambda x, offset=offset: near(x.double()) + offset))
            assert torch.allclose(far.x, searched(make(near)).x)


def test_nan_counts_as_the_worst() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[..., 0] > 0, near(x), torch.nan)

    for search in (RolloverBudget(broken, 80, 4, 2, 5, generator=rng()), SVDD(broken, 80, 4, generator=rng())):
        with pytest.warns(RuntimeWarning, match="were NaN: they count as -inf"):
            found = searched(search, 5)
        assert bool((found.x[:, 0] > 0).all())
    nothing = RolloverBudget(lambda x: x.sum(-1) * torch.nan, 80, 4, 2, 5, generator=rng())
    with pytest.warns(RuntimeWarning):
        found = searched(nothing)
    assert bool(found.x.isfinite().all())
    assert found.trace.step[0, 0, -1] == 2  # and it came to the last step


def test_rewards_that_are_all_infinitely_bad_are_as_any_that_are_alike() -> None:
    """A step's first draw is gone on from, whatever its reward."""
    even, worst = (
        searched(RolloverBudget(lambda x, c=c: 0 * x.sum(-1) + c, 80, 4, 2, 5, generator=rng()))
        for c in (0.0, -math.inf)
    )
    assert torch.equal(even.x, worst.x)
    assert torch.equal(even.trace.step, worst.trace.step)


def test_scorers_decode_and_ask_in_parts() -> None:
    seen: list[int] = []

    def decode(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return 2 * rows

    scorer = Scorer(lambda x: near(x / 2), decode=decode, batch_size=4)
    found = searched(RolloverBudget(scorer, 80, 4, 2, 5, generator=rng()), 3)
    assert torch.equal(found.x, searched(RolloverBudget(near, 80, 4, 2, 5, generator=rng()), 3).x)
    assert max(seen) == 4


def test_states_of_half_precision_are_kept_in_single() -> None:
    """The network is asked in bfloat16; steps of the last bits would be lost in it."""
    asked: list[torch.dtype] = []

    def network(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        asked.append(x.dtype)
        return velocity(x.float(), label).to(x.dtype)

    search = RolloverBudget(near, 80, 4, 2, 5, generator=rng())
    found = search.sample(convert(network, Flow(), VP()), VP(), SHAPE, 2, dtype=torch.bfloat16)
    assert found.x.dtype == torch.bfloat16
    assert set(asked) == {torch.bfloat16}
    assert bool((found.reward > -1).all())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RolloverBudget(near, 69), "nfe must be at least 70 for RolloverBudget"),
        (lambda: RolloverBudget(near, 50), "nfe must be at least 70"),
        (lambda: RolloverBudget(near, 78, finish="ode"), "nfe must be at least 79"),
        (lambda: BestOfN(near, 9), "nfe must be at least 10"),
        (lambda: SVDD(near, 19), "nfe must be at least 20"),
        (lambda: SVDD(near, 100, candidates=6), "nfe must be at least 110"),
        (lambda: SoP(near, 41), "nfe must be at least 42"),
        (lambda: SoP(near, forward=0.8, backward=0.7), "backward must be above forward"),
        (lambda: SoP(near, seed=0.3), "forward must be at most"),
        (lambda: RolloverBudget(near, solver=FlowSDE(norm=0.0)), "solver must add noise for RolloverBudget"),
        (lambda: CoDe(near, solver=FlowSDE(norm=0.0)), "solver must add noise for CoDe"),
        (lambda: RolloverBudget(near, finish="now"), "finish must be one of"),
        (lambda: BestOfN(near).sample(Denoiser(velocity, Flow(), "flow"), VP(), SHAPE), "process must be the model's own"),
        (lambda: BestOfN(near).sample(convert(velocity, Flow(), VP()), Flow(), SHAPE), "process must be the model's own"),
        (lambda: convert(convert(velocity, Flow(), VP()), Flow(), VP()), "source must be the converted network's own"),
        (lambda: BestOfN(lambda x: x, 20).sample(velocity, Flow(), SHAPE), "reward must return shape"),
        (lambda: BestOfN(near, 20).sample(lambda x, t: x * torch.nan, Flow(), SHAPE), "NaN in the prediction of evaluation 1"),
        (lambda: BestOfN(near, 20).sample(velocity, Flow(), (0,)), "shape"),
    ],
)  # fmt: skip
def test_bad_input(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["rollover", "svdd"])
def test_no_decision_waits_for_the_device(kind: str) -> None:
    """From the second reward to the last but one nothing synchronizes."""
    device, asked = torch.device("cuda"), 0

    def reward(x: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += 1
        torch.cuda.set_sync_debug_mode("error" if 2 <= asked < last else "default")
        return -(x - 0.3).square().sum(-1)

    noise = torch.Generator(device).manual_seed(0)
    search: Any = (
        RolloverBudget(reward, 80, 4, 2, 5, generator=noise)
        if kind == "rollover"
        else SVDD(reward, 80, 4, generator=noise)
    )
    last = 35 if kind == "rollover" else 3
    model = convert(velocity, Flow(), VP())
    try:
        found = search.sample(model, VP(), SHAPE, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert asked == (35 if kind == "rollover" else 3)
    assert found.x.device.type == "cuda"
