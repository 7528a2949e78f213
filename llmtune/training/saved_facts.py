"""What the manifest of a checkpoint says beyond its files: where the run was, how it did, what it ran on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import TrainerState, TrainingArguments

from llmtune.training.continuity import Cursor

PACKAGES = ("llmtune", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "numpy", "safetensors")
# A last evaluation worse than the best by more than this share of it makes a checkpoint unhealthy (an estimate).
TOLERANCE = 0.1


def manifest_facts(
    *, state: TrainerState, args: TrainingArguments, cursor: Cursor, open_incident: bool, num_ranks: int
) -> dict[str, Any]:
    """The facts of a checkpoint saved at this moment, but for ``finite_weights``, which takes reading all of them.

    See the attributes of ``CheckpointInfo`` for what is healthy.
    """
    evaluation: Mapping[str, Any] = next((one for one in reversed(state.log_history) if "eval_loss" in one), {})
    current = evaluation if evaluation.get("step") == state.global_step else {}
    last, best = evaluation.get(str(args.metric_for_best_model)), state.best_metric
    return {
        "step": state.global_step,
        "metrics": {key: _plain(value) for key, value in current.items() if key.startswith("eval_")},
        "open_incident": open_incident,
        "evaluation_worse": is_worse(last, best, greater_is_better=bool(args.greater_is_better)),
        "cursor": asdict(cursor),
        "random_states": random_digest(),
        "versions": versions(),
        "num_ranks": num_ranks,
    }


def are_finite(weights: Iterable[torch.Tensor]) -> bool:
    """Whether every number of every weight is finite; one transfer from the device where they are."""
    held = [weight.detach() for weight in weights]
    if not held:
        return True
    sums = torch.stack([weight.sum(dtype=torch.float32) for weight in held])
    # A sum is finite only if its terms are; one of finite terms may overflow, so that they are looked at one by one.
    return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(weight).all()) for weight in held)


def is_worse(last: float | None, best: float | None, *, greater_is_better: bool) -> bool:
    """Whether the last evaluation lies further from the best than is tolerated; not, while there is none."""
    if last is None or best is None or not math.isfinite(best):
        return False
    loss = (best - last) if greater_is_better else (last - best)
    return not loss <= TOLERANCE * abs(best)  # so that NaN is worse than anything


def random_digest() -> str:
    """SHA-256 of the states of all random generators of this process."""
    digest = hashlib.sha256(repr(random.getstate()).encode())
    name, keys, *position = np.random.get_state()
    digest.update(repr((name, position)).encode() + np.asarray(keys).tobytes())
    states = [torch.random.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.random.get_rng_state_all()
    for state in states:
        digest.update(state.cpu().numpy().tobytes())
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of what wrote the checkpoint; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
