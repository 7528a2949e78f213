"""One decision together with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

Source = Literal["user", "preset", "measured", "derived", "default"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A value, why it was chosen, who chose it, and what would change it.

    ``source`` is ``user`` (asked for), ``preset`` (written in a preset, whose source the reason names), ``measured``
    (a probe on this machine), ``derived`` (computed from hardware, model and data) or ``default``. ``changes`` names
    what would have led to another value, such as ``lora from 16.5 GiB free``; empty where nothing sensible would.
    """

    value: T
    reason: str
    source: Source
    changes: str = ""

    def to_json(self) -> dict[str, Any]:
        """``{value, reason, source, changes}``; tuples become lists."""
        return {"value": _plain(self.value), "reason": self.reason, "source": self.source, "changes": self.changes}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Choice[Any]:
        """The inverse of ``to_json``; lists become tuples. Documents of earlier versions have no ``changes``."""
        return Choice(
            _frozen(document["value"]),
            document["reason"],
            document["source"],
            document.get("changes", ""),
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _frozen(part) for name, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def asked_or(asked: T | None, key: str, otherwise: Choice[T]) -> Choice[T]:
    """What the user set for ``key``, else the choice made for them."""
    return otherwise if asked is None else Choice(asked, f"you set {key}", "user")
