"""What the layers of the supported architectures do, operation by operation, written on a ``Tape``.

Read from transformers 5.23 (``models/{llama,mistral,qwen2,qwen3,phi,phi3}``), peft 0.21 (``tuners/lora``),
bitsandbytes 0.50 (``autograd/_functions.py``), torch 2.13 (``derivatives.yaml``) and ``llmtune.kernels``. Compared with
the events of torch's CPU allocator in runs of small models, of all six, lora, qlora and full, with and without
recomputing, dropout and packing (``tests/benchmarks/bench_memory.py``): the tensor peak was within 0.7 % in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from llmtune.models import LinearModule, ModelSpec
from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.paths import (
    arithmetic_of,
    backward_blocks_bytes,
    forward_blocks_bytes,
    loss_workspace,
    mask_width,
    norm_blocks,
    norm_is_ours,
    paths_of,
    scored_rows,
)
from llmtune.planning.memory.tape import Cost, Tape, Value

# Architectures that rotate a part of each head and put it together with the rest.
PARTLY_ROTATED = ("PhiForCausalLM", "Phi3ForCausalLM")


class Pass:
    """One forward pass through one piece of the model.

    Args:
        spec: The model.
        footprint: How it is trained.
        on_cpu: Some operations need more memory there.
    """

    def __init__(self, spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> None:
        self.tape = Tape(accumulates=footprint.accumulates)
        self._spec, self._shape, self._footprint, self._on_cpu = spec, spec.shape, footprint, on_cpu
        self._arithmetic, self._paths = arithmetic_of(footprint), paths_of(spec, footprint, on_cpu=on_cpu)
        self._full = footprint.method == "full"
        self._tokens = footprint.tokens
        adapted = () if self._full else spec.targeted(footprint.targets)
        self._adapted = {module.name for module in adapted}
        self._linears = {module.name: module for module in spec.linears}

    def start(self, *, gradient: bool) -> Value:
        """What a layer starts from: int(tokens) rows of the residual stream."""
        return Value(self._tokens * self._shape.hidden, self._arithmetic.stream, gradient=gradient)

    # ------------------------------------------------------------------ elementary

    def _cast(self, x: Value, item: int) -> Value:
        return x if x.item == item else self.tape.add([x], x.size, item)

    def _add(self, x: Value, y: Value, *holds: Value) -> Value:
        item = max(x.item, y.item)
        # On a CPU the narrower operand is widened into a copy first.
        work = x.size * item if x.item != y.item and self._on_cpu else 0
        return self.tape.add([x, y], x.size, item, alias=True, holds=holds, forward_work=work)

    def _multiply(self, x: Value, y: Value, *holds: Value) -> Value:
        return self.tape.add([x, y], x.size, x.item, saved=[x, y], holds=holds)

    def _transposed(self, x: Value) -> Value:
        """A view whose gradient has to be copied into the order of the input."""
        return self.tape.add([x], x.size, x.item, view=True)

    def _rms_norm(self, x: Value, width: int) -> Value:
        if self._paths.norms and norm_is_ours(self._footprint, x.size / self._tokens, x.item):
            return self._norm_in_blocks(x, width)
        add, rows = self.tape.add, x.size / width
        wide = self._cast(x, 4)
        square = add([wide], x.size, 4, saved=[wide], backward_work=2 * wide.num_bytes)
        mean = add([square], rows, 4)
        root = add([mean], rows, 4, saves_output=True, backward_work=8 * rows)
        normal = add([wide, root], x.size, 4, saved=[wide, root], backward_work=wide.num_bytes)
        normal = self._cast(normal, x.item)
        # Times a weight of the stream's type, which under autocast is wider than a head.
        item = max(x.item, self._arithmetic.stream)
        work = x.size * item * (self._full + (item != normal.item))
        return add([normal], x.size, item, saved=[normal] if self._full else (), backward_work=work, trains=self._full)

    def _norm_in_blocks(self, x: Value, width: int) -> Value:
        """As ``kernels.layers`` computes it: from its input and a factor for each row."""
        block, narrow = norm_blocks(self._footprint, x.size, width), x.item != 4
        return self.tape.add(
            [x],
            x.size,
            max(x.item, self._arithmetic.stream),
            saved=[x, Value(x.size / width, 4, gradient=False)],
            folded=True,
            trains=self._full,
            # In fp32 the squares; of what is narrower, input and gradient too.
            forward_work=block * (8 if narrow else 4),
            backward_work=block * (12 if narrow else 4),
        )

    def _layer_norm(self, x: Value, width: int) -> Value:
        rows = x.size / width
        statistics = Value(2 * rows, 4, gradient=False)
        return self.tape.add([x], x.size, x.item, saved=[x, statistics], trains=self._full)

    # ------------------------------------------------------------------ linear modules

    def _product(self, x: Value, width: int, out: int, *, trained: bool) -> Value:
        rows = x.size / width
        # What is kept of a frozen weight is the weight itself; autocast keeps a copy of one that is trained.
        weight = Value(0, 4, gradient=False)
        if self._arithmetic.autocast:
            x = self._cast(x, self._arithmetic.product)
            if trained:
                weight = Value(width * out, x.item, gradient=False)
        return self.tape.add(
            [x],
            rows * out,
            x.item,
            saved=[x, weight] if trained else [weight],
            folded=True,
            backward_work=width * out * x.item if trained and x.item != 4 else 0,
            trains=trained,
            weight_gradient=width * out * 4 if trained else 0,
        )

    def _quantized_product(self, x: Value, width: int, out: int) -> Value:
        rows, came = x.size / width, x.item
        if self._arithmetic.quantization == "nf4":
            x = self._cast(x, self._arithmetic.product)
        unpacked = width * out * x.item
        # bitsandbytes keeps the input of an 8-bit product, though nothing reads it.
        kept = x if self._arithmetic.quantization == "int8" else Value(0, 4, gradient=False)
        y = self.tape.add(
            [x],
            rows * out,
            x.item,
            saved=[kept],
            folded=True,
            late=kept is x,
            forward_work=unpacked,
            backward_work=unpacked,
        )
        return self._cast(y, came)

    def linear(self, name: str, x: Value) -> Value:
        """The linear module of this name, with its adapter."""
        return self.apply(self._linears[name], x, adapted=name in self._adapted)

    def apply(self, module: LinearModule, x: Value, *, adapted: bool) -> Value:
        """A linear module of a decoder layer, with or without an adapter."""
        arithmetic = self._arithmetic
        if arithmetic.quantization is None:
            y = self._product(x, module.in_features, module.out_features, trained=self._full)
        else:
            y = self._quantized_product(x, module.in_features, module.out_features)
        if not adapted:
            return y
        if self._paths.adapters:
            return self._add_adapter(x, y, module.in_features, module.out_features)
        if arithmetic.quantization == "nf4":  # peft copies it, lest it be changed in place
            y = self.tape.add([y], y.size, y.item, alias=True)
        return self._adapt(x, y, module.in_features, module.out_features)

    def _add_adapter(self, x: Value, y: Value, width: int, out: int) -> Value:
        """``y + scale * B(A(dropout(x)))`` as ``kernels.adapters`` computes it, into ``y``, with copies of A and B."""
        item, rank, dropout = self._arithmetic.product, self._footprint.rank, self._footprint.dropout > 0
        rows = x.size / width
        narrow = x.size * item * (x.item != item)
        # Its input without what is dropped; in fp32 a CPU widens the mask too.
        masked = x.size * item * (1 + (self._on_cpu and item == 4)) if dropout else 0.0
        low = Value(rows * rank, item, gradient=False)
        mask = [Value(x.size, 1, gradient=False)] if dropout else []
        # What is added to y where that is wider, and widened for it on a CPU.
        added = y.size * (item + y.item * self._on_cpu) if y.item != item else 0.0
        return self.tape.add(
            [y, x],
            y.size,
            y.item,
            saved=[x, low, *mask],
            in_place=True,
            folded=True,
            trains=True,
            forward_work=narrow + max(masked - low.num_bytes, added),
            # The gradient of x is made in the adapter's precision, beside x in it; then widened.
            backward_work=max(narrow, masked + low.num_bytes + (y.size * item if y.item != item else 0.0)),
            weight_gradient=4 * rank * (width + out),
        )

    def _adapt(self, x: Value, y: Value, width: int, out: int) -> Value:
        """``y + scale * B(A(dropout(x)))`` with fp32 A and B, as PEFT computes it."""
        arithmetic, given = self._arithmetic, x
        quantized = arithmetic.quantization is not None
        if not (quantized and arithmetic.autocast):
            x = self._cast(x, 4)
        dropped = self._dropout(x) if self._footprint.dropout else x
        low = self._product(dropped, width, self._footprint.rank, trained=True)
        high = self._product(low, self._footprint.rank, out, trained=True)
        high = self.tape.add([high], high.size, high.item)  # times the scale
        if quantized and not arithmetic.autocast:
            high = self._cast(high, y.item)
        return self._cast(self._add(y, high, x, given), y.item)

    # ------------------------------------------------------------------ attention

    def _rope(self, x: Value, share: float = 1.0) -> Value:
        """Rotate ``share`` of each head; in the type of cos and sin, which is the stream's, where that is wider."""
        item = max(x.item, self._arithmetic.stream)
        size = share * x.size * item
        return self.tape.add(
            [x], x.size, item, forward_work=1.5 * size, backward_work=2 * size + (item - x.item) * x.size
        )

    def _attend(self, q: Value, k: Value, v: Value, *holds: Value, beside: float = 0.0) -> Value:
        """``holds`` and ``beside`` bytes more are alive while it runs forward: the caller has names for them."""
        shape, given = self._shape, (q, k, v)
        masked = self._paths.masked
        if masked and shape.heads > shape.kv_heads:
            # Grouped heads without copies are for calls without a mask.
            k, v = (self.tape.add([x], q.size, x.item) for x in (k, v))
        if self._arithmetic.autocast:
            q, k, v = (self._cast(x, self._arithmetic.product) for x in (q, k, v))
        kept = [Value(self._tokens * shape.heads, 4, gradient=False)]  # logsumexp
        if masked:
            # The boolean mask as numbers of the queries' type, made anew in every layer.
            kept.append(Value(self._tokens * mask_width(self._footprint), q.item, gradient=False))
        back = backward_blocks_bytes(self._spec, self._footprint, q.item) if self._paths.backward_in_blocks else 0.0
        work = forward_blocks_bytes(self._spec, self._footprint, q.item) if self._paths.forward_in_blocks else 0.0
        out = self.tape.add(
            [q, k, v],
            q.size,
            q.item,
            saved=[q, k, v, *kept],
            saves_output=True,
            holds=[*given, *holds],
            forward_work=work + beside,
            backward_work=back,
        )
        ours = self._paths.forward_in_blocks or (self._footprint.packed and not masked)
        if ours or not (self._on_cpu and self._spec.architecture in PARTLY_ROTATED):
            return out
        # Torch's output lies as the queries do: put together anew, head by head, so that it has to be copied.
        return self.tape.add([out], out.size, out.item, alias=True)

    def _heads(self, x: Value) -> tuple[Value, Value, Value]:
        q, k, v = (self._transposed(self.linear(name, x)) for name in ("q_proj", "k_proj", "v_proj"))
        return q, k, v

    # ------------------------------------------------------------------ decoder layers

    def llama(self, x: Value, *, norm_heads: bool = False) -> Value:
        """Llama, Mistral, Qwen2; Qwen3 with ``norm_heads``."""
        hidden, head = self._shape.hidden, self._shape.head_dim
        h = self._rms_norm(x, hidden)
        q, k, v = self._heads(h)
        if norm_heads:
            q, k = self._rms_norm(q, head), self._rms_norm(k, head)
        x = self._add(x, self.linear("o_proj", self._attend(self._rope(q), self._rope(k), v)), h)
        h = self._rms_norm(x, hidden)
        gate = self.linear("gate_proj", h)
        gate = self.tape.add([gate], gate.size, gate.item, saved=[gate])
        return self._add(x, self.linear("down_proj", self._multiply(gate, self.linear("up_proj", h))), h)

    def qwen3(self, x: Value) -> Value:
        """As Llama, with norms on queries and keys."""
        return self.llama(x, norm_heads=True)

    def phi3(self, x: Value) -> Value:
        """Phi-3: one matrix for queries, keys and values, one for gate and up."""
        shape = self._shape
        widths = [shape.heads * shape.head_dim] + [shape.kv_heads * shape.head_dim] * 2
        h = self._rms_norm(x, shape.hidden)
        together = self.linear("qkv_proj", h)
        q, k, v = (self._slice(together, self._tokens * width) for width in widths)
        x = self._add(x, self._drop(self.linear("o_proj", self._attend(self._rope(q), self._rope(k), v))), h)
        h = self._rms_norm(x, shape.hidden)
        both = self.linear("gate_up_proj", h)
        gate, up = (self._slice(both, both.size / 2) for _ in range(2))
        gate = self.tape.add([gate], gate.size, gate.item, saved=[gate])
        return self._add(x, self._drop(self.linear("down_proj", self._multiply(up, gate))), h)

    def phi(self, x: Value) -> Value:
        """Phi: attention and MLP side by side."""
        shape = self._shape
        h = self._layer_norm(x, shape.hidden)
        q, k, v = self._heads(h)
        rotated = [self._rope(x, 0.5) for x in (q, k)]
        halves = sum(x.num_bytes / 2 for x in rotated)  # rotated, and named as what they were halves of
        attended = self._drop(self.linear("dense", self._attend(*rotated, v, q, k, beside=halves)))
        fed = self._drop(self.linear("fc2", self._gelu_new(self.linear("fc1", h))))
        return self._add(self._add(attended, fed), x, h, attended, fed)

    def _slice(self, x: Value, size: float) -> Value:
        """A part of ``x``; its gradient is as large as ``x``."""
        return self.tape.add([x], size, x.item, view=True)

    def _drop(self, x: Value) -> Value:
        return self._dropout(x) if self._spec.residual_dropout else x

    def _dropout(self, x: Value) -> Value:
        # A CPU keeps factors of the input's type, a GPU's fused kernel one byte for each value.
        return self.tape.add([x], x.size, x.item, saved=[Value(x.size, x.item if self._on_cpu else 1, gradient=False)])

    def _gelu_new(self, x: Value) -> Value:
        """``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))``, operation by operation."""
        add = self.tape.add
        half = add([x], x.size, x.item)
        cube = add([x], x.size, x.item, saved=[x], backward_work=2 * x.num_bytes)
        inner = self._add(x, add([cube], x.size, x.item))
        tanh = add([add([inner], x.size, x.item)], x.size, x.item, saves_output=True)
        return self._multiply(half, add([tanh], x.size, x.item, alias=True), x)

    # ------------------------------------------------------------------ the end

    def head(self, x: Value) -> Value:
        """Last norm, vocabulary-wide logits, and their cross-entropy."""
        shape = self._shape
        norm = self._layer_norm if self._spec.architecture == "PhiForCausalLM" else self._rms_norm
        x = norm(x, shape.hidden)
        return self.loss(x)

    def loss(self, x: Value) -> Value:
        """Head and loss, from the last hidden states."""
        return self._loss_in_chunks(x) if self._paths.loss else self._whole_loss(x)

    def _whole_loss(self, x: Value) -> Value:
        """As transformers computes it: logits of all positions, and their log-probabilities in fp32."""
        shape, add = self._shape, self.tape.add
        narrow = self._product(x, shape.hidden, shape.vocabulary, trained=self._full)
        logits = self._cast(narrow, 4)
        logs = add([logits], logits.size, 4, saves_output=True, holds=[narrow])
        return add([logs], 1, 4, saved=[logs, Value(self._tokens, 8, gradient=False)])

    def _loss_in_chunks(self, x: Value) -> Value:
        """As ``kernels.loss`` computes it: chunks of logits, and gradients in the forward pass.

        Any token may have a label; the last one of a row has none.
        """
        shape, footprint, add = self._shape, self._footprint, self.tape.add
        scored = scored_rows(footprint)
        positions = Value(scored, 8, gradient=False)
        # Labels, moved by one; labels and positions of the rows that have one.
        labels = 16 * self._tokens
        states = add([x], scored * shape.hidden, x.item, saved=[positions], holds=[x], forward_work=labels)
        kept = [Value(scored * shape.hidden, x.item, gradient=False)]
        if self._full:
            kept.append(Value(shape.vocabulary * shape.hidden, 4, gradient=False))
        work = loss_workspace(self._spec, footprint, on_cpu=self._on_cpu)
        return add(
            [states],
            1,
            4,
            saved=kept,
            holds=[x, states],
            trains=self._full,
            forward_work=labels + 16 * scored + work,
        )


