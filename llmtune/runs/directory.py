"""The run directory: everything that one run was told, decided, saw and made."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from llmtune.errors import OutputError, RunNotFoundError
from llmtune.runs.documents import encode, number, write_atomically
from llmtune.runs.events import EventLog, now
from llmtune.runs.lock import hold, is_held
from llmtune.runs.redaction import redact

STATUSES = frozenset({"planned", "running", "finished", "preempted", "failed"})


class RunDirectory:
    """One run on disk. Make one with :meth:`create` or :meth:`open`.

    Args:
        path: The directory.
        entries_before: What it held before this process made a run of it; None when it did not exist.
        created_here: Whether this process made a run of it.
        parents_made: Parent directories made on the way, innermost first.
    """

    def __init__(
        self,
        path: Path,
        *,
        created_here: bool = False,
        entries_before: frozenset[str] | None = None,
        parents_made: tuple[Path, ...] = (),
    ) -> None:
        self.path = path
        self.created_here = created_here
        self._entries_before = entries_before
        self._parents_made = parents_made
        self._log = EventLog(path / "events.jsonl")

    # ------------------------------------------------------------------ making and finding

    @classmethod
    def create(cls, path: Path | str, *, identity: Mapping[str, str]) -> RunDirectory:
        """The run of ``identity`` in ``path``, made if it is not there yet.

        Args:
            path: Where; missing parents are made.
            identity: What makes this run this run, e.g. fingerprints of data, model and configuration.

        Raises:
            OutputError: The place cannot be written, or holds a run of another identity.
        """
        path = Path(path).absolute()
        if is_run(path):
            run = cls.open(path)
            run._refuse_other_identity(identity)
            return run
        existed = path.is_dir()
        parents_made = tuple(parent for parent in path.parents if not parent.exists())
        before = frozenset(os.listdir(path)) if existed else None
        run = cls(path, created_here=True, entries_before=before, parents_made=parents_made)
        with _explained(path):
            try:
                path.mkdir(parents=True, exist_ok=True)
                write_atomically(path / "run.json", encode(_new_run(path.name, identity), indent=2))
            except OSError:
                run.discard()
                raise
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """The run that is in ``path``.

        Raises:
            RunNotFoundError: There is none.
        """
        path = Path(path).absolute()
        if not is_run(path):
            seen = "has no run.json" if path.is_dir() else "does not exist"
            raise RunNotFoundError(
                f"{path}: no run is here (the directory {seen}). `llmtune runs` lists the runs that are known."
            )
        return cls(path)

    def discard(self) -> None:
        """Remove what this process made here; a run that was there before is left alone."""
        if not self.created_here:
            return
        if self._entries_before is None:
            if self.path.is_dir():
                shutil.rmtree(self.path, ignore_errors=True)
            for parent in self._parents_made:
                with suppress(OSError):  # another run moved in meanwhile
                    parent.rmdir()
            return
        for entry in list(self.path.iterdir()):
            if entry.name not in self._entries_before:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def lock(self) -> AbstractContextManager[None]:
        """A context in which this process alone trains into the directory.

        Raises:
            OutputError: Another living process does; names it. A lock left by a dead process does not count.
        """
        return hold(self.path)

    @property
    def is_live(self) -> bool:
        """Whether a process on this machine is training into the directory now."""
        return is_held(self.path)

    # ------------------------------------------------------------------ documents

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.name

    @property
    def run(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        document: dict[str, Any] = self.read_json("run.json")
        return document

    def write_json(self, name: str, document: Any) -> Path:
        """Write one document atomically; non-finite numbers become strings, secrets are hidden.

        Raises:
            OutputError: The disk is full or the place is not writable any more.
        """
        with _explained(self.path):
            write_atomically(self.path / name, encode(document, indent=2))
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        """Write one page made of documents of this run, atomically and as it is given.

        Raises:
            OutputError: The disk is full or the place is not writable any more.
        """
        return self.write_bytes(name, text.encode("utf-8", "replace"))

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write one file atomically and as it is given.

        Raises:
            OutputError: The disk is full or the place is not writable any more.
        """
        with _explained(self.path):
            write_atomically(self.path / name, content)
        return self.path / name

    def read_json(self, name: str) -> Any:
        """One document.

        Raises:
            RunNotFoundError: It is missing or no JSON.
        """
        path = self.path / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise RunNotFoundError(f"{path} is missing; the run directory is incomplete.") from None
        except (OSError, ValueError) as error:
            raise RunNotFoundError(f"{path} cannot be read: {error}. Restore it from a backup.") from error

    def update_run(self, **fields: Any) -> dict[str, Any]:
        """Merge ``fields`` into ``run.json``; a change of ``status`` also sets ``started`` or ``finished``."""
        document = self.run
        status = fields.get("status")
        if status is not None:
            assert status in STATUSES, f"{status!r} is no status of the contract"
            if status == "running":
                document["started"] = document.get("started") or now()
                document["finished"] = None
            elif status != "planned":
                document["finished"] = now()
        document |= fields
        self.write_json("run.json", document)
        return document

    def write_status(
        self,
        *,
        state: str,
        step: int,
        of: int | None,
        eta_seconds: float | None,
        loss: float | None,
        last_checkpoint: Path | str | None,
        exit_code: int | None = None,
    ) -> None:
        """Rewrite ``status.json``, the small file for those who watch from outside.

        It is not forced to disk each time: it is written often, and ``run.json`` and the events hold the truth.
        """
        assert state in STATUSES, f"{state!r} is no status of the contract"
        document = {
            "state": state,
            "status": state,
            "step": step,
            "of": of,
            "eta_seconds": eta_seconds,
            "loss": loss,
            "last_checkpoint": last_checkpoint,
            "exit_code": exit_code,
            "updated": now(),
        }
        with _explained(self.path):
            write_atomically(self.path / "status.json", encode(document, indent=2), durable=False)

    def end(self, status: str, *, exit_code: int) -> None:
        """Note how the run ended, in ``run.json`` and ``status.json``, from what its events say."""
        last: dict[str, Any] = next(reversed(self.steps()), {})
        saved = [event for event in self.events() if event["event"] == "checkpoint_saved"]
        self.update_run(status=status, exit_code=exit_code, steps=last.get("step", 0))
        self.write_status(
            state=status,
            step=last.get("step", 0),
            of=(self.latest_plan() or {}).get("choices", {}).get("updates", {}).get("value"),
            eta_seconds=0.0 if status == "finished" else None,
            loss=number(last.get("loss")),
            last_checkpoint=saved[-1]["path"] if saved else None,
            exit_code=exit_code,
        )

    def write_environment(self, document: Mapping[str, Any]) -> Path:
        """Write ``environment.json``: versions, hardware, data fingerprint, thread counts."""
        return self.write_json("environment.json", document)

    def add_plan(self, document: Mapping[str, Any]) -> Path:
        """Write the plan now in force: ``plan.json``, then ``plan-2.json`` and so on; older plans stay."""
        count = len(self.plans)
        return self.write_json("plan.json" if count == 0 else f"plan-{count + 1}.json", document)

    @property
    def plans(self) -> list[Path]:
        """The files of all plans that were in force, oldest first."""
        numbered = {1: self.path / "plan.json"} if (self.path / "plan.json").exists() else {}
        for path in self.path.glob("plan-*.json"):
            if match := re.fullmatch(r"plan-(\d+)\.json", path.name):
                numbered[int(match[1])] = path
        return [numbered[number] for number in sorted(numbered)]

    def latest_plan(self) -> dict[str, Any] | None:
        """The plan in force, or None when none was made yet."""
        plans = self.plans
        return self.read_json(plans[-1].name) if plans else None

    # ------------------------------------------------------------------ events and failures

    def event(self, event: str, step: int, **fields: Any) -> None:
        """Append one line to ``events.jsonl``.

        Raises:
            OutputError: The disk is full or the place is not writable any more.
        """
        with _explained(self.path):
            self._log.append(event, step, fields)

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event in the order written; a line torn by a crash is passed over."""
        return iter(self._log)

    def steps(self) -> list[dict[str, Any]]:
        """The ``step`` events by rising step, of the course that the run took at last."""
        return self._log.last_by_step("step")

    def evaluations(self) -> list[dict[str, Any]]:
        """The ``evaluation`` events by rising step, of the course that the run took at last."""
        return self._log.last_by_step("evaluation")

    def write_failure(
        self,
        exception: BaseException,
        *,
        kind: str,
        cause: str,
        evidence: Any = None,
        remedy: str = "",
        action: str = "stop",
        trace: str | None = None,
    ) -> Path:
        """Write a failure report and its traceback into ``failures/``; returns the report.

        Args:
            exception: What was raised.
            kind: One word for the class of failure, e.g. ``out_of_memory``.
            cause: One sentence.
            evidence: The facts that speak for the cause, as JSON.
            remedy: What was or can be done.
            action: What is done now: ``stop``, or ``restart`` where a new process may go on.
            trace: Where the program was, in place of the traceback of ``exception``.
        """
        folder = self.path / "failures"
        with _explained(self.path):
            folder.mkdir(exist_ok=True)
            stem = _free_stem(folder, slug(kind) or "failure")
            text = redact(trace or "".join(traceback.format_exception(exception)))
            write_atomically(folder / f"{stem}.txt", text.encode("utf-8", "backslashreplace"))
        document = {
            "time": now(),
            "kind": kind,
            "cause": cause,
            "evidence": evidence,
            "remedy": remedy,
            "action": action,
            "exception": type(exception).__name__,
            "message": str(exception),
            "traceback": f"{stem}.txt",
        }
        return self.write_json(f"failures/{stem}.json", document)

    # ------------------------------------------------------------------ places

    @property
    def checkpoints(self) -> Path:
        """Where committed checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where the final adapter lies."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Where the final model of full fine-tuning lies."""
        return self.path / "model"

    @property
    def final(self) -> Path | None:
        """The final adapter or model, or None while there is neither."""
        return next((place for place in (self.adapter, self.model) if place.is_dir()), None)

    @property
    def report(self) -> Path:
        """Where the report lies."""
        return self.path / "report.html"

    def _refuse_other_identity(self, identity: Mapping[str, str]) -> None:
        held = self.run.get("identity") or {}
        if dict(identity) == held:
            return
        differing = sorted(key for key in held.keys() | identity.keys() if held.get(key) != identity.get(key))
        raise OutputError(
            f"{self.path} holds another run: it has {_spelled(held)}, this one has {_spelled(identity)} "
            f"({', '.join(differing)} differs). Choose another --output, or continue the run that is there with "
            f"`llmtune resume {self.path}`."
        )


