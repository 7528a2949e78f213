"""How a save is carried out: staged, committed, tried again where the disk refused, in the foreground or behind.

A save in the background is a copy in host memory, taken between two updates, that one thread writes, verifies and
commits while training goes on. It is file for file what the Trainer itself would have written; a test compares them.
At most one is in flight. Files that never change during a run (tokenizer, configurations) are taken from the first
save of the process, which is therefore always made in the foreground.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from llmtune.checkpoints import MANIFEST, commit, open_place, read_manifest, retain, staging_root
from llmtune.checkpoints.compression import COMPRESSED, compress_optimizer
from llmtune.checkpoints.durable import sync
from llmtune.checkpoints.places import committed
from llmtune.checkpoints.retention import FEWEST
from llmtune.checkpoints.sharing import REBUILDABLE
from llmtune.console import speaker
from llmtune.errors import CheckpointError, LlmtuneError, RecoveryExhausted, TrainingError
from llmtune.runs import RunDirectory
from llmtune.training.ranks import Ranks
from llmtune.training.recovery import classify
from llmtune.training.recovery.classify import NO_ROOM_BYTES
from llmtune.training.saved_facts import are_finite
from llmtune.training.snapshot import RNG_NAME, Snapshot

# What changes from save to save; all else of a checkpoint is the same throughout a run.
CHANGING = frozenset({OPTIMIZER_NAME, COMPRESSED, SCHEDULER_NAME, SCALER_NAME, TRAINER_STATE_NAME, RNG_NAME, MANIFEST})


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A committed save; ``state`` is the Trainer's as it was then."""

    state: TrainerState
    seconds: float


