"""Running claims: parallel, resumable, and unmoved by processes that die."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import claims_for_tests as examples
import psutil
import pytest
import torch_claim_for_tests as torch_example

from polyak.lab import Progress, Store, StoreError, TrialError, collect, run, run_many
from polyak.lab.claim import Arm, Criterion, Metric, Scale, Task
from polyak.lab.result import ClaimResult, TrialResult
from polyak.lab.store import Planned, Stored
from polyak.lab.tuning import FIRST_TUNING_SEED, Plan, choose
from polyak.lab.workers import call_apart

HERE = Path(__file__).parent


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """Counts the trials that have begun, by what they are, in whatever process."""
    path = tmp_path / "journal"
    monkeypatch.setenv("POLYAK_TEST_JOURNAL", str(path))
    return lambda: Counter(path.read_text().splitlines()) if path.exists() else Counter()


def drive(home: Path, factory: str, jobs: int = 2, **keywords: Any) -> subprocess.Popen[str]:
    """A process of its own that runs a test claim."""
    command = [sys.executable, str(HERE / "driver.py"), str(home), str(jobs), factory, json.dumps(keywords)]

    def heed_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )


def until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.01)


def states(home: Path) -> Counter[str]:
    with Store(home) as store:
        return Counter(state for (state,) in store._db.execute("SELECT state FROM trials"))


def content(result: ClaimResult) -> dict[str, Any]:
    """All of a result but its date and times."""
    plain = result.to_json()
    return {
        **plain,
        "date": "",
        "seconds": 0,
        "trials": [{**trial, "seconds": 0} for trial in plain["trials"]],
    }


# -- what a run yields -----------------------------------------------------------------------------------------------------


def test_each_result_is_told_as_its_claim_ends(tmp_path: Path) -> None:
    """One place: the first claim's trials all end before the second's begin, and its result comes then."""
    told: list[tuple[str, int]] = []
    done: dict[str, int] = {}
    with Store(tmp_path) as store:
        results = run_many(
            [examples.make("two"), examples.make("one")],
            jobs=1,
            store=store,
            on_progress=lambda p: done.update({p.claim: p.done}),
            on_result=lambda result: told.append((result.slug, sum(done.values()))),
        )
        count = len(results["one"].trials)
        assert told == [("two", count), ("one", 2 * count)]
        told.clear()
        run_many([examples.make("one")], store=store, on_result=lambda result: told.append((result.slug, 0)))
        assert told == [("one", 0)], "also where all is stored"


def test_a_run_tunes_reports_and_judges(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with Store(tmp_path) as store:
        assert collect(examples.make(), store=store) is None
        result = run(examples.make(), jobs=2, store=store, on_progress=seen.append)
        assert collect(examples.make(), store=store) == result
    assert result.verdict == "holds"
    assert result.chosen == {"parabola": {"plain": ({"lr": 0.003},) * 5, "quick": ({"lr": 0.2},) * 5}}
    assert result.seeds == (0, 1, 2, 3, 4)
    assert result.tuning_seeds == tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + 5))
    assert len(result.finals("parabola", "quick", "loss")) == 5
    assert set(result.versions) == {"python", "torch", "numpy", "polyak", "fingerprint"}
    tuning = [t for t in result.trials if t.purpose == "tuning"]
    assert Counter(t.arm for t in tuning) == {"plain": 15, "quick": 15}
    assert [t.point for t in tuning if t.diverged] == [{"lr": 2.0}] * 5
    assert len(result.trials[0].curve) == 20
    assert result.trials[0].curve[3][0] == {"step": 3.0}
    assert (seen[0].done, seen[0].total, seen[0].cached) == (0, 40, 0)
    assert (seen[-1].done, seen[-1].running, seen[-1].eta_seconds) == (40, (), 0.0)
    assert any("quick on parabola, tuning lr=0.1" in p.running for p in seen)
    assert any("quick on parabola, seed 4" in p.running for p in seen)


@pytest.mark.usefixtures("processes")
def test_one_worker_or_two_yield_the_same(tmp_path: Path) -> None:
    """Down to the global generator's state, which a worker's earlier trials must not decide."""
    contents = []
    for jobs in (1, 2):
        with Store(tmp_path / str(jobs)) as store:
            contents.append(content(run(examples.make(), jobs=jobs, store=store)))
    assert contents[0] == contents[1]


def test_tuning_seeds_are_never_reported(tmp_path: Path, journal: Callable[[], Counter[str]]) -> None:
    scale = Scale(name="small", says="", seeds=3, tuning_seeds=2, options={"steps": 5})
    with Store(tmp_path) as store:
        result = run(examples.make(scales=(scale,)), store=store)
    seeds = {purpose: {t.seed for t in result.trials if t.purpose == purpose} for purpose in ("tuning", "report")}
    assert seeds == {"tuning": {FIRST_TUNING_SEED + i for i in range(6)}, "report": {0, 1, 2}}
    assert len(journal()) == 2 * 3 * 2 * 3 + 2 * 3


def test_a_scale_on_other_seeds_shares_none_with_the_former(tmp_path: Path) -> None:
    """Neither the reported ones, nor those that options are tuned on."""
    before, after = (
        examples.make(scales=(Scale("small", "", 3, first_seed=first, options={"steps": 5}),)) for first in (0, 100)
    )
    with Store(tmp_path) as store:
        seen = run(before, store=store)
        assert collect(after, store=store) is None
        result = run(after, store=store)
        assert collect(after, store=store) == result
    assert result.seeds == (100, 101, 102)
    assert result.tuning_seeds == tuple(FIRST_TUNING_SEED + seed for seed in result.seeds)
    used, again = ({t.seed for t in r.trials} for r in (seen, result))
    assert (len(used), len(again), used & again) == (6, 6, set())


def noisy_plan(seeds: int = 3, tuning_seeds: int = 2, grid: Sequence[float] = (0.1, 0.2)) -> Plan:
    scale = Scale(name="small", says="", seeds=seeds, tuning_seeds=tuning_seeds, options={"steps": 5})
    arms = tuple(
        Arm(name=n, label="", role=role, grid={"lr": list(grid)})
        for n, role in (("plain", "baseline"), ("quick", "method"))
    )
    return Plan(examples.make(scales=(scale,), arms=arms), scale="small", seeds=None, device="cpu", versions={})


def test_every_seed_has_a_tuning_of_its_own() -> None:
    """What is chosen for a seed follows from its own tuning seeds alone, and from no other seed's luck."""
    plan = noisy_plan()
    best = {
        ("plain", 0): 0.1,
        ("plain", 1): 0.2,
        ("plain", 2): 0.1,
        ("quick", 0): 0.2,
        ("quick", 1): 0.2,
        ("quick", 2): 0.1,
    }
    named: list[Planned] = []
    for trial in list(plan.known()):
        reported = (trial.seed - FIRST_TUNING_SEED) // 2
        loss = 1.0 if trial.point["lr"] == best[trial.arm, reported] else 2.0
        named += plan.add(trial, ended(trial, loss))
    assert {(t.arm, t.seed): t.point["lr"] for t in named} == best
    assert not any(plan.add(trial, ended(trial, 1.0)) for trial in named)
    assert plan.complete
    chosen = plan.result().chosen["parabola"]
    assert chosen == {arm: tuple({"lr": best[arm, seed]} for seed in range(3)) for arm in ("plain", "quick")}


