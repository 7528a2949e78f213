"""Which of ``llmtune.kernels`` a pass takes, and what they need: numbers of their modules, which load torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmtune.kernels import CHUNK_ROWS
from llmtune.models import ModelSpec
from llmtune.models.spec import WRITTEN_DOWN
from llmtune.planning.memory.estimate import BYTES_PER_VALUE, Footprint

# ``kernels.adapters``: fewer tokens are left to PEFT on a CPU, where the stream between layers is bf16.
FEWEST_ROWS = 128
# ``kernels.loss``: entries of the vocabulary that a thread of a CPU widens at once, and entries of a trained head's
# gradient that are added up at once.
WORK_ENTRIES, BLOCK_ENTRIES = 2**18, 2**20
# ``kernels.layers``: values of a block of rows per thread; fewer values of a norm's input are left to transformers.
BLOCK_VALUES, FEWEST_VALUES = 2**16, 2**16
# ``kernels.cpu_attention``: queries of a block, scores of a product, longest document of heads that share keys where
# the CPU has AMX, shortest document and fewest queries that go forward in blocks where it has not.
BLOCK, SCORES, LONGEST, SHORTEST, FEWEST_QUERIES = 128, 2**20, 1024, 64, 2048

# What oneDNN asks torch for in a bf16 product over a vocabulary, beside sums in fp32: 0.5 MiB for 2,048 words, 1 to 1.1
# MiB from 8,192 to 98,304 (measured, torch 2.13, AMX).
KERNEL_SCRATCH = 2**20
# Architectures whose head has a bias.
BIASED_HEAD = ("PhiForCausalLM",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Bytes of values while a model trains.

    Attributes:
        stream: Between layers, which is the embedding's.
        product: What matrix products, attention and logits are computed in; ``stream`` but under autocast.
        autocast: Whether autocast chooses the inputs of matrix products.
        quantization: nf4, int8 or None.
    """

    stream: int
    product: int
    autocast: bool
    quantization: str | None


