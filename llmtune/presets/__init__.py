"""What llmtune knows about model families: one YAML file per family, read into a frozen ``Preset``.

A preset says how a family is recognised, which modules its adapters sit on, which training numbers suit a goal and a
size of data, and which models there are to choose from. Every number carries its source.
"""

from __future__ import annotations

from llmtune.presets.facts import (
    GOALS,
    METHODS,
    SCHEDULES,
    SIZES,
    CatalogueEntry,
    Level,
    ModelShape,
    Recognition,
    dataset_size,
)
from llmtune.presets.preset import Preset, catalogue, find_entry

__all__ = [
    "GOALS",
    "METHODS",
    "SCHEDULES",
    "SIZES",
    "CatalogueEntry",
    "Level",
    "ModelShape",
    "Preset",
    "Recognition",
    "catalogue",
    "dataset_size",
    "find_entry",
]
