"""``compare``: checks what is asked for, examines tasks and arms, runs the trials, and returns the result."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from polyak.core import checks
from polyak.lab import limits, versions
from polyak.lab.compare import arms as specs
from polyak.lab.compare import budget as budgets
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.comparison import Comparison
from polyak.lab.compare.examine import examine
from polyak.lab.compare.optimizers import BASE
from polyak.lab.compare.recipe import REST
from polyak.lab.compare.record import AskedTask, Record
from polyak.lab.compare.rehearsal import Again, rehearse_all
from polyak.lab.compare.rows import Setup
from polyak.lab.compare.sampling import PARTS
from polyak.lab.compare.search import ComparisonPlan
from polyak.lab.compare.spec import ArmError, ArmSpec, Kind
from polyak.lab.compare.task import Facts, NoTaskError, TaskError, add_folder
from polyak.lab.run import Listener, Progress, carry_out, device_kind
from polyak.lab.store import Store
from polyak.lab.trackers import TRACK, Tracker
from polyak.lab.workers import Executor, call_apart

EXAMINATION_S = 300.0  # a task that has not been built and looked at by then is taken to hang
# The files that decide what a trial yields, beside the task's and the arm's.
_OWN_CODE = ("trial", "sampling", "task", "generators", "recipe")
_GUARD = '; a script that calls compare must do so under `if __name__ == "__main__":`'
_REDRAW_S = 2.0
_FEW = 8  # steps, or evaluations, that all arms but the baseline are looked at for
_COSTLY = 10.0  # times as long as a plain one a step may take
_log = logging.getLogger("polyak.lab.compare")
_ARM = checks.text | checks.Function("a class", classes=True)


@checks.arguments(
    tasks=checks.anything, arms=checks.anything, budget=checks.anything,
    seeds=checks.Integer(1, limits.MOST["seeds"]), trials=checks.Integer(1, limits.MOST["trials"]), baseline=checks.text | None,
    target=checks.real | None, points=checks.Integer(2, limits.MOST["points"]), device=checks.text,
    jobs=checks.Integer(1, limits.MOST["jobs"]) | None, deadline=checks.Number(0, limits.MOST_SECONDS, "(]") | None,
    fresh=checks.flag, store=checks.path | checks.Instance(Store, words="a Store") | None, progress=checks.flag,
    on_progress=checks.Function("a function of the Progress", 1) | None,
    on_measurement=checks.Function("a function (trial, at, values)", 3) | None,
    executor=checks.Like("an executor", "slots", "open", "start") | None,
    processes=checks.Integer(1, limits.MOST["processes"]), track=TRACK,
)  # fmt: skip
def compare(
    tasks: str | Path | Sequence[str | Path],
    arms: str | Sequence[str | type],
    *,
    budget: str = "5m",
    seeds: int = 5,
    trials: int = 6,
    baseline: str | None = None,
    target: float | None = None,
    points: int = 20,
    device: str = "cpu",
    jobs: int | None = None,
    deadline: float | None = None,
    fresh: bool = False,
    store: Store | Path | str | None = None,
    progress: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    on_measurement: Listener | None = None,
    executor: Executor | None = None,
    processes: int = 1,
    track: str | Tracker | Sequence[str | Tracker] = (),
) -> Comparison:
    """Compare optimizers or samplers on tasks of one's own, at an equal budget for tuning and for each trial.

    Args:
        tasks: a task file (see :mod:`polyak.lab.compare.task`), several, or a folder of them.
        arms: what is compared, e.g. ``"adamw,adan,lion"`` (see :mod:`polyak.lab.compare.arms`); in a sequence also classes.
        budget: a time for the whole comparison ("5m"), which all trials share equally; a time for each trial ("20s/trial"); or a
            count for each trial ("500steps", for samplers "20nfe").
        seeds: how many are reported, the same for all arms; 3 or more can decide something.
        trials: tuning trials of every arm for each of these seeds, on a seed that is not reported.
        baseline: the arm that the others are compared with. Default: the first.
        target: a value of the main metric; the report then says what it costs to reach it. Default: the baseline's final value.
        points: how often a reported trial is measured on the way (a tuning trial: half as often).
        device: "cpu", "cuda" or "cuda:N".
        jobs: trials at once. Default: with a budget in time 1, since trials that run at once slow each other down; else one for
            each core.
        deadline: seconds after which a trial is given up. Default: generous, by what the task takes.
        fresh: run all trials anew, and forget what is stored of them.
        store: where results are kept, a folder or an open store. Default: as for all of polyak.
        progress: show a bar (in a notebook or a terminal), where ``on_progress`` is not given.
        on_progress: called with the progress of each task's trials.
        on_measurement: hears every measurement as it is made (see :func:`polyak.lab.run.carry_out`).
        executor: where trials run, in place of ``jobs`` processes of this machine: a :class:`polyak.lab.cluster.Cluster`. With
            a budget in time and no ``jobs``, each of its nodes runs one trial at a time. It is closed at the end.
        processes: of each trial (:mod:`polyak.lab.group`); with several the budget is a count.
        track: where measurements are mirrored to, e.g. "tensorboard" (:mod:`polyak.lab.trackers`).

    Raises:
        TaskError: a task file cannot be used.
        ArmError: an arm is unknown, or has an unknown option.
        ValueError: another argument is wrong.
        TrialError: a trial could not be run; finished ones are kept, and the same call goes on from there.
        KeyboardInterrupt: on SIGINT or SIGTERM; finished trials are kept.
        StoreError: the store cannot be read or written.
        ClusterError: the cluster cannot be used.
        TrackerError: a tracker cannot be used.

    Workers are processes that are started afresh: a script that calls this must do so under ``if __name__ == "__main__":``.

    Finished trials are stored by what determines them, and are not run again: the code of the task and of the arm, with what
    they import from beside them, and the versions of packages that these import; the initial weights, first batches and first
    numbers that the task gives; the arm's options, the seed, the budget. What this does not see, such as a change far back in a
    data file, is for ``fresh``.

    What it is at before the first trial it says to the logger "polyak.lab.compare".
    """
    files = task_files(tasks)
    for file in files:
        add_folder(file)  # arms may be beside the tasks
    # What is asked for is understood before any task is imported, which may take minutes.
    if not isinstance(budget, str):
        raise ValueError(f"budget must be {budgets.FORMS}, in words, got {checks.shown(budget)}")
    spend = budgets.parse(budget, 1)
    asked = _asked(arms, baseline, spend)
    if spend.unit == "seconds" and processes > 1:
        # Each process has a clock of its own: one would go on to a step that the others do not take.
        raise ValueError(f"budget for trials of several processes is a count like 500steps, got {budget!r}")
    kind = device_kind(device, processes, executor)
    call = call_apart if executor is None else executor.call
    facts = {file: _examine(file, device, processes, deadline or EXAMINATION_S, call) for file in files}
    kind_of_task = next(iter(facts.values())).kind
    if any(f.kind != kind_of_task for f in facts.values()):
        raise TaskError("tasks must be alike: some are of training and some of sampling")
    competitors = asked.get(kind_of_task) or _first(baseline, specs.parse(arms, kind_of_task))
    tuned = sum(bool(arm.space) for arm in competitors)
    # A reported trial of samplers draws with parts of its budget, too.
    weight = sum(PARTS) if kind_of_task == "sampling" else 1
    limit = budgets.parse(budget, len(files) * seeds * (tuned * trials + len(competitors) * weight))
    _check_unit(limit, kind_of_task)
    _check_amount(limit, facts)
    if limit.unit == "seconds" and executor is not None and jobs is None:
        executor.apart()
    at_once = jobs if jobs is not None else 1 if limit.unit == "seconds" else None

    setup = Setup(
        budget=limit,
        arms=competitors,
        trials=trials,
        points=points,
        target=target,
        jobs=at_once,
        seeds=seeds,
        device=kind,
        versions=versions.versions(),
    )
    given = [
        AskedTask(file=file, facts=f, fingerprints=_fingerprints(file, f, competitors)) for file, f in facts.items()
    ]
    record = Record(setup=setup, tasks=tuple(given))
    plans = record.plans()
    for plan, f in zip(plans, facts.values(), strict=True):
        plan.deadline = _deadline(limit, f, points) if deadline is None else deadline
    with _opened(store) as opened, _bar(progress and on_progress is None) as tell:
        if fresh:
            _forget(plans, opened)
        for file, plan in zip(files, plans, strict=True):
            known = list(plan.known())
            there = opened.results(known)
            if not there:
                _say_what_is_not_used(plan, limit, opened)
            if len(there) < len(known):
                patience = deadline or EXAMINATION_S
                again = [] if there or processes > 1 or device != "cpu" else _again(plan, facts[file])
                patience += 2 * len(again) * (plan.deadline or 0.0)
                _try(file, plan, limit, device, processes, patience, call, again)
        opened.note(record.slug, record.to_json())
        carry_out(
            plans,
            device=device,
            jobs=at_once,
            store=opened,
            on_progress=on_progress or tell,
            on_measurement=on_measurement,
            executor=executor,
            processes=processes,
            track=track,
        )
    return record.comparison(plans)


def task_files(tasks: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that are meant: of a folder, all Python files whose names do not begin with an underscore.

    Raises:
        TaskError: there is no such file, a folder has none, or two have one name.
    """
    found: list[Path] = []
    for given in list(tasks) if isinstance(tasks, (list, tuple)) else [tasks]:
        if not isinstance(given, (str, Path)):
            what = "a function" if callable(given) else repr(given)
            raise TaskError(
                f"a task is a file, got {what}: trials run in processes of their own, which do not see what a notebook or script "
                "holds. Write it to a file (in a notebook: a cell that begins with %%writefile task.py), and name that"
            )
        path = Path(given).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.glob("*.py") if not p.name.startswith("_"))
            if not inside:
                raise NoTaskError(f"{path} has no task files (*.py)")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            near = (
                checks.suggestion(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
            )
            raise NoTaskError(f"{path}: there is no such file{near or '; `polyak init-task` writes an example'}")
    if not found:
        raise TaskError("name a task file, or a folder of them")
    stems = [path.stem for path in found]
    if twice := sorted({s for s in stems if stems.count(s) > 1}):
        raise TaskError(f"task files must have names of their own, {twice[0]!r} is there twice")
    return [path.resolve() for path in found]


def _examine(file: Path, device: str, processes: int, patience: float, call: Callable[..., Any]) -> Facts:
    _log.info("checking %s", file.name)
    found = _apart(file, call, examine, str(file), device, processes, timeout=patience)
    if isinstance(found, str):
        raise TaskError(found)
    return found


def _try(
    file: Path,
    plan: ComparisonPlan,
    limit: Budget,
    device: str,
    processes: int,
    patience: float,
    call: Callable[..., Any],
    again: Sequence[Again],
) -> None:
    """Build every arm on the task, and take two steps (or draw once); and run trials twice in one process."""
    _log.info("trying each arm on %s", file.name)
    arms = []
    for name, arm in plan.specs.items():
        centre = {option: r.centre for option, r in arm.space.items()}
        shared = {"class": arm.target, "fixed": dict(arm.fixed), "budget": {limit.unit: limit.amount}}
        arms.append((name, {**shared, "tuned": sorted(centre), **centre}))
    wrong = _apart(file, call, rehearse_all, str(file), device, arms, processes, again, timeout=patience)
    if wrong is not None:
        raise wrong


def _again(plan: ComparisonPlan, facts: Facts) -> list[Again]:
    """The baseline's whole trial, and a few steps of each other arm's, in the middle of their ranges.

    By a count: of a time, about as many steps as will fit.
    """
    worst = {metric.name: metric.worst_value for metric in plan.claim.metrics}
    found = []
    for arm, spec in plan.specs.items():
        point = {name: r.centre for name, r in spec.space.items()}
        options = {**plan.options(arm, "report"), "tuned": sorted(point), **point}
        [(unit, amount)] = options["budget"].items()
        if unit == "seconds":
            fit = max(1, int(amount / facts.seconds))
            unit, amount = ("steps", fit) if facts.kind == "training" else ("evaluations", _FEW)
        if found and facts.kind == "training":
            amount = min(amount, _FEW)
        found.append(Again(plan.claim.trial, arm, {**options, "budget": {unit: amount}}, worst))
    return found


def _apart(file: Path, call: Callable[..., Any], function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """A call in a process of its own, on a task's code."""
    try:
        return call(function, *arguments, timeout=timeout)
    except TimeoutError:
        raise TaskError(
            f"{file.name}: not ready after {timeout:g} s: a call of task, loss or evaluate does not end"
        ) from None
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1]
        # A script without the guard runs itself again in every process that it starts.
        hint = _GUARD if why.endswith("exit status 1") else ""
        raise TaskError(f"{file.name}: {why}{hint}") from error


def _forget(plans: Sequence[ComparisonPlan], store: Store) -> None:
    """All that is stored of the arms, also what this command would not come by, and a later one would: of further seeds, say."""
    for plan in plans:
        for trial in {trial.arm: trial for trial in plan.known()}.values():
            store.forget(trial)


def _say_what_is_not_used(plan: ComparisonPlan, limit: Budget, store: Store) -> None:
    """Of a shared budget each trial's part changes with the number of arms, tasks, seeds and trials."""
    if limit.total is None:
        return
    own = {trial.versions["fingerprint"] for trial in plan.known()}
    for run in reversed(store.runs(plan.claim.slug)):
        if (
            run.versions.get("fingerprint") in own
            and run.done
            and run.device == plan.device
            and run.scale.endswith("seconds")
        ):
            before = run.scale.partition(" ")[0]
            _log.warning(
                "each trial now gets %g s; stored ones got %s s, and are not used (they are with a budget of %ss/trial)",
                limit.amount, before, before,
            )  # fmt: skip
            return


def _asked(arms: str | Sequence[str | type], baseline: str | None, spend: Budget) -> dict[Kind, tuple[ArmSpec, ...]]:
    """The arms, the baseline first, as competitors of each kind that they can be: which one it is, the task will say.

    Raises:
        ArmError, ValueError: they are of no kind.
    """
    found: dict[Kind, tuple[ArmSpec, ...]] = {}
    wrong: dict[Kind, ArmError] = {}
    for kind in ("training", "sampling"):
        try:
            found[kind] = specs.parse(arms, kind)
        except ArmError as error:
            wrong[kind] = error
    if not found:
        # What is nearly the name of a sampler was meant to be one.
        raise wrong["sampling" if spend.unit == "evaluations" or _nearer_to_samplers(arms) else "training"]
    if len(found) == 1:
        _check_unit(spend, next(iter(found)))
    return {kind: _first(baseline, competitors) for kind, competitors in found.items()}


def _nearer_to_samplers(arms: str | Sequence[str | type]) -> bool:
    words = specs.words_of(arms)
    near = {kind: sum(specs.nearly(word, kind) for word in words) for kind in ("training", "sampling")}
    return near["sampling"] > near["training"]


def _first(name: str | None, arms: Sequence[ArmSpec]) -> tuple[ArmSpec, ...]:
    """The arms with the baseline first."""
    if name is None:
        return tuple(arms)
    found = [arm for arm in arms if name.lower() in (arm.text.lower(), arm.label.lower())]
    if not found:
        texts = [arm.text for arm in arms]
        raise ValueError(
            f"baseline must be one of the arms {', '.join(texts)}, got {limits.short(name)!r}{checks.suggestion(name, texts)}"
        )
    return (found[0], *(arm for arm in arms if arm is not found[0]))


def _check_unit(spend: Budget, kind: Kind) -> None:
    wrong, right = (("evaluations",), "500steps") if kind == "training" else (("steps", "gradients"), "20nfe")
    if spend.unit in wrong:
        raise ValueError(f"budget for {kind} is a time or a count like {right}, got {spend.label}")


def _check_amount(limit: Budget, facts: Mapping[Path, Facts]) -> None:
    slowest = max(f.seconds for f in facts.values())
    if limit.unit == "seconds" and limit.amount < 2 * slowest:
        raise ValueError(
            f"budget is too small: {limit.amount:.3g} s for each trial, and one step alone takes {slowest:.2g} s; give more time, "
            "or fewer seeds, trials or arms"
        )


# -- its trials ----------------------------------------------------------------------------------------------------------


def _fingerprints(file: Path, facts: Facts, arms: Sequence[ArmSpec]) -> dict[str, str]:
    """Of the code that decides each arm's results, and what the task gives."""
    code = versions.code_of_file(file)
    own = [versions.code_of_file(Path(__file__).with_name(f"{name}.py")) for name in _OWN_CODE]
    return {arm.text: _fingerprint(code, facts.identity, *own, *_codes(arm)) for arm in arms}


def _deadline(budget: Budget, facts: Facts, points: int) -> float:
    """When a trial is given up, where nobody says so: generous also for a long one, and for what it does beside training."""
    work = budget.amount if budget.unit == "seconds" else _COSTLY * budget.amount * facts.seconds
    return budgets.LEAST_DEADLINE_S[budget.unit] + 4 * (work + facts.building + (points + 1) * facts.evaluating)


def _codes(arm: ArmSpec) -> list[str]:
    parts = [value for name, value in arm.fixed.items() if name in ("guidance", "steering", BASE, REST)]
    return [versions.code_of(target) for target in (arm.target, *parts)]


def _fingerprint(*codes: str) -> str:
    return hashlib.sha256("\n".join(codes).encode()).hexdigest()[:16]


# -- around it -------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(store: Store | Path | str | None) -> Iterator[Store]:
    with nullcontext(store) if isinstance(store, Store) else Store(store) as opened:
        yield opened


@contextmanager
def _bar(wanted: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar of all tasks' trials, in a notebook as in a terminal."""
    if not wanted:
        yield None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets has a bar of text
        from tqdm.auto import tqdm

    news: dict[str, Progress] = {}
    bar: Any = None
    drawn = -math.inf

    def tell(p: Progress) -> None:
        nonlocal bar, drawn
        news[p.claim] = p
        done, total = sum(n.done for n in news.values()), sum(n.total for n in news.values())
        if bar is None:
            bar = tqdm(desc="trials", unit="trial", total=total)
        grown = done > bar.n
        bar.total, bar.n = total, done
        bar.set_postfix_str("; ".join(label for n in news.values() for label in n.running), refresh=False)
        # Where the bar is text, a saved notebook keeps every version of it.
        if grown or p.elapsed - drawn > _REDRAW_S:
            drawn = p.elapsed
            bar.refresh()

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()
