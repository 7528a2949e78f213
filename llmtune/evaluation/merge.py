"""Whether an adapter can be merged into its base, found out on copies of single modules."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from llmtune.errors import ModelError
from llmtune.kernels.adapters import detach_adapters

# How far a merged module may be from the unmerged one, relative to the size of its output: some roundings of the base's
# type; where the base is quantised anew, NF4's own error (0.09 for builtin:tiny, 0.33 for a random model 32 wide). A
# merge that did nothing is off by about 0.7, because the adapter of the copy is made as strong as its base.
ROUNDINGS, EXACT, QUANTISED = 8, 1e-4, 0.5
_ROWS = 8


def check_merge(model: Any) -> tuple[str, ...]:
    """Merge a copy of one adapted module of each name, with an adapter that is not zero, and compare what they compute.

    The model itself is left as it is, to the bit.

    Returns:
        A sentence for each kind of module that cannot be merged in the form its base has.

    Raises:
        ModelError: A merge fails, or computes something else.
    """
    notices, problems = [], []
    for name, module in _one_per_name(model).items():
        try:
            difference, tolerance = _merged_difference(module)
        except NotImplementedError as error:
            notices.append(f"{name} cannot be merged as it is ({error}): merge into unquantised weights instead")
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            if "out of memory" in str(error).lower():
                raise
            problems.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if not difference <= tolerance:
                problems.append(f"{name} computes something else once merged: {difference:.2g} of its output")
    if problems:
        raise ModelError(
            f"the adapter cannot be merged into its base: {'; '.join(problems)}. Nothing was trained; the merge after "
            "training would have failed. Choose other modules with --set adapter.targets=…, or go without this check "
            "with --set train.probe=false and use the adapter unmerged"
        )
    return tuple(notices)


def _one_per_name(model: Any) -> dict[str, Any]:
    """The last adapted module of each name, such as ``q_proj``."""
    from peft.tuners.lora import LoraLayer

    return {path.rpartition(".")[2]: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}


@torch.no_grad()
def _merged_difference(module: Any) -> tuple[float, float]:
    """How far a merged copy of ``module`` is from an unmerged one, relative to its output, and how far it may be."""
    draws = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).eval()
    detach_adapters(twin)  # what is merged is PEFT's; and a copy that holds its own forward would outlive this check
    base = twin.get_base_layer()
    inputs = _inputs(base, twin.in_features, draws)
    alone = base(inputs).float()
    ups = [weight for name, weight in twin.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    for weight in ups:
        weight.copy_(torch.randn(weight.shape, generator=draws))
    added = (twin(inputs).float() - alone).norm()
    for weight in ups:
        weight.mul_(alone.norm() / added.clamp_min(1e-30))
    unmerged = twin(inputs).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merging into quantised weights rounds them is what is measured here
        twin.merge(safe_merge=True)
    if not twin.merged:
        raise NotImplementedError("peft merges nothing")
    difference = float((twin(inputs).float() - unmerged).norm() / unmerged.norm().clamp_min(1e-30))
    return difference, _tolerance(base)


def _inputs(base: Any, width: int, draws: torch.Generator) -> torch.Tensor:
    device = base.weight.device
    if isinstance(base, torch.nn.Embedding):
        return torch.randint(base.num_embeddings, (1, _ROWS), generator=draws).to(device)
    dtype = base.weight.dtype if base.weight.dtype.is_floating_point else getattr(base, "compute_dtype", None)
    return torch.randn(1, _ROWS, width, generator=draws).to(device, dtype or torch.float16)


def _tolerance(base: Any) -> float:
    dtype = base.weight.dtype
    return max(ROUNDINGS * torch.finfo(dtype).eps, EXACT) if dtype.is_floating_point else QUANTISED
