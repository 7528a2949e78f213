"""Committed checkpoints: staged, checksummed, synced, renamed; listed when complete, resumed when verified."""

from llmtune.checkpoints.commit import commit, replace_directory
from llmtune.checkpoints.listing import (
    CheckpointInfo,
    list_checkpoints,
    newest_verified,
    retain,
    step_of,
    sweep_leftovers,
)
from llmtune.checkpoints.manifest import MANIFEST, Verification, read_manifest, verify, write_manifest

__all__ = [
    "MANIFEST",
    "CheckpointInfo",
    "Verification",
    "commit",
    "list_checkpoints",
    "newest_verified",
    "read_manifest",
    "replace_directory",
    "retain",
    "step_of",
    "sweep_leftovers",
    "verify",
    "write_manifest",
]
