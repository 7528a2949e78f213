"""What a complete checkpoint consists of: size and SHA-256 of every file, and a hash of the manifest itself."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune.checkpoints import durable

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

# What a manifest says of a file: its size as ``bytes``, its ``sha256`` in hex.
Entry = dict[str, Any]
Signature = frozenset[tuple[str, int, int, int]]
# Checkpoints that this process has verified, by path: what their files looked like then.
_verified: dict[str, Signature] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Whether a directory is exactly what its manifest says.

    Attributes:
        reason: The first difference, or that there is none.
        manifest: What it says; empty where it cannot be believed.
    """

    ok: bool
    reason: str
    manifest: Mapping[str, Any] = field(default_factory=dict)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names_of(directory: Path) -> list[str]:
    """Every file, the manifest left out, by name relative to ``directory``."""
    files, _ = durable.tree(directory)
    return [str(path.relative_to(directory)) for path in files if path != directory / MANIFEST]


def entry_of(path: Path) -> Entry:
    """Size in bytes and SHA-256 of one file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_manifest(
    directory: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """Describe ``directory`` together with ``facts`` in its manifest, forced to disk, and return its path.

    Args:
        directory: What is described.
        facts: At least ``step``.
        files: The entry of each; asked for here when not given.
    """
    files = {name: entry_of(directory / name) for name in names_of(directory)} if files is None else files
    document = {"format_version": FORMAT_VERSION, **facts, "files": files}
    document["manifest_sha256"] = _self_hash(document)
    target = directory / MANIFEST
    target.unlink(missing_ok=True)
    durable.write(target, json.dumps(document, indent=1, sort_keys=True).encode())
    return target


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest's document.

    Raises:
        ValueError: It is missing, unreadable, edited, or of a format this version does not know.
    """
    path = directory / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("manifest.json is no regular file")
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("manifest.json is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"manifest.json cannot be read: {error}") from None
    if not isinstance(document, dict) or document.get("format_version") != FORMAT_VERSION:
        raise ValueError("manifest.json has an unknown format")
    if document.get("manifest_sha256") != _self_hash(document):
        raise ValueError("manifest.json was changed after it was written")
    if not isinstance(document.get("files"), dict) or not isinstance(document.get("step"), int):
        raise ValueError("manifest.json names no step or no files")
    return document


def verify(directory: Path, *, contents: bool = True) -> Verification:
    """Read every file and compare it with the manifest: none missing, none extra, all equal, no link or device.

    Args:
        directory: The checkpoint.
        contents: Whether files are read; else only the manifest is, and all sizes compared.
    """
    if directory.is_symlink():
        return Verification(ok=False, reason="is a symbolic link")
    try:
        document = read_manifest(directory)
        reason = _difference(directory, document, contents=contents)
    except ValueError as error:
        return Verification(ok=False, reason=str(error))
    except OSError as error:
        return Verification(ok=False, reason=f"cannot be read: {error}")
    if reason is not None:
        return Verification(ok=False, reason=reason)
    return Verification(ok=True, reason="every file matches its manifest", manifest=document)


def verify_once(directory: Path) -> Verification:
    """The same, but files that this process has verified are read again only when size, time or inode has changed."""
    known = _verified.get(str(directory))
    try:
        if known is not None and known == _signature(directory):
            reason = "every file matches its manifest"
            return Verification(ok=True, reason=reason, manifest=read_manifest(directory))
    except (OSError, ValueError):
        pass  # something has changed: what it is, `verify` says
    result = verify(directory)
    if result.ok:
        remember(directory)
    else:
        _verified.pop(str(directory), None)
    return result


def remember(directory: Path) -> None:
    """Note that ``directory`` has just been verified."""
    _verified[str(directory)] = _signature(directory)


def is_intact(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is regular and has the size and hash that a manifest says."""
    try:
        found = path.lstat()
    except OSError:
        return False
    same_size = stat.S_ISREG(found.st_mode) and found.st_size == entry["bytes"]
    return same_size and sha256_of(path) == entry["sha256"]


def _difference(directory: Path, document: Mapping[str, Any], *, contents: bool) -> str | None:
    if directory.name != f"checkpoint-{document['step']}":
        return f"is named {directory.name} but holds step {document['step']}"
    found = _entries(directory)
    expected = {*document["files"], MANIFEST}
    for name in sorted(found.keys() ^ expected):
        return f"{name} {'is not in the manifest' if name in found else 'is missing'}"
    for name, entry in sorted(document["files"].items()):
        mode, size = found[name].st_mode, found[name].st_size
        if stat.S_ISLNK(mode):
            return f"{name} is a symbolic link"
        if not stat.S_ISREG(mode):
            return f"{name} is no regular file"
        if size != entry["bytes"]:
            return f"{name} has {size} bytes, expected {entry['bytes']}"
        if contents and sha256_of(directory / name) != entry["sha256"]:
            return f"{name} has another SHA-256 than when it was saved"
    return None


def _entries(directory: Path) -> dict[str, os.stat_result]:
    """Whatever is no directory, by relative name; a link to a directory is no directory."""
    found = {}
    for folder, folders, names in os.walk(directory):
        for name in [*folders, *names]:
            path = Path(folder, name)
            facts = path.lstat()
            if not stat.S_ISDIR(facts.st_mode):
                found[str(path.relative_to(directory))] = facts
    return found


def _signature(directory: Path) -> Signature:
    entries = _entries(directory).items()
    return frozenset((name, facts.st_size, facts.st_mtime_ns, facts.st_ino) for name, facts in entries)


def _self_hash(document: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
