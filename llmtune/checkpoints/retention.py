"""Which checkpoints may go. Only verified ones count as kept, and only verified ones are ever deleted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmtune.checkpoints.commit import discard, set_aside
from llmtune.checkpoints.listing import CheckpointInfo, committed, inspect
from llmtune.checkpoints.manifest import verify_once
from llmtune.checkpoints.sharing import restore

# With one alone, a bad block would lose the run.
FEWEST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What one pass did.

    Attributes:
        deleted: Steps of deleted checkpoints.
        rejected: Checkpoints that do not verify and were put aside, each with its reason and the path it had.
    """

    deleted: tuple[int, ...]
    rejected: tuple[CheckpointInfo, ...]


def retain(checkpoints: Path, *, keep: int, best: Path | None) -> Retention:
    """Delete old checkpoints: the newest ``keep`` verified ones, the best and the newest healthy one stay.

    One that does not verify never counts as kept. It is put aside, not deleted, and only while another one verifies:
    a run whose checkpoints are all bad must stop instead of starting over.
    """
    assert keep >= FEWEST, f"at least {FEWEST} checkpoints are kept"
    infos = [_inspect(step, path) for step, path in committed(checkpoints)]
    good = [info for info in infos if info.verified]
    if not good:
        return Retention(deleted=(), rejected=())
    kept = {info.path for info in good[:keep]}
    kept |= {info.path for info in good if best is not None and info.path.name == best.name}
    kept |= {info.path for info in [i for i in good if i.healthy][:1]}
    gone = [info for info in good if info.path not in kept]
    bad = [info for info in infos if not info.verified]
    for info in bad:
        set_aside(info.path)
    for info in reversed(gone):
        discard(info.path)
    return Retention(deleted=tuple(info.step for info in gone), rejected=tuple(bad))


def set_aside_after(checkpoints: Path, step: int) -> list[Path]:
    """Take checkpoints of later steps out of the listing: they are of a course that the run has left.

    Left in place, the newest of them would be resumed next time, and the same step could not be committed again.

    Returns:
        The paths they had, newest first.
    """
    later = [path for number, path in committed(checkpoints) if number > step]
    for path in later:
        set_aside(path)
    return later


def _inspect(step: int, path: Path) -> CheckpointInfo:
    info = inspect(step, path, verify_once)
    return inspect(step, path, verify_once) if not info.verified and restore(path) else info
