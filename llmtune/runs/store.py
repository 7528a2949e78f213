"""The index over all runs. The directories are the truth: losing the index loses nothing."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmtune.console import speaker
from llmtune.errors import ConfigError, MissingExtraError, RunNotFoundError, nearest
from llmtune.runs.directory import RunDirectory, is_run
from llmtune.runs.documents import plain

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine, Table

T = TypeVar("T")

DATABASE_NAME = "llmtune.db"

# How long one process waits for another that is writing to the same SQLite file.
_BUSY_SECONDS = 30
_SQLITE_MAGIC = b"SQLite format 3\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What the index knows of one run; ``best`` has ``metric``, ``value`` and ``step``, or is None."""

    name: str
    dir: str
    status: str
    model: str | None
    data: str | None
    preset: str | None
    started: str | None
    finished: str | None
    steps: int | None
    best: dict[str, Any] | None

    @classmethod
    def of(cls, directory: Path) -> RunRecord:
        """The record of the run in ``directory``.

        Raises:
            RunNotFoundError: There is no readable run.
        """
        run = RunDirectory.open(directory)
        document = run.run
        kept = ("model", "data", "preset", "started", "finished", "steps", "best")
        return cls(
            name=run.name,
            dir=str(run.path),
            status=document.get("status", "planned"),
            **{key: document.get(key) for key in kept},
        )

    def to_json(self) -> dict[str, Any]:
        """The record as ``runs --json`` prints it."""
        return asdict(self)


