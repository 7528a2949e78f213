"""Base models: where they are, what shape they have, and how weights and adapters are loaded."""

from typing import TYPE_CHECKING

from llmtune.models.download import Download, download_of
from llmtune.models.locate import ModelLocation, locate, preset_of
from llmtune.models.spec import LinearModule, ModelSpec, read_spec, spec_from_entry

if TYPE_CHECKING:
    from llmtune.models.load import load_for_training, load_tokenizer, load_tuned, require_lasting

__all__ = [
    "Download",
    "LinearModule",
    "ModelLocation",
    "ModelSpec",
    "download_of",
    "load_for_training",
    "load_tokenizer",
    "load_tuned",
    "locate",
    "preset_of",
    "read_spec",
    "require_lasting",
    "spec_from_entry",
]


def __getattr__(name: str) -> object:
    if name in ("load_for_training", "load_tokenizer", "load_tuned", "require_lasting"):  # these import torch
        from llmtune.models import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
