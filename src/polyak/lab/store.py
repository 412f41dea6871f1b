"""The store: trials are written as they end, and any process may read them; and the comparisons that were asked for.

A trial is known by a digest of all that determines its result. Before it runs it is marked as in flight by its owner (an open
:class:`Store`); the mark holds for as long as the owner lives (see :mod:`polyak.lab.database`).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

from polyak.lab.database import Database, StoreError
from polyak.lab.result import TrialResult

__all__ = ["COMPARISON", "InFlight", "Noted", "Planned", "Run", "Store", "StoreError", "Stored"]
COMPARISON = "compare-"  # begins the name under which a comparison's trials are stored; the task file's name follows
_AT_ONCE = 500  # digests in one question: SQLite takes a limited number of parameters

_INSERT = """
INSERT INTO trials (digest, state, owner, claim, scale, task, arm, seed, purpose, point, options, device, versions)
VALUES (:digest, 'running', :owner, :claim, :scale, :task, :arm, :seed, :purpose, :point, :options, :device, :versions)
ON CONFLICT (digest) DO UPDATE SET state = 'running', owner = :owner, message = ''
"""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A trial to run: all that determines its result. ``device`` is its kind: "cpu" or an accelerator's name."""

    claim: str
    scale: str
    task: str
    arm: str
    seed: int
    purpose: Literal["tuning", "report"]
    point: Mapping[str, Any]
    options: Mapping[str, Any]  # all of Trial.options, the point's among them
    device: str
    versions: Mapping[str, str]  # python, torch, numpy, polyak, fingerprint

    @cached_property
    def digest(self) -> str:
        """What the trial is known by. polyak's version is left out: the fingerprint says what matters of it."""
        versions = {name: version for name, version in self.versions.items() if name != "polyak"}
        facts = [self.claim, self.scale, self.task, self.arm, self.seed, self.purpose, self.device]
        return hashlib.sha256(_json([*facts, self.options, versions], sort=True).encode()).hexdigest()

    @property
    def label(self) -> str:
        """For people: "adan on digits, seed 3" or "adan on digits, tuning lr=0.01"."""
        return f"{self.arm} on {self.task}, {_what(self.seed, self.purpose, self.point)}"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A trial from the store, with when it ended (ISO, UTC) and on what machine."""

    result: TrialResult
    finished: str
    machine: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the store holds of one claim at one scale, device kind and set of versions."""

    claim: str
    scale: str
    device: str
    versions: Mapping[str, str]
    done: int
    failed: int
    seconds: float
    finished: str  # ISO, UTC, of its last trial; "" where none has ended


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A trial that a living process has in flight. ``since``: when that process began (seconds of :func:`time.time`)."""

    claim: str
    scale: str
    device: str
    versions: Mapping[str, str]
    task: str
    arm: str
    what: str  # "seed 3" or "tuning lr=0.01"
    digest: str
    owner: str
    since: float

    def label(self, arms: Mapping[str, str], tasks: Mapping[str, str]) -> str:
        """For people, with these labels for names: "Adan on Digits, seed 3"."""
        return f"{arms.get(self.arm, self.arm)} on {tasks.get(self.task, self.task)}, {self.what}"


@dataclass(frozen=True, kw_only=True)
class Noted:
    """A comparison that was asked for: what it is known by, when it was asked for last (ISO, UTC), and what was asked."""

    slug: str
    asked: str
    data: Mapping[str, Any]


class Store(Database):
    """The database of trials in a folder, made where it is missing.

    Args:
        home: the folder. Default: the environment's ``POLYAK_HOME``, else the user's data folder of this system.

    Raises:
        StoreError: from every method, where the folder cannot be written, the disk is full, or the file is damaged or made
            by a newer polyak. Whatever was stored stays as it was.

    Several processes may use one store at once, each through a ``Store`` of its own. Use it as a context manager, or close it.
    """

    # -- a trial's way through the store ---------------------------------------------------------------------------------

    def claim_trial(self, trial: Planned) -> Literal["mine", "done", "elsewhere"]:
        """Mark a trial as in flight here.

        Returns "mine" where it is now for the caller to run (a trial whose owner has died is taken over, one that failed is
        tried again), "done" where its result is stored, "elsewhere" where another living process has it in flight.
        """
        with self._clear_errors():
            self._live()
            with self._transaction():
                query = "SELECT state, owner FROM trials WHERE digest = ?"
                row = self._db.execute(query, [trial.digest]).fetchone()
                if row is not None and row["state"] == "done":
                    return "done"
                if row is not None and row["state"] == "running" and self._lives(row["owner"]):
                    return "mine" if row["owner"] == self._owner else "elsewhere"
                self._db.execute(_INSERT, {**_columns(trial), "owner": self._owner})
                return "mine"

    def finish(self, trial: Planned, result: TrialResult, machine: Mapping[str, str]) -> None:
        """Store a trial's result. The first result of a trial stays: a later one is the same by construction."""
        ended = {
            "machine": _json(machine),
            "finished": _now(),
            "seconds": result.seconds,
            "diverged": int(result.diverged),
            "message": result.message,
            "result": _json(result.values),
            "curve": _json([[at, values] for at, values in result.curve]),
        }
        with self._clear_errors(), self._transaction():
            query = "SELECT 1 FROM trials WHERE digest = ? AND state = 'done'"
            if self._db.execute(query, [trial.digest]).fetchone() is None:
                self._db.execute(_INSERT, {**_columns(trial), "owner": self._owner})
                assignments = ", ".join(f"{name} = :{name}" for name in ended)
                self._db.execute(
                    f"UPDATE trials SET state = 'done', {assignments} WHERE digest = :digest",
                    {**ended, "digest": trial.digest},
                )

    def fail(self, trial: Planned, message: str) -> None:
        """Record that a trial could not be run, and why. It is tried again when it is next claimed."""
        with self._clear_errors(), self._transaction():
            self._db.execute(
                "UPDATE trials SET state = 'failed', message = ? WHERE digest = ? AND state = 'running' AND owner = ?",
                [message, trial.digest, self._owner],
            )

    def release(self, trial: Planned) -> None:
        """Give up a trial that is in flight here, without a result."""
        with self._clear_errors(), self._transaction():
            self._db.execute(
                "DELETE FROM trials WHERE digest = ? AND state = 'running' AND owner = ?", [trial.digest, self._owner]
            )

    def forget(self, trial: Planned) -> None:
        """Remove the results of this trial and its like: the same arm with any seed, purpose and options, by the same code."""
        alike = [trial.claim, trial.scale, trial.task, trial.arm, trial.device]
        versions = {name: version for name, version in trial.versions.items() if name != "polyak"}
        same = "".join(f" AND json_extract(versions, '$.{name}') = ?" for name in versions)
        query = f"""
            DELETE FROM trials
            WHERE state = 'done' AND claim = ? AND scale = ? AND task = ? AND arm = ? AND device = ?{same}
        """
        with self._clear_errors(), self._transaction():
            self._db.execute(query, [*alike, *versions.values()])

    def note(self, slug: str, data: Mapping[str, Any]) -> None:
        """Keep what a comparison was asked for as; asked for again, it is the latest."""
        query = "INSERT INTO comparisons (slug, asked, data) VALUES (?, ?, ?) ON CONFLICT (slug) DO UPDATE SET asked = ?, data = ?"
        now, text = _now(), _json(data)
        with self._clear_errors(), self._transaction():
            self._db.execute(query, [slug, now, text, now, text])

    # -- what is stored --------------------------------------------------------------------------------------------------

    def results(self, trials: Iterable[Planned]) -> dict[str, Stored]:
        """The results that are stored of these trials, by their digests."""
        digests = list(dict.fromkeys(t.digest for t in trials))
        query = "SELECT * FROM trials WHERE state = 'done'"
        found = {row["digest"]: _stored(row) for row in self._among(digests, query)}
        return {digest: found[digest] for digest in digests if digest in found}

    def states(self, digests: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Of those trials that have ended "done" or "failed", and when."""
        query = "SELECT digest, state, finished FROM trials WHERE state != 'running'"
        return {row["digest"]: (row["state"], row["finished"]) for row in self._among(list(digests), query)}

    def _among(self, digests: list[str], query: str) -> Iterator[sqlite3.Row]:
        """The rows of a query that has a condition, for these trials."""
        with self._clear_errors():
            for start in range(0, len(digests), _AT_ONCE):
                some = digests[start : start + _AT_ONCE]
                yield from self._db.execute(f"{query} AND digest IN ({', '.join('?' * len(some))})", some)

    def runs(self, slug: str | None = None) -> list[Run]:
        """What is stored, by claim, scale, device kind and versions; latest last. ``slug`` picks one claim."""
        query = """
            SELECT claim, scale, device, versions, sum(state = 'done') AS done, sum(state = 'failed') AS failed,
                total(seconds) AS seconds, max(finished) AS finished
            FROM trials WHERE :slug IS NULL OR claim = :slug
            GROUP BY claim, scale, device, versions HAVING done + failed > 0 ORDER BY finished, claim, scale
        """
        with self._clear_errors():
            rows = self._db.execute(query, {"slug": slug}).fetchall()
        return [Run(**{**dict(row), "versions": json.loads(row["versions"])}) for row in rows]

    def comparisons(self) -> list[Noted]:
        """The comparisons that were asked for, the latest first."""
        with self._clear_errors():
            if not self._has("comparisons"):
                return []  # read from a store that an earlier version made
            rows = self._db.execute(
                "SELECT slug, asked, data FROM comparisons ORDER BY asked DESC, rowid DESC"
            ).fetchall()
        return [Noted(**{**dict(row), "data": json.loads(row["data"])}) for row in rows]

    def durations(self, slug: str, scale: str, device: str) -> dict[tuple[str, str], float]:
        """How many seconds a trial took on average, by task and arm, whatever the versions."""
        query = """
            SELECT task, arm, avg(seconds) FROM trials
            WHERE state = 'done' AND claim = ? AND scale = ? AND device = ? GROUP BY task, arm
        """
        with self._clear_errors():
            return {(task, arm): mean for task, arm, mean in self._db.execute(query, [slug, scale, device])}

    def in_flight(self) -> list[InFlight]:
        """The trials that living processes have in flight, longest-running processes first."""
        query = """
            SELECT digest, owner, claim, scale, device, versions, task, arm, seed, purpose, point FROM trials
            WHERE state = 'running' ORDER BY claim, scale, task, arm, seed
        """
        with self._clear_errors():
            if not any(self._lock_file(self._owner).parent.glob("*.lock")):
                return []  # without reading the table: nobody is at work
            rows = self._db.execute(query).fetchall()
            since = {owner: self._since(owner) for owner in {row["owner"] for row in rows}}
        found = []
        for row in rows:
            began = since[row["owner"]]
            if began is not None:
                facts = {name: row[name] for name in ("claim", "scale", "device", "task", "arm", "digest", "owner")}
                what = _what(row["seed"], row["purpose"], json.loads(row["point"]))
                found.append(InFlight(**facts, versions=json.loads(row["versions"]), what=what, since=began))
        return sorted(found, key=lambda trial: trial.since)

    def latest(self, of: Run | InFlight, count: int) -> list[Stored]:
        """The trials that ended last, the very last first, without their curves: of a run, or of the process that has this one
        in flight."""
        column, *key = (
            ["owner", of.claim, of.scale, of.device, of.owner] if isinstance(of, InFlight) else ["versions", *_key(of)]
        )
        query = f"""
            SELECT *, '[]' AS curve FROM (
                SELECT task, arm, seed, purpose, point, result, seconds, diverged, message, finished, machine FROM trials
                WHERE state = 'done' AND claim = ? AND scale = ? AND device = ? AND {column} = ?
                ORDER BY finished DESC, rowid DESC LIMIT ?
            )
        """
        with self._clear_errors():
            rows = self._db.execute(query, [*key, count]).fetchall()
        return [_stored(row) for row in rows]

    def seeds(self, run: Run) -> int:
        """How many seeds of a run are reported by now."""
        query = """
            SELECT count(DISTINCT seed) FROM trials
            WHERE purpose = 'report' AND claim = ? AND scale = ? AND device = ? AND versions = ?
        """
        with self._clear_errors():
            return self._db.execute(query, _key(run)).fetchone()[0]


def _what(seed: int, purpose: str, point: Mapping[str, Any]) -> str:
    return f"seed {seed}" if purpose == "report" else f"tuning {', '.join(f'{k}={v}' for k, v in point.items())}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _key(run: Run) -> list[str]:
    return [run.claim, run.scale, run.device, _json(run.versions, sort=True)]


def _json(value: Any, *, sort: bool = False) -> str:
    """JSON in the order given, or in the one form that equal data share."""
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), default=_refuse)


def _refuse(value: Any) -> Any:
    raise TypeError(
        f"options and values must be numbers, strings, booleans, None, or lists and mappings of them, got {value!r}"
    )


def _columns(trial: Planned) -> dict[str, Any]:
    plain = {
        name: getattr(trial, name) for name in ("digest", "claim", "scale", "task", "arm", "seed", "purpose", "device")
    }
    return {
        **plain,
        **{name: _json(getattr(trial, name), sort=name == "versions") for name in ("point", "options", "versions")},
    }


def _stored(row: sqlite3.Row) -> Stored:
    result = TrialResult(
        task=row["task"],
        arm=row["arm"],
        seed=row["seed"],
        purpose=row["purpose"],
        point=json.loads(row["point"]),
        values=json.loads(row["result"]),
        curve=tuple((at, values) for at, values in json.loads(row["curve"])),
        seconds=row["seconds"],
        diverged=bool(row["diverged"]),
        message=row["message"],
    )
    return Stored(result=result, finished=row["finished"], machine=json.loads(row["machine"]))
