"""One decision together with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

Source = Literal["user", "preset", "measured", "derived", "default"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A value, why it was chosen and who chose it.

    ``source`` is ``user`` (asked for), ``preset`` (written in a preset, whose source the reason names), ``measured``
    (a probe on this machine), ``derived`` (computed from hardware, model and data) or ``default``.
    """

    value: T
    reason: str
    source: Source

    def to_json(self) -> dict[str, Any]:
        """``{value, reason, source}``; tuples become lists."""
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return {"value": value, "reason": self.reason, "source": self.source}


def asked_or(asked: T | None, key: str, otherwise: Choice[T]) -> Choice[T]:
    """What the user set for ``key``, else the choice made for them."""
    return otherwise if asked is None else Choice(asked, f"you set {key}", "user")
