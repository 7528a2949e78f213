"""From an exception to a ``Failure``: what kind it is, the evidence, and what a person can do.

Asked in this order, because each is stronger evidence than what follows:

1. what llmtune itself raised;
2. workers, ranks and devices, whose errors surface wherever the main process happens to be;
3. a callback or metric of the user's on the way from us to what raised;
4. memory, disk, files of a checkpoint: in the error, then in the errors it was raised from;
5. other code that is neither ours nor a library's;
6. else it is a defect.
"""

from __future__ import annotations

import errno as numbers
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmtune.errors import CheckpointError, LlmtuneError, OutputError, Preempted, RecoveryExhausted, TrainingError
from llmtune.training.recovery import signs
from llmtune.training.recovery.failure import Failure, FailureKind
from llmtune.training.recovery.origin import Origin, lost_a_worker, origin_of, raised_at
from llmtune.units import format_bytes

# With less than this on a disk, a write that failed is taken to have failed for want of room (an estimate).
NO_ROOM_BYTES = 1024 * 1024
_LONGEST_MESSAGE = 500
# Modules whose exceptions carry texts of drivers and allocators without being a RuntimeError.
_SPEAK_FOR_MACHINES = frozenset({"safetensors", "safetensors_rust", "triton", "torch", "bitsandbytes", "deepspeed"})
_LESS_MEMORY = "--set train.token_budget=… with a smaller value, --method qlora, or a smaller model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """What can be asked about the disk of the run directory; each may raise OSError."""

    free_bytes: Callable[[], int | None] | None
    free_inodes: Callable[[], int | None] | None
    needed_bytes: int | None


def classify(
    error: BaseException,
    *,
    step: int,
    phase: str,
    free_disk_bytes: Callable[[], int] | None = None,
    free_inodes: Callable[[], int | None] | None = None,
    needed_disk_bytes: int | None = None,
) -> Failure:
    """Say what went wrong.

    Args:
        error: What was raised.
        step: Updates done.
        phase: What the run was doing: load, step, evaluation, save, data, callback or finish.
        free_disk_bytes: Asked only when a write failed; bytes free where the run directory is.
        free_inodes: The same for inodes.
        needed_disk_bytes: Bytes that what was being written takes, where that is known.
    """
    disk = Disk(free_bytes=free_disk_bytes, free_inodes=free_inodes, needed_bytes=needed_disk_bytes)
    if isinstance(error, RecoveryExhausted):
        return error.failure
    found = _ours(error, step, phase, disk) or _anywhere(error, step, phase)
    if found is not None:
        return found
    origin = origin_of(error)
    if origin is not None and origin.is_hook:
        return _user_code(error, origin, step, phase)
    for link in _chain(error):
        found = _memory(link, step, phase) or _disk(link, step, phase, disk) or _checkpoint(link, step, phase)
        if found is not None:
            return found
    if (found := _weak_disk(error, step, phase, disk)) is not None:
        return found
    if isinstance(error, TrainingError):
        return _refused(error, step, phase)
    return _defect(error, step, phase) if origin is None else _user_code(error, origin, step, phase)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    return _memory_of(error) is not None


# ---------------------------------------------------------------------- by us


def _ours(error: BaseException, step: int, phase: str, disk: Disk) -> Failure | None:
    if isinstance(error, Preempted | KeyboardInterrupt):
        what = _evidence(error, phase)
        return Failure(
            kind="preempted", cause="stopped by a signal", step=step, evidence=what, remedy="Continue the run."
        )
    if isinstance(error, CheckpointError):
        return Failure(
            kind="corrupt_checkpoint",
            cause="no checkpoint verifies",
            step=step,
            evidence=_evidence(error, phase) | {"mendable": False},
            remedy="Restore a checkpoint from a backup, or start anew with --resume never in another --output.",
        )
    if isinstance(error, OutputError):
        for link in _chain(error):
            if (found := _disk(link, step, "save", disk)) is not None:
                return found
    if not isinstance(error, LlmtuneError) or type(error) in (LlmtuneError, TrainingError):
        return None
    return _refused(error, step, phase)


def _refused(error: LlmtuneError, step: int, phase: str) -> Failure:
    return Failure(
        kind="refused",
        cause=str(error),
        step=step,
        evidence=_evidence(error, phase),
        remedy="Change what the message says, then run the same command again.",
    )


# ---------------------------------------------------------------------- by the machine


def _anywhere(error: BaseException, step: int, phase: str) -> Failure | None:
    text = _text(error)
    if lost_a_worker(error):
        lost = signs.WORKER_KILLED
        return Failure(kind=lost.kind, cause=lost.cause, step=step, evidence=_evidence(error, phase), remedy=lost.check)
    if not _speaks_for_the_machine(error):
        return None
    memory = _memory_of(error)
    if signs.CAUGHT_IN_WORKER.search(str(error)) and memory is not None:
        check = "Free memory of the machine, or use --set train.num_workers=0."
        return Failure(
            kind="worker", cause=signs.WORKER_MEMORY, step=step, evidence=_evidence(error, phase), remedy=check
        )
    for sign in signs.ANYWHERE:
        if not sign.texts.search(text):
            continue
        if sign.kind == "hardware" and (memory is not None or signs.NOT_HARDWARE.search(text)):
            continue
        evidence = _evidence(error, phase) | ({"where": "loader"} if sign.kind == "hung" else {})
        return Failure(kind=sign.kind, cause=sign.cause, step=step, evidence=evidence, remedy=sign.check)
    return None


def _memory_of(error: BaseException) -> str | None:
    """Which memory ran out, as a cause; None where none did."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == numbers.ENOMEM):
        return signs.HOST_MEMORY
    if not _speaks_for_the_machine(error) or isinstance(error, OSError):
        return None
    text = _text(error)
    for cause, texts in signs.MEMORY.items():
        if texts.search(text):
            return cause
    return signs.DEVICE_MEMORY if type(error).__name__ == "OutOfMemoryError" else None


