"""An append-only ledger of requests, costs and replies in SQLite (write-ahead log), from which a run resumes.

Each attempt is committed before it is sent, and its reply before it counts. A process killed in between leaves an
attempt without an outcome, which may have been charged: it counts as paid at the upper bound of its cost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqa_jax.errors import UserError
from sqa_jax.files import disk_errors
from sqa_jax.teach.teacher import Reply, Request

_TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
-- One row for each time that a request was sent. state: sent (in flight) | answered | free (an error that costs
-- nothing) | lost (no reply arrived, but it may have been charged). Prices are in US dollars.
CREATE TABLE IF NOT EXISTS attempts (
  id INTEGER PRIMARY KEY, hash TEXT NOT NULL, pid TEXT NOT NULL, sample INTEGER NOT NULL, state TEXT NOT NULL,
  reserved REAL NOT NULL, batch TEXT, sent REAL NOT NULL, ended REAL,
  status TEXT, raw TEXT, prompt_tokens INTEGER, output_tokens INTEGER, price REAL, error TEXT
);
CREATE INDEX IF NOT EXISTS attempts_by_hash ON attempts (hash, state);
-- job is the service's name of a batch job; NULL until the service has confirmed it.
CREATE TABLE IF NOT EXISTS batches (name TEXT PRIMARY KEY, job TEXT, open INTEGER NOT NULL);
"""


class Outcome(NamedTuple):
    """The outcome of an attempt.

    Attributes:
      reply: None if there is none; then `error` says why, and `maybe_paid` whether it may have been charged.
      price: of the reply in US dollars, None if unknown.
    """

    attempt: int
    reply: Reply | None = None
    price: float | None = None
    error: str = ""
    maybe_paid: bool = False


