"""What a complete checkpoint consists of: size and SHA-256 of every file, and a hash of the manifest itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Whether a directory is exactly what its manifest says; ``reason`` names the first difference."""

    ok: bool
    reason: str


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> Path:
    """Describe every file of ``directory`` together with ``facts``, and return the manifest's path (not yet synced)."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    document = {"format_version": FORMAT_VERSION, **facts, "files": files}
    document["manifest_sha256"] = _self_hash(document)
    target = directory / MANIFEST
    target.write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")
    return target


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest's document.

    Raises:
        ValueError: It is missing, unreadable, edited, or of a format this version does not know.
    """
    try:
        document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("manifest.json is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"manifest.json cannot be read: {error}") from None
    if not isinstance(document, dict) or document.get("format_version") != FORMAT_VERSION:
        raise ValueError("manifest.json has an unknown format")
    if document.get("manifest_sha256") != _self_hash(document):
        raise ValueError("manifest.json was changed after it was written")
    return document


def verify(directory: Path) -> Verification:
    """Compare every file with the manifest: none missing, none extra, sizes and hashes equal, no symbolic link."""
    try:
        document = read_manifest(directory)
    except ValueError as error:
        return Verification(ok=False, reason=str(error))
    if directory.is_symlink():
        return Verification(ok=False, reason="is a symbolic link")
    if directory.name != f"checkpoint-{document['step']}":
        return Verification(ok=False, reason=f"is named {directory.name} but holds step {document['step']}")
    found = {path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()}
    expected = {directory / name for name in document["files"]} | {directory / MANIFEST}
    for path in sorted(found ^ expected):
        state = "is not in the manifest" if path in found else "is missing"
        return Verification(ok=False, reason=f"{path.relative_to(directory)} {state}")
    for name, entry in document["files"].items():
        path = directory / name
        if path.is_symlink():
            return Verification(ok=False, reason=f"{name} is a symbolic link")
        if path.stat().st_size != entry["bytes"]:
            return Verification(ok=False, reason=f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}")
        if sha256_of(path) != entry["sha256"]:
            return Verification(ok=False, reason=f"{name} has another SHA-256 than when it was saved")
    return Verification(ok=True, reason="every file matches its manifest")


def _self_hash(document: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
