"""The embedded default: a small base model and demo data, so that a fresh machine needs no network.

``corpus`` and ``pretrain`` made the model, ``tasks`` made the data; neither is needed to use them.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["TINY_ID", "demo_heldout_path", "demo_train_path", "tiny_path"]

TINY_ID = "builtin:tiny"
"""What a user writes for ``--model`` to get the embedded model."""

_HERE = Path(__file__).parent


def tiny_path() -> Path:
    """The directory of the embedded model; ``transformers`` loads it as it is."""
    return _HERE / "tiny"


def demo_train_path() -> Path:
    """The tuning data of ``llmtune demo``: requests for a parcel and their JSON, as chat messages."""
    return _HERE / "demo" / "train.jsonl"


def demo_heldout_path() -> Path:
    """The held-out data of ``llmtune demo``: the same task, about names that are not in the tuning data."""
    return _HERE / "demo" / "heldout.jsonl"
