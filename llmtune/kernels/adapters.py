"""LoRA in the precision of the base: ``y = x Wᵀ + bias + scale · B A dropout(x)`` as one step of autograd.

PEFT casts the input of every adapted layer to fp32, where the masters of A and B are, computes the adapter there and
keeps the cast for the backward pass: ``16h + 4q + 2f + 14r`` bytes more per token and layer than are needed, and on a
CPU products at a sixth of the rate. Here the products are in the dtype of x, with copies of A and B (`MasterCopy`), and
what is kept is x itself, which neighbouring layers share, ``A dropout(x)`` [rows, rank], and one byte per value of x
where dropout is on. Gradients of A and B are fp32: sums over rows are accumulated in fp32 and, on a CPU in bf16,
rounded once to bf16 before they are widened (relative error 2⁻⁹ of each value; no product there writes fp32).

`attach_adapters` puts this into the layers of a ``PeftModel``; whatever it does not cover goes PEFT's own way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from llmtune.kernels.masters import MasterCopy

# On a CPU in bf16, fewer rows are left to PEFT: a product there costs 20 µs before it begins, one in fp32 hardly any.
# Measured on an AMX core, forward and backward, rank 16: ours is 0.65 to 0.95 times as fast at 32 rows, 0.85 to 1.25 at
# 128, 1.1 to 1.6 at 256 (576 to 576, 576 to 1,536, 896 to 128, 896 to 4,864).
FEWEST_ROWS = 128
_STATE = "_adapter_copies"  # attribute of an attached layer
_RESOLUTION = 2**16  # of a dropout's probability on a CPU: random numbers of 16 bits are compared with it
_WITH_VALUES = (torch.Tensor, nn.Parameter)  # others stand for tensors: fake ones, those spread over processes


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterArithmetic:
    """What `attach_adapters` has done.

    Attributes:
        num_attached: Layers that compute their adapter in the base's precision.
        num_left: Layers left to PEFT.
        reasons: Why, one sentence each.
    """

    num_attached: int
    num_left: int
    reasons: tuple[str, ...]


class _Adapter(NamedTuple):
    """One adapter of one layer, ready to be multiplied with."""

    master_a: torch.Tensor
    master_b: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    mask: torch.Tensor | None
    scale: float


# ---------------------------------------------------------------------------------------------------------- dropout


def kept_share(p: float, x: torch.Tensor) -> float:
    """The share of the values of ``x`` that dropout with probability ``p`` keeps: on a CPU in steps of 1/65,536."""
    return round((1 - p) * _RESOLUTION) / _RESOLUTION if _draws_words(x) else 1 - p


def draw_mask(x: torch.Tensor, kept: float) -> torch.Tensor:
    """Which values of ``x`` dropout keeps: bool in its shape, drawn from torch's global random state.

    On a CPU torch draws 4.7 ns per value, in one thread: five times what the product of a 576 × 576 layer takes
    (measured on an AMX core). There it draws a seed, and numpy's SFC64 fills in the values at 0.4 ns each.
    """
    if not _draws_words(x):
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(kept)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-x.numel() // 4), dtype=np.uint64)
    drawn = words.view(np.uint16)[: x.numel()]
    return torch.from_numpy(drawn < round(kept * _RESOLUTION)).view(x.shape)


def _draws_words(x: torch.Tensor) -> bool:
    """Whether ``x`` has values, on a CPU, now: a graph that is traced cannot leave torch."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in _WITH_VALUES


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``x`` where ``mask`` is set, else zero; not scaled."""
    if mask is None:
        return x
    if x.device.type != "cpu" or x.element_size() != 2:
        return x * mask
    # A product of bf16 with bool takes five times as long on a CPU as one of whole numbers with the same bits.
    kept = mask.view(torch.int8).to(torch.int16)
    return kept.mul_(x.view(torch.int16)).view(x.dtype)


# ---------------------------------------------------------------------------------------------------------- products


def _add_adapter(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Add the adapter's output to ``y`` [rows, out]; returns ``A dropout(x)`` [rows, rank], not scaled."""
    low = _masked(x, mask) @ a.t()
    if y.dtype == low.dtype:
        torch.addmm(y, low, b.t(), alpha=scale, out=y)
    else:
        y.add_(low @ b.t(), alpha=scale)
    return low


