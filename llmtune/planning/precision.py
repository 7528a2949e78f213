"""Which numbers a run computes with, and by which kernels."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.hardware import Accelerator
from llmtune.planning.choice import Choice
from llmtune.planning.request import PlanRequest

# Architectures of transformers 5.23 that refuse torch's scaled_dot_product_attention (``_supports_sdpa = False``).
WITHOUT_SDPA = frozenset(
    {
        "deepseek_v4",
        "gemma2",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "hy_v4",
        "mimo_v2_flash",
        "vaultgemma",
    }
)
# Model types made in bf16 whose activations leave the range of fp16, above 65,504 (Gemma 3: Unsloth, training fixes of
# March 2025; Gemma 2: ml-explore/mlx-examples, "fix precision issues", NaN).
BEYOND_FP16 = frozenset({"gemma2", "gemma3_text"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionChoices:
    """Arithmetic of the base model."""

    quantization: Choice[str | None]
    precision: Choice[str]
    attention: Choice[str]


def choose_precision(request: PlanRequest, method: str) -> PrecisionChoices:
    """By what the device computes in hardware, and by method and architecture."""
    return PrecisionChoices(
        quantization=_quantization(request, method), precision=_precision(request), attention=_attention(request)
    )


def accelerator_of(request: PlanRequest) -> Accelerator | None:
    """The accelerator that trains; None on a CPU."""
    return next((a for a in request.hardware.accelerators if a.index == request.device.index), None)


def _precision(request: PlanRequest) -> Choice[str]:
    asked = request.config.train.precision
    if asked is not None:
        return Choice(asked, "you set train.precision", "user")
    device = accelerator_of(request)
    if device is None:
        cpu = request.hardware.cpu
        if cpu.amx or cpu.avx512_bf16:
            unit = "AMX" if cpu.amx else "AVX512-BF16"
            return Choice("bf16", f"this CPU multiplies bf16 matrices in hardware ({unit})", "derived")
        changes = "bf16 on a CPU with AMX or AVX512-BF16; --set train.precision=bf16 halves the weights, and is slow"
        return Choice("fp32", "this CPU has no bf16 matrix unit", "derived", changes)
    if device.bf16:
        return Choice("bf16", f"{device.name} computes in bf16, which needs no loss scaling", "derived")
    if device.fp16 and request.spec.model_type in BEYOND_FP16:
        reason = f"{device.name} has no bf16, and activations of '{request.spec.model_type}' leave the range of fp16"
        return Choice("fp32", reason, "derived", "bf16 on an NVIDIA GPU from Ampere on (compute capability 8.0)")
    if device.fp16:
        changes = "bf16 on an NVIDIA GPU from Ampere on (compute capability 8.0)" if device.kind == "cuda" else ""
        reason = f"{device.name} has fp16 but no bf16; the loss is scaled dynamically"
        return Choice("fp16", reason, "derived", changes)
    return Choice("fp32", f"{device.name} has neither bf16 nor fp16 matrix units", "derived")


def _quantization(request: PlanRequest, method: str) -> Choice[str | None]:
    if method != "qlora":
        return Choice(None, f"{method} keeps the base weights as they are", "derived", "nf4 with --method qlora")
    reason = "4-bit NormalFloat, scales quantised too (arXiv:2305.14314)"
    return request.setting("adapter.quantization", reason)


def _attention(request: PlanRequest) -> Choice[str]:
    if request.spec.model_type in WITHOUT_SDPA:
        reason = f"transformers has no other attention for '{request.spec.model_type}' that needs no further package"
        return Choice("eager", reason, "derived")
    return Choice("sdpa", "exact, and picks the fastest kernel for this device by itself", "default")
