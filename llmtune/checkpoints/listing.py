"""Which checkpoints a run has, which of them can be trusted, and which is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtune.checkpoints import durable
from llmtune.checkpoints.manifest import Verification, verify
from llmtune.checkpoints.places import STAGING_PREFIX, TRASH_PREFIX
from llmtune.checkpoints.places import committed as committed
from llmtune.checkpoints.sharing import restore
from llmtune.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """One committed checkpoint.

    Attributes:
        verified: Whether every file matches the manifest.
        reason: The first difference, or that there is none.
        metrics: Metrics of the evaluation at this step, empty when there was none.
        healthy: Verified, all weights finite, no open incident, last evaluation within tolerance of the best.
        facts: All that its manifest says, its files left out; empty where it does not verify.
    """

    step: int
    path: Path
    verified: bool
    reason: str
    metrics: Mapping[str, float]
    num_bytes: int
    healthy: bool
    facts: Mapping[str, Any] = field(default_factory=dict)

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


def list_checkpoints(checkpoints: Path) -> list[CheckpointInfo]:
    """Every committed checkpoint, every byte of it verified now, newest first."""
    return [inspect(step, path) for step, path in committed(checkpoints)]


def inspect(step: int, path: Path, check: Callable[[Path], Verification] = verify) -> CheckpointInfo:
    """One committed checkpoint, as far as ``check`` believes it."""
    result = check(path)
    facts = {key: value for key, value in result.manifest.items() if key != "files"}
    return CheckpointInfo(
        step=step,
        path=path,
        verified=result.ok,
        reason=result.reason,
        metrics=facts.get("metrics", {}),
        num_bytes=sum(entry["bytes"] for entry in result.manifest.get("files", {}).values()),
        healthy=result.ok and _is_healthy(facts),
        facts=facts,
    )


def newest_verified(
    checkpoints: Path,
    rejected: Callable[[CheckpointInfo], None],
    objection: Callable[[Path], str | None] = lambda path: None,
) -> Path | None:
    """The newest checkpoint that can be resumed; each newer one that cannot is handed to ``rejected``.

    A damaged file that can be rebuilt is restored first. Weights that are not finite are passed over.

    Args:
        checkpoints: Where they lie. The caller holds the run's lock.
        rejected: Told why a checkpoint is not used.
        objection: What else speaks against a checkpoint that verifies; None where nothing does.

    Returns:
        Its path, or None when nothing was ever committed.

    Raises:
        CheckpointError: Checkpoints exist and none of them can be resumed.
    """
    found, reasons = committed(checkpoints), []
    for step, path in found:
        info = inspect(step, path)
        if not info.verified and restore(path):
            info = inspect(step, path)
        if info.verified:
            info = replace(info, reason=_unusable(info) or objection(path) or "")
            if not info.reason:
                return path
        reasons.append(info.reason)
        rejected(info)
    if found:
        raise CheckpointError(
            f"{checkpoints}: none of {len(found)} checkpoints verifies (newest: {reasons[0]}). "
            "Start over in a new directory with --output, or with --resume never"
        )
    return None


def best_of(infos: Iterable[CheckpointInfo], metric: str, *, greater_is_better: bool) -> CheckpointInfo | None:
    """The verified checkpoint with the best finite ``metric``; of equals the newest, None where none has it."""
    having = [info for info in infos if info.verified and metric_of(info, metric) is not None]
    sign = 1 if greater_is_better else -1
    return max(having, key=lambda info: (sign * (metric_of(info, metric) or 0.0), info.step), default=None)


def metric_of(info: CheckpointInfo, metric: str) -> float | None:
    """The value of ``metric``, with or without its prefix ``eval_``; None where it is missing or not finite."""
    value = info.metrics.get(metric, info.metrics.get(f"eval_{metric}"))
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def sweep_leftovers(checkpoints: Path) -> None:
    """Remove what a killed process left half-way, of checkpoints and of final exports beside them.

    The caller holds the run's lock, so nobody else can be at work here.
    """
    for folder in (checkpoints, checkpoints.parent):
        if not folder.is_dir():
            continue
        ours = (STAGING_PREFIX, TRASH_PREFIX) if folder == checkpoints else _EXPORTS
        for path in folder.iterdir():
            if path.name.startswith(ours):
                durable.remove(path)


_EXPORTS = tuple(f"{prefix}{name}-" for prefix in (STAGING_PREFIX, TRASH_PREFIX) for name in ("adapter", "model"))


def _is_healthy(facts: Mapping[str, Any]) -> bool:
    return bool(facts.get("finite_weights")) and not facts.get("open_incident") and not facts.get("evaluation_worse")


def _unusable(info: CheckpointInfo) -> str | None:
    return None if info.facts.get("finite_weights") else "its weights are not finite"
