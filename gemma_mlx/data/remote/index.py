"""The cache's index in SQLite: what is kept, who uses it, and which version of an object each run reads."""

from __future__ import annotations

import errno
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from gemma_mlx.errors import SourceError

FORMAT = 1
_WAIT_S = 60
"""How long a process waits for another's transaction (milliseconds, usually)."""
_DAY_NS = 86_400 * 10**9
PINS_LAST_DAYS = 90
_TOUCHES, _TOUCH_NS = 256, 5 * 10**9
"""Uses are written down when this many wait, or the first has waited this long, and before anything is let go."""

_SCHEMA = f"""
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
    checksum BLOB, used INTEGER NOT NULL
);
CREATE INDEX oldest ON entries (used);
CREATE INDEX unfinished ON entries (size) WHERE checksum IS NULL;
CREATE TABLE total (bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER more AFTER INSERT ON entries BEGIN UPDATE total SET bytes = bytes + NEW.size; END;
CREATE TRIGGER less AFTER DELETE ON entries BEGIN UPDATE total SET bytes = bytes - OLD.size; END;
CREATE TRIGGER other AFTER UPDATE OF size ON entries
    BEGIN UPDATE total SET bytes = bytes + NEW.size - OLD.size; END;
CREATE TABLE holds (owner TEXT, key BLOB, PRIMARY KEY (owner, key)) WITHOUT ROWID;
CREATE TABLE runs (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, used INTEGER NOT NULL);
CREATE TABLE pins (
    run INTEGER, url BLOB, version TEXT NOT NULL, size INTEGER, checksum BLOB, PRIMARY KEY (run, url)
) WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
"""
_STAYING = """
    (SELECT coalesce(sum(size), 0) FROM entries WHERE checksum IS NULL) + (SELECT coalesce(sum(size), 0) FROM entries
    WHERE checksum NOT NULL AND key IN (SELECT key FROM holds))
"""


class Entry(NamedTuple):
    """A kept object: `id` is never given twice."""

    id: int
    size: int
    checksum: bytes


class Pin(NamedTuple):
    """The version of an object that a run reads; `checksum` only where the source has no versions."""

    version: str
    size: int | None
    checksum: bytes | None = None