# Architecture -> its decoder layer; any other is traced when its configuration is read.
LAYERS: dict[str, Callable[[Pass, Value], Value]] = {
    "LlamaForCausalLM": Pass.llama,
    "MistralForCausalLM": Pass.llama,
    "Qwen2ForCausalLM": Pass.llama,
    "Qwen3ForCausalLM": Pass.qwen3,
    "PhiForCausalLM": Pass.phi,
    "Phi3ForCausalLM": Pass.phi3,
    "SmolLM3ForCausalLM": Pass.llama,  # of four layers one does not rotate, and needs less
}


def layer_costs(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> tuple[Cost, Cost, Cost]:
    """Bytes of the first decoder layer, of any other, and of everything after the last.

    Where only adapters are trained and nothing is run again, the first layer starts from what needs no gradient.
    """
    # A planner asks for many plans that differ in what no layer notices.
    alike = replace(
        footprint,
        checkpoint_every=min(footprint.checkpoint_every, 1),
        offload=False,
        optimizer="",
        processes=1,
    )
    return _layer_costs(spec, alike, on_cpu)


@lru_cache(maxsize=256)
def _layer_costs(spec: ModelSpec, footprint: Footprint, on_cpu: bool) -> tuple[Cost, Cost, Cost]:
    run = LAYERS[spec.architecture]
    costs = []
    for gradient in (footprint.method == "full" or footprint.checkpoint_every > 0, True):
        layer = Pass(spec, footprint, on_cpu=on_cpu)
        start = layer.start(gradient=gradient)
        costs.append(layer.tape.cost(start, run(layer, start)))
    end = Pass(spec, footprint, on_cpu=on_cpu)
    start = end.start(gradient=True)
    return costs[0], costs[1], end.tape.cost(start, end.head(start))
