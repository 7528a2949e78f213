"""Size of the weights that are missing in the Hub's cache, and the free disk space there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.hardware.detection import existing_parent, free_disk_bytes
from llmtune.models.spec import ModelSpec

# Files that hold all weights, and indices that name the files of the parts; transformers takes the first that exists.
WHOLE = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Weights that a run fetches before it starts.

    Attributes:
        bytes: Bytes to fetch: parameters times the bytes of one on disk.
        directory: The cache that they go to.
        free_bytes: Free bytes there; None on a machine that was only described.
        shares_disk: Whether the run writes to the same disk.
    """

    bytes: int
    directory: str
    free_bytes: int | None
    shares_disk: bool

    def to_json(self) -> dict[str, Any]:
        """``download`` of a plan."""
        return {
            "bytes": self.bytes,
            "directory": self.directory,
            "free_bytes": self.free_bytes,
            "shares_disk": self.shares_disk,
        }


def download_of(
    spec: ModelSpec, *, source: str | None = None, revision: str | None = None, output: str | Path, is_here: bool = True
) -> Download | None:
    """Return what has to be fetched for the model; None where its weights are on this disk.

    Args:
        spec: The model.
        source: The Hub id or directory that it is loaded from; ``spec.id`` when not given.
        revision: The commit on the Hub.
        output: Where the run writes.
        is_here: Whether the plan is for this machine; for another one everything has to be fetched.
    """
    source = source or spec.id
    if source.startswith("builtin:") or Path(source).is_dir():
        return None
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    share = _missing_share(source, revision, cache) if is_here else 1.0
    if share == 0:
        return None
    return Download(
        bytes=round(share * spec.parameters * spec.stored_item),
        directory=str(cache),
        free_bytes=free_disk_bytes(cache) if is_here else None,
        shares_disk=existing_parent(cache).stat().st_dev == existing_parent(output).stat().st_dev,
    )


def _missing_share(model_id: str, revision: str | None, cache: Path) -> float:
    """Return the share of the weight files that are not in the cache, 0 to 1."""
    if not (cache / f"models--{model_id.replace('/', '--')}").is_dir():
        return 1.0  # found out without loading the client, which takes a tenth of a second
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(model_id, name, revision=revision, cache_dir=cache)
        return found if isinstance(found, str) else None

    try:
        if any(cached(name) for name in WHOLE):
            return 0.0
        index = next((path for name in INDICES if (path := cached(name))), None)
    except HFValidationError:
        return 1.0
    if index is None:
        return 1.0
    parts = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return sum(cached(part) is None for part in parts) / max(1, len(parts))
