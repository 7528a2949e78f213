"""Causal attention on a CPU: torch's kernel forward, blocks of matrix products backward.

Why the backward pass: torch's CPU kernel goes forward in 1.1 to 6 ms over 1,024 bf16 tokens of nine heads, and takes 16
to 29 ms back, however short the rows are (torch 2.13, one AMX core). Here the way back consists of batched matrix
products over blocks of queries. It saves what the kernel saves (queries, keys, values, output, one fp32 number per
token and head), so a plan's memory per layer is the same. Beside it stand, in one layer at a time, with ``b`` bytes per
number and ``H`` heads over ``K`` key heads of ``D`` numbers: ``b ((2H + 2K)(D + 2) + (H + 2K) D)`` bytes per token and
two buffers of at most ``b max(2 ** 20, 128 H / K seq)`` bytes.
"""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llmtune.kernels.documents import Documents

# Queries of a block, and scores of a product: a block's causal half is not computed, and its scores stay in a second
# level cache. Of 64, 128, 256 and of 2 ** 18 to 2 ** 24 the fastest for rows of 32 to 1,024 tokens, nine heads over
# three and fourteen over two, bf16 on an AMX core.
_BLOCK = 128
_SCORES = 2**20
# Longest document that blocks of products are faster for where heads share keys, and twice of what it is where none do:
# 1.12 to 1.28 times at 1,024 tokens against 0.87 times (32 heads of 80, alone), 1.18 at 512.
_LONGEST = 1024


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the functions here compute these: bf16 or fp32 on a CPU, heads of one width."""
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == key.shape[-1] == value.shape[-1]
    known = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float32) and query.numel() > 0
    dense = all(state.stride(-1) == 1 for state in (query, key, value))
    return alike and known and dense and query.shape[1] % key.shape[1] == 0


@torch.compiler.disable  # type: ignore[untyped-decorator]  # every row has bounds of its own: compiled anew for each
def document_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, documents: Documents
) -> torch.Tensor:
    """Every document by itself: float [1, seq, heads, head_dim]."""
    mixed: torch.Tensor = CausalAttention.apply(query, key, value, scale, documents.bounds())  # type: ignore[no-untyped-call]
    return mixed.transpose(1, 2).contiguous()


class CausalAttention(torch.autograd.Function):
    """Attention of each document to itself, causally: torch's flash kernel forward, blocks of products backward.

    Takes ``query`` float [batch, heads, seq, head_dim], ``key`` and ``value`` float [batch, key heads, seq, head_dim],
    the factor of the scores, and the bounds of the documents (`Documents.bounds`), the same for every row. Where
    `goes_in_blocks` says no, torch's kernel goes backward too, document by document.
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
        if goes_in_blocks(query, key, ctx.bounds):
            return *_blocks_backward(gradient, query, key, value, output, logs, ctx.scale, ctx.bounds), None, None
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = _empty_like(query), _empty_like(key), _empty_like(value)
        for start, end in pairwise(ctx.bounds):
            part = [state[:, :, start:end] for state in (gradient, query, key, value, output, logs)]
            for whole, piece in zip(gradients, flash(*part, 0.0, True, scale=ctx.scale), strict=True):
                whole[:, :, start:end] = piece
        return *gradients, None, None


def goes_in_blocks(query: torch.Tensor, key: torch.Tensor, bounds: tuple[int, ...]) -> bool:
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
