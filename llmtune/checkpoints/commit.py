"""From a staged directory to a committed one: after the rename it is complete, before it nobody sees it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmtune.checkpoints import durable
from llmtune.checkpoints.manifest import Entry, entry_of, names_of, remember, verify, write_manifest
from llmtune.checkpoints.places import QUARANTINE_PREFIX as QUARANTINE_PREFIX
from llmtune.checkpoints.places import quarantine_of, trash_of
from llmtune.checkpoints.places import staging_root as staging_root
from llmtune.checkpoints.sharing import REBUILDABLE, share
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
    write_manifest(staged, facts, _settled(staged, final.parent))
    for directory in reversed(durable.tree(staged)[1]):
        durable.sync(directory)
    result = verify(staged, contents=False)
    if not result.ok:
        raise CheckpointError(f"{final.name} did not read back as written: {result.reason}")
    staged.rename(final)
    durable.sync(final.parent)
    remember(final)
    return final


def _settled(staged: Path, checkpoints: Path) -> dict[str, Entry]:
    """Force every file to disk and read it back from there; returns what the manifest says of them.

    Hashing takes as long as the disk does, so it is done beside: once of what was written, once of what is read back.

    Raises:
        CheckpointError: What was read back is not what was written.
    """
    sizes = {name: (staged / name).stat().st_size for name in names_of(staged)}
    largest_first = sorted(sizes, key=lambda name: (name not in REBUILDABLE, sizes[name]), reverse=True)
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="llmtune-hash") as beside:
        written = {name: beside.submit(entry_of, staged / name) for name in largest_first}
        for name in largest_first:
            (staged / name).chmod(0o644)  # safetensors writes 0600
        read_back: dict[str, Future[Entry]] = {}

        def settle(name: str) -> None:
            durable.sync(staged / name)
            read_back[name] = beside.submit(_read_back, staged / name, written[name])

        for name in largest_first:
            if name not in REBUILDABLE:
                settle(name)
        files = {name: entry.result() for name, entry in written.items()}
        for name in files.keys() - share(staged, files, checkpoints) - read_back.keys():
            settle(name)
        for name, entry in read_back.items():
            if entry.result() != files[name]:
                raise CheckpointError(f"{staged.name} did not read back as written: {name} has another SHA-256")
    return files


def _read_back(path: Path, written: Future[Entry]) -> Entry:
    written.result()  # of what was written, which is in memory until here
    durable.forget(path)
    return entry_of(path)


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