class CheckpointSaver:
    """Saves of one process, one after the other.

    Args:
        checkpoints: Where they are committed.
        ranks: The processes of this launch; the main one commits what all of them wrote.
        compress: Whether the optimizer's state is kept compressed.
    """

    def __init__(self, checkpoints: Path, ranks: Ranks, *, compress: bool) -> None:
        self._checkpoints, self._ranks, self._compress = checkpoints, ranks, compress
        self._constant: dict[str, bytes] | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self._opened = False
        self._told: list[tuple[str, int, dict[str, Any]]] = []
        self.best: str | None = None  # path of the best checkpoint, which is never deleted to make room

    @property
    def can_go_behind(self) -> bool:
        """Whether the next save can be written in the background: the files that never change are known."""
        return self._constant is not None

    def save(
        self, step: int, write: Callable[[Path], None], facts: Callable[[], Mapping[str, Any]], *, needed_bytes: int
    ) -> None:
        """Save in the foreground; every rank calls this.

        Args:
            step: Updates made.
            write: Fills ``checkpoint-<step>`` in the directory it is given; called again where the disk refused.
            facts: What the manifest says beyond the files; asked once they are written.
            needed_bytes: About how much is written.

        Raises:
            RecoveryExhausted: It could not be written; says how much is needed and how much is free.
            OutputError: The run directory is gone.
        """
        self._persist(step, write, facts, needed_bytes)
        if self._ranks.size == 1:
            self._learn_constant(self._checkpoints / f"checkpoint-{step}")
        self._tell()

    def save_behind(self, snapshot: Snapshot, facts: Mapping[str, Any], *, needed_bytes: int) -> None:
        """Start writing ``snapshot`` in the background; the save before it has been collected."""
        assert self._thread is None, "at most one save is in flight"
        assert self._constant is not None, "the first save of a process is made in the foreground"
        constant, step = self._constant, snapshot.state.global_step

        def run() -> None:
            began = time.perf_counter()
            try:
                name = f"checkpoint-{step}"
                self._persist(
                    step,
                    lambda root: snapshot.write(root / name, constant),
                    lambda: dict(facts) | {"finite_weights": are_finite(snapshot.weights.values())},
                    needed_bytes,
                )
                self._outcome = Saved(state=snapshot.state, seconds=time.perf_counter() - began)
            except BaseException as error:
                self._outcome = error  # raised where it is collected, on the training thread

        self._thread = threading.Thread(target=run, name="llmtune-save")
        self._thread.start()

    def collect(self, *, wait: bool) -> Saved | None:
        """What has been committed in the background since the last call.

        Args:
            wait: Whether to wait for a save in flight.

        Raises:
            RecoveryExhausted: See `save`.
        """
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        self._thread, outcome, self._outcome = None, self._outcome, None
        self._tell()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    # ------------------------------------------------------------------ one save

    def _persist(
        self, step: int, write: Callable[[Path], None], facts: Callable[[], Mapping[str, Any]], needed_bytes: int
    ) -> None:
        try:
            self._attempt(step, write, facts)
        except _NotWrittenError as first:
            if self._ranks.size > 1:  # the others are past it: a second attempt would wait for them for ever
                raise self._refused(step, first, needed_bytes) from first.error
            self._make_room(step, first)
            try:
                self._attempt(step, write, facts)
            except _NotWrittenError as again:
                raise self._refused(step, again, needed_bytes) from again.error

    def _attempt(self, step: int, write: Callable[[Path], None], facts: Callable[[], Mapping[str, Any]]) -> None:
        name, ranks = f"checkpoint-{step}", self._ranks
        root = ranks.from_main(staging_root(self._checkpoints, step))

        def finish() -> None:
            if self._compress:
                compress_optimizer(root / name)
            if (events := self._checkpoints.parent / "events.jsonl").exists():
                sync(events)  # whoever goes on from this checkpoint finds the account of the steps before it
            commit(root / name, self._checkpoints / name, facts())

        try:
            ranks.agreed(self._guarded(self._open), main_only=True)
            ranks.agreed(self._guarded(lambda: write(root)))
            ranks.agreed(self._guarded(finish), main_only=True)
        finally:
            if ranks.is_main:
                shutil.rmtree(root, ignore_errors=True)

    def _open(self) -> None:
        if not (self._opened and self._checkpoints.is_dir()):
            open_place(self._checkpoints)
            self._opened = True

    def _guarded(self, act: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                act()
            except Exception as error:  # tokenizers and torch wrap what the system said in exceptions of their own
                refused = _disk_refused(error, self._checkpoints)
                if refused is None:
                    raise
                raise refused from error

        return guarded

    def _make_room(self, step: int, refused: _NotWrittenError) -> None:
        gone = self._free() if refused.is_full else ()
        freed = f"checkpoints {', '.join(map(str, sorted(gone)))} are deleted" if gone else "nothing is deleted"
        speaker.warn(f"the checkpoint of step {step} could not be written ({refused}); {freed}, it is tried once more")
        self._told.append(("incident", step, {"kind": "disk", "cause": str(refused), "free_bytes": refused.free_bytes}))
        self._told += [("checkpoint_deleted", step, {"deleted_step": old}) for old in gone]
        self._told.append(("recovery", step, {"action": "free_disk", "reason": f"{refused}; {freed}"}))

    def _free(self) -> tuple[int, ...]:
        try:
            return retain(self._checkpoints, keep=FEWEST, best=Path(self.best) if self.best else None).deleted
        except OSError as error:  # a disk that does not even delete: the second attempt says what is wrong
            speaker.warn(f"nothing could be deleted in {self._checkpoints}: {error}")
            return ()

    def _refused(self, step: int, refused: _NotWrittenError, needed_bytes: int) -> RecoveryExhausted:
        failure = classify(
            refused.error,
            step=step,
            phase="save",
            free_disk_bytes=lambda: refused.free_bytes,
            free_inodes=lambda: refused.free_inodes,
            needed_disk_bytes=max(needed_bytes, self._usual_bytes()),
        )
        tries = "tried twice" if self._ranks.size == 1 else "tried once"
        reason = f"the checkpoint of step {step} could not be written to {self._checkpoints}, {tries}: {refused}"
        return RecoveryExhausted(failure, reason)

    def _usual_bytes(self) -> int:
        """Of the newest checkpoint, tokenizer and all."""
        for _, path in committed(self._checkpoints):
            try:
                return sum(entry["bytes"] for entry in read_manifest(path)["files"].values())
            except ValueError:
                continue
        return 0

    def _learn_constant(self, checkpoint: Path) -> None:
        if self._constant is not None:
            return
        files = [path for path in checkpoint.iterdir() if path.name not in CHANGING and not _holds_weights(path)]
        if all(path.is_file() and path.name in REBUILDABLE for path in files):
            self._constant = {path.name: path.read_bytes() for path in files}

    def _tell(self) -> None:
        if self._told and self._ranks.is_main:
            run = RunDirectory(self._checkpoints.parent)
            for event, step, fields in self._told:
                run.event(event, step, **fields)
            self._told.clear()


class _NotWrittenError(TrainingError):
    """The disk refused; ``error`` is what said so, and what is free was asked before anything was cleared away."""

    def __init__(self, error: Exception, *, free_bytes: int, free_inodes: int) -> None:
        self.error, self.free_bytes, self.free_inodes = error, free_bytes, free_inodes
        super().__init__(getattr(error, "strerror", None) or str(error))

    @property
    def is_full(self) -> bool:
        """Whether it was for want of room."""
        said = getattr(self.error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return said or self.free_bytes < NO_ROOM_BYTES or not self.free_inodes


def _disk_refused(error: Exception, place: Path) -> _NotWrittenError | None:
    """Whether an error of a save speaks for the disk; a full one surfaces in many forms, so its room is asked."""
    if isinstance(error, LlmtuneError) and not isinstance(error, CheckpointError):
        return None
    try:
        room = os.statvfs(place)
    except OSError:
        return None if not isinstance(error, OSError) else _NotWrittenError(error, free_bytes=0, free_inodes=1)
    free, inodes = room.f_bavail * room.f_frsize, room.f_favail if room.f_files else 1
    if isinstance(error, CheckpointError):  # what was read back is not what was written
        error = OSError(errno.EIO, str(error))
    if isinstance(error, OSError):
        return _NotWrittenError(error, free_bytes=free, free_inodes=inodes)
    full = free < NO_ROOM_BYTES or inodes == 0
    if full or isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error):
        said = OSError(errno.ENOSPC if full else errno.EIO, f"{os.strerror(errno.ENOSPC if full else errno.EIO)}")
        said.__cause__ = error
        return _NotWrittenError(said, free_bytes=free, free_inodes=inodes)
    return None


def unreadable(checkpoint: Path) -> str | None:
    """Why this transformers cannot read the Trainer's state in a checkpoint that verifies; None if it can."""
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (TypeError, ValueError, OSError) as error:
        wrote = read_manifest(checkpoint).get("versions", {}).get("transformers", "another version")
        reader = f"transformers {transformers.__version__}"
        return f"{TRAINER_STATE_NAME} cannot be read by {reader} ({error}); it was written by {wrote}: install that one"
    return None


def _holds_weights(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".safetensors.index.json"))
