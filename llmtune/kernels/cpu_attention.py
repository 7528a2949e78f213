"""Causal attention on a CPU: blocks of matrix products where these are faster than torch's kernel.

Torch's kernel goes forward in 1.1 to 6 ms over 1,024 bf16 tokens of nine heads, and takes 16 to 29 ms back, however
short the rows are (torch 2.13, one AMX core). Here the way back consists of batched matrix products over blocks of
queries. Without AMX the kernel is slow forward too, and rows of all lengths go both ways in blocks.

What is saved is what the kernel saves (queries, keys, values, output, one fp32 number per token and head), so a plan's
memory per layer is the same. Beside it stand, in one layer at a time, with ``b`` bytes per number and ``H`` heads over
``K`` key heads of ``D`` numbers: on the way back ``b ((2H + 2K)(D + 2) + (H + 2K) D)`` bytes per token and two buffers
of at most ``b max(2 ** 20, 128 H / K seq)`` bytes, on the way forward ``b K (D + 2)`` and one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
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
# 1.12 to 1.28 times at 1,024 tokens against 0.87 times (32 heads of 80, alone), 1.18 at 512. With AVX512-BF16 alone all
# lengths are: 1.4 to 2.2 times at 2,048, 1.1 to 1.9 times at 8,192 (five shapes of heads, two cores).
_LONGEST = 1024
# Shortest document, and fewest queries of all its rows and heads, that they are faster for forward with AVX512-BF16
# alone: 1.2 to 1.7 times with 64 tokens in 16 rows, 1.4 to 2.3 with 512 in two, 1.0 to 1.8 with 4,096 in one; but 0.6
# times with 64 in one row of nine heads.
_SHORTEST, _FEWEST = 64, 2048


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
    """Attention of each document to itself, causally.

    Takes ``query`` float [batch, heads, seq, head_dim], ``key`` and ``value`` float [batch, key heads, seq, head_dim],
    the factor of the scores, and the bounds of the documents (`Documents.bounds`), the same for every row. Where
    `forward_in_blocks` says no, torch's flash kernel goes forward; where `backward_in_blocks` does, it goes backward.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bounds: tuple[int, ...]
    ) -> torch.Tensor:
        """The weighted values: float [batch, heads, seq, head_dim]."""
        if len(bounds) == 2:
            output, logs = _forward(query, key, value, scale)
        else:
            output, logs = _empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
            for start, end in pairwise(bounds):
                q, k, v = (state[:, :, start:end] for state in (query, key, value))
                output[:, :, start:end], logs[:, :, start:end] = _forward(q, k, v, scale)
        ctx.save_for_backward(query, key, value, output, logs)
        ctx.scale, ctx.bounds = scale, bounds
        mixed: torch.Tensor = output
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the three tensors."""
        query, key, value, output, logs = ctx.saved_tensors
        if backward_in_blocks(query, key, ctx.bounds):
            return *_blocks_backward(gradient, query, key, value, output, logs, ctx.scale, ctx.bounds), None, None
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = _empty_like(query), _empty_like(key), _empty_like(value)
        for start, end in pairwise(ctx.bounds):
            part = [state[:, :, start:end] for state in (gradient, query, key, value, output, logs)]
            for whole, piece in zip(gradients, flash(*part, 0.0, True, scale=ctx.scale), strict=True):
                whole[:, :, start:end] = piece
        return *gradients, None, None


def backward_in_blocks(query: torch.Tensor, key: torch.Tensor, bounds: tuple[int, ...]) -> bool:
    """Whether blocks of products go backward faster than torch's kernel: in bf16, with AMX up to a length."""
    most = _LONGEST if query.shape[1] > key.shape[1] else _LONGEST // 2
    return query.dtype == torch.bfloat16 and (_vector_bf16() or _longest(bounds) <= most)


def forward_in_blocks(query: torch.Tensor) -> bool:
    """Whether they go forward faster with a document's ``query``: in bf16 without AMX, if it is not short."""
    rows, heads, tokens, _ = query.shape
    enough = tokens >= _SHORTEST and rows * heads * tokens >= _FEWEST
    return query.dtype == torch.bfloat16 and enough and _vector_bf16()


@cache
def _vector_bf16() -> bool:
    """Whether this CPU multiplies bf16 in vector registers (AVX512-BF16), and not with AMX."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16")) and not has.get("amx_bf16")


def _longest(bounds: tuple[int, ...]) -> int:
    return max(end - start for start, end in pairwise(bounds))


def _empty_like(states: torch.Tensor) -> torch.Tensor:
    """float [batch, heads, seq, head_dim], in memory as [batch, seq, heads, head_dim], as layers have it."""
    rows, heads, tokens, width = states.shape
    return states.new_empty((rows, tokens, heads, width)).transpose(1, 2)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted values of a document, and the logarithm of each query's sum: fp32 [batch, heads, seq]."""
    if forward_in_blocks(query):
        return _blocks_forward(query, key, value, scale)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logs = flash(query, key, value, 0.0, True, scale=scale)
    return output, logs