def _free_stem(folder: Path, kind: str) -> str:
    """``0003-hung``: the next number, taken by making the file of the traceback, since ranks may fail together."""
    for count in itertools.count(len(list(folder.glob("*.json"))) + 1):
        with suppress(FileExistsError):
            (folder / f"{count:04d}-{kind}.txt").touch(exist_ok=False)
            return f"{count:04d}-{kind}"
    raise AssertionError("numbers do not end")


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory."""
    try:
        return (path / "run.json").is_file()
    except OSError:
        return False


def derive_name(*, data_name: str, model_id: str, identity_hash: str) -> str:
    """A short readable name for a run: ``orders-tiny-3f9a1c`` from data, model and the hash of the identity."""
    data = slug(Path(data_name).stem)[:32].strip("-.")
    model = slug(re.split(r"[/\\:]", model_id.rstrip("/\\"))[-1])[:32].strip("-.")
    return "-".join(part for part in (data, model, identity_hash[:6]) if part)


def choose_directory(root: Path | str, base_name: str, identity: Mapping[str, str]) -> Path:
    """Where a run without an explicit output goes.

    The same command continues its unfinished run; a finished run, or one of another identity, is left alone and
    the next of ``base_name``, ``base_name-2``, ``base_name-3`` … is taken.
    """
    number = 1
    while True:
        path = Path(root).absolute() / (base_name if number == 1 else f"{base_name}-{number}")
        if is_run(path):
            held = RunDirectory.open(path).run
            if held.get("identity") == dict(identity) and held.get("status") != "finished":
                return path
        elif not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
        number += 1


def slug(text: str) -> str:
    """``text`` in the letters that are safe in names of files everywhere."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")


def _new_run(name: str, identity: Mapping[str, str]) -> dict[str, Any]:
    unknown = ("model", "data", "preset", "started", "finished", "steps", "best")
    return {"name": name, "status": "planned", "identity": dict(identity), "created": now()} | dict.fromkeys(unknown)


def _spelled(identity: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(identity.items())) or "no identity"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the system says about ``path`` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        free = _free_bytes(path)
        where = error.filename or path
        if isinstance(error, FileExistsError | NotADirectoryError):
            cure = "A file is in the way; choose another --output."
        elif free is not None and free < 1024 * 1024:
            cure = f"Free some disk space ({free} bytes are left) or choose an --output on another disk."
        else:
            cure = "Choose an --output that you may write to, on a disk with room."
        raise OutputError(f"cannot write to the run directory {path}: {reason} ({where}). {cure}") from error


def _free_bytes(path: Path) -> int | None:
    for place in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(os.fspath(place)).free
    return None
