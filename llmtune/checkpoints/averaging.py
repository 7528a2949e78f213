"""The arithmetic mean of several checkpoints' weights, as a directory that peft or transformers loads.

Averaged are the tensors as they are stored. For LoRA that is the mean of each factor, not of their products, which is
what averaging adapters commonly means and what keeps the rank.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.checkpoints import durable
from llmtune.checkpoints.commit import replace_directory
from llmtune.checkpoints.manifest import verify
from llmtune.checkpoints.places import STAGING_PREFIX
from llmtune.checkpoints.sharing import REBUILDABLE
from llmtune.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    import torch

WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


def average(checkpoints: Sequence[Path], target: Path) -> Path:
    """Write the mean of ``checkpoints`` to ``target``, with the configuration and tokenizer of the first.

    Tensors are added up in fp32 and stored in the type they had; those of whole numbers are taken from the first.

    Raises:
        CheckpointError: Fewer than two, one that does not verify, or weights of different names or shapes.
        OutputError: ``target`` exists or cannot be written.
    """
    from safetensors.torch import save_file

    if len(checkpoints) < 2:
        raise CheckpointError(f"an average needs at least 2 checkpoints, got {len(checkpoints)}")
    for path in checkpoints:
        if not (result := verify(path)).ok:
            raise CheckpointError(f"{path} is not averaged: {result.reason}")
    if target.exists():
        raise OutputError(f"{target} exists already; choose another --output.")
    first = checkpoints[0]
    names = _weights_of(checkpoints)
    staged = target.parent / f"{STAGING_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        staged.mkdir(parents=True)
        for name in names:
            save_file(_mean([path / name for path in checkpoints]), staged / name, metadata={"format": "pt"})
            (staged / name).chmod(0o644)
        for path in first.iterdir():
            if path.name in REBUILDABLE or path.name.endswith(INDEX_SUFFIX):
                shutil.copyfile(path, staged / path.name)
        replace_directory(staged, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error}. Choose another --output.") from error
    finally:
        durable.remove(staged)
    return target


def _weights_of(checkpoints: Sequence[Path]) -> list[str]:
    names = [sorted(path.name for path in checkpoint.glob(f"*{WEIGHTS_SUFFIX}")) for checkpoint in checkpoints]
    if not names[0]:
        raise CheckpointError(f"{checkpoints[0]} has no weights in one piece (*{WEIGHTS_SUFFIX}); export it first")
    for path, found in zip(checkpoints, names, strict=True):
        if found != names[0]:
            raise CheckpointError(f"{path} has the weights {found}, {checkpoints[0]} has {names[0]}")
    return names[0]


def _mean(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Tensor by tensor, so that memory holds the result and one tensor more of each file."""
    from contextlib import ExitStack

    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(str(path), framework="pt")) for path in files]
        names = list(opened[0].keys())
        for path, file in zip(files, opened, strict=True):
            if set(file.keys()) != set(names):
                differing = sorted(set(names) ^ set(file.keys()))[0]
                raise CheckpointError(f"{path} and {files[0]} hold different tensors, e.g. {differing}")
        return {name: _mean_tensor([file.get_tensor(name) for file in opened], name, files) for name in names}


def _mean_tensor(tensors: Sequence[Any], name: str, files: Sequence[Path]) -> torch.Tensor:
    import torch

    first: torch.Tensor = tensors[0]
    for tensor, path in zip(tensors, files, strict=True):
        if tensor.shape != first.shape:
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}, in {files[0]} {list(first.shape)}")
    if not first.is_floating_point():
        return first
    total = torch.zeros(first.shape, dtype=torch.float32)
    for tensor in tensors:
        total += tensor.float()
    return (total / len(tensors)).to(first.dtype)