class RunStore:
    """Finds and lists runs.

    Args:
        url: Database URL (``LLMTUNE_STORE``); without it SQLite in ``root``.
        root: The directory that holds run directories.

    Raises:
        ConfigError: The URL cannot be used; passwords in it are not shown.
    """

    def __init__(self, url: str | None = None, root: Path | str = "runs") -> None:
        self.root = Path(root).absolute()
        self._is_default = url is None
        self._url = _parse_url(url) if url else _sqlite_url(self.root / DATABASE_NAME)
        # A SQLite file lies beside its runs and moves with them between machines; a server is shared by machines
        # that do not see each other's directories.
        self._host = "" if self._file else platform.node()

    @property
    def _file(self) -> Path | None:
        if self._url.get_backend_name() != "sqlite" or not self._url.database or self._url.database == ":memory:":
            return None
        return Path(self._url.database)

    def index(self, directory: Path | str) -> None:
        """Enter one run, or bring its entry up to date."""
        path = Path(directory).absolute()
        self._connected(lambda connection, table: self._enter(connection, table, [path]))

    def runs(self, *, status: str | None = None, model: str | None = None) -> list[RunRecord]:
        """Every known run, newest first; entries whose directory is gone are dropped.

        Args:
            status: Only runs in this state.
            model: Only runs of models whose id contains this text.
        """
        if self._is_default and not self.root.is_dir():
            return []
        found = self._connected(self._listed)
        return [
            record
            for record in found
            if (status is None or record.status == status)
            and (model is None or model.lower() in (record.model or "").lower())
        ]

    def find(self, text: Path | str) -> Path:
        """The directory of a run given as a directory, a name or the beginning of a name.

        Raises:
            RunNotFoundError: Nothing, or more than one run, answers to it.
        """
        path = Path(text)
        if is_run(path):
            return path.absolute()
        records = self.runs()
        matching = [record for record in records if record.name == str(text)]
        matching = matching or [record for record in records if str(text) and record.name.startswith(str(text))]
        if len(matching) == 1:
            return Path(matching[0].dir)
        if matching:
            candidates = ", ".join(f"{record.name} ({record.dir})" for record in matching[:8])
            raise RunNotFoundError(
                f"{str(text)!r} is the beginning of {len(matching)} runs: {candidates}. Give more of the name, or "
                "the directory."
            )
        close = nearest(str(text), [record.name for record in records])
        hint = f" Did you mean {close!r}?" if close else ""
        also = " (the directory is there, but has no run.json)" if path.is_dir() else ""
        raise RunNotFoundError(
            f"no run {str(text)!r}{also}: it is neither a run directory nor the name, or the beginning of the name, of "
            f"one of the {len(records)} runs in {self.root}.{hint} `llmtune runs` lists them."
        )

    def rebuild(self) -> list[RunRecord]:
        """Forget the index and make it again from the run directories."""

        def again(connection: Connection, table: Table) -> list[RunRecord]:
            known = self._known(connection, table)
            connection.execute(table.delete().where(table.c.host == self._host))
            self._enter(connection, table, {Path(directory) for directory in known} | set(self._scan()))
            return self._read(connection, table)

        return self._connected(again)

    # ------------------------------------------------------------------ rows

    def _listed(self, connection: Connection, table: Table) -> list[RunRecord]:
        """All rows, after those whose ``run.json`` changed behind the index are read again."""
        known = self._known(connection, table)
        paths = {Path(directory) for directory in known} | set(self._scan())
        changed = [path for path in paths if known.get(str(path)) != _changed_at(path)]
        if changed:
            self._enter(connection, table, changed)
        return self._read(connection, table)

    def _scan(self) -> list[Path]:
        return [path.parent for path in self.root.glob("*/run.json")]

    def _known(self, connection: Connection, table: Table) -> dict[str, int]:
        rows = connection.execute(table.select().where(table.c.host == self._host))
        return {row.dir: row.changed_at for row in rows}

    def _enter(self, connection: Connection, table: Table, paths: Iterable[Path]) -> None:
        """Write the rows of ``paths``; the row of a directory that holds no readable run is removed."""
        for path in paths:
            changed_at = _changed_at(path)
            key = (table.c.host == self._host) & (table.c.dir == str(path))
            try:
                record = plain(RunRecord.of(path).to_json(), str)
            except RunNotFoundError as error:
                connection.execute(table.delete().where(key))
                if changed_at is not None:
                    speaker.warn(f"left out of the list of runs: {error}")
                continue
            values = record | {"host": self._host, "changed_at": changed_at}
            statement = _insert(connection)(table).values(values)
            connection.execute(statement.on_conflict_do_update(index_elements=["host", "dir"], set_=values))

    def _read(self, connection: Connection, table: Table) -> list[RunRecord]:
        order = (table.c.started.is_(None).desc(), table.c.started.desc(), table.c.name)
        rows = connection.execute(table.select().order_by(*order)).mappings()
        return [RunRecord(**{key: row[key] for key in RunRecord.__dataclass_fields__}) for row in rows]

    # ------------------------------------------------------------------ connection

    def _connected(self, work: Callable[[Connection, Table], T]) -> T:
        """Run ``work`` in one transaction; a SQLite file that is damaged is set aside and made again."""
        from sqlalchemy.exc import DatabaseError

        self._prepare_file()
        try:
            return self._transact(work)
        except DatabaseError as error:
            if not self._file or not _is_damage(error):
                raise self._unusable(error) from error
            damage = error
        aside = self._set_aside(self._file)
        speaker.warn(
            f"the index of runs {self._file} could not be read ({damage.orig}); it was set aside as {aside.name} and "
            f"made again from the runs in {self.root}. No run is lost."
        )
        try:
            self._transact(lambda connection, table: self._listed(connection, table) and None)
            return self._transact(work)
        except DatabaseError as error:
            raise self._unusable(error) from error

    def _transact(self, work: Callable[[Connection, Table], T]) -> T:
        from sqlalchemy.schema import CreateTable

        engine = self._engine()
        try:
            with engine.begin() as connection:
                table = _table()
                connection.execute(CreateTable(table, if_not_exists=True))
                return work(connection, table)
        finally:
            engine.dispose()

    def _engine(self) -> Engine:
        from sqlalchemy import create_engine, event
        from sqlalchemy.exc import NoSuchModuleError
        from sqlalchemy.pool import NullPool

        sqlite = self._url.get_backend_name() == "sqlite"
        try:
            engine = create_engine(
                self._url, poolclass=NullPool, connect_args={"timeout": _BUSY_SECONDS} if sqlite else {}
            )
        except NoSuchModuleError as error:
            raise self._unusable(error) from error
        except ModuleNotFoundError as error:
            raise MissingExtraError(error.name or "psycopg", "postgresql", "LLMTUNE_STORE") from error
        if sqlite:
            event.listen(engine, "connect", _use_write_ahead_log)
            event.listen(engine, "begin", _begin_writing)
        return engine

    def _prepare_file(self) -> None:
        file = self._file
        if file is None:
            return
        if self._is_default:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(str(self.root), [f"the directory of runs cannot be made: {error}"]) from error
        elif file.is_file() and file.stat().st_size and not _is_sqlite(file):
            raise ConfigError("LLMTUNE_STORE", [f"{file} is a file, but no SQLite database; name another one"])

    def _set_aside(self, file: Path) -> Path:
        """Rename a damaged database; of several processes that notice it, one does."""
        aside = file.with_name(f"{file.name}.damaged")
        for suffix in ("", "-wal", "-shm"):
            part = file.with_name(file.name + suffix)
            if part.exists():
                part.replace(aside.with_name(aside.name + suffix))
        return aside

    def _unusable(self, error: Exception) -> ConfigError:
        shown = self._url.render_as_string(hide_password=True)
        reason = str(getattr(error, "orig", error)).strip()
        if self._url.password:
            reason = reason.replace(str(self._url.password), "***")
        where = "index of runs" if self._is_default else "LLMTUNE_STORE"
        return ConfigError(where, [f"cannot use {shown}: {reason}; check that it exists and may be written"])


