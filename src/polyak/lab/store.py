"""Where trials are kept: one SQLite database, written as trials end, read by everyone.

A trial is known by a digest of all that determines its result. Before it runs it is marked as in flight by its owner (an open
:class:`Store`); the mark holds for as long as the owner lives, which the operating system vouches for: every owner holds a lock
on a file of its own, and a process that dies in whatever way loses its locks. So nothing waits for a time to pass, and a
process that was merely suspended keeps what it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polyak.lab.result import ComparedTrial, TrialResult

if TYPE_CHECKING:
    from filelock import BaseFileLock

SCHEMA = 1
# Marks the file as ours ("plyk"), so that no other program's database is taken for a store.
APPLICATION = 0x706C796B
FILE = "polyak.sqlite3"
COMPARISON = "compare-"  # begins the name under which a comparison's trials are stored; the task file's name follows
# Writers wait this long for each other: a write is one row, so that only a stuck disk takes longer.
PATIENCE_S = 60.0

_TABLES = """
CREATE TABLE trials (
    digest TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed')),
    owner TEXT NOT NULL,
    claim TEXT NOT NULL,
    scale TEXT NOT NULL,
    task TEXT NOT NULL,
    arm TEXT NOT NULL,
    seed INTEGER NOT NULL,
    purpose TEXT NOT NULL,
    point TEXT NOT NULL,
    options TEXT NOT NULL,
    device TEXT NOT NULL,
    versions TEXT NOT NULL,
    machine TEXT NOT NULL DEFAULT '{}',
    finished TEXT NOT NULL DEFAULT '',
    seconds REAL NOT NULL DEFAULT 0,
    diverged INTEGER NOT NULL DEFAULT 0,
    message TEXT NOT NULL DEFAULT '',
    result TEXT NOT NULL DEFAULT '{}',
    curve TEXT NOT NULL DEFAULT '[]'
);
CREATE INDEX trials_by_claim ON trials (claim, scale, device);
"""

_INSERT = """
INSERT INTO trials (digest, state, owner, claim, scale, task, arm, seed, purpose, point, options, device, versions)
VALUES (:digest, 'running', :owner, :claim, :scale, :task, :arm, :seed, :purpose, :point, :options, :device, :versions)
ON CONFLICT (digest) DO UPDATE SET state = 'running', owner = :owner, message = ''
"""


class StoreError(RuntimeError):
    """The store cannot be read or written; what was stored before is as it was."""


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
        return _label(self.arm, self.task, self.seed, self.purpose, self.point)


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
    arm: str
    label: str
    owner: str
    since: float


class Store:
    """The database of trials in a folder, made where it is missing.

    Args:
        home: the folder. Default: the environment's ``POLYAK_HOME``, else the user's data folder of this system.

    Raises:
        StoreError: from every method, where the folder cannot be written, the disk is full, or the file is damaged or made
            by a newer polyak. Whatever was stored stays as it was.

    Several processes may use one store at once, each through a ``Store`` of its own. Use it as a context manager, or close it.
    """

    def __init__(self, home: Path | str | None = None) -> None:
        self._at(home)
        with self._clear_errors():
            self.home.mkdir(parents=True, exist_ok=True)
            # Two processes may open a new store at once; SQLite does not wait where both switch it to its WAL mode.
            with _lock(self.home / "polyak.lock", timeout=PATIENCE_S):
                self._db = sqlite3.connect(self.path, timeout=PATIENCE_S, isolation_level=None)
                try:
                    self._prepare()
                except BaseException:
                    self._db.close()
                    raise

    @classmethod
    def reader(cls, home: Path | str | None = None) -> Store | None:
        """The store as it is, opened for reading alone. None where there is none yet.

        Nothing is made or changed, but for the empty files beside the database by which SQLite's readers and writers know of
        each other.
        """
        store = cls.__new__(cls)
        store._at(home)
        if not store.path.exists():
            return None
        with store._clear_errors():
            address = f"{store.path.resolve().as_uri()}?mode=ro"
            store._db = sqlite3.connect(address, uri=True, timeout=PATIENCE_S, isolation_level=None)
            try:
                if store._tables():
                    return store
            except BaseException:
                store._db.close()
                raise
            store._db.close()
        return None

    def _at(self, home: Path | str | None) -> None:
        self.home = home_folder(home)
        if self.home.exists() and not self.home.is_dir():
            raise StoreError(f"{self.home} is a file, not the folder of a store: name a folder, or {_ELSEWHERE}")
        self.path = self.home / FILE
        self._owner = uuid.uuid4().hex
        self._alive: BaseFileLock | None = None

    def _tables(self) -> int:
        """How many tables and indices there are. StoreError where the file is not ours, or made by a newer polyak."""
        self._db.row_factory = sqlite3.Row
        version, application, tables = (
            self._db.execute(query).fetchone()[0]
            for query in ("PRAGMA user_version", "PRAGMA application_id", "SELECT count(*) FROM sqlite_master")
        )
        if (tables or version) and application != APPLICATION:
            raise StoreError(f"{self.path} is a database of another program: {_ELSEWHERE}")
        if version > SCHEMA:
            raise StoreError(
                f"{self.path} was written by a newer polyak (schema {version}, this one knows {SCHEMA}): "
                f"update polyak, or {_ELSEWHERE}"
            )
        return tables

    def _prepare(self) -> None:
        tables = self._tables()
        if self._db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            self._db.execute("PRAGMA journal_mode = WAL")
        if not tables:
            with self._transaction():
                for statement in _TABLES.strip().rstrip(";").split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up all trials still marked as in flight, and close the file."""
        try:
            if self._alive is not None:
                # Where even this cannot be written the marks end with the lock.
                with suppress(StoreError), self._clear_errors(), self._transaction():
                    self._db.execute("DELETE FROM trials WHERE state = 'running' AND owner = ?", [self._owner])
                self._alive.release()
                self._lock_file(self._owner).unlink(missing_ok=True)
                self._alive = None
        finally:
            self._db.close()

    # -- a trial's way through the store ---------------------------------------------------------------------------------

    def claim_trial(self, trial: Planned) -> Literal["mine", "done", "elsewhere"]:
        """Mark a trial as in flight here.

        Returns "mine" where it is now for the caller to run (a trial whose owner has died is taken over, one that failed is
        tried again), "done" where its result is stored, "elsewhere" where another living process has it in flight.
        """
        with self._clear_errors():
            if self._alive is None:
                self._lock_file(self._owner).parent.mkdir(exist_ok=True)
                alive = _lock(self._lock_file(self._owner), timeout=0)
                alive.acquire()
                self._alive = alive
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
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
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

    # -- what is stored --------------------------------------------------------------------------------------------------

    def results(self, trials: Iterable[Planned]) -> dict[str, Stored]:
        """The results that are stored of these trials, by their digests."""
        wanted = {t.digest: t for t in trials}
        digests = list(wanted)
        found: dict[str, Stored] = {}
        with self._clear_errors():
            # SQLite takes a limited number of parameters at once.
            for start in range(0, len(digests), 500):
                some = digests[start : start + 500]
                marks = ", ".join("?" * len(some))
                query = f"SELECT * FROM trials WHERE state = 'done' AND digest IN ({marks})"
                for row in self._db.execute(query, some):
                    found[row["digest"]] = _stored(row)
        return {digest: found[digest] for digest in digests if digest in found}

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

    def compared(self) -> list[ComparedTrial]:
        """All trials of comparisons that have ended, in the order they were begun in."""
        query = """
            SELECT claim, scale, device, versions, arm, purpose, seed, state, owner, seconds, finished,
                coalesce(json_extract(options, '$.class'), '') AS target, coalesce(json_extract(options, '$.number'), -1) AS number,
                coalesce(json_extract(options, '$.points'), 0) AS points
            FROM trials WHERE state != 'running' AND claim GLOB ? ORDER BY rowid
        """
        with self._clear_errors():
            rows = self._db.execute(query, [f"{COMPARISON}*"]).fetchall()
        return [ComparedTrial(**{**dict(row), "versions": json.loads(row["versions"])}) for row in rows]

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
            SELECT owner, claim, scale, device, versions, task, arm, seed, purpose, point FROM trials
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
                facts = {name: row[name] for name in ("claim", "scale", "device", "arm", "owner")}
                label = _label(row["arm"], row["task"], row["seed"], row["purpose"], json.loads(row["point"]))
                found.append(InFlight(**facts, versions=json.loads(row["versions"]), label=label, since=began))
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

    # -- beneath ---------------------------------------------------------------------------------------------------------

    def _lock_file(self, owner: str) -> Path:
        return self.home / "running" / f"{owner}.lock"

    def _lives(self, owner: str) -> bool:
        """Whether an owner still holds its lock; the file of one that died is cleared away."""
        from filelock import Timeout

        if owner == self._owner:
            return True
        path = self._lock_file(owner)
        if not path.exists():
            return False
        try:
            with _lock(path, timeout=0), suppress(PermissionError):  # Windows deletes no open file
                path.unlink(missing_ok=True)
        except Timeout:
            return True
        return False

    def _since(self, owner: str) -> float | None:
        """When an owner began (seconds of :func:`time.time`), if it still holds its lock; nothing is cleared away."""
        from filelock import Timeout

        path = self._lock_file(owner)
        try:
            began = path.stat().st_mtime
            if owner != self._owner:
                with _lock(path, timeout=0):
                    return None
        except FileNotFoundError:
            return None
        except Timeout:
            pass
        return began

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # SQLite may have rolled back by itself, as it does on a full disk.
            if self._db.in_transaction:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Say in one sentence what is wrong with the store and what helps."""
        try:
            yield
        except sqlite3.Error as error:
            # The low byte is the kind of error, the others its detail.
            kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
            raise StoreError(f"{self.path}: {_WHAT_HELPS.get(kind, _UNEXPECTED)} (SQLite: {error})") from error
        except OSError as error:
            what = error.strerror or error
            raise StoreError(f"{self.home}: cannot be written: {what}. Make it writable, or {_ELSEWHERE}") from error


_ELSEWHERE = "set POLYAK_HOME to another folder"
_UNEXPECTED = "the store cannot be used; what was stored is as it was"
_DAMAGED = f"the file is damaged or no database: move it aside to start a new store, or {_ELSEWHERE}"
_READ_ONLY = f"the store cannot be written: make file and folder writable, or {_ELSEWHERE}"
_WHAT_HELPS = {
    sqlite3.SQLITE_FULL: f"the disk is full; what was stored is as it was. Make room, or {_ELSEWHERE}",
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_BUSY: f"another process has held the store for more than {PATIENCE_S:g} s; end it, or {_ELSEWHERE}",
    sqlite3.SQLITE_IOERR: f"the disk could not be read or written, or is full; make room, or {_ELSEWHERE}",
}


def home_folder(home: Path | str | None) -> Path:
    if home is None:
        home = os.environ.get("POLYAK_HOME") or None
    if home is None:
        import platformdirs

        home = platformdirs.user_data_dir("polyak", appauthor=False)
    return Path(home).expanduser()


def _label(arm: str, task: str, seed: int, purpose: str, point: Mapping[str, Any]) -> str:
    if purpose == "report":
        return f"{arm} on {task}, seed {seed}"
    return f"{arm} on {task}, tuning {', '.join(f'{k}={v}' for k, v in point.items())}"


def _key(run: Run) -> list[str]:
    return [run.claim, run.scale, run.device, _json(run.versions, sort=True)]


def _lock(path: Path, *, timeout: float) -> BaseFileLock:
    from filelock import FileLock

    return FileLock(path, timeout=timeout)


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
