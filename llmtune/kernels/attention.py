"""Causal attention of training passes: no mask where none is needed, a faster backward pass on CPUs, packed documents.

``attach_attention`` makes it the attention of a loaded model. It takes the passes that training consists of and hands
every other one (a cache, a mask, one token at a time, dropout) to transformers' ``sdpa``:

============================  =========================================================================
rows padded on the right      no mask; a CPU's backward pass is `CausalAttention`'s
documents packed in one row   ``torch.nn.attention.varlen`` on CUDA, document by document on a CPU
anything else                 ``sdpa``, with the mask that it would have had
============================  =========================================================================

Why the backward pass: torch's CPU kernel goes forward in 1.1 to 6 ms over 1,024 bf16 tokens of nine heads, and takes 16
to 29 ms back, however short the rows are (torch 2.13, one AMX core). Here the way back consists of batched matrix
products over blocks of queries. It saves what the kernel saves (queries, keys, values, output, one fp32 number per
token and head), so a plan's memory per layer is the same. Beside it stand, in one layer at a time, with ``b`` bytes per
number and ``H`` heads over ``K`` key heads of ``D`` numbers: ``b ((2H + 2K)(D + 2) + (H + 2K) D)`` bytes per token and
two buffers of at most ``b max(2 ** 20, 128 H / K seq)`` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from llmtune.kernels.documents import Documents

NAME = "llmtune"  # under which transformers knows it
# Model types that ask for a mask by documents, and do nothing to it but hand it on. Proven one by one in the tests.
PACKABLE_TYPES = frozenset({"llama", "mistral", "phi", "phi3", "qwen2", "qwen3"})
# Queries of a block, and scores of a product: a block's causal half is not computed, and its scores stay in a second
# level cache. Of 64, 128, 256 and of 2 ** 18 to 2 ** 24 the fastest for rows of 32 to 1,024 tokens, nine heads over
# three and fourteen over two, bf16 on an AMX core.
_BLOCK = 128
_SCORES = 2**20
# Longest document that blocks of products are faster for where heads share keys, and twice of what it is where none do:
# 1.12 to 1.28 times at 1,024 tokens against 0.87 times (32 heads of 80, alone), 1.18 at 512.
_LONGEST = 1024
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
        if _suits_cpu(*states):
            if documents is not None:
                return _one_by_one(*states, scale, documents), None
            bounds = (0, query.shape[2])
            if _needs_gradient(*states) and _in_blocks(*states[:2], bounds):
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


def _suits_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == key.shape[-1] == value.shape[-1]
    known = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float32) and query.numel() > 0
    dense = all(state.stride(-1) == 1 for state in (query, key, value))
    return alike and known and dense and query.shape[1] % key.shape[1] == 0


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


# ------------------------------------------------------------------ a CPU's


@torch.compiler.disable  # type: ignore[untyped-decorator]  # every row has bounds of its own: compiled anew for each
def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, documents: Documents
) -> torch.Tensor:
    """Every document by itself: float [1, seq, heads, head_dim]."""
    mixed: torch.Tensor = CausalAttention.apply(query, key, value, scale, documents.bounds())  # type: ignore[no-untyped-call]
    return mixed.transpose(1, 2).contiguous()


class CausalAttention(torch.autograd.Function):
    """Attention of each document to itself, causally: torch's flash kernel forward, blocks of products backward.

    Takes ``query`` float [batch, heads, seq, head_dim], ``key`` and ``value`` float [batch, key heads, seq, head_dim],
    the factor of the scores, and the bounds of the documents (`Documents.bounds`), the same for every row. Where
    `_in_blocks` says no, torch's kernel goes backward too, document by document.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bounds: tuple[int, ...]
    ) -> torch.Tensor:
        """The weighted values: float [batch, heads, seq, head_dim]."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if len(bounds) == 2:
            output, logs = flash(query, key, value, 0.0, True, scale=scale)
        else:
            output, logs = _empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
            for start, end in pairwise(bounds):
                part = [state[:, :, start:end] for state in (query, key, value)]
                output[:, :, start:end], logs[:, :, start:end] = flash(*part, 0.0, True, scale=scale)
        ctx.save_for_backward(query, key, value, output, logs)
        ctx.scale, ctx.bounds = scale, bounds
        mixed: torch.Tensor = output
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the three tensors."""
        query, key, value, output, logs = ctx.saved_tensors
        if _in_blocks(query, key, ctx.bounds):
            return *_blocks_backward(gradient, query, key, value, output, logs, ctx.scale, ctx.bounds), None, None
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = _empty_like(query), _empty_like(key), _empty_like(value)
        for start, end in pairwise(ctx.bounds):
            part = [state[:, :, start:end] for state in (gradient, query, key, value, output, logs)]
            for whole, piece in zip(gradients, flash(*part, 0.0, True, scale=ctx.scale), strict=True):
                whole[:, :, start:end] = piece
        return *gradients, None, None


def _in_blocks(query: torch.Tensor, key: torch.Tensor, bounds: tuple[int, ...]) -> bool:
    """Whether blocks of products go backward faster than torch's kernel: in bf16, up to a length; never in fp32."""
    most = _LONGEST if query.shape[1] > key.shape[1] else _LONGEST // 2
    return query.dtype == torch.bfloat16 and _longest(bounds) <= most


def _longest(bounds: tuple[int, ...]) -> int:
    return max(end - start for start, end in pairwise(bounds))


