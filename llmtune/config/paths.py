"""Places that the environment decides: the cache folder and the run store."""

from __future__ import annotations

import os
from collections.abc import Sequence
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


def has_hub_token() -> bool:
    """Whether an access token for the Hugging Face Hub is at hand: in the environment, or noted by ``hf auth login``.

    The client's own answer, without the third of a second that loading the client takes.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return False
    named = (os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return any(named) or Path(constants.HF_TOKEN_PATH).is_file()


def credential_is_set(variables: Sequence[str], files: Sequence[tuple[str, str]] = ()) -> bool:
    """Return whether one of these variables is set, or one of these files of the home folder holds a text.

    Args:
        variables: Names of environment variables.
        files: Paths below the home folder, each with the text that it must hold; an empty text is in every file.
    """
    if any(os.environ.get(name, "").strip() for name in variables):
        return True
    for name, text in files:
        try:
            held = (Path.home() / name).read_text(encoding="utf-8", errors="replace")
        except (OSError, RuntimeError):  # there is no such file, or no home folder
            continue
        if text in held:
            return True
    return False
