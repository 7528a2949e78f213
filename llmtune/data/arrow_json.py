"""JSON inside Arrow columns, as ``datasets`` stores objects of different shapes (``Json`` features)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmtune.data.reporter import parsed_json

Decode = Callable[[Any], Any]


def row_decoder(schema: Any) -> Decode | None:
    """Return what decodes the JSON columns of a row of a ``pyarrow.Schema``; None where it has none."""
    decoders = {field.name: decode for field in schema if (decode := _decoder(field.type)) is not None}
    return _object_decoder(decoders) if decoders else None


def _decoder(kind: Any) -> Decode | None:
    import pyarrow as pa

    if getattr(kind, "extension_name", None) == "arrow.json":
        return parsed_json
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _decoder(kind.value_type)
        return None if inner is None else _list_decoder(inner)
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        decoders = {field.name: decode for field in fields if (decode := _decoder(field.type)) is not None}
        return _object_decoder(decoders) if decoders else None
    return None


def _list_decoder(decode: Decode) -> Decode:
    return lambda values: None if values is None else [decode(value) for value in values]


def _object_decoder(decoders: dict[str, Decode]) -> Decode:
    def decoded(values: Any) -> Any:
        if values is None:
            return None
        return values | {name: decode(values[name]) for name, decode in decoders.items()}

    return decoded
