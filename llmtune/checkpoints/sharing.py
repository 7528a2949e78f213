"""Files that every checkpoint of a run has alike and that can be rebuilt: one copy on disk, and a spare.

What a resume depends on (weights, optimizer, schedule, random states, trainer state) is never shared: one bad block
would take all checkpoints at once. A tokenizer may be shared, because a spare copy outside the checkpoints restores it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.checkpoints import durable
from llmtune.checkpoints.manifest import is_intact, read_manifest
from llmtune.checkpoints.places import committed

# What save_pretrained of tokenizers, configurations and peft writes besides weights.
REBUILDABLE = frozenset(
    {
        "README.md",
        "adapter_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
SPARES = ".spares"


def share(staged: Path, files: Mapping[str, Mapping[str, Any]], checkpoints: Path) -> set[str]:
    """Replace rebuildable files of ``staged`` by hard links to equal ones of the newest checkpoint that has them.

    A file that no checkpoint has yet gets a spare copy, forced to disk, beside ``checkpoints``.

    Returns:
        Names of the files that are links now, on disk already.
    """
    candidates = [name for name in files if name in REBUILDABLE]
    newest = next((path for _, path in committed(checkpoints) if not path.is_symlink()), None)
    kept = _files_of(newest) if newest is not None else {}
    linked = set()
    for name in candidates:
        if newest is not None and kept.get(name) == files[name] and is_intact(newest / name, files[name]):
            if _link(newest / name, staged / name):
                linked.add(name)
        elif kept.get(name) != files[name]:
            _spare(staged / name, checkpoints.parent / SPARES / str(files[name]["sha256"]))
    return linked


def restore(checkpoint: Path) -> list[str]:
    """Put back rebuildable files of ``checkpoint`` that are damaged or gone and of which there is a spare.

    Returns:
        Their names.
    """
    if checkpoint.is_symlink():
        return []
    restored = []
    for name, entry in _files_of(checkpoint).items():
        spare = checkpoint.parent.parent / SPARES / str(entry["sha256"])
        if name in REBUILDABLE and not is_intact(checkpoint / name, entry) and is_intact(spare, entry):
            fresh = checkpoint / f".{name}.restored"
            durable.remove(fresh)
            durable.write(fresh, spare.read_bytes())
            fresh.replace(checkpoint / name)
            durable.sync(checkpoint)
            restored.append(name)
    return restored


def _files_of(checkpoint: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        files: Mapping[str, Mapping[str, Any]] = read_manifest(checkpoint)["files"]
    except ValueError:
        return {}
    return files


def _link(source: Path, target: Path) -> bool:
    fresh = target.with_name(f".{target.name}.link")
    try:
        os.link(source, fresh)
    except OSError:  # a file system without hard links: the copy stays
        return False
    fresh.replace(target)
    return True


def _spare(source: Path, spare: Path) -> None:
    if spare.exists():
        return
    durable.make_directory(spare.parent)
    fresh = spare.with_name(f"{spare.name}.new")
    durable.remove(fresh)
    durable.write(fresh, source.read_bytes())
    fresh.replace(spare)
    durable.sync(spare.parent)