def _empty_like(states: torch.Tensor) -> torch.Tensor:
    """float [batch, heads, seq, head_dim], in memory as [batch, seq, heads, head_dim], as layers have it."""
    rows, heads, tokens, width = states.shape
    return states.new_empty((rows, tokens, heads, width)).transpose(1, 2)


def _blocks_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logs: torch.Tensor,
    scale: float,
    bounds: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values, bf16.

    With probabilities ``p = exp(scale q k - l)``, where ``l`` (``logs``) is the logarithm of each query's sum, and
    ``d = sum(gradient x output)`` per query (FlashAttention-2, arXiv:2307.08691)::

        dv = p' g        ds = p (g v' - d)        dq = scale ds k        dk = scale ds' q

    ``l`` and ``d`` are subtracted inside the matrix products, as further columns against columns of ones: sums are kept
    in fp32 there, so what is rounded to bf16 is near zero wherever ``p`` is near one.
    """
    rows, heads, tokens, width = query.shape
    grouped = (rows, key.shape[1], heads // key.shape[1], tokens)
    # A power of two scales keys without rounding them; what is left of the factor is applied to scores.
    power = 2.0 ** round(math.log2(scale))
    rest = scale / power
    dots = (gradient.transpose(1, 2) * output.transpose(1, 2)).sum(-1, dtype=torch.float32).transpose(1, 2)
    queries = _widened(query.view(*grouped, width), (logs / -rest).view(grouped))
    gradients = _widened(gradient.view(*grouped, width), (-dots).view(grouped))
    keys, values = _with_ones(key * power, queries.shape[-1]), _with_ones(value, queries.shape[-1])
    dq, dk, dv = _empty_like(query), _empty_like(key), _empty_like(value)
    longest = _longest(bounds)
    of_head = grouped[2] * min(_BLOCK, longest) * longest  # scores of a key head in a row
    many_rows, many_heads = max(1, _SCORES // (of_head * key.shape[1])), max(1, _SCORES // of_head)
    for first_row, first_head in product(range(0, rows, many_rows), range(0, key.shape[1], many_heads)):
        some = slice(first_row, first_row + many_rows), slice(first_head, first_head + many_heads)
        for start, end in pairwise(bounds):
            part = slice(start, end)
            a, b = queries[*some, :, part], gradients[*some, :, part]
            to = dq.view(*grouped, width)[*some, :, part], dk[*some, part], dv[*some, part]
            _document_backward(a, b, keys[*some, part], values[*some, part], rest, scale, to)
    return dq, dk, dv


def _widened(states: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """``states`` bf16 [..., head_dim] with ``column`` fp32 [...] behind it: rounded, and what that left of it."""
    width = states.shape[-1]
    wide = states.new_empty((*states.shape[:-1], width + 2))
    wide[..., :width] = states
    wide[..., width] = column
    wide[..., width + 1] = column - wide[..., width]
    return wide


def _with_ones(states: torch.Tensor, width: int) -> torch.Tensor:
    wide = states.new_ones((*states.shape[:-1], width))
    wide[..., : states.shape[-1]] = states
    return wide


def _document_backward(
    queries: torch.Tensor,
    gradients: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rest: float,
    scale: float,
    to: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Gradients of one document in some rows, written to ``to``.

    Args:
        queries: float [rows, key heads, group, seq, head_dim and columns].
        gradients: As ``queries``, of the output.
        keys: float [rows, key heads, seq, head_dim and columns], times the power of two in ``scale``.
        values: As ``keys``, but not scaled.
        rest: ``scale`` over that power.
        scale: Factor of the scores.
        to: Of queries [rows, key heads, group, seq, head_dim]; of keys and values [rows, key heads, seq, head_dim].
    """
    rows, heads, group, tokens, wide = queries.shape
    dq, dk, dv = to
    width, batch = dk.shape[-1], rows * heads
    keys, values = keys.reshape(batch, tokens, wide), values.reshape(batch, tokens, wide)
    blocks = -(-tokens // _BLOCK)
    size = -(-tokens // blocks)
    # Sums over blocks are kept in fp32.
    sums = [keys.new_zeros((batch, tokens, width), dtype=torch.float32) for _ in range(2)] if blocks > 1 else []
    for start in range(0, tokens, size):
        end = min(tokens, start + size)
        q = queries[:, :, :, start:end].reshape(batch, -1, wide)
        g = gradients[:, :, :, start:end].reshape(batch, -1, wide)
        p = torch.bmm(q, keys[:, :end].transpose(1, 2))
        if rest != 1.0:
            p.mul_(rest)
        p.exp_().view(batch * group, end - start, end)[:, :, start:].tril_()
        of_values = torch.bmm(p.transpose(1, 2), g[..., :width])
        ds = torch.bmm(g, values[:, :end].transpose(1, 2)).mul_(p)
        of_keys = torch.bmm(ds.transpose(1, 2), q[..., :width])
        of_queries = torch.bmm(ds, keys[:, :end, :width])
        dq[:, :, :, start:end] = (of_queries if rest == 1.0 else of_queries.mul_(rest)).view(
            rows, heads, group, -1, width
        )
        if blocks > 1:
            sums[0][:, :end] += of_keys
            sums[1][:, :end] += of_values
        else:
            sums = [of_keys, of_values]
    dk.copy_(sums[0].mul_(scale).view(rows, heads, tokens, width))
    dv.copy_(sums[1].view(rows, heads, tokens, width))