def _wide(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale · left right`` in fp32: written as such on CUDA, widened from the inputs' dtype elsewhere."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32).mul_(scale)
    product = torch.mm(left, right).float()
    return product if scale == 1 else product.mul_(scale)


def _gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x through the adapter alone, and of A and B in fp32; None for those not ``wanted``."""
    dx = da = db = None
    if wanted[2]:
        # Transposed, it reads dy in the order it is written in.
        db = _wide(low.t(), dy, scale).t().contiguous()
    if wanted[0] or wanted[1]:
        dlow = dy @ b
        if wanted[1]:
            da = _wide(dlow.t(), _masked(x, mask), scale)
        if wanted[0]:
            dx = torch.empty_like(x)
            torch.addmm(dx, dlow, a, beta=0, alpha=scale, out=dx)
            dx = _masked(dx, mask)
    return dx, da, db


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer and its adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        master_a: torch.Tensor,
        master_b: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        flat = _rows(x)
        y = nn.functional.linear(flat, weight, bias)
        low = _add_adapter(y, flat, a, b, None if mask is None else _rows(mask), scale)
        ctx.save_for_backward(x, low, weight, a, b, mask)
        ctx.scale = scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, weight, a, b, mask = ctx.saved_tensors
        flat, dy = _rows(x), _rows(dy)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        dx, da, db = _gradients(dy, flat, low, a, b, None if mask is None else _rows(mask), ctx.scale, wanted)
        if dx is not None:
            # Adding to what is there costs a large product nothing.
            dx = torch.addmm(dx, dy, weight, out=dx).view(x.shape)
        return dx, None, None, da, db, None, None, None, None


class _AdapterAlone(torch.autograd.Function):
    """The adapter's output added, in place, to that of a base layer that computes its own."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        master_a: torch.Tensor,
        master_b: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        flat = _rows(x).to(a.dtype)
        low = _add_adapter(y.view(-1, y.shape[-1]), flat, a, b, None if mask is None else _rows(mask), scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, low, a, b, mask)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b, mask = ctx.saved_tensors
        mask = None if mask is None else _rows(mask)
        dx, da, db = _gradients(
            _rows(dy).to(a.dtype), _rows(x).to(a.dtype), low, a, b, mask, ctx.scale, ctx.needs_input_grad[1:4]
        )
        if dx is not None:
            dx = dx.to(x.dtype).view(x.shape)
        return dy, dx, da, db, None, None, None, None


# ---------------------------------------------------------------------------------------------------------- layers


def attach_adapters(model: nn.Module) -> AdapterArithmetic:
    """Let the LoRA layers of ``model`` compute in the precision of their base from now on.

    Replaces ``forward`` on the instances alone: parameters, their names, merging, switching and saving stay PEFT's.
    A call that is not one plain adapter on a frozen base of the input's dtype goes to PEFT's forward: adapters
    disabled or merged, several or none active, ``adapter_names``, autocast to another dtype, hooks inside the layer, a
    base that is trained, masters that are not fp32, an input cast that was switched off, few rows (`FEWEST_ROWS`).
    Not for a model whose parameters are spread over processes (FSDP, DeepSpeed).
    Attaching twice is the same as once.
    """
    from peft.tuners.lora.layer import LoraLayer

    attached = 0
    left: Counter[str] = Counter()
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        reason = _why_not(module)
        if reason is not None:
            left[reason] += 1
            continue
        attached += 1
        if _STATE not in vars(module):
            setattr(module, _STATE, {})
            module.forward = partial(_forward, module)
    reasons = tuple(f"{number} {'layer' if number == 1 else 'layers'}: {why}" for why, number in sorted(left.items()))
    return AdapterArithmetic(num_attached=attached, num_left=left.total(), reasons=reasons)


def detach_adapters(model: nn.Module) -> int:
    """Give the layers PEFT's own ``forward`` back and drop all copies; returns how many there were."""
    found = [module for module in model.modules() if _STATE in vars(module)]
    for module in found:
        del module.forward
        delattr(module, _STATE)
    return len(found)


def _why_not(layer: Any) -> str | None:
    """Why a layer is left to PEFT for good, whatever it is called with."""
    from peft.tuners.lora.layer import Linear

    if _STATE in vars(layer):
        return None
    if "forward" in vars(layer):
        return "its forward was already replaced by another library"
    base = layer.base_layer
    if type(layer) is Linear:
        if type(base) is not nn.Linear:
            return f"an adapter on {type(base).__name__} is computed by PEFT"
    elif type(layer).__module__ != "peft.tuners.lora.bnb":
        return f"an adapter of kind {type(layer).__name__} is computed by PEFT"
    if not layer.lora_A:
        return "it has no adapter"
    for name, a in layer.lora_A.items():
        if name in layer.lora_variant:
            return f"a variant of LoRA ({type(layer.lora_variant[name]).__name__}) is computed by PEFT"
        if layer.lora_bias[name]:
            return "an adapter with a bias is computed by PEFT"
        if a.weight.dtype != torch.float32 or layer.lora_B[name].weight.dtype != torch.float32:
            return "its weights are not fp32, so there is nothing to cast"
        if type(a.weight) is not nn.Parameter:
            return f"its weights are {type(a.weight).__name__}, spread over processes"
    return None


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``forward`` of an attached layer."""
    adapter = None if args or kwargs or _too_few(x) else _adapter(layer, x)
    if adapter is None:
        output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return output
    base = layer.base_layer
    if type(base) is nn.Linear:
        output = _AdaptedLinear.apply(x, base.weight, base.bias, *adapter)  # type: ignore[no-untyped-call]
        return output
    y = base(x)
    if y._is_view() or not y.is_contiguous():
        y = y.clone()  # autograd cannot write into a view that a function of its own has returned
    output = _AdapterAlone.apply(y, x, *adapter)  # type: ignore[no-untyped-call]
    return output


def _too_few(x: torch.Tensor) -> bool:
    """Whether ``x`` has so few rows that PEFT is faster; a graph that is traced should not depend on their number."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.numel() < FEWEST_ROWS * x.shape[-1]
    )


