"""Causal attention of training passes: no mask where none is needed, faster passes on CPUs, packed documents.

``attach_attention`` makes it the attention of a loaded model. It takes the passes that training consists of and hands
every other one (a cache, a mask, one token at a time, dropout) to transformers' ``sdpa``:

============================  =========================================================================
rows padded on the right      no mask; on a CPU `CausalAttention`
documents packed in one row   ``torch.nn.attention.varlen`` on CUDA, document by document on a CPU
anything else                 ``sdpa``, with the mask that it would have had
============================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from llmtune.kernels.cpu_attention import (
    CausalAttention,
    backward_in_blocks,
    document_by_document,
    forward_in_blocks,
    takes,
)
from llmtune.kernels.documents import Documents

NAME = "llmtune"  # under which transformers knows it
# Model types that ask for a mask by documents, and do nothing to it but hand it on. Proven one by one in the tests.
PACKABLE_TYPES = frozenset({"gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "smollm3"})
_UNUSUAL = ("softcap", "position_bias", "cache", "s_aux")  # arguments of other kinds of attention


# ------------------------------------------------------------------ for a model


def mask_is_needed(config: Any) -> bool:
    """Whether rows that are padded on the right, and on the right alone, need their ``attention_mask``.

    A causal model reads no token behind the one it is at, so padding behind a row changes none of its numbers and
    takes no gradient from them. Without the mask ``sdpa`` may take its flash kernel, which has none, and CUDA does not
    wait for the question whether the mask masks anything. A sliding window changes nothing about it: it only takes
    tokens away. Experts are another matter: with ``output_router_logits`` the loss counts where tokens go, and the mask
    keeps padding out of the count.
    """
    text = config.get_text_config()
    causal = getattr(text, "is_causal", True) and not getattr(text, "use_bidirectional_attention", False)
    encoder = getattr(config, "is_encoder_decoder", False)
    return not causal or encoder or bool(getattr(text, "output_router_logits", False))


def attach_attention(model: Any) -> str | None:
    """Make this module's attention that of ``model``, a ``PreTrainedModel`` or a ``PeftModel``.

    Returns:
        Why it stays as it is, a sentence; None where it was changed. Attached twice is attached.
    """
    inner = _inner(model)
    config = inner.config.get_text_config()
    now = config._attn_implementation
    if now == NAME:
        return None
    if now != "sdpa":
        return f"the model's attention is {now}, and only sdpa is replaced"
    if mask_is_needed(inner.config):
        return "the model is not causal throughout, or needs its mask for more than attention"
    if not inner._can_set_attn_implementation():
        return f"{type(inner).__name__} computes attention by itself"
    if (dropout := getattr(config, "attention_dropout", 0.0) or 0.0) > 0.0:
        return f"the model drops {dropout:.0%} of its attention"
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    inner.set_attn_implementation(NAME)
    return None


def detach_attention(model: Any) -> None:
    """Give ``model`` back the ``sdpa`` attention it had."""
    inner = _inner(model)
    if inner.config.get_text_config()._attn_implementation == NAME:
        inner.set_attn_implementation("sdpa")


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ------------------------------------------------------------------ what transformers calls


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> torch.Tensor | Documents | None:
    """The mask of a pass, as ``transformers.masking_utils.sdpa_mask`` makes it, or what stands for it.

    transformers asks for a mask that must not be left out (``allow_is_causal_skip``), by a function of indices alone
    (not ``use_vmap``), without padding and as wide as it is high, when it has recognised packed documents by their
    ``position_ids``. Where a document begins is asked of that function: there, a token does not see the one before.
    """

    def build() -> torch.Tensor | None:
        mask: torch.Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **others,
        )
        return mask

    plain = attention_mask is None and "allow_is_bidirectional_skip" not in others and not use_vmap
    plain = plain and getattr(others.get("config"), "model_type", None) in PACKABLE_TYPES
    one_row = batch_size == 1 and q_length == kv_length > 1 and (local_size is None or local_size > 1)
    if allow_is_causal_skip or not plain or not one_row or torch.compiler.is_compiling():
        return build()
    index = torch.arange(kv_length, device=device)
    zero = torch.zeros_like(index[1:])
    documents = Documents(
        continues=mask_function(zero, zero, index[1:], index[:-1]),
        window=local_size,
        make_mask=lambda: _present(build()),
    )
    if index.device.type == "cpu" and local_size is not None and documents.longest() > local_size:
        return documents.mask()
    return documents


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Documents | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as ``AttentionInterface`` has it.

    Args:
        module: The layer's attention.
        query: float [batch, heads, seq, head_dim].
        key: float [batch, key heads, keys, head_dim].
        value: As ``key``.
        attention_mask: What `make_mask` made.
        dropout: Share of the weights that is dropped.
        scaling: Factor of the scores; None for ``head_dim ** -0.5``.
        is_causal: None for what ``module`` says.
        **others: The pass's further arguments.

    Returns:
        float [batch, seq, heads, head_dim], and no weights.
    """
    documents = attention_mask if isinstance(attention_mask, Documents) else None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = causal and dropout == 0.0 and all(others.get(name) is None for name in _UNUSUAL)
    whole = documents is not None or (attention_mask is None and query.shape[2] == key.shape[2] > 1)
    if plain and whole and (scaling is None or scaling > 0.0):
        states = _autocast(query, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if takes(*states):
            if documents is not None:
                return document_by_document(*states, scale, documents), None
            bounds = (0, query.shape[2])
            backward = _needs_gradient(*states) and backward_in_blocks(*states[:2], bounds)
            if backward or forward_in_blocks(states[0]):
                mixed: torch.Tensor = CausalAttention.apply(*states, scale, bounds)  # type: ignore[no-untyped-call]
                return mixed.transpose(1, 2).contiguous(), None
        elif documents is not None and _suits_varlen(*states):
            return _varlen(*states, scale, documents, others), None
    mask = documents.mask() if documents is not None else attention_mask
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return output


def _present(mask: torch.Tensor | None) -> torch.Tensor:
    assert mask is not None, "a mask that may not be left out was left out"
    return mask


def _autocast(*states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors in the precision that autocast gives attention, as it does for ``sdpa``."""
    kind = states[0].device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        states = tuple(state.to(dtype) for state in states)
    query, key, value = states
    return query, key, value


def _needs_gradient(*states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(state.requires_grad for state in states)


# ------------------------------------------------------------------ packed documents on CUDA


def _suits_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """What torch's variable-length kernel takes: 2-byte numbers, heads of a multiple of 8 up to 256, from Ampere on."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    width = query.shape[-1]
    alike = query.dtype == key.dtype == value.dtype and width == key.shape[-1] == value.shape[-1]
    return alike and width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    documents: Documents,
    others: dict[str, Any],
) -> torch.Tensor:
    """Every document by itself in one kernel: float [1, seq, heads, head_dim].

    Bounds that came with the batch, under the names that transformers has for FlashAttention, spare the host a wait for
    the device.
    """
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = others.get("cu_seq_lens_q"), others.get("max_length_q")
    if bounds is None or longest is None:
        bounds, longest = documents.cumulated(), documents.longest()
    window = (-1 if documents.window is None else documents.window - 1, 0)
    mixed = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_q=bounds,
        cu_seq_k=bounds,
        max_q=int(longest),
        max_k=int(longest),
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed, torch.Tensor)
    return mixed[None]