def _parse_url(url: str) -> URL:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    example = "expected e.g. sqlite:///runs.db or postgresql+psycopg://user@host/database"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigError("LLMTUNE_STORE", [f"got a text that is no database URL, {example}"]) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        shown = parsed.render_as_string(hide_password=True)
        raise ConfigError("LLMTUNE_STORE", [f"got {shown!r}, {example}"])
    return parsed


def _sqlite_url(path: Path) -> URL:
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(path))


def _table() -> Table:
    from sqlalchemy import JSON, BigInteger, Column, MetaData, Table, Text

    return Table(
        "runs",
        MetaData(),
        Column("host", Text, primary_key=True),
        Column("dir", Text, primary_key=True),
        Column("name", Text, nullable=False),
        Column("status", Text, nullable=False),
        Column("model", Text),
        Column("data", Text),
        Column("preset", Text),
        Column("started", Text),
        Column("finished", Text),
        Column("steps", BigInteger),
        Column("best", JSON(none_as_null=True)),
        Column("changed_at", BigInteger),
    )


def _insert(connection: Connection) -> Any:
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert

        return sqlite_insert
    from sqlalchemy.dialects.postgresql import insert as postgresql_insert

    return postgresql_insert


def _use_write_ahead_log(connection: Any, _record: Any) -> None:
    """Let readers and one writer work at once, where the file system can; else the rollback journal does."""
    import sqlite3

    connection.isolation_level = None  # transactions are begun by _begin_writing
    with suppress(sqlite3.DatabaseError):  # a damaged file is noticed, and told, by the statement that follows
        connection.execute("PRAGMA journal_mode=WAL").close()


def _begin_writing(connection: Connection) -> None:
    """Wait for other writers before reading, so that no reader has to become a writer and be refused."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _is_damage(error: Exception) -> bool:
    """Whether making the file again would help; a file that is locked or not writable is no damage."""
    from sqlalchemy.exc import OperationalError

    text = str(error)
    return not isinstance(error, OperationalError) or "no such column" in text or "has no column" in text


def _is_sqlite(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC


def _changed_at(directory: Path) -> int | None:
    """When ``run.json`` was last replaced, in nanoseconds, or None when it is gone."""
    try:
        return (directory / "run.json").stat().st_mtime_ns
    except OSError:
        return None
