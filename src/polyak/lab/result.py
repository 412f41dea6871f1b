"""Results as plain data, which the store, the verdicts, the reports and JSON exchange: trials, criteria, verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from polyak.core import checks
from polyak.lab.claim import EMPTY, KINDS, Kind, Verdict


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One finished trial. ``values`` are its final measurements; ``curve`` the ones on the way, in order."""

    task: str
    arm: str
    seed: int
    purpose: str  # "report" or "tuning"
    point: Mapping[str, Any]  # the point of the arm's grid that it ran with
    values: Mapping[str, float]
    curve: tuple[tuple[Mapping[str, float], Mapping[str, float]], ...]  # (at, values)
    seconds: float
    diverged: bool = False
    message: str = ""  # why it diverged


@dataclass(frozen=True, kw_only=True)
class CriterionResult:
    """A criterion's outcome. The statistic is the criterion's ratio, difference or value."""

    name: str
    says: str
    verdict: Verdict
    gating: bool
    statistic: str  # e.g. "ratio of train_loss, adan / adamw"
    op: str
    bound: float
    estimate: float  # mean over seeds (geometric for ratios)
    low: float  # its 95 % interval, by Student's t over seeds
    high: float
    p_value: float  # two-sided, of an estimate this far from the bound, by itself
    per_seed: tuple[float, ...]
    seeds_passing: int
    improvement: float  # probability that a random seed's arm is better than its rival on the same seed
    by_mean: bool = False  # whether the mean over seeds decides; else it is every seed, or nothing can
    adjusted: float = 1.0  # the p-value that decides then: corrected for the number of criteria that count (Holm)
    control_verdict: str = ""  # the verdict with the control in the arm's place; "" where there is none
    note: str = ""
    kind: Kind = "effect"  # what was published before there were kinds does not say it: ClaimResult.from_json


@checks.arguments(criteria=checks.Several(checks.Instance(CriterionResult, words="a CriterionResult")))
def verdict(criteria: Iterable[CriterionResult]) -> Verdict:
    """Of several: ``fails`` where any gating criterion fails, ``holds`` where all hold, else ``undecided``."""
    gating = [c.verdict for c in criteria if c.gating]
    if "fails" in gating:
        return "fails"
    return "holds" if gating and all(v == "holds" for v in gating) else "undecided"


@dataclass(frozen=True)
class KindVerdict:
    """The verdict of one kind of criteria, with how many of those that count are met."""

    kind: Kind
    verdict: Verdict
    met: int
    total: int


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """All about one run of a claim at one scale, ready for a table, a report or JSON."""

    slug: str
    scale: str
    device: str
    verdict: Verdict  # of all criteria that count, whatever their kind
    criteria: tuple[CriterionResult, ...]
    trials: tuple[TrialResult, ...]
    chosen: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # task -> arm -> the tuned point of each seed
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    date: str  # ISO, UTC, of the last trial
    seconds: float  # total time of all trials
    versions: Mapping[str, str]  # python, torch, numpy, polyak, fingerprint
    machine: Mapping[str, str]  # system, processor, cores, accelerator; never a host's or user's name
    notes: tuple[str, ...] = field(default=())

    @property
    def verdicts(self) -> tuple[KindVerdict, ...]:
        """One for each kind of which any criterion counts."""
        counting: list[tuple[Kind, list[CriterionResult]]] = [
            (kind, [c for c in self.criteria if c.gating and c.kind == kind]) for kind in KINDS
        ]
        return tuple(
            KindVerdict(kind, verdict(asked), sum(c.verdict == "holds" for c in asked), len(asked))
            for kind, asked in counting
            if asked
        )

    def finals(self, task: str, arm: str, metric: str) -> list[float]:
        """The reported trials' final values of one metric, in the order of :attr:`seeds`."""
        by_seed = {
            t.seed: t.values[metric] for t in self.trials if t.purpose == "report" and t.task == task and t.arm == arm
        }
        return [by_seed[s] for s in self.seeds if s in by_seed]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; infinities and NaN become the strings "inf", "-inf", "nan"."""
        verdicts = {v.kind: {"verdict": v.verdict, "met": v.met, "of": v.total} for v in self.verdicts}
        return plain({**asdict(self), "verdicts": verdicts})

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, kinds: Mapping[str, Kind] = EMPTY) -> ClaimResult:
        """The inverse of :meth:`to_json`. Data without "trials" (a published verdict) gives a result without any.

        ``kinds`` is what criteria are, by name, that do not say it themselves.
        """
        seeds = len(data["seeds"])
        return cls(
            **{
                **{name: value for name, value in data.items() if name != "verdicts"},  # which follow from the criteria
                "chosen": {
                    task: {arm: _each(points, seeds) for arm, points in arms.items()}
                    for task, arms in data["chosen"].items()
                },
                "criteria": tuple(_criterion(c, kinds) for c in data["criteria"]),
                "trials": tuple(_trial(t) for t in data.get("trials", ())),
                "seeds": tuple(data["seeds"]),
                "tuning_seeds": tuple(data["tuning_seeds"]),
                "notes": tuple(data.get("notes", ())),
            }
        )


def plain(value: Any) -> Any:
    """Data for JSON: infinities and NaN become the strings "inf", "-inf", "nan"."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _each(points: Any, seeds: int) -> tuple[Mapping[str, Any], ...]:
    """The point of each seed; a verdict that was published when all seeds had one has it once."""
    return (points,) * seeds if isinstance(points, Mapping) else tuple(points)


def _criterion(data: Mapping[str, Any], kinds: Mapping[str, Kind]) -> CriterionResult:
    known = {"kind": kinds[data["name"]]} if data["name"] in kinds else {}
    return CriterionResult(**{**known, **_numbers(data)})


def _trial(data: Mapping[str, Any]) -> TrialResult:
    curve = tuple((_numbers(at), _numbers(values)) for at, values in data["curve"])
    return TrialResult(**{**data, "values": _numbers(data["values"]), "curve": curve})


def _numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`plain` where numbers are: only these three words become floats again."""
    words = {"inf", "-inf", "nan"}

    def number(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(number(v) for v in value)
        return float(value) if isinstance(value, str) and value in words else value

    return {str(k): number(v) for k, v in data.items()}
