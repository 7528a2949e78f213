"""From a staged directory to a committed one: after the rename it is complete, before it nobody sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.checkpoints import durable
from llmtune.checkpoints.manifest import describe, remember, verify, write_manifest
from llmtune.checkpoints.places import QUARANTINE_PREFIX as QUARANTINE_PREFIX
from llmtune.checkpoints.places import quarantine_of, trash_of
from llmtune.checkpoints.places import staging_root as staging_root
from llmtune.checkpoints.sharing import share
from llmtune.errors import CheckpointError, OutputError

# What the Trainer leaves in a save that must not be kept: pickled arguments, access token included.
UNWANTED = ("training_args.bin",)


def open_place(checkpoints: Path) -> None:
    """Make the directory of checkpoints, if it is not there yet, so that it survives a power failure.

    Raises:
        OutputError: The run directory itself is gone. It is not made again: what it held would be missing.
    """
    try:
        durable.make_directory(checkpoints)
    except FileNotFoundError:
        raise OutputError(
            f"the run directory {checkpoints.parent} is gone: it was there when training began, and something has "
            "removed or renamed it. Put it back and continue the run, or start again with another --output."
        ) from None


def commit(staged: Path, final: Path, facts: Mapping[str, Any]) -> Path:
    """Make ``staged`` the committed checkpoint ``final``; both have the same name, in different directories.

    Every file is forced to disk, then the manifest, then the directories; everything is read back and compared, and
    one rename makes it visible. A committed target that verifies is left as it is; one that does not is put aside.
    Whoever staged it clears away what an error leaves there; what was committed before stands.

    Raises:
        CheckpointError: What was read back is not what was written.
        OSError: The disk refused.
    """
    assert staged.name == final.name, "a checkpoint is staged under its own name"
    if final.is_symlink() or final.exists():
        if verify(final).ok:
            durable.sync(final.parent)  # an attempt before this one may have failed at just that
            return final
        set_aside(final)
    for name in UNWANTED:
        (staged / name).unlink(missing_ok=True)
    files = describe(staged)
    for name in files:
        (staged / name).chmod(0o644)  # safetensors writes 0600
    linked = share(staged, files, final.parent)
    for name in files.keys() - linked:
        durable.sync(staged / name)
    write_manifest(staged, facts, files)
    for directory in reversed(durable.tree(staged)[1]):
        durable.sync(directory)
    result = verify(staged)
    if not result.ok:
        raise CheckpointError(f"{final.name} did not read back as written: {result.reason}")
    staged.rename(final)
    durable.sync(final.parent)
    remember(final)
    return final


def set_aside(checkpoint: Path) -> Path:
    """Take ``checkpoint`` out of the listing without deleting it; returns where it is now."""
    aside = quarantine_of(checkpoint)
    checkpoint.rename(aside)
    durable.sync(aside.parent)
    return aside


def discard(directory: Path) -> None:
    """Delete a committed directory so that a crash half-way leaves no half checkpoint under its name."""
    trash = trash_of(directory)
    directory.rename(trash)
    durable.sync(trash.parent)
    durable.remove(trash)


def replace_directory(staged: Path, final: Path) -> None:
    """Put a finished directory in the place of ``final``, which may exist; deleted is the old one last."""
    durable.sync_tree(staged)
    trash = trash_of(final)
    if final.is_symlink() or final.exists():
        final.rename(trash)
    staged.rename(final)
    durable.sync(final.parent)
    durable.remove(trash)
