"""The search: exact problems, exact budgets, selection on held-out values, and going on after a kill."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from lcsc_cases import Counting, Quadratic, states, trajectory, unrelated
from safetensors.torch import save_file
from torch import nn

from polyak.teachers import LCSC, CheckpointBank, Result, combine, ema_coefficients
from polyak.teachers.lcsc.objective import RECOMBINE
from polyak.teachers.lcsc.optimizers import OPTIMIZERS, full

NAMES = list(OPTIMIZERS)
PROBLEMS = {"unrelated": unrelated, "trajectory": trajectory}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def search(q: Quadratic, optimizer="evolution", evals=300, seed=0, **options) -> Result:
    return LCSC(q.states, objective=q, optimizer=optimizer, evals=evals, generator=seeded(seed), **options).run()


# -- exact problems --------------------------------------------------------------------------------------------------------


@cache
def best_average(problem: str, seed: int) -> float:
    return search(PROBLEMS[problem](seed), "grid", 2000).value


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("optimizer", "closed"), [("evolution", 0.8), ("cmaes", 0.99), ("quadratic", 0.99)])
def test_the_gap_between_the_best_average_and_the_minimum_is_closed(problem, optimizer, closed):
    seed = list(PROBLEMS).index(problem)
    q = PROBLEMS[problem](seed)
    least = q.at(q.minimum())
    average = best_average(problem, seed)
    found = search(q, optimizer, 2000, seed).value
    assert found >= least * (1 - 1e-12)
    assert (average - found) / (average - least) >= closed


def test_the_minimum_is_one():
    q = unrelated(0)
    a = q.minimum()
    assert abs(float(a.sum()) - 1) < 1e-12
    for seed in range(20):
        step = torch.randn(len(a), dtype=torch.float64, generator=seeded(seed))
        assert q.at(a + 1e-3 * (step - step.mean())) > q.at(a)


@pytest.mark.parametrize("optimizer", NAMES)
def test_an_easy_problem_is_solved_by_all_and_the_greedy_soup_stays_convex(optimizer):
    g = seeded(3)
    t = torch.randn(30, dtype=torch.float64, generator=g)
    T = t + torch.randn(6, 30, dtype=torch.float64, generator=g)  # around the target: the mean is good
    q = Quadratic(T, t, torch.eye(30, dtype=torch.float64))
    result = search(q, optimizer, 400)
    assert result.value < 0.5 * min(q.at(a) for a in torch.eye(6, dtype=torch.float64))
    if optimizer in ("greedy", "grid"):
        assert bool((result.tried >= 0).all())


def test_the_grid_holds_every_kind_of_average():
    q = unrelated(0, k=10)
    result = search(q, "grid", 400)
    assert result.tried[0].tolist() == ema_coefficients(10, 0.0).tolist()
    assert len({tuple(a) for a in result.tried.tolist()}) == 400
    firsts = {int((a != 0).nonzero()[0]) for a in result.tried}
    assert firsts == {*range(10)}
    for a in result.tried[1:]:
        start = int((a != 0).nonzero()[0])
        rate = 1 - float(a[-1])
        torch.testing.assert_close(a, ema_coefficients(10, rate, start=start), rtol=0, atol=1e-14)


# -- budgets and values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["evolution", "cmaes", "quadratic", "grid"])
@pytest.mark.parametrize("evals", [1, 7, 123, 400])
def test_the_objective_is_called_as_often_as_was_said(optimizer, evals):
    q, calls = unrelated(0, k=8), []

    def objective(state):
        calls.append(1)
        return q(state)

    result = LCSC(q.states, objective=objective, optimizer=optimizer, evals=evals).run()
    assert len(calls) == len(result.history) == len(result.tried) == evals


def test_greedy_ends_when_nothing_helps_and_never_spends_more():
    q = unrelated(0, k=8)
    assert len(search(q, "greedy", 5).history) == 5
    assert 8 < len(search(q, "greedy", 2000).history) < 2000


@pytest.mark.parametrize("optimizer", NAMES)
def test_the_best_never_rises_and_values_are_those_of_their_coefficients(optimizer):
    q = unrelated(1)
    result = search(q, optimizer)
    assert bool((result.best.diff() <= 0).all())
    assert result.value == float(result.history.min()) == float(result.best[-1])
    assert bool(((result.tried.sum(1) - 1).abs() < 1e-12).all())
    for a, value in zip(result.tried, result.history.tolist(), strict=True):
        assert abs(q.at(a) - value) <= 1e-9 * (1 + value)
    winner = result.tried[int(result.history.argmin())]
    assert torch.equal(result.coefficients, winner)


def test_the_seed_decides():
    q = unrelated(0)
    assert torch.equal(search(q, seed=1).tried, search(q, seed=1).tried)
    assert not torch.equal(search(q, seed=1).tried, search(q, seed=2).tried)
    before = torch.get_rng_state()
    search(q, "cmaes", seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_search_of_ones_own():
    def halves(k, evals, population, generator):
        yield torch.full((k - 1,), 1 / k, dtype=torch.float64)
        yield torch.zeros(k - 1, dtype=torch.float64)

    result = search(unrelated(0, k=4), halves, 50)
    assert result.tried.tolist() == [[0.25] * 4, [1, 0, 0, 0]]


def test_a_search_forgets_rounding_every_hundred_evaluations():
    """In float32 the weights of a value after a combination from the start are those of that combination, bitwise."""
    given = [{k: v.float() for k, v in s.items()} for s in unrelated(0).states]
    seen = []

    def objective(state):
        seen.append(state["w"].clone())
        return float(state["w"].square().sum())

    result = LCSC(given, objective=objective, evals=250).run()
    for n in (0, RECOMBINE, 2 * RECOMBINE):
        assert torch.equal(seen[n], combine(given, result.tried[n])["w"])
    drift = max(float((w - combine(given, a)["w"]).abs().max()) for w, a in zip(seen, result.tried, strict=True))
    assert 0 < drift < 1e-5


# -- models ----------------------------------------------------------------------------------------------------------------


def small(seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(X) - Y).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_is_the_candidate_and_ends_as_the_winner(dtype):
    given = [small(i).to(dtype).state_dict() for i in range(5)]
    model = small(9).to(dtype)

    def objective(m):
        assert m is model
        with torch.no_grad():
            return (m(X.to(dtype)).double() - Y).square().mean()

    lcsc = LCSC(given, objective=objective, model=model, evals=120)
    result = lcsc.run()
    expected = combine(given, result.coefficients)
    assert all(torch.equal(v, expected[k]) and v.dtype == dtype for k, v in model.state_dict().items())
    other = lcsc.apply_(small(7).to(dtype), result.coefficients)
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
    assert all(torch.equal(v, expected[k]) for k, v in lcsc.state_dict(result.coefficients).items())


def test_with_and_without_a_model_the_search_is_the_same():
    given, model = [small(i).state_dict() for i in range(5)], small(9)

    def of_state(state):
        m = small(8)
        m.load_state_dict(state)
        return loss(m)

    one = LCSC(given, objective=loss, model=model, evals=150).run()
    two = LCSC(given, objective=of_state, evals=150).run()
    assert torch.equal(one.history, two.history)


def test_tied_weights_are_added_to_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    given = [Tied().state_dict() for _ in range(3)]
    model = Tied()
    result = LCSC(given, objective=lambda m: float(m.b.weight.detach().square().sum()), model=model, evals=60).run()
    expected = combine(given, result.coefficients)["a.weight"]
    assert torch.equal(model.a.weight, expected)
    assert model.b.weight is model.a.weight
    assert abs(result.value - float(expected.square().sum())) < 1e-5


def test_a_device_budget_changes_nothing_but_reads():
    given = [small(i).state_dict() for i in range(5)]
    plain = LCSC(given, objective=loss, model=small(9), evals=150).run()
    counted = [Counting(s, str(i)) for i, s in enumerate(given)]
    lcsc = LCSC(counted, objective=loss, model=small(9), evals=150, device_budget=10**6)
    Counting.reads = 0
    kept = lcsc.run()
    assert Counting.reads < 150  # every evaluation but the few from the start reads nothing
    torch.testing.assert_close(plain.history[:100], kept.history[:100], rtol=1e-4, atol=0)


def test_a_model_must_have_the_checkpoints_entries():
    given = [small(i).state_dict() for i in range(3)]
    with pytest.raises(ValueError, match=r"the model lacks '2\.weight', which the checkpoints have"):
        LCSC(given, objective=loss, model=nn.Sequential(nn.Linear(4, 6))).run()
    with pytest.raises(ValueError, match=r"the checkpoints lack '3\.weight', which the model has"):
        LCSC(given, objective=loss, model=small(0).append(nn.Linear(2, 2))).run()
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(7, 4\) in the model, \(6, 4\) in checkpoints"):
        LCSC(given, objective=loss, model=nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2))).run()


# -- held-out values -------------------------------------------------------------------------------------------------------


def test_the_best_five_are_judged_again_and_the_winner_is_theirs():
    q, other = unrelated(0), unrelated(1)
    calls = []

    def heldout(state):
        calls.append(1)
        return Quadratic(q.T, other.t, other.A)(state)

    result = search(q, evals=200, heldout=heldout)
    assert len(calls) == len(result.finalists) == 5
    by_search = sorted(result.history.tolist())[:5]
    assert sorted(f.value for f in result.finalists) == by_search
    best = min(result.finalists, key=lambda f: f.heldout)
    assert (result.heldout, result.value) == (best.heldout, best.value)
    assert torch.equal(result.coefficients, best.coefficients)
    assert [f.heldout for f in result.finalists] == sorted(f.heldout for f in result.finalists)


def test_finalists_differ():
    def twice(k, evals, population, generator):
        for _ in range(evals):
            yield torch.zeros(k - 1, dtype=torch.float64)

    result = search(unrelated(0, k=4), twice, 20, heldout=lambda state: 1.0)
    assert len(result.finalists) == 1
    assert search(unrelated(0)).heldout is None
    assert len(search(unrelated(0), heldout=lambda state: 1.0, finalists=2).finalists) == 2


# -- going on after a kill -------------------------------------------------------------------------------------------------


def whole_search(journal: str, log: str, optimizer: str, die_at: int = 0, nap: float = 0.0) -> None:
    """A search that notes every evaluation and its result; it kills its process before the evaluation ``die_at``."""
    q = unrelated(0)
    states = [{"w": s["w"].float()} for s in q.states]

    def ask(state, kind: str):
        with open(log, "a") as file:
            if kind == "search" and len(Path(log).read_text().splitlines()) + 1 == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(nap)
            value = q(state)
            file.write(f"{kind}\n")
        return value

    asked = {kind: lambda state, kind=kind: ask(state, kind) for kind in ("search", "heldout")}
    options = dict(optimizer=optimizer, evals=260, generator=seeded(5), resume=journal)
    result = LCSC(states, objective=asked["search"], heldout=asked["heldout"], **options).run()
    torch.save(vars(result) | {"finalists": [vars(f) for f in result.finalists]}, f"{log}.pt")


def files(folder: Path, name: str) -> list[str]:
    return [str(folder / f"{name}.{kind}") for kind in ("jsonl", "log")]


@pytest.fixture
def start(tmp_path: Path, forks):
    """Starts a search in a process of its own, which is to be killed."""

    def begun(optimizer: str, **options):
        process = forks.Process(target=whole_search, args=(*files(tmp_path, "broken"), optimizer), kwargs=options)
        process.start()
        return process

    return begun


def outcome(folder: Path, name: str):
    return torch.load(folder / f"{name}.log.pt")


def identical(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(identical(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(identical, one, two))
    return one == two


@pytest.mark.parametrize(("optimizer", "deaths"), [("evolution", (43, 150)), ("cmaes", (222,))])
def test_a_search_that_is_killed_goes_on_bitwise(tmp_path, start, optimizer, deaths):
    whole_search(*files(tmp_path, "whole"), optimizer)
    for die_at in deaths:  # in the beginning, and between two combinations from the start
        process = start(optimizer, die_at=die_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    whole_search(*files(tmp_path, "broken"), optimizer)
    assert identical(outcome(tmp_path, "whole"), outcome(tmp_path, "broken"))
    calls = (tmp_path / "broken.log").read_text().split()
    assert (calls.count("search"), calls.count("heldout")) == (260, 5)
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "broken.jsonl").read_bytes()


def test_a_kill_from_outside_costs_one_evaluation_at_most(tmp_path, start):
    whole_search(*files(tmp_path, "whole"), "evolution")
    process = start("evolution", nap=0.02)
    while not ((log := tmp_path / "broken.log").exists() and len(log.read_text().split()) > 50):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    whole_search(*files(tmp_path, "broken"), "evolution")
    assert identical(outcome(tmp_path, "whole"), outcome(tmp_path, "broken"))
    assert len((tmp_path / "broken.log").read_text().split()) in (265, 266)


def test_a_finished_search_is_read_and_a_longer_one_goes_on(tmp_path):
    q, calls = unrelated(0), []

    def objective(state):
        calls.append(1)
        return q(state)

    def run(evals):
        calls.clear()
        return LCSC(q.states, objective=objective, evals=evals, resume=tmp_path / "deep" / "j.jsonl").run(), len(calls)

    first, spent = run(80)
    again, nothing = run(80)
    longer, more = run(200)
    assert (spent, nothing, more) == (80, 0, 120)
    assert torch.equal(first.history, again.history)
    assert torch.equal(longer.history, LCSC(q.states, objective=q, evals=200).run().history)
    assert torch.equal(longer.history[:80], first.history)


def test_a_torn_last_line_is_dropped(tmp_path):
    q, path = unrelated(0), tmp_path / "j.jsonl"
    whole = search(q, evals=60, resume=path)
    text = path.read_bytes()
    path.write_bytes(text[:-20])
    assert torch.equal(search(q, evals=60, resume=path).history, whole.history)
    assert path.read_bytes() == text


def test_a_journal_of_another_search_is_refused(tmp_path):
    q, path = unrelated(0), tmp_path / "j.jsonl"
    search(q, evals=50, resume=path)
    for change, message in (
        ({"seed": 3}, "its seed is"),
        ({"optimizer": "grid"}, "its optimizer is 'evolution', here 'grid'"),
        ({"population": 20}, "its population is 40, here 20"),
    ):
        with pytest.raises(ValueError, match=message):
            search(q, evals=50, resume=path, **change)
    with pytest.raises(ValueError, match="its checkpoints is 20, here 8"):
        search(unrelated(0, k=8), evals=50, resume=path)
    with pytest.raises(ValueError, match="its entries is"):
        search(unrelated(0, d=10), evals=50, resume=path)
    grid = tmp_path / "g.jsonl"
    search(q, "grid", evals=50, resume=grid)
    with pytest.raises(ValueError, match="evaluation 2 was of other coefficients"):
        search(q, "grid", evals=60, resume=grid)
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="is not the journal of a search"):
        search(q, evals=50, resume=path)


# -- memory ----------------------------------------------------------------------------------------------------------------


def test_a_search_holds_one_tensor_of_one_checkpoint_beside_the_candidate():
    g = seeded(0)
    made = [{f"w{j}": torch.randn(500, generator=g) for j in range(4)} for _ in range(10)]
    counted = [Counting(s, str(i)) for i, s in enumerate(made)]
    Counting.alive = Counting.most = 0
    LCSC(counted, objective=lambda s: float(s["w0"].square().sum()), evals=150, heldout=lambda s: 1.0).run()
    assert Counting.most <= sum(t.nbytes for t in made[0].values())


def memory_of_a_search(folder: str, queue) -> None:
    """How much a process grows, at the most, while it looks at combinations of files."""

    def anonymous() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    seen = []

    def objective(state) -> float:
        seen.append(anonymous())
        return float(state["w0"][:10].square().sum())

    lcsc = LCSC(folder, objective=objective, evals=4, population=2)
    before = anonymous()
    lcsc.run()
    queue.put(max(seen) - before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_are_streamed(tmp_path, forks, suffix):
    each = 4 * 2**20
    for i in range(12):
        state = {f"w{j}": torch.full((each // 4,), float(i + j)) for j in range(4)}  # 16 MiB a checkpoint
        path = tmp_path / f"{i}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    queue = forks.Queue()
    process = forks.Process(target=memory_of_a_search, args=(str(tmp_path), queue))
    process.start()
    grown = queue.get()
    process.join()
    # The candidate (4 tensors) and at most one checkpoint; 12 checkpoints would be 192 MiB.
    assert grown <= 2 * 4 * each


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_identical_checkpoints_give_the_last_with_a_warning():
    one = states(1)[0]
    given = [{k: v.clone() for k, v in one.items()} for _ in range(3)]
    with pytest.warns(UserWarning, match="all checkpoints are the same"):
        result = LCSC(given, objective=lambda s: float(s["net.bias"].sum())).run()
    assert result.coefficients.tolist() == [0, 0, 1]
    assert len(result.history) == 1


@pytest.mark.parametrize("optimizer", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_count_as_inf(optimizer, bad):
    q, calls = unrelated(0, k=8), []

    def objective(state):
        calls.append(1)
        return bad if len(calls) % 3 == 0 else q(state)

    result = LCSC(q.states, objective=objective, optimizer=optimizer, evals=200).run()
    assert result.failures == len(calls) // 3
    assert int(result.history.isinf().sum()) == result.failures
    assert math.isfinite(result.value)


@pytest.mark.parametrize("optimizer", NAMES)
def test_an_objective_that_is_finite_nowhere_raises(optimizer):
    with pytest.raises(RuntimeError, match="the objective was finite at none of"):
        LCSC(unrelated(0, k=5).states, objective=lambda s: math.nan, optimizer=optimizer, evals=100).run()


def test_exploding_coefficients_are_warned_of():
    q = unrelated(0, k=3, d=4)
    far = Quadratic(q.T, q.T[0] + 30 * (q.T[1] - q.T[0]), torch.eye(4, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"the largest coefficient is 3\d"):
        search(far, "quadratic", 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(q, "quadratic", 400)


def test_fp16_checkpoints_are_searched_in_float32_and_given_back_in_theirs():
    given = [{k: v.half() for k, v in s.items()} for s in unrelated(0).states]
    seen = set()

    def objective(state):
        seen.add(state["w"].dtype)
        return float(state["w"].double().square().sum())

    lcsc = LCSC(given, objective=objective, evals=60)
    result = lcsc.run()
    assert seen == {torch.float16}
    assert lcsc.state_dict(result.coefficients)["w"].dtype == torch.float16
    wide = [{"w": s["w"].float()} for s in given]
    assert torch.equal(lcsc.state_dict(result.coefficients)["w"], combine(wide, result.coefficients)["w"].half())


def normalized(seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def test_batch_norm_is_warned_of_and_reestimated():
    given = []
    for i in range(4):
        m = normalized(i)
        m(X * (i + 1))
        given.append(m.state_dict())
    model = normalized(9)
    with pytest.warns(UserWarning, match=r"'1\.running_mean' belongs to a BatchNorm.*reestimate="):
        LCSC(given, objective=loss, model=model)
    with pytest.warns(UserWarning, match=r"'1\.running_mean' belongs to a BatchNorm"):
        LCSC(given, objective=lambda s: 1.0)
    asked = []

    def reestimate(m):
        asked.append(1)
        with torch.no_grad():
            hidden = m[0](X)
            m[1].running_mean.copy_(hidden.mean(0))
            m[1].running_var.copy_(hidden.var(0))

    def evaluated(m):
        m.eval()
        hidden = m[0](X)
        torch.testing.assert_close(m[1].running_mean, hidden.mean(0))
        return loss(m)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = LCSC(given, objective=evaluated, model=model, evals=80, reestimate=reestimate).run()
    assert len(asked) == 81  # and once for the winner that is left in the model
    assert abs(evaluated(model) - result.value) < 1e-5
    assert bool((model[1].running_var > 0).all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"evals": 0}, ValueError, "evals must be at least 1, got 0"),
        ({"population": 1}, ValueError, "population must be at least 2, got 1"),
        ({"finalists": 0}, ValueError, "finalists must be at least 1"),
        ({"optimizer": "evolutoin"}, ValueError, "did you mean 'evolution'"),
        ({"objective": 3}, TypeError, "objective must be a function of the model, got 3"),
        ({"heldout": True}, TypeError, "heldout must be a function of the model, False or None, got True"),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module or None, got 'net'"),
        ({"device_budget": -1}, ValueError, "device_budget must be at least 0"),
        ({"reestimate": print}, ValueError, "reestimate needs model="),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        LCSC(states(), **{"objective": lambda s: 1.0, **options})


@pytest.mark.parametrize("value", ["good", None, True, torch.ones(2)])
def test_an_objective_must_return_a_number(value):
    with pytest.raises(TypeError, match="objective must return a number"):
        LCSC(states(), objective=lambda s: value).run()


def test_cmaes_needs_three_checkpoints_and_its_library(monkeypatch):
    with pytest.raises(ValueError, match="needs at least 3 checkpoints, got 2"):
        search(unrelated(0, k=2), "cmaes")
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ImportError, match=r"polyak\[teachers\]"):
        search(unrelated(0), "cmaes")


@pytest.mark.parametrize("optimizer", [n for n in NAMES if n != "cmaes"])
def test_two_checkpoints_are_enough(optimizer):
    q = unrelated(0, k=2)
    assert search(q, optimizer, 50).value <= min(q.at(ema_coefficients(2, 0.0)), q.at(ema_coefficients(2, 1.0))) + 1e-9


def test_full_puts_the_rest_on_the_oldest():
    assert full(torch.tensor([0.25, -0.5], dtype=torch.float64)).tolist() == [1.25, 0.25, -0.5]
    assert len(CheckpointBank(states())) == 4
