"""The store's file: one SQLite database in a folder, with its schema, its locks, and one sentence for each thing that can go wrong.

Every owner (an open store) holds a lock on a file of its own, which the operating system takes back when the owner's process
dies in whatever way. So nothing waits for a time to pass, and a process that was merely suspended keeps what it has.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from polyak.core import checks

if TYPE_CHECKING:
    from filelock import BaseFileLock

SCHEMA = 1
# Marks the file as ours ("plyk"), so that no other program's database is taken for a store.
APPLICATION = 0x706C796B
FILE = "polyak.sqlite3"
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
# Not there in stores of before it was needed; what read and wrote those does not miss it.
_COMPARISONS = """
CREATE TABLE IF NOT EXISTS comparisons (
    slug TEXT PRIMARY KEY,
    asked TEXT NOT NULL,
    data TEXT NOT NULL
)
"""


def create(database: sqlite3.Connection) -> None:
    """The tables of an empty store, and the marks by which it is known."""
    for statement in [*_TABLES.strip().rstrip(";").split(";"), _COMPARISONS]:
        database.execute(statement)
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.execute(f"PRAGMA user_version = {SCHEMA}")


class StoreError(RuntimeError):
    """The store cannot be read or written; what was stored before is as it was."""


class Database:
    """The file, opened by one owner."""

    @checks.arguments(home=checks.path | None)
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
    def reader(cls, home: Path | str | None = None) -> Self | None:
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
                create(self._db)
        if not self._has("comparisons"):
            self._db.execute(_COMPARISONS)

    def _has(self, table: str) -> bool:
        query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
        return self._db.execute(query, [table]).fetchone() is not None

    def __enter__(self) -> Self:
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

    # -- who is alive ------------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        """Take the lock that says that this owner lives, if it is not held yet."""
        if self._alive is None:
            self._lock_file(self._owner).parent.mkdir(exist_ok=True)
            alive = _lock(self._lock_file(self._owner), timeout=0)
            alive.acquire()
            self._alive = alive

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

    # -- beneath -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self, file: Path) -> Iterator[sqlite3.Connection]:
        """The database in a transaction with another one's tables as ``other.trials`` and so on."""
        with self._clear_errors():
            self._db.execute("ATTACH ? AS other", [str(file)])
            try:
                with self._transaction():
                    yield self._db
            finally:
                self._db.execute("DETACH other")

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


def _lock(path: Path, *, timeout: float) -> BaseFileLock:
    from filelock import FileLock

    return FileLock(path, timeout=timeout)
