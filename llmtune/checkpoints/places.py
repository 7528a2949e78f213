"""Names of directories: which are committed checkpoints, which are on their way in, out, or put aside."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

STAGING_PREFIX = ".staging-"
TRASH_PREFIX = ".trash-"
QUARANTINE_PREFIX = ".quarantine-"


def staging_root(checkpoints: Path, step: int) -> Path:
    """A fresh name on the same file system that no listing takes for a checkpoint."""
    return checkpoints / f"{STAGING_PREFIX}{step}-{os.getpid()}-{_unique()}"


def trash_of(directory: Path) -> Path:
    """What ``directory`` is called from the moment it is given up until it is deleted."""
    return directory.parent / f"{TRASH_PREFIX}{directory.name}-{_unique()}"


def quarantine_of(directory: Path) -> Path:
    """What ``directory`` is called when it is out of use but kept."""
    return directory.parent / f"{QUARANTINE_PREFIX}{directory.name}-{_unique()}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a committed checkpoint, which its manifest confirms."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def committed(checkpoints: Path) -> list[tuple[int, Path]]:
    """Step and path of every ``checkpoint-<step>``, newest first by step, whatever the clock says."""
    if not checkpoints.is_dir():
        return []
    matches = ((re.fullmatch(r"checkpoint-(0|[1-9]\d*)", path.name), path) for path in checkpoints.iterdir())
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def _unique() -> str:
    return uuid.uuid4().hex[:8]