def _adapter(layer: Any, x: torch.Tensor) -> _Adapter | None:
    """The one adapter that is active, cast and with a mask drawn; None where PEFT has to do it."""
    name = _active(layer)
    if name is None:
        return None
    linear_a, linear_b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    dtype = _product_dtype(layer.base_layer, x)
    if (
        dtype is None
        or not _autocast_agrees(x.device.type, dtype)
        or _hooked(layer.base_layer, linear_a, linear_b, dropout)
    ):
        return None
    master_a, master_b = linear_a.weight, linear_b.weight
    if not (master_a.dtype == master_b.dtype == torch.float32 and linear_b.bias is None):
        return None
    if not (x.device == master_a.device == master_b.device):
        return None
    scale, mask = float(layer.scaling[name]), None
    if type(dropout) is nn.Dropout:
        if dropout.training and dropout.p > 0:
            kept = kept_share(dropout.p, x)
            if kept == 0:
                return None
            scale, mask = scale / kept, draw_mask(x, kept)
    elif type(dropout) is not nn.Identity:
        return None
    copies = getattr(layer, _STATE)
    if name not in copies:
        copies[name] = (MasterCopy(), MasterCopy())
    copy_a, copy_b = copies[name]
    return _Adapter(master_a, master_b, copy_a.of(master_a, dtype), copy_b.of(master_b, dtype), mask, scale)


def _active(layer: Any) -> str | None:
    """The name of the one plain adapter that is active."""
    if layer.disable_adapters or layer.merged or not layer.cast_input_dtype_enabled:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 and names[0] not in layer.lora_variant else None


def _product_dtype(base: Any, x: torch.Tensor) -> torch.dtype | None:
    """What the adapter is computed in; None where it is not known to be exact and fast."""
    weight, bias = base.weight, base.bias
    dtype = x.dtype
    if type(base) is nn.Linear:
        if weight.dtype != dtype or weight.requires_grad or type(weight) is not nn.Parameter:
            return None
    elif getattr(base, "compute_dtype", None) is not None:
        dtype = base.compute_dtype  # x may be fp32, as norms give it
    if bias is not None and bias.requires_grad:
        return None
    half = (torch.bfloat16, torch.float16) if x.is_cuda else (torch.bfloat16,)
    return dtype if dtype == torch.float32 or dtype in half else None


def _autocast_agrees(device_type: str, dtype: torch.dtype) -> bool:
    """Whether autocast, if it is on, would compute products in ``dtype`` too: then it has nothing to cast."""
    return not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) == dtype


def _hooked(*modules: nn.Module) -> bool:
    """Whether somebody listens to a module that would not be called."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )
