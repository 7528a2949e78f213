"""From a staged directory to a committed one: after the rename it is complete, before it nobody sees it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.checkpoints.manifest import verify, write_manifest
from llmtune.errors import CheckpointError

STAGING_PREFIX = ".staging-"
TRASH_PREFIX = ".trash-"
QUARANTINE_PREFIX = ".quarantine-"
# What the Trainer leaves in a save that must not be kept: pickled arguments, access token included.
UNWANTED = ("training_args.bin",)


def staging_root(checkpoints: Path, step: int) -> Path:
    """A fresh name on the same file system that no listing takes for a checkpoint."""
    return checkpoints / f"{STAGING_PREFIX}{step}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def commit(staged: Path, final: Path, facts: Mapping[str, Any]) -> Path:
    """Make ``staged`` the committed checkpoint ``final``.

    Every file and directory is synced, the manifest is written last, everything is read back and compared, and one
    rename makes it visible. A committed target that verifies is left as it is; one that does not is put aside.

    Raises:
        CheckpointError: What was read back is not what was written.
        OSError: The disk refused; ``staged`` is removed, and what was committed before stands.
    """
    try:
        for name in UNWANTED:
            (staged / name).unlink(missing_ok=True)
        for path in staged.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
        write_manifest(staged, facts)
        _sync_tree(staged)
        if final.exists():
            if verify(final).ok:
                shutil.rmtree(staged)
                return final
            final.rename(final.parent / f"{QUARANTINE_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}")
        _read_back(staged, final)
        staged.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return final


def _read_back(staged: Path, final: Path) -> None:
    # Verification expects the final name, and a rename inside the staging folder costs nothing.
    named = staged.parent / f"{staged.name}.d" / final.name
    named.parent.mkdir()
    staged.rename(named)
    try:
        result = verify(named)
    finally:
        named.rename(staged)
        named.parent.rmdir()
    if not result.ok:
        raise CheckpointError(f"the checkpoint of step {final.name} did not read back as written: {result.reason}")


def discard(directory: Path) -> None:
    """Delete a committed directory so that a crash half-way leaves no half checkpoint under its name."""
    trash = directory.parent / f"{TRASH_PREFIX}{directory.name}-{uuid.uuid4().hex[:8]}"
    directory.rename(trash)
    _sync(trash.parent)
    shutil.rmtree(trash)


def replace_directory(staged: Path, final: Path) -> None:
    """Put a finished, synced directory in the place of ``final``, which may exist."""
    _sync_tree(staged)
    if final.exists():
        discard(final)
    staged.rename(final)
    _sync(final.parent)


def _sync_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
