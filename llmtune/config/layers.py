"""Configuration files as layers: each file, and on top of it the overlay that was chosen from its ``environments``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune.config.reading import read_file
from llmtune.errors import did_you_mean

OVERLAYS = "environments"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Keys of a file, or of one overlay in it.

    Attributes:
        where: Name in messages.
        document: The keys.
        is_chosen: Whether the keys count; overlays that were not chosen are only checked.
    """

    where: str
    document: Mapping[str, Any]
    is_chosen: bool = True


@dataclass(slots=True)
class Layers:
    """The layers of all files, from the first to the last, and what is wrong with them: ``(source, sentence)``."""

    layers: list[Layer] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    names: dict[str, None] = field(default_factory=dict)  # of overlays, in their order


def read_layers(files: Sequence[str | Path], env: str | None, asked_by: str) -> Layers:
    """Read configuration files, each with the overlay ``env`` on top of it.

    Args:
        files: Files, in the order in which they are merged.
        env: Name of an overlay; None chooses none.
        asked_by: Source of ``env`` in messages.

    Raises:
        ConfigError: A file cannot be read.
    """
    found = Layers()
    for file in map(str, files):
        document = dict(read_file(Path(file)))
        overlays = document.pop(OVERLAYS, None)
        found.layers.append(Layer(where=file, document=document))
        if not isinstance(overlays, Mapping | None) or not all(isinstance(name, str) for name in overlays or ()):
            found.problems.append((file, _expected_overlays()))
            continue
        for name, overlay in (overlays or {}).items():
            found.names[name] = None
            if not isinstance(overlay, Mapping | None):
                found.problems.append((file, f"{OVERLAYS}.{name}: got {overlay!r}, expected a mapping of keys"))
                continue
            where = f"{file} ({OVERLAYS}.{name})"
            found.layers.append(Layer(where=where, document=overlay or {}, is_chosen=name == env))
    if env is not None and env not in found.names:
        found.problems.append((asked_by, _no_overlay(env, files, list(found.names))))
    return found


def _no_overlay(env: str, files: Sequence[str | Path], names: Sequence[str]) -> str:
    if names:
        return f"got '{env}', expected {' or '.join(names)}" + _hint(env, names)
    if not files:
        return f"got '{env}', but no configuration file was given; pass --config FILE with `{OVERLAYS}: {{{env}: …}}`"
    return f"got '{env}', but {', '.join(map(str, files))} has no `{OVERLAYS}`; add `{OVERLAYS}: {{{env}: …}}`"


def _hint(env: str, names: Sequence[str]) -> str:
    hint = did_you_mean(env, names)
    return hint if hint.startswith(", did") else ""


def _expected_overlays() -> str:
    return f"{OVERLAYS}: expected a mapping such as `{OVERLAYS}: {{dev: {{train: {{epochs: 1}}}}}}`"