def ended(trial: Planned, loss: float) -> Stored:
    result = TrialResult(task=trial.task, arm=trial.arm, seed=trial.seed, purpose=trial.purpose, point=trial.point,
                         values={"loss": loss}, curve=(), seconds=0.0)  # fmt: skip
    return Stored(result=result, finished="", machine={})


@pytest.mark.parametrize(
    ("seeds", "tuning_seeds", "named"), [(1001, 1, "seeds"), (1, 10, "tuning_seeds"), (0, 1, "seeds")]
)
def test_numbers_of_seeds_have_a_range(seeds: int, tuning_seeds: int, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}.* must be"):
        noisy_plan(seeds, tuning_seeds)


def test_the_largest_numbers_of_seeds_leave_room_for_the_one_that_is_looked_at() -> None:
    """Which is neither tuned nor reported."""
    assert max(noisy_plan(1000, 9).tuning_seeds) < 20_000


def test_stored_trials_are_not_run_again(tmp_path: Path, journal: Callable[[], Counter[str]]) -> None:
    seen: list[Progress] = []
    with Store(tmp_path) as store:
        first = run(examples.make(), store=store)
        second = run(examples.make(), store=store, on_progress=seen.append)
        assert second == first
        assert (seen[0].done, seen[0].cached) == (40, 40)
        more = run(examples.make(), seeds=6, store=store)
    assert set(journal().values()) == {1}
    assert sum(journal().values()) == 40 + 2 * 4
    assert more.seeds == (0, 1, 2, 3, 4, 5)


