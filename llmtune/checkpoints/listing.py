"""Which checkpoints a run has, which of them can be trusted, and which may go."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.checkpoints.commit import STAGING_PREFIX, TRASH_PREFIX, discard
from llmtune.checkpoints.manifest import read_manifest, verify
from llmtune.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """One committed checkpoint.

    Attributes:
        verified: Whether every file matches the manifest.
        reason: The first difference, or that there is none.
        metrics: Metrics of the evaluation at this step, empty when there was none.
        healthy: Verified and all weights finite.
    """

    step: int
    path: Path
    verified: bool
    reason: str
    metrics: Mapping[str, float]
    num_bytes: int
    healthy: bool

    def to_json(self) -> dict[str, Any]:
        """One entry of ``checkpoints RUN --json``."""
        return {
            "step": self.step,
            "path": str(self.path),
            "verified": self.verified,
            "reason": self.reason,
            "metrics": dict(self.metrics),
            "bytes": self.num_bytes,
            "healthy": self.healthy,
        }


def step_of(checkpoint: Path) -> int:
    """The step in the name of a committed checkpoint, which its manifest confirms."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def committed(checkpoints: Path) -> list[tuple[int, Path]]:
    """Step and path of every ``checkpoint-<step>``, newest first by step, whatever the clock says."""
    if not checkpoints.is_dir():
        return []
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in checkpoints.iterdir())
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def list_checkpoints(checkpoints: Path) -> list[CheckpointInfo]:
    """Every committed checkpoint, verified now, newest first."""
    return [_inspect(step, path) for step, path in committed(checkpoints)]


def _inspect(step: int, path: Path) -> CheckpointInfo:
    result = verify(path)
    facts: Mapping[str, Any] = read_manifest(path) if result.ok else {}
    return CheckpointInfo(
        step=step,
        path=path,
        verified=result.ok,
        reason=result.reason,
        metrics=facts.get("metrics", {}),
        num_bytes=sum(entry["bytes"] for entry in facts.get("files", {}).values()),
        healthy=result.ok and bool(facts.get("finite_weights")),
    )


def newest_verified(checkpoints: Path, rejected: Callable[[CheckpointInfo], None]) -> Path | None:
    """The newest checkpoint that verifies; each newer one that does not is handed to ``rejected``.

    Returns:
        Its path, or None when nothing was ever committed.

    Raises:
        CheckpointError: Checkpoints exist and none of them verifies.
    """
    found = committed(checkpoints)
    for step, path in found:
        info = _inspect(step, path)
        if info.verified:
            return path
        rejected(info)
    if found:
        raise CheckpointError(
            f"{checkpoints}: none of {len(found)} checkpoints verifies (newest: {_inspect(*found[0]).reason}). "
            "Start over in a new directory with --output, or with --resume never"
        )
    return None


def retain(checkpoints: Path, *, keep: int, best: Path | None) -> list[int]:
    """Delete old checkpoints: the newest ``keep`` verified ones, the best and the newest healthy one stay.

    Returns:
        Steps that were deleted. One that does not verify is never counted as kept, and never deleted here.
    """
    infos = [info for info in list_checkpoints(checkpoints) if info.verified]
    kept = {info.path for info in infos[:keep]}
    kept |= {info.path for info in infos if best is not None and info.path.name == best.name}
    kept |= {info.path for info in [i for i in infos if i.healthy][:1]}
    gone = [info for info in infos if info.path not in kept]
    for info in gone:
        discard(info.path)
    return [info.step for info in gone]


def sweep_leftovers(checkpoints: Path) -> None:
    """Remove staging and trash folders that a killed process left; the caller holds the run's lock."""
    if checkpoints.is_dir():
        for path in checkpoints.iterdir():
            if path.name.startswith((STAGING_PREFIX, TRASH_PREFIX)):
                shutil.rmtree(path)
