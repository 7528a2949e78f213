"""Places that the environment decides: the cache folder and the run store."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of rebuildable things: ``LLMTUNE_CACHE``, else ``$XDG_CACHE_HOME/llmtune``, else ``~/.cache/llmtune``."""
    explicit = os.environ.get("LLMTUNE_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtune"


def store_url() -> str | None:
    """Database URL of the run store from ``LLMTUNE_STORE``; None means SQLite beside the runs."""
    return os.environ.get("LLMTUNE_STORE") or None