def test_collect_takes_as_many_seeds_as_there_are(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        run(examples.make(), seeds=4, store=store)
        assert collect(examples.make(), store=store) is None
        few = collect(examples.make(), seeds=4, store=store)
        assert few is not None
        assert len(few.seeds) == 4
        run(examples.make(), seeds=7, store=store)
        many = collect(examples.make(), store=store)
        assert many is not None
        assert len(many.seeds) == 7


def test_several_claims_share_the_workers(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        together = run_many([examples.make("one"), examples.make("two")], jobs=2, store=store)
        alone = run(examples.make("two"), store=store)
    assert list(together) == ["one", "two"]
    assert together["two"] == alone


def test_an_untuned_claim_has_no_tuning_trials(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        result = run(examples.slow(seeds=3, sleep=0.0), store=store)
    assert result.tuning_seeds == ()
    assert {t.purpose for t in result.trials} == {"report"}
    assert result.chosen == {"parabola": {"plain": ({},) * 3, "quick": ({},) * 3}}


def test_scales_and_arms_may_leave_tasks_out(tmp_path: Path) -> None:
    claim = examples.make(
        tasks=(Task(name="parabola", label="", tune="loss"), Task(name="far", label="", tune="loss")),
        arms=(
            Arm(name="plain", label="", role="baseline", options={"lr": 0.1}),
            Arm(name="quick", label="", role="method", options={"lr": 0.2}),
            Arm(name="extra", label="", role="ablation", options={"lr": 0.3}, tasks=("far",)),
        ),
        scales=(
            Scale(name="small", says="", seeds=1, options={"steps": 2}, tasks=("parabola",)),
            Scale(name="paper", says="", seeds=1, options={"steps": 2}),
        ),
    )
    with Store(tmp_path) as store:
        assert len(run(claim, store=store).trials) == 2
        assert len(run(claim, scale="paper", store=store).trials) == 5


# -- tuning ----------------------------------------------------------------------------------------------------------------


def tuned(*values: float, better: Any = "lower", diverged: tuple[int, ...] = ()) -> tuple[dict[str, Any], str]:
    """What is chosen of a grid of four points with these values."""
    arm = Arm(name="quick", label="", role="method", grid={"lr": [0.1, 0.2], "beta": ["none", None]})
    facts: dict[str, Any] = {"task": "parabola", "arm": "quick", "seed": FIRST_TUNING_SEED, "purpose": "tuning"}
    trials = [
        TrialResult(**facts, point={}, values={"loss": v}, curve=(), seconds=0.0, diverged=i in diverged)
        for i, v in enumerate(values)
    ]
    return choose(arm, Metric(name="loss", label="", better=better), [[t] for t in trials])


def test_the_best_point_is_chosen() -> None:
    inf = float("inf")
    assert tuned(3.0, 1.0, 2.0, 4.0) == ({"lr": 0.1, "beta": None}, "")
    assert tuned(3.0, 1.0, 2.0, 4.0, better="higher") == ({"lr": 0.2, "beta": None}, "")
    assert tuned(3.0, 1.0, 1.0, 1.0)[0] == {"lr": 0.1, "beta": None}, "the first of equals"
    assert tuned(inf, inf, inf, 9.0, diverged=(0, 1, 2))[0] == {"lr": 0.2, "beta": None}
    assert tuned(-inf, 0.1, -inf, -inf, better="higher", diverged=(0, 2, 3))[0] == {"lr": 0.1, "beta": None}


def test_where_all_diverged_the_first_point_is_taken_and_noted() -> None:
    point, note = tuned(*[float("inf")] * 4, diverged=(0, 1, 2, 3))
    assert point == {"lr": 0.1, "beta": "none"}
    assert note == "every tuning trial diverged; the grid's first point is used"


def test_an_arm_that_diverges_everywhere_is_judged_all_the_same(tmp_path: Path) -> None:
    claim = examples.make(
        arms=(
            Arm(name="plain", label="", role="baseline", grid={"lr": [0.1, 0.2]}),
            Arm(name="quick", label="", role="method", grid={"lr": [5.0, 7.0]}),
        )
    )
    with Store(tmp_path) as store:
        result = run(claim, store=store)
    assert (result.verdict, result.criteria[0].estimate) == ("fails", float("inf"))
    assert result.chosen["parabola"]["quick"] == ({"lr": 5.0},) * 5
    assert result.notes == (
        "quick on parabola: every tuning trial diverged; the grid's first point is used",
        "quick on parabola: 5 of 5 reported trials diverged",
    )


# -- measurements ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "message"), [("diverge", "too big"), ("nan", "final loss = nan")])
def test_divergence_scores_the_worst(tmp_path: Path, how: str, message: str) -> None:
    with Store(tmp_path) as store:
        result = run(examples.bad(how), store=store)
    (trial,) = [t for t in result.trials if t.diverged]
    assert (trial.arm, trial.seed, trial.message) == ("quick", 1, message)
    assert trial.values == {"loss": float("inf"), "global_draw": float("inf")}
    assert len(trial.curve) == (how == "diverge")
    assert result.criteria[0].per_seed[1] == float("inf")
    assert result.notes == ("quick on parabola: 1 of 3 reported trials diverged",)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "RuntimeError: a bug in the trial"),
        ("unknown metric", "must be one of 'loss', 'global_draw', got 'lost'; did you mean 'loss'"),
        ("no final", "must end with a final measurement"),
        ("two finals", "must be its last, and the only one"),
        ("no number", "measured loss must be a number"),
        ("no loss", r"must hold \['loss'\]"),
        ("no measurement", "must yield measurements"),
        ("unknown option", r"no option 'momentum' for arm 'quick'"),
    ],
)
def test_an_error_in_a_trial_is_raised_after_the_others_are_stored(tmp_path: Path, how: str, message: str) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(TrialError, match=message) as caught:
            run(examples.bad(how), jobs=1, store=store)
        (what,) = store.runs()
        assert what.failed == 1
        assert what.done > 0
        assert collect(examples.bad(how), store=store) is None
    trial = caught.value.trial
    assert (trial.arm, trial.task, trial.seed) == ("quick", "parabola", 1)
    assert "could not run quick on parabola, seed 1" in str(caught.value)


