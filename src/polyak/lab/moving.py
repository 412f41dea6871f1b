"""Export and import of a store: its finished trials, or those of some claims, as one file for another machine.

The file is a database as the store's own. Taken in by another store, its trials are there as if they had been run there, so that
a run goes on where it stopped; what both have stays as it is.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from polyak.lab.database import APPLICATION, SCHEMA, StoreError, create
from polyak.lab.store import Store

_COLUMNS = (
    "digest, state, owner, claim, scale, task, arm, seed, purpose, point, options, device, versions, machine, finished, seconds, "
    "diverged, message, result, curve"
)


def export(store: Store, file: Path, *, claims: Collection[str] = ()) -> int:
    """Write finished trials and comparisons to a file; how many trials.

    Args:
        store: what is written.
        file: replaced where it is such a file already.
        claims: the slugs of those that are meant; () for all, comparisons among them.

    Raises:
        ValueError: the file is something else.
        StoreError: the store cannot be read, or the file not be written.
    """
    if file.exists() and not _is_ours(file):
        raise ValueError(f"{file} is there and is no exported store: name another file")
    made = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(made, isolation_level=None)) as database:
            create(database)
        only = f" AND claim IN ({', '.join('?' * len(claims))})" if claims else ""
        with store.attached(made) as database:
            count = database.execute(
                f"INSERT INTO other.trials ({_COLUMNS}) SELECT {_COLUMNS} FROM trials WHERE state = 'done'{only}",
                [*claims],
            ).rowcount
            if not claims:
                database.execute("INSERT INTO other.comparisons SELECT * FROM comparisons")
        made.replace(file)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{file} cannot be written: {error}") from error
    finally:
        made.unlink(missing_ok=True)
    return count


def take_in(store: Store, file: Path) -> tuple[int, int]:
    """Add the finished trials and the comparisons of an exported file; how many trials are new, and how many there are in it.

    Raises:
        ValueError: there is no such file, it is no exported store, or a newer polyak wrote it.
        StoreError: the store cannot be written.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if not _is_ours(file):
        raise ValueError(f"{file} is no exported store, or a newer polyak wrote it")
    with store.attached(file) as database:
        [total] = database.execute("SELECT count(*) FROM other.trials WHERE state = 'done'").fetchone()
        # A trial that failed here, or is in flight, has its result now.
        new = database.execute(
            f"INSERT INTO trials ({_COLUMNS}) SELECT {_COLUMNS} FROM other.trials WHERE state = 'done' "
            f"ON CONFLICT (digest) DO UPDATE SET ({_COLUMNS}) = "
            f"({', '.join(f'excluded.{c}' for c in _COLUMNS.split(', '))}) WHERE trials.state != 'done'"
        ).rowcount
        database.execute(
            "INSERT INTO comparisons SELECT slug, asked, data FROM other.comparisons WHERE true "
            "ON CONFLICT (slug) DO UPDATE SET asked = excluded.asked, data = excluded.data "
            "WHERE excluded.asked > comparisons.asked"
        )
    return new, total


def _is_ours(file: Path) -> bool:
    """Whether a file is a store's database of this version or an earlier one."""
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            [application] = database.execute("PRAGMA application_id").fetchone()
            [version] = database.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error:
        return False
    return application == APPLICATION and version <= SCHEMA
