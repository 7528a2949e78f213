"""Committed checkpoints: staged, checksummed, synced, renamed; listed when complete, resumed when verified."""

from llmtune.checkpoints.averaging import average
from llmtune.checkpoints.commit import commit, open_place, replace_directory, set_aside
from llmtune.checkpoints.listing import (
    CheckpointInfo,
    best_of,
    list_checkpoints,
    metric_of,
    newest_verified,
    sweep_leftovers,
)
from llmtune.checkpoints.manifest import MANIFEST, Verification, read_manifest, verify, write_manifest
from llmtune.checkpoints.places import staging_root, step_of
from llmtune.checkpoints.retention import Retention, retain, set_aside_after
from llmtune.checkpoints.search import facts_of, matching

__all__ = [
    "MANIFEST",
    "CheckpointInfo",
    "Retention",
    "Verification",
    "average",
    "best_of",
    "commit",
    "facts_of",
    "list_checkpoints",
    "matching",
    "metric_of",
    "newest_verified",
    "open_place",
    "read_manifest",
    "replace_directory",
    "retain",
    "set_aside",
    "set_aside_after",
    "staging_root",
    "step_of",
    "sweep_leftovers",
    "verify",
    "write_manifest",
]