def test_an_error_of_one_claim_does_not_stop_the_others(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(TrialError, match="a bug in the trial"):
            run_many([examples.bad("raise"), examples.make("sound")], store=store)
        assert collect(examples.make("sound"), store=store) is not None


def test_arguments_are_checked(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
            run(examples.make(), seeds=0, store=store)
        with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
            run(examples.make(), jobs=0, store=store)
        with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"):
            run(examples.make(), device="tpu", store=store)
        with pytest.raises(KeyError, match="'huge' is unknown; it has small"):
            run(examples.make(), scale="huge", store=store)
        with pytest.raises(ValueError, match="twice"):
            run_many([examples.make(), examples.make()], store=store)
        with pytest.raises(ValueError, match="top level of a module"):
            run(examples.make(trial=lambda _: iter(())), store=store)
        assert run_many([], store=store) == {}


# -- processes that die ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("processes")
def test_what_a_task_prints_does_not_get_into_what_the_command_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which may be JSON."""
    with Store(tmp_path) as store:
        run(examples.bad("print"), store=store, jobs=1)
    assert capfd.readouterr() == ("", "hello\n")
    call_apart(print, "in an examination", timeout=300)
    assert capfd.readouterr() == ("", "in an examination\n")


@pytest.mark.usefixtures("processes")
def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path, journal: Callable[[], Counter[str]]) -> None:
    claim = examples.bad("die once", mark=str(tmp_path / "mark"))
    with Store(tmp_path) as store:
        result = run(claim, jobs=2, store=store)
    assert len(result.trials) == 6
    assert journal()["bad parabola quick 1 None"] == 2
    assert sum(journal().values()) == 7


@pytest.mark.usefixtures("processes")
def test_a_worker_that_dies_again_is_an_error(tmp_path: Path, journal: Callable[[], Counter[str]]) -> None:
    with Store(tmp_path) as store, pytest.raises(TrialError, match=r"died 2 times.*SIGKILL.*memory"):
        run(examples.bad("die"), jobs=2, store=store)
    assert journal()["bad parabola quick 1 None"] == 2
    assert states(tmp_path)["running"] == 0


def test_a_killed_run_is_finished_later(
    tmp_path: Path, journal: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle: its workers end, too, and only the two trials in flight are run again."""
    monkeypatch.setenv("POLYAK_TEST_HANGS_AFTER", "4")
    with drive(tmp_path, "slow", sleep=0.0) as driver:
        until(lambda: sum(journal().values()) == 6)
        workers = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    until(lambda: not any(map(lives, workers)))
    assert states(tmp_path)["done"] == 4
    monkeypatch.delenv("POLYAK_TEST_HANGS_AFTER")
    with Store(tmp_path) as store:
        result = run(examples.slow(sleep=0.0), jobs=2, store=store)
    assert len(result.trials) == 12
    again = [line for line, times in journal().items() if times > 1]
    assert len(again) == 2
    assert len(journal()) == 12
    assert states(tmp_path) == {"done": 12}


def test_two_processes_share_the_work(tmp_path: Path, journal: Callable[[], Counter[str]]) -> None:
    with drive(tmp_path, "slow", 1, sleep=0.2) as one, drive(tmp_path, "slow", 1, sleep=0.2) as two:
        (out_one, error_one), (out_two, error_two) = one.communicate(), two.communicate()
    assert (one.returncode, two.returncode) == (0, 0), error_one + error_two
    assert json.loads(out_one) == json.loads(out_two)
    assert len(journal()) == 12
    assert set(journal().values()) == {1}


def test_a_trial_whose_process_dies_is_taken_over(
    tmp_path: Path, journal: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = examples.slow(seeds=1, sleep=0.0)
    monkeypatch.setenv("POLYAK_TEST_SLEEP", "600")
    with drive(tmp_path, "slow", 2, seeds=1, sleep=0.0) as one:
        monkeypatch.delenv("POLYAK_TEST_SLEEP")
        until(lambda: sum(journal().values()) == 2)
        outcome: list[ClaimResult] = []

        def wait_for_it() -> None:
            with Store(tmp_path) as store:
                outcome.append(run(claim, jobs=2, store=store))

        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        time.sleep(0.7)
        assert sum(journal().values()) == 2, "both trials are in flight in a living process"
        one.kill()
        waiting.join()
    assert len(outcome) == 1
    assert set(journal().values()) == {2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly(
    tmp_path: Path, journal: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Also in the middle of trials that do not end."""
    monkeypatch.setenv("POLYAK_TEST_HANGS_AFTER", "4")
    with drive(tmp_path, "slow", sleep=0.0) as driver:
        until(lambda: sum(journal().values()) == 6)
        workers = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(number)
        _, errors = driver.communicate()
    assert "KeyboardInterrupt" in errors
    assert driver.returncode != 0
    assert states(tmp_path) == {"done": 4}
    until(lambda: not any(map(lives, workers)))
    assert list((tmp_path / "running").iterdir()) == []


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_is_stored(
    tmp_path: Path, journal: Callable[[], Counter[str]]
) -> None:
    claim = examples.make(scales=(Scale(name="small", says="", seeds=5, options={"steps": 2000}),))
    with Store(tmp_path) as store:
        store._db.execute("PRAGMA max_page_count = 300")
        with pytest.raises(StoreError, match="the disk is full"):
            run(claim, jobs=1, store=store)
    kept = states(tmp_path)
    assert kept["running"] == 0
    assert kept["done"] > 0
    with Store(tmp_path) as store:
        run(claim, jobs=1, store=store)
    assert states(tmp_path) == {"done": 40}
    assert sum(journal().values()) == 41, "only the trial that found no room is run again"


def test_progress_that_raises_ends_the_run(tmp_path: Path) -> None:
    def refuse(progress: Progress) -> None:
        if progress.done == 3:
            raise LookupError("no screen")

    with Store(tmp_path) as store, pytest.raises(LookupError, match="no screen"):
        run(examples.make(), store=store, on_progress=refuse)
    assert states(tmp_path) == {"done": 3}


@pytest.mark.usefixtures("processes")
def test_workers_use_one_thread_and_seed_the_global_generator(tmp_path: Path) -> None:
    import torch

    with Store(tmp_path) as store:
        result = run(torch_example.make(), jobs=1, store=store)
    assert result.finals("parabola", "plain", "loss") == [1.0, 1.0]
    draws = [torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in (0, 1)]
    assert result.finals("parabola", "plain", "global_draw") == draws


def test_criteria_may_need_another_metric_of_a_rival(tmp_path: Path) -> None:
    criterion = Criterion(
        name="c",
        says="",
        kind="effect",
        task="parabola",
        metric="loss",
        arm="quick",
        against="plain",
        against_metric="global_draw",
    )
    with Store(tmp_path) as store, pytest.raises(TrialError, match=r"must hold \['global_draw'\]"):
        run(examples.bad("", criteria=(criterion,)), store=store)