def _blocks_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_forward`, bf16.

    Scores come twice out of a product. The first time they are rounded, which is good enough for the greatest of each
    query; it is subtracted inside the second product, as further columns (see `_blocks_backward`).
    """
    rows, heads, tokens, width = query.shape
    grouped = _grouped(query, key)
    power, rest = _split(scale)
    queries, keys = query.view(*grouped, width), _with_ones(key * power, width + 2)
    output, logs = _empty_like(query), query.new_empty((*grouped, 1), dtype=torch.float32)
    for some, part in _pieces(grouped, (0, tokens)):
        to = output.view(*grouped, width)[*some, :, part], logs[*some, :, part]
        _document_forward(queries[*some, :, part], keys[*some, part], value[*some, part], rest, to)
    return output, logs.view(rows, heads, tokens)


def _document_forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rest: float,
    to: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Weighted values and logarithms of sums of one document in some rows, written to ``to``.

    Args:
        queries: float [rows, key heads, group, seq, head_dim].
        keys: float [rows, key heads, seq, head_dim and columns], times the power of two in the factor of the scores.
        values: float [rows, key heads, seq, head_dim].
        rest: The factor over that power.
        to: Of values [rows, key heads, group, seq, head_dim]; of logarithms, fp32, one wide.
    """
    rows, heads, group, tokens, width = queries.shape
    batch = rows * heads
    keys, values = keys.reshape(batch, tokens, -1), values.reshape(batch, tokens, width)
    for start, end in _blocks(tokens):
        block = queries[:, :, :, start:end]
        q = block.reshape(batch, -1, width)
        p = torch.bmm(q, keys[:, :end, :width].transpose(1, 2))
        own = p.view(batch * group, end - start, end)[:, :, start:]
        own += torch.full_like(own[0], -math.inf).triu_(1)
        greatest = p.amax(-1)
        torch.bmm(_widened(q, -greatest), keys[:, :end].transpose(1, 2), out=p)
        if rest != 1.0:
            p.mul_(rest)
        p.exp_()
        own.tril_()
        sums = p.sum(-1, dtype=torch.float32, keepdim=True)
        to[0][:, :, :, start:end] = torch.bmm(p, values[:, :end]).div(sums).view(block.shape)
        sums.log_().add_(greatest.unsqueeze(-1), alpha=rest)
        to[1][:, :, :, start:end] = sums.view(*block.shape[:-1], 1)


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
    width = query.shape[-1]
    grouped = _grouped(query, key)
    power, rest = _split(scale)
    dots = (gradient.transpose(1, 2) * output.transpose(1, 2)).sum(-1, dtype=torch.float32).transpose(1, 2)
    queries = _widened(query.view(*grouped, width), (logs / -rest).view(grouped))
    gradients = _widened(gradient.view(*grouped, width), (-dots).view(grouped))
    keys, values = _with_ones(key * power, queries.shape[-1]), _with_ones(value, queries.shape[-1])
    dq, dk, dv = _empty_like(query), _empty_like(key), _empty_like(value)
    for some, part in _pieces(grouped, bounds):
        a, b = queries[*some, :, part], gradients[*some, :, part]
        to = dq.view(*grouped, width)[*some, :, part], dk[*some, part], dv[*some, part]
        _document_backward(a, b, keys[*some, part], values[*some, part], rest, scale, to)
    return dq, dk, dv


def _grouped(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, key heads, heads of each, tokens."""
    rows, heads, tokens, _ = query.shape
    return rows, key.shape[1], heads // key.shape[1], tokens


def _split(scale: float) -> tuple[float, float]:
    """A power of two, which scales keys without rounding them, and what is left of ``scale``, for the scores."""
    power = 2.0 ** round(math.log2(scale))
    return power, scale / power


def _pieces(grouped: tuple[int, int, int, int], bounds: tuple[int, ...]) -> Iterator[tuple[tuple[slice, slice], slice]]:
    """Some rows and key heads, as many as the caches hold the scores of, and one of their documents."""
    rows, heads, group, _ = grouped
    longest = _longest(bounds)
    of_head = group * min(_BLOCK, longest) * longest  # scores of a key head in a row
    many_rows, many_heads = max(1, _SCORES // (of_head * heads)), max(1, _SCORES // of_head)
    for row, head in product(range(0, rows, many_rows), range(0, heads, many_heads)):
        for start, end in pairwise(bounds):
            yield (slice(row, row + many_rows), slice(head, head + many_heads)), slice(start, end)


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    """Blocks of queries of a document, of one size but for the last."""
    size = -(-tokens // -(-tokens // _BLOCK))
    for start in range(0, tokens, size):
        yield start, min(tokens, start + size)


def _widened(states: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """``states`` bf16 [..., head_dim] with ``column`` [...] behind it: rounded, and what that left of it."""
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
    several = tokens > _BLOCK
    # Sums over blocks are kept in fp32.
    sums = [keys.new_zeros((batch, tokens, width), dtype=torch.float32) for _ in range(2)] if several else []
    for start, end in _blocks(tokens):
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
        if several:
            sums[0][:, :end] += of_keys
            sums[1][:, :end] += of_values
        else:
            sums = [of_keys, of_values]
    dk.copy_(sums[0].mul_(scale).view(rows, heads, tokens, width))
    dv.copy_(sums[1].view(rows, heads, tokens, width))