def _memory(error: BaseException, step: int, phase: str) -> Failure | None:
    cause = _memory_of(error)
    if cause is None:
        return None
    kind: FailureKind = "evaluation_out_of_memory" if phase == "evaluation" else "out_of_memory"
    first = "Free memory that other programs hold and continue the run" if step else "Free memory"
    wanted = re.search(r"[Tt]r(?:ied|ying) to allocate ([\d.]+ ?\w+)", _text(error))
    return Failure(
        kind=kind,
        cause=cause,
        step=step,
        evidence=_evidence(error, phase) | ({"tried_to_allocate": wanted[1]} if wanted else {}),
        remedy=f"{first}; or start another one with {_LESS_MEMORY}.",
    )


def _disk(error: BaseException, step: int, phase: str, disk: Disk) -> Failure | None:
    number = _os_error(error)
    known = signs.DISK_ERRORS if phase not in ("save", "finish") else {**signs.SAVE_ERRORS, **signs.DISK_ERRORS}
    if number is None or number not in known:
        return None
    cause, mendable, remedy = known[number]
    evidence = _evidence(error, phase) | {"errno": numbers.errorcode.get(number, str(number)), "mendable": mendable}
    if isinstance(error, OSError) and error.filename is not None:
        evidence["file"] = str(error.filename)
    return _on_disk(cause, step, evidence, remedy, disk)


def _weak_disk(error: BaseException, step: int, phase: str, disk: Disk) -> Failure | None:
    """``unexpected pos 64 vs 0``: bytes are missing. Why, only the disk can tell, and only if it is asked now."""
    if not (_speaks_for_the_machine(error) and signs.WRITER_TEXTS.search(_text(error))):
        return None
    evidence = _evidence(error, phase) | {"mendable": True}
    return _on_disk(signs.NOT_WRITTEN, step, evidence, "Look at the disk of the run directory", disk)


def _on_disk(cause: str, step: int, evidence: dict[str, Any], remedy: str, disk: Disk) -> Failure:
    free, inodes, needed = _asked(disk.free_bytes), _asked(disk.free_inodes), disk.needed_bytes
    evidence |= {"free_bytes": free, "free_inodes": inodes, "needed_bytes": needed}
    if cause in (signs.DISK_FULL, signs.NOT_WRITTEN):
        if inodes == 0:
            cause, remedy = signs.NO_INODES, "Delete small files there"
        elif free is not None and free < (needed or NO_ROOM_BYTES):
            cause, remedy = signs.DISK_FULL, "Free space on the disk of the run directory"
    room = f" ({format_bytes(needed)} needed, " if needed is not None else " ("
    known = f"{room}{format_bytes(free)} free)" if free is not None else ""
    return Failure(
        kind="disk",
        cause=cause,
        step=step,
        evidence={key: value for key, value in evidence.items() if value is not None},
        remedy=f"{remedy}{known}, then continue the run. The checkpoints before it stand.",
    )


def _checkpoint(error: BaseException, step: int, phase: str) -> Failure | None:
    if phase != "load" or not signs.READER_TEXTS.search(_text(error)):
        return None
    return Failure(
        kind="corrupt_checkpoint",
        cause=signs.UNREADABLE,
        step=step,
        evidence=_evidence(error, phase),
        remedy="Continue from an earlier one: `llmtune checkpoints RUN verify` says which can be trusted.",
    )


# ---------------------------------------------------------------------- by code


def _user_code(error: BaseException, origin: Origin, step: int, phase: str) -> Failure:
    return Failure(
        kind="user_code",
        cause=f"{type(error).__name__} in {origin.owner}",
        step=step,
        evidence=_evidence(error, phase) | {"owner": origin.owner, "where": origin.where},
        remedy=f"Mend {origin.where}, then continue the run.",
    )


def _defect(error: BaseException, step: int, phase: str) -> Failure:
    function, where = raised_at(error)
    return Failure(
        kind="defect",
        cause=f"{type(error).__name__} in {function}" if function else type(error).__name__,
        step=step,
        evidence=_evidence(error, phase) | ({"where": where} if where else {}),
        remedy="Please report it with the traceback; the run can be continued from its last checkpoint.",
    )


# ---------------------------------------------------------------------- reading errors


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then those it was raised from or while handling which it was raised."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _text(error: BaseException) -> str:
    """The message; of one that carries the traceback of a worker only its last line."""
    text = str(error).strip()
    return text.splitlines()[-1] if signs.CAUGHT_IN_WORKER.match(text) else text


def _speaks_for_the_machine(error: BaseException) -> bool:
    root = type(error).__module__.partition(".")[0]
    return isinstance(error, RuntimeError | MemoryError | OSError) or root in _SPEAK_FOR_MACHINES


def _os_error(error: BaseException) -> int | None:
    """The number of the operating system's error that the exception is or tells of."""
    if isinstance(error, OSError):
        return error.errno
    if not _speaks_for_the_machine(error):
        return None
    text = _text(error)
    if named := signs.OS_ERROR.search(text):
        return int(named[1] or named[2])
    return next((number for number, texts in signs.DISK_TEXTS.items() if texts.search(text)), None)


def _asked(question: Callable[[], int | None] | None) -> int | None:
    if question is None:
        return None
    try:
        return question()
    except OSError:  # the directory is gone; the errno of the write says so
        return None


def _evidence(error: BaseException, phase: str) -> dict[str, Any]:
    return {"phase": phase, "exception": type(error).__name__, "message": _text(error)[:_LONGEST_MESSAGE]}