class Index:
    """One process's view of the index; safe to use from several threads, and by several processes.

    An entry without a checksum is being written: its size is reserved. URLs are stored as digests alone, since they may
    be signed.

    Args:
        folder: where ``index.sqlite`` lies.

    Attributes:
        new: there was no (readable) index, so files that lie there are unknown.

    Raises (everywhere):
        SourceError: the folder cannot be written, the disk is full, or the index is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "index.sqlite"
        self._lock, self._clock = threading.Lock(), 0
        self._touched: dict[int, int] = {}
        self._runs: dict[str, int] = {}
        with telling(folder):
            try:
                self._open()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # not a database, or a damaged one
                for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
                    (folder / name).unlink(missing_ok=True)
                self._open()

    def _open(self) -> None:
        self.path.touch(mode=0o600)
        self._db = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        # What a power cut takes back is downloaded again.
        self._db.execute("PRAGMA synchronous = NORMAL")
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        self.new = found == 0
        if self.new:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        elif found != FORMAT:
            raise SourceError(
                f"cache folder {self.folder}: made by another version of this library (format {found}, not {FORMAT}); "
                "remove it, or give another folder"
            )
        self._db.execute("SELECT * FROM total, (SELECT 1 FROM entries LIMIT 1)").fetchall()

    def close(self) -> None:
        """Writes down the last uses."""
        with self.writing():
            self._write_touches()
        with self._lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that other threads and processes wait for; undone where it raises."""
        with self._lock, telling(self.folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _all(self, query: str, *values: object) -> list[tuple]:
        return self._db.execute(query, values).fetchall()

    def _now(self) -> int:
        """Nanoseconds, never the same twice."""
        self._clock = max(self._clock + 1, time.time_ns())
        return self._clock

    # Entries.

    def entry(self, key: bytes) -> Entry | None:
        """A whole entry."""
        with self._lock, telling(self.folder):
            rows = self._all("SELECT id, size, checksum FROM entries WHERE key = ? AND checksum NOT NULL", key)
        return Entry(*rows[0]) if rows else None

    def total(self) -> int:
        """Bytes kept and reserved."""
        with self._lock, telling(self.folder):
            return self._all("SELECT bytes FROM total")[0][0]

    def touch(self, id: int) -> None:
        """Notes a use; cheap, since it is written down with others."""
        with self._lock:
            now = self._now()
            self._touched[id] = now
            due = len(self._touched) >= _TOUCHES or now - next(iter(self._touched.values())) > _TOUCH_NS
        if due:
            with self.writing():
                self._write_touches()

    def _write_touches(self) -> None:
        self._db.executemany(
            "UPDATE entries SET used = max(used, ?) WHERE id = ?", [(now, id) for id, now in self._touched.items()]
        )
        self._touched.clear()

    # The following are called inside `writing`.

    def reserved(self) -> list[bytes]:
        """Keys of entries that are being written (or were, by a process that is gone)."""
        return [key for (key,) in self._all("SELECT key FROM entries WHERE checksum IS NULL")]

    def is_whole(self, key: bytes) -> bool:
        """Whether there is a whole entry."""
        return bool(self._all("SELECT 1 FROM entries WHERE key = ? AND checksum NOT NULL", key))

    def reserve(self, key: bytes, size: int) -> None:
        """Sets the bytes set aside for an entry that is being written."""
        self._db.execute(
            "INSERT INTO entries (key, size, used) VALUES (?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET size = excluded.size",
            (key, size, self._now()),
        )

    def reserved_for(self, key: bytes) -> int:
        """Bytes set aside for an entry so far (also by a process that is gone)."""
        return self._all("SELECT coalesce(sum(size), 0) FROM entries WHERE key = ?", key)[0][0]

    def publish(self, key: bytes, size: int, checksum: bytes) -> int:
        """Makes a reserved entry whole; gives its id."""
        self._db.execute(
            "UPDATE entries SET size = ?, checksum = ?, used = ? WHERE key = ?", (size, checksum, self._now(), key)
        )
        return self._all("SELECT id FROM entries WHERE key = ?", key)[0][0]

    def drop(self, key: bytes, id: int | None = None) -> bool:
        """Forgets an entry (only the one with this id); whether there was one."""
        cursor = self._db.execute("DELETE FROM entries WHERE key = ? AND id = coalesce(?, id)", (key, id))
        return cursor.rowcount > 0

    def make_room(self, need: int, limit: int, remove: Callable[[bytes], bool]) -> bool:
        """Lets the least recently used entries go until `need` more bytes fit into `limit`; whether they do.

        Args:
            remove: unlinks an entry's file; false where the file is being read. Held entries stay too.
        """
        self._write_touches()
        over = self._all("SELECT bytes FROM total")[0][0] + need - limit
        if over <= 0:
            return True
        if need + self._all(f"SELECT {_STAYING}")[0][0] > limit:
            return False  # even without all the others: none has to go in vain
        last = -1
        while over > 0:
            oldest = self._all(
                "SELECT id, key, size, used FROM entries WHERE used > ? AND checksum NOT NULL "
                "AND key NOT IN (SELECT key FROM holds) ORDER BY used LIMIT 64",
                last,
            )
            if not oldest:
                return False
            for id, key, size, used in oldest:
                last = used
                if over > 0 and remove(key):
                    self.drop(key, id)
                    over -= size
        return True

    # Holds.

    def hold(self, owner: str, key: bytes) -> bool:
        """Keeps an entry from being let go; false where there is none."""
        if not self.is_whole(key):
            return False
        self._db.execute("INSERT OR IGNORE INTO holds VALUES (?, ?)", (owner, key))
        return True

    def holders(self) -> list[str]:
        return [owner for (owner,) in self._all("SELECT DISTINCT owner FROM holds")]

    def release(self, owner: str, key: bytes | None = None) -> None:
        """Ends one hold, or all."""
        self._db.execute("DELETE FROM holds WHERE owner = ? AND key = coalesce(?, key)", (owner, key))

    # Pins.

    def pinned(self, run: str, url: str) -> Pin | None:
        """Which version of an object a run reads, once it is known."""
        number = self._run(run)
        with self._lock, telling(self.folder):
            rows = self._all(
                "SELECT version, size, checksum FROM pins WHERE run = ? AND url = ?", number, _url_digest(url)
            )
        return Pin(*rows[0]) if rows else None

    def pin(self, run: str, pins: Iterable[tuple[str, Pin]]) -> None:
        """Says which version of objects a run reads; those that have a pin keep it."""
        number = self._run(run)
        with self.writing():
            self._db.executemany(
                "INSERT OR IGNORE INTO pins VALUES (?, ?, ?, ?, ?)",
                [(number, _url_digest(url), *pin) for url, pin in pins],
            )

    def pin_content(self, run: str, url: str, checksum: bytes) -> bytes:
        """The checksum that a run's object has: this one, unless one was noted before."""
        number, digest = self._run(run), _url_digest(url)
        with self.writing():
            self._db.execute(
                "UPDATE pins SET checksum = coalesce(checksum, ?) WHERE run = ? AND url = ?", (checksum, number, digest)
            )
            rows = self._all("SELECT checksum FROM pins WHERE run = ? AND url = ?", number, digest)
        return rows[0][0] if rows else checksum

    def forget(self, run: str) -> None:
        """Drops a run's pins."""
        number = self._run(run)
        with self.writing():
            self._db.execute("DELETE FROM pins WHERE run = ?", (number,))

    def _run(self, run: str) -> int:
        """The run's number; the first question of a process notes the run's use and drops runs long unused."""
        with self._lock:
            if run in self._runs:
                return self._runs[run]
        with self.writing():
            now = time.time_ns()
            self._db.execute(
                "INSERT INTO runs (name, used) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET used = excluded.used",
                (run, now),
            )
            old = self._all("SELECT id FROM runs WHERE used < ?", now - PINS_LAST_DAYS * _DAY_NS)
            # Pins first: a number may be given again once its run is gone.
            self._db.executemany("DELETE FROM pins WHERE run = ?", old)
            self._db.executemany("DELETE FROM runs WHERE id = ?", old)
            self._runs[run] = self._all("SELECT id FROM runs WHERE name = ?", run)[0][0]
            return self._runs[run]


def _url_digest(url: str) -> bytes:
    return blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line.

    No row is to blame for it, so it is a `SourceError`, an `InputError` that is never skipped as a bad row.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder) from None
        raise SourceError(
            f"cache folder {folder}: cannot be used ({e.strerror}); give one that you can write"
        ) from None
    except sqlite3.Error as e:
        if "full" in str(e):
            raise _full(folder) from None
        hint = "remove it, or give another folder" if "malformed" in str(e) else "give another folder, on a local disk"
        raise SourceError(f"cache folder {folder}: its index cannot be used ({e}); {hint}") from None


def _full(folder: Path) -> SourceError:
    return SourceError(
        f"cache folder {folder}: the disk is full; free some space, or give a folder on another disk or a lower limit"
    )