class Ledger:
    """The ledger of one workdir, locked to one process at a time.

    Args:
      path: the SQLite file, created if missing.

    Raises:
      UserError: another process holds the lock, the file is corrupt, or it cannot be written. Every method raises one
        if the disk is full.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = open(self.path.with_suffix(".lock"), "w")
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.path.parent}: is a file, or inside one; choose another --workdir") from None
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.close)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another run is using it; wait for it or choose another --workdir"
                ) from None
            with self._sqlite_errors():
                self._open()
            undo.pop_all()

    def _open(self) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")  # a committed reply survives a power failure
        self._db.executescript(_TABLES)
        self._db.execute(
            "UPDATE attempts SET state = 'lost', error = 'the process ended before the reply came' WHERE state = 'sent' "
            "AND (batch IS NULL OR batch NOT IN (SELECT name FROM batches WHERE open))"
        )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: Any) -> None:
        self._db.close()
        self._lock.close()

    @contextlib.contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "full" in str(error):
                raise UserError(
                    f"{self.path}: the disk is full; free some space and run the same command again"
                ) from None
            if "readonly" in str(error) or "unable to open" in str(error):
                raise UserError(f"{self.path}: cannot be written ({error}); choose another --workdir") from None
            if "malformed" in str(error) or "not a database" in str(error):
                raise UserError(f"{self.path}: damaged ({error}); restore it from a copy, or move it away") from None
            raise

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._sqlite_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def bind_settings(self, settings: Mapping[str, Any]) -> None:
        """Binds the ledger to these settings, or checks that it is bound to them.

        A ledger whose attempts were all free of charge is bound anew: after a model that does not exist, another can
        be chosen.

        Raises:
          UserError: it is bound to other settings; those that differ are named.
        """
        with self._transaction() as db:
            bound = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM settings")}
            if not bound or not db.execute("SELECT 1 FROM attempts WHERE state != 'free' LIMIT 1").fetchone():
                db.execute("DELETE FROM settings")
                db.executemany("INSERT INTO settings VALUES (?, ?)", [(k, json.dumps(v)) for k, v in settings.items()])
                return
        differing = [f"{k} was {bound.get(k)!r} and is {v!r}" for k, v in settings.items() if bound.get(k) != v]
        if differing:
            raise UserError(
                f"{self.path.parent}: holds replies to other settings ({', '.join(differing)}); choose another --workdir"
            )

    def spent(self) -> tuple[float, float]:
        """US dollars (paid for replies, possibly paid for attempts without one)."""
        with self._sqlite_errors():
            row = self._db.execute(
                "SELECT TOTAL(CASE state WHEN 'answered' THEN price END), "
                "TOTAL(CASE WHEN state IN ('sent', 'lost') THEN reserved END) FROM attempts"
            ).fetchone()
        return row[0], row[1]

    def record_attempts(
        self, requests: Sequence[Request], reserved: Sequence[float], batch: str | None = None
    ) -> list[int]:
        """Records attempts that are about to be sent; returns their ids. With `batch`, opens that batch job."""
        ids: list[int] = []
        with self._transaction() as db:
            if batch is not None:
                db.execute("INSERT INTO batches VALUES (?, NULL, 1)", (batch,))
            for request, price in zip(requests, reserved, strict=True):
                cursor = db.execute(
                    "INSERT INTO attempts (hash, pid, sample, state, reserved, batch, sent) VALUES (?, ?, ?, 'sent', ?, ?, ?)",
                    (request.hash, request.pid, request.sample, price, batch, time.time()),
                )
                assert cursor.lastrowid is not None
                ids.append(cursor.lastrowid)
        return ids

    def record_outcomes(self, outcomes: Sequence[Outcome], batch: str | None = None) -> None:
        """Records the outcomes of attempts, in one transaction. With `batch`, closes that batch job."""
        with self._transaction() as db:
            for outcome in outcomes:
                db.execute(
                    "UPDATE attempts SET state = ?, ended = ?, status = ?, raw = ?, prompt_tokens = ?, output_tokens = ?, "
                    "price = ?, error = ? WHERE id = ?",
                    (*_outcome_columns(outcome), outcome.attempt),
                )
            if batch is not None:
                db.execute("UPDATE batches SET open = 0 WHERE name = ?", (batch,))

    def record_replies(self, replies: Sequence[tuple[Request, Reply]], price: float | None) -> None:
        """Records replies of a local teacher, for which no attempt was recorded, in one transaction."""
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO attempts (hash, pid, sample, reserved, sent, state, ended, status, raw, prompt_tokens, "
                "output_tokens, price, error) VALUES (?, ?, ?, 0, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (r.hash, r.pid, r.sample, time.time(), *_outcome_columns(Outcome(0, reply, price)))
                    for r, reply in replies
                ],
            )

    def replies(self) -> list[sqlite3.Row]:
        """The latest reply to each request hash, with the number of replies as `times`, in the order of sending."""
        with self._sqlite_errors():
            return self._db.execute(
                "SELECT *, MAX(id), COUNT(*) AS times FROM attempts WHERE state = 'answered' GROUP BY hash ORDER BY id"
            ).fetchall()

    def open_batch_jobs(self) -> list[tuple[str, str | None]]:
        """(display name, the service's name or None) of the batch jobs that are not collected yet."""
        with self._sqlite_errors():
            rows = self._db.execute("SELECT name, job FROM batches WHERE open ORDER BY rowid").fetchall()
        return [(row["name"], row["job"]) for row in rows]

    def confirm_batch_job(self, name: str, job: str) -> None:
        """Records the name that the service gave to a batch job."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET job = ? WHERE name = ?", (job, name))

    def pending_attempts(self, name: str) -> list[sqlite3.Row]:
        """The attempts of a batch job that have no outcome yet, in submission order."""
        with self._sqlite_errors():
            return self._db.execute(
                "SELECT * FROM attempts WHERE batch = ? AND state = 'sent' ORDER BY id", (name,)
            ).fetchall()


def _outcome_columns(outcome: Outcome) -> tuple:
    """The columns state, ended, status, raw, prompt_tokens, output_tokens, price, error."""
    reply = outcome.reply
    if reply is None:
        return ("lost" if outcome.maybe_paid else "free", time.time(), None, None, None, None, None, outcome.error)
    tokens = (reply.prompt_tokens, reply.output_tokens)
    raw = reply.raw.encode("utf-8", "replace").decode()  # JSON can contain lone surrogates, a UTF-8 file cannot
    return ("answered", time.time(), reply.status, raw, *tokens, outcome.price, None)