def arithmetic_of(footprint: Footprint) -> Arithmetic:
    """How a run computes: fp32 weights under autocast when all are trained, weights of the precision otherwise."""
    item = BYTES_PER_VALUE[footprint.precision]
    full = footprint.method == "full"
    # Quantised fp16 models hold norms, embedding and head in fp32; see ``models.load``.
    wide = full or (footprint.quantization is not None and footprint.precision == "fp16")
    return Arithmetic(
        stream=4 if wide else item,
        product=item,
        autocast=item == 2 and (full or footprint.precision == "fp16"),
        quantization=footprint.quantization,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """What of a pass is computed by ``llmtune.kernels``; the rest is transformers', PEFT's and torch's.

    Attributes:
        loss: The loss, in chunks of logits.
        adapters: Adapters on plain linear layers, in the base's precision.
        norms: RMSNorms of the residual stream, in blocks of rows (on a CPU).
        backward_in_blocks: The backward pass of attention, in blocks of products (on a CPU).
        forward_in_blocks: Its forward pass, likewise.
        masked: Whether attention gets a dense mask.
    """

    loss: bool
    adapters: bool
    norms: bool
    backward_in_blocks: bool
    forward_in_blocks: bool
    masked: bool


def paths_of(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> Paths:
    """What this run takes: as ``attach_kernels`` decides it, and each kernel pass by pass.

    Of a model that could not be traced nothing is known, least of all that it is plain.
    """
    traced = spec.activations
    whole = footprint.sharding is None and (traced is not None or spec.architecture in WRITTEN_DOWN)
    attention = whole and (traced is None or traced.plain_attention)
    masked = _masked(spec, footprint, on_cpu=on_cpu, attached=attention)
    adapts = footprint.method != "full" and _adapts(footprint, on_cpu=on_cpu)
    in_blocks = attention and not masked and on_cpu and footprint.precision == "bf16"
    return Paths(
        loss=whole and (traced is None or traced.plain_loss),
        adapters=whole and adapts and (traced is None or traced.plain_linears),
        norms=whole and on_cpu and norm_is_ours(footprint, spec.shape.hidden, arithmetic_of(footprint).stream),
        backward_in_blocks=in_blocks and _backward_in_blocks(spec, footprint),
        forward_in_blocks=in_blocks and _forward_in_blocks(spec, footprint),
        masked=masked,
    )


def _masked(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool, attached: bool) -> bool:
    """Padding on the right needs no mask; a window that is shorter than a row does, and documents that no kernel takes.

    A kernel for documents takes windows too.
    """
    windowed = footprint.window is not None and footprint.width >= footprint.window
    if not footprint.packed:
        return windowed
    if on_cpu:
        return windowed or not attached or footprint.precision == "fp16"
    # As ``torch.nn.attention.varlen`` takes heads; GPUs that have bf16 (from Ampere on).
    head = spec.shape.head_dim
    fits = footprint.precision == "bf16" and head % 8 == 0 and head <= 256
    return not (attached and footprint.varlen and fits)


def _adapts(footprint: Footprint, *, on_cpu: bool) -> bool:
    if footprint.precision == "fp16" and (on_cpu or footprint.quantization == "int8"):
        return False  # no fast fp16 on a CPU; of 8-bit layers autocast would compute in fp16 what is fp32
    few = on_cpu and arithmetic_of(footprint).stream == 2 and footprint.tokens < FEWEST_ROWS
    return not few


def norm_is_ours(footprint: Footprint, values: float, item: int) -> bool:
    """Whether a norm that reads so many values per token, of ``item`` bytes each, is computed by our kernel."""
    return (item == 4 or footprint.precision == "bf16") and values * footprint.tokens >= FEWEST_VALUES


def norm_blocks(footprint: Footprint, values: float, width: int) -> float:
    """Values of the block of rows that a norm of so many values works on."""
    return min(values, width * max(1, BLOCK_VALUES * footprint.threads // width))


def _backward_in_blocks(spec: ModelSpec, footprint: Footprint) -> bool:
    shared = spec.shape.heads > spec.shape.kv_heads
    return footprint.vector_bf16 or footprint.width <= (LONGEST if shared else LONGEST // 2)


def _forward_in_blocks(spec: ModelSpec, footprint: Footprint) -> bool:
    queries = spec.shape.heads * (footprint.width if footprint.packed else footprint.tokens)
    return footprint.vector_bf16 and footprint.width >= SHORTEST and queries >= FEWEST_QUERIES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """Attention of the longest rows of a pass in blocks of products.

    Attributes:
        width: Tokens of a row or document.
        group: Query heads of a key head.
        head: Numbers of a head.
        batch: Key heads of rows that are computed at once.
        size: Queries of a block.
        several: Whether a row has more than one of them.
        in_parts: Whether these rows are not all that a pass has of them, in one piece.
        copied: Whether the queries of a block have to be put together.
    """

    width: int
    group: int
    head: int
    batch: int
    size: int
    several: bool
    in_parts: bool
    copied: bool

    @classmethod
    def of(cls, spec: ModelSpec, footprint: Footprint) -> _Blocks:
        """As ``kernels.cpu_attention`` cuts them."""
        shape, width = spec.shape, footprint.width
        rows = 1 if footprint.packed else max(1, footprint.tokens // width)
        group = shape.heads // shape.kv_heads
        of_head = group * min(BLOCK, width) * width
        some_rows = min(rows, max(1, SCORES // (of_head * shape.kv_heads)))
        some_heads = min(shape.kv_heads, max(1, SCORES // of_head))
        blocks = -(-width // BLOCK)
        return cls(
            width=width,
            group=group,
            head=shape.head_dim,
            batch=some_rows * some_heads,
            size=-(-width // blocks),
            several=blocks > 1,
            in_parts=some_heads < shape.kv_heads and some_rows > 1,
            copied=group > 1 or some_rows > 1,
        )

    @property
    def wide(self) -> int:
        """Numbers of a head with two columns more."""
        return self.head + 2

    @property
    def queries(self) -> int:
        """Of a block."""
        return self.batch * self.group * self.size


def backward_blocks_bytes(spec: ModelSpec, footprint: Footprint, item: int) -> float:
    """What the backward pass of attention in blocks needs beside its inputs and its gradients."""
    some, tokens, heads = _Blocks.of(spec, footprint), footprint.tokens, spec.shape.heads
    # Queries, gradient, keys and values with two columns more, and the fp32 column that was put last.
    there = float(item) * tokens * 2 * (heads + spec.shape.kv_heads) * some.wide
    there += 4.0 * tokens * heads  # dots
    scores = some.queries * some.width * item
    # Keys and values of these heads in one piece, where they are a part of all; queries and gradients of a block, where
    # they have to be copied; sums in fp32; products not added yet.
    keys = some.batch * some.width
    inside = 2 * scores + (2 * item * keys * some.wide if some.in_parts or footprint.packed else 0)
    if some.several:
        inside += 2 * item * some.queries * some.wide * some.copied
        inside += 2 * 4 * keys * some.head
    # Products of a block, the last one's of the block before, and keys that a product needs without gaps.
    inside += item * some.head * (3 * keys + (1 + some.several) * some.queries)
    return there + inside


def forward_blocks_bytes(spec: ModelSpec, footprint: Footprint, item: int) -> float:
    """What its forward pass in blocks needs beside inputs, output and the logarithms that are kept."""
    some = _Blocks.of(spec, footprint)
    there = float(item) * footprint.tokens * spec.shape.kv_heads * some.wide
    # Values in one piece; queries and scores; and the most of: scores in fp32 that are added up, queries with two
    # columns more, and weighted values before and after they are divided in fp32.
    values = item * some.batch * some.width * some.head
    most = max(4 * some.width, item * some.wide, (item + 4) * some.head)
    queries = some.queries * (item * (some.width + some.head) + most)
    return there + values + queries


def logit_tensors(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> tuple[float, ...]:
    """Bytes of the tensors as wide as the vocabulary that are there at once: a chunk's, or those of all positions."""
    vocabulary = spec.shape.vocabulary
    if not paths_of(spec, footprint, on_cpu=on_cpu).loss:
        return (4.0 * vocabulary * footprint.tokens,) * 3
    item, chunk = arithmetic_of(footprint).product, chunk_rows(scored_rows(footprint))
    if item == 4:
        return (4.0 * chunk * vocabulary,)
    # Widened on a CPU as many rows at a time as its caches hold.
    rows = min(chunk, max(1, footprint.threads * WORK_ENTRIES // vocabulary)) if on_cpu else chunk
    return float(item * chunk * vocabulary), 4.0 * rows * vocabulary


def loss_workspace(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> float:
    """Bytes that ``kernels.loss`` needs beside hidden states and gradients."""
    hidden, arithmetic, full = spec.shape.hidden, arithmetic_of(footprint), footprint.method == "full"
    item, weights = arithmetic.product, spec.shape.vocabulary * hidden
    states = chunk_rows(scored_rows(footprint)) * hidden * item
    work = sum(logit_tensors(spec, footprint, on_cpu=on_cpu))
    work += states if arithmetic.stream != item else 0  # a chunk of hidden states, cast
    # What is written to the gradient of the hidden states, and while it is computed.
    inside = states + (2 * states + min(KERNEL_SCRATCH, 256 * spec.shape.vocabulary) if on_cpu and item == 2 else 0.0)
    if not full or item == 4:
        return work + inside
    wide = 4.0 * chunk_rows(scored_rows(footprint)) * spec.shape.vocabulary if on_cpu else 0.0
    # The head, cast; a part of its gradient, widened where it is added; a chunk widened for a bias's gradient.
    part = (item + 4) * min(BLOCK_ENTRIES, weights) if on_cpu else item * weights
    return work + weights * item + max(inside, part, wide if spec.architecture in BIASED_HEAD else 0.0)


def scored_rows(footprint: Footprint) -> int:
    """Rows of hidden states that may have a label to predict: all but the last of each row."""
    rows = 1 if footprint.packed else max(1, footprint.tokens // footprint.width)
    return max(1, footprint.tokens - rows)


def mask_width(footprint: Footprint) -> int:
    """Tokens that a row of a dense mask is wide."""
    return footprint.tokens if footprint.packed else footprint.width


def largest_passes(footprint: Footprint, paths: Paths) -> tuple[Footprint, ...]:
    """Passes of a run of which one takes the most: the largest, and the largest whose chunks of logits are full.

    Just above a full chunk there are two of half the size.
    """
    full = scored_rows(footprint) // CHUNK_ROWS * CHUNK_ROWS
    if not paths.loss or full in (0, scored_rows(footprint)):
        return (footprint,)
    smaller = footprint
    while (above := scored_rows(smaller) - full) > 0:  # twice or thrice: fewer tokens may be fewer rows
        smaller = replace(smaller, tokens=smaller.tokens - above)
    return footprint, smaller


def chunk_rows(scored: int) -> int:
    """Rows of logits that are there at once: of so many, in chunks of one size."""
    return -(-scored // max(1, -(-scored // CHUNK_ROWS)))
