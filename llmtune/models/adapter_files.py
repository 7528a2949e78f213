"""What an adapter's directory may hold, looked at before peft reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtune.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# peft 0.21 imports the modules that these keys of an adapter's configuration name.
_OWN_MODULES = {"megatron_core": (None, "megatron.core"), "megatron_config": (None,)}
_LIBRARIES = ("transformers", "peft", "torch")


def require_plain_adapter(directory: Path) -> None:
    """Refuse an adapter that could make peft import somebody's code, or whose weights are no safetensors.

    Raises:
        ModelError: It names a module that is not one of its own, has its weights in another form, or cannot be read.
    """
    for name in (CONFIG, WEIGHTS):
        if (directory / name).is_symlink() or not (directory / name).is_file():
            raise ModelError(f"adapter {directory}: {name} is missing, or is no regular file; weights are safetensors")
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"adapter {directory}: {CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"adapter {directory}: {CONFIG} is no JSON object")
    for key, module in _foreign(config):
        raise ModelError(
            f"adapter {directory}: {CONFIG} names the module {module!r} under {key}, which would be imported; that is "
            "refused. An adapter made by llmtune names none: take the one from its run directory"
        )


def _foreign(config: dict[str, Any]) -> list[tuple[str, Any]]:
    found = [(key, config[key]) for key, own in _OWN_MODULES.items() if config.get(key) not in own]
    mapping = config.get("auto_mapping")
    if mapping is not None:
        library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
        if not isinstance(library, str) or library.partition(".")[0] not in _LIBRARIES:
            found.append(("auto_mapping", library))
    return found
