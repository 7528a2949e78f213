"""Origin of a configuration: its files and its environment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Files and environment of a configuration. All origins are equal, so that only settings are compared.

    Attributes:
        files: Configuration files, in the order in which they were merged.
        env: Name of the overlay that was chosen from ``environments``.
        notes: What a person should know: which file decided where files disagree, which names were read as others.
    """

    files: tuple[str, ...] = field(default=(), compare=False)
    env: str | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
