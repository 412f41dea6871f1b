"""The comparisons in a store (``polyak compare``): what each asked for, and which of its trials have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from polyak.lab.compare.comparison import Comparison
from polyak.lab.compare.record import Record
from polyak.lab.compare.search import ComparisonPlan
from polyak.lab.store import InFlight, Noted, Store


@dataclass
class Compared:
    """A comparison, read from a store.

    Args:
        asked: when it was asked for last (ISO, UTC).
        plans: each task's trials, with those results that were found.
        states: of those trials that have ended "done" or "failed", and when, by digest.
    """

    record: Record
    asked: str
    plans: Sequence[ComparisonPlan]
    states: Mapping[str, tuple[str, str]]

    @property
    def total(self) -> int:
        return sum(plan.total for plan in self.plans)

    @property
    def done(self) -> int:
        return sum(len(plan.found) for plan in self.plans)

    @property
    def failed(self) -> int:
        return sum(state == "failed" for state, _ in self.states.values())

    @property
    def complete(self) -> bool:
        return self.done == self.total

    @property
    def seconds(self) -> float:
        return sum(stored.result.seconds for plan in self.plans for stored in plan.found.values())

    @property
    def finished(self) -> str:
        """When its last trial ended (ISO, UTC); "" where none has."""
        return max((finished for _, finished in self.states.values()), default="")

    @cached_property
    def arms(self) -> Mapping[str, str]:
        """What arms are called, by their words."""
        return {arm.name: arm.label for arm in self.plans[0].claim.arms}

    @cached_property
    def result(self) -> Comparison:
        """What was found, where it is complete; else what there is for drawings, without a judgement."""
        return (self.record.comparison if self.complete else self.record.so_far)(self.plans)

    @cached_property
    def digests(self) -> frozenset[str]:
        """Of all its trials that can be named by now."""
        return frozenset(trial.digest for plan in self.plans for trial in plan.known())

    def goes_on(self, trial: InFlight) -> bool:
        """Whether a trial in flight is of this comparison."""
        return trial.digest in self.digests


@dataclass
class Shelf:
    """The comparisons of one store. What was read is kept for as long as the store's trials of it are the same."""

    _known: dict[str, Compared] = field(default_factory=dict)

    def read(self, store: Store) -> list[Compared]:
        """All there are, the latest first; those whose records another version wrote are left out."""
        found = [compared for noted in store.comparisons() if (compared := self._read(store, noted))]
        self._known = {compared.record.slug: compared for compared in found}
        return found

    def _read(self, store: Store, noted: Noted) -> Compared | None:
        known = self._known.get(noted.slug)
        if known and known.asked == noted.asked and known.states == store.states(known.digests):
            return known
        try:
            record = Record.from_json(noted.data)
        except (ValueError, TypeError, KeyError):
            return None
        compared = Compared(record, noted.asked, record.plans(), {})
        for plan in compared.plans:
            plan.load(store)
        compared.states = store.states(compared.digests)
        return compared
