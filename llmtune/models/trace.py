"""Activations of a model whose layers have no closed form: its own modules, run on tensors that have no memory.

Tensors are fake (``FakeTensorMode``): every operation is dispatched as on a CPU, shapes and types are right, nothing is
computed. What is alive is told by the life of each storage, what is kept by autograd's own hooks. The figures are exact
for the shapes that are traced; between and beyond them they are linear in tokens and in tokens times width.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmtune.models.activations import ARITHMETICS, LinearInput, Stage, TracedActivations
from llmtune.models.heads import decoder_of, own_loss, standing_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows and width of the passes that are traced: large, so that what grows with tokens decides where the peak is.
SHAPES = ((8, 512), (8, 1024), (16, 512))
# Two layers of a transformer take about 500 operations forward and backward; a state-space model without its kernels
# takes some for every token.
MOST_OPERATIONS = 10_000
# Torch's kernel for attention on a CPU; its eighth argument says whether it is causal.
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# Layers that are run; of more the last one counts, whose inputs are like those of all others.
TRACED_LAYERS = 2


@dataclass(slots=True)
class StageBytes:
    """What one piece of a model took: kept after its forward pass, and the most that each pass added while it ran.

    ``attention`` is what the backward pass had added when it had run torch's kernel for attention; less than nothing
    where more had been freed. ``normed`` are the values that norms like Llama's have read.
    """

    saved: int = 0
    forward: int = 0
    backward: int = 0
    attention: int = 0
    normed: int = 0


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that are alive, and the most since it was last asked."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = self._operations = self._seen = 0
        self._known: dict[int, tuple[int, int]] = {}
        self.attended: int | None = None  # what was alive when attention last went backward

    def watch(self, tensor: torch.Tensor) -> int:
        """Number of the storage that ``tensor`` lies in; addresses are used again, numbers are not."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._seen += 1
            self._known[key] = (self._seen, storage.nbytes())
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._freed, key)
        return self._known[key][0]

    def _freed(self, key: int) -> None:
        self.live -= self._known.pop(key, (0, 0))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            raise RuntimeError(f"more than {MOST_OPERATIONS} operations: it works token by token")
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.watch(value)
        if func is FLASH_BACKWARD and args[7] and (kwargs or {}).get("attn_mask") is None:
            self.attended = self.live
        return out


class PassTrace:
    """A forward and backward pass of a model on the meta device; afterwards its weights are fake tensors.

    Attributes:
        layers: What each decoder layer took.
        outside: What all else took: embedding, last norm, head, loss.
        attends: Whether attention was torch's kernel, causal and without a mask.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[torch.nn.Module]) -> None:
        self._model, self._live = model, _Live()
        self._modules = list(layers)
        self.layers = [StageBytes() for _ in layers]
        self.outside = StageBytes()
        self.attends = False
        self._stage: StageBytes = self.outside
        self._start, self._kept = 0, set[int]()
        self._read: list[tuple[str, int]] = []

    @property
    def inputs(self) -> tuple[LinearInput, ...]:
        """What the linear modules of the last layer read."""
        numbers: dict[int, int] = {}
        return tuple(
            LinearInput(module=name, tensor=numbers.setdefault(storage, len(numbers)), saved=storage in self._kept)
            for name, storage in self._read
        )

    @property
    def saved(self) -> int:
        """Bytes kept for the backward pass, without weights."""
        return self.outside.saved + sum(layer.saved for layer in self.layers)

    def run(
        self,
        *,
        rows: int,
        width: int,
        autocast: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        whole: bool = True,
    ) -> PassTrace:
        """Trace one pass without a mask, which rows that are padded on the right do not need.

        Args:
            rows: Rows of the micro-batch.
            width: Tokens of each.
            autocast: What matrix products are computed in.
            dtype: Of all weights; as they are where it is left out.
            whole: Whether head and loss are part of it.

        Raises:
            RuntimeError: The model takes more operations than are worth counting, or one depends on data.
        """
        mode, live = FakeTensorMode(), self._live
        _make_fake(self._model, mode, dtype)
        computing = torch.autocast("cpu", dtype=autocast) if autocast is not None else contextlib.nullcontext()
        with mode, contextlib.ExitStack() as hooks:
            hooks.enter_context(_silent(logging.getLogger("torch._subclasses.fake_tensor")))
            hooks.enter_context(_unpacked())
            ids = torch.zeros(rows, width, dtype=torch.long)
            for tensor in (*self._model.parameters(), *self._model.buffers(), ids):
                live.watch(tensor)
            known = {live.watch(tensor) for tensor in self._model.parameters()}
            for number, module in enumerate(self._modules):
                hooks.enter_context(_removed(module.register_forward_pre_hook(self._enter(number))))
                hooks.enter_context(_removed(module.register_forward_hook(self._leave(number))))
            for module in filter(is_plain_norm, self._model.modules()):
                hooks.enter_context(_removed(module.register_forward_pre_hook(self._norms)))
            for path, module in self._modules[-1].named_modules():
                if is_linear(module):
                    hooks.enter_context(_removed(module.register_forward_pre_hook(self._reads(path))))
            with live:
                self._begin(self.outside)
                keep = torch.autograd.graph.saved_tensors_hooks(self._keep(known), lambda tensor: tensor)
                with computing, keep, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    end, gradient = self._forward(ids, whole=whole)
                self._end("forward")
                self._begin(self.outside)
                end.backward(gradient)  # type: ignore[no-untyped-call]
                self._end("backward")
        return self

    def _forward(self, ids: torch.Tensor, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, or the hidden states that it would be computed from and their gradient."""
        if whole:
            loss: torch.Tensor = self._model(input_ids=ids, labels=ids, num_items_in_batch=1).loss
            return loss, None
        decoder = decoder_of(self._model)
        assert decoder is not None, "only what has a plain loss is traced without it"
        states: torch.Tensor = decoder(input_ids=ids).last_hidden_state
        return states, torch.empty_like(states)

    # ------------------------------------------------------------------ stages

    def _begin(self, stage: StageBytes) -> None:
        self._stage, self._start = stage, self._live.live
        self._live.most = self._live.live

    def _end(self, which: str) -> None:
        grown = self._live.most - self._start
        setattr(self._stage, which, max(getattr(self._stage, which), grown))
        if self._live.attended is not None:
            self._stage.attention, self._live.attended = self._live.attended - self._start, None
            self.attends = True

    def _enter(self, number: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._end("forward")
            self._begin(self.layers[number])

        return enter

    def _leave(self, number: int) -> Callable[..., None]:
        def leave(module: Any, args: Any, out: Any) -> None:
            self._end("forward")
            self._begin(self.outside)
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._turn(number))

        return leave

    def _reads(self, path: str) -> Callable[..., None]:
        def note(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            self._read.append((path.rsplit(".", 1)[-1], self._live.watch(args[0])))

        return note

    def _norms(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._stage.normed += args[0].numel()

    def _turn(self, number: int) -> None:
        """The gradient of a layer's output is there: its backward pass begins."""
        self._end("backward")
        self._begin(self.layers[number])

    def _keep(self, known: set[int]) -> Callable[[torch.Tensor], torch.Tensor]:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            number = self._live.watch(tensor)
            if number not in known and number not in self._kept:
                self._kept.add(number)
                self._stage.saved += tensor.untyped_storage().nbytes()
            return tensor

        return keep


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """An operation that fails on fake tensors is logged as an error, and raises it too."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _unpacked() -> Iterator[None]:
    """transformers looks at positions for packed rows, and takes fake ones, which it cannot look at, for packed."""
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


@contextlib.contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _make_fake(model: torch.nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> None:
    """Replace weights and buffers by fake ones on the CPU; what was shared stays shared."""
    made: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        weight = isinstance(old, torch.nn.Parameter)
                        new = torch.empty(old.shape, dtype=dtype if weight and dtype else old.dtype, device="cpu")
                        made[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad) if weight else new
                    tensors[name] = made[id(old)]  # type: ignore[assignment]


def is_linear(module: torch.nn.Module) -> bool:
    """Whether it multiplies by a matrix; GPT-2's ``Conv1D`` does so by a transposed one."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def is_plain_norm(module: torch.nn.Module) -> bool:
    """Whether it is an RMSNorm that does what Llama's does: transformers has many copies of it."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def written(kind: type) -> tuple[Any, ...]:
        code = getattr(kind.forward, "__code__", None)  # type: ignore[attr-defined]
        return () if code is None else (code.co_code, code.co_names, code.co_consts)

    return type(module).__name__.endswith("RMSNorm") and written(type(module)) == written(LlamaRMSNorm)


def has_plain_loss(model: PreTrainedModel) -> bool:
    """Whether ``model`` is a decoder with a linear head and the usual cross-entropy, and needs nothing else of it."""
    decoder = decoder_of(model)
    return decoder is not None and own_loss(model) is None and _reads_states_alone(model, decoder)


def _reads_states_alone(model: PreTrainedModel, decoder: torch.nn.Module) -> bool:
    """Whether a call with labels makes do with a decoder that gives hidden states and nothing else."""
    weight = model.get_output_embeddings().weight
    ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
    states = weight.new_zeros((1, 2, weight.shape[1]))
    try:
        with standing_in(decoder, lambda *args, **kwargs: states), torch.no_grad():
            model(input_ids=ids, labels=ids)
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
        return False
    return True


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The list of layers that are alike: the longest one of modules of one class."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    return max(lists, key=len, default=None)


def trace_activations(model: PreTrainedModel) -> TracedActivations | None:
    """Bytes of a layer and of the rest by kind of arithmetic, of the kinds in which it runs on fake tensors.

    None when there is no such kind.

    Args:
        model: A causal language model on the meta device. It is cut to its first layers and useless afterwards.
    """
    layers = decoder_layers(model)
    if layers is None:
        return None
    del layers[TRACED_LAYERS:]
    plain_linears = all(type(module) is torch.nn.Linear for module in layers.modules() if is_linear(module))
    plain_loss = has_plain_loss(model)
    model.config.use_cache = False
    model.train()
    model.enable_input_require_grads()
    traces: dict[str, list[PassTrace]] = {}
    for name in ARITHMETICS:
        # Data decides what a mixture of experts does, and not every operation knows fake tensors of every type.
        with contextlib.suppress(
            RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError, KeyError
        ):
            traces[name] = _traces(model, layers, name, whole=not plain_loss)
    if not traces:
        return None
    passes = traces.get("single") or next(iter(traces.values()))
    return TracedActivations(
        layer={name: _fit([trace.layers[-1] for trace in found]) for name, found in traces.items()},
        outside={name: _fit([trace.outside for trace in found]) for name, found in traces.items()},
        inputs=passes[0].inputs,
        plain_loss=plain_loss,
        plain_linears=plain_linears,
        plain_attention=passes[0].attends,
    )


def _traces(model: PreTrainedModel, layers: torch.nn.ModuleList, arithmetic: str, *, whole: bool) -> list[PassTrace]:
    model.requires_grad_(arithmetic in ("trained", "autocast"))
    dtype = torch.bfloat16 if arithmetic == "half" else torch.float32
    autocast = torch.bfloat16 if arithmetic == "autocast" else None
    return [
        PassTrace(model, list(layers)).run(rows=rows, width=width, autocast=autocast, dtype=dtype, whole=whole)
        for rows, width in SHAPES
    ]


def _fit(measured: Sequence[StageBytes]) -> Stage:
    parts: dict[str, float] = {}
    for which in ("saved", "forward", "backward", "attention"):
        parts |= dict(
            zip((f"{which}_fixed", which, f"{which}_pair"), _solve([getattr(m, which) for m in measured]), strict=True)
        )
    (rows, width), *_ = SHAPES
    return Stage(**parts, normed=measured[0].normed / (rows * width))


def _solve(sizes: Sequence[int]) -> tuple[float, float, float]:
    """``fixed + per_token * tokens + per_pair * tokens * width`` through the three shapes."""
    (small, wide, tall), ((rows, width), (_, double), (many, _)) = sizes, SHAPES
    # Twice the width and twice the rows have the same tokens; they differ in pairs alone.
    per_pair = (wide - tall) / (rows * double * double - many * width * width)
    per_token = (tall - small - per_pair * (many - rows) * width * width) / ((many - rows) * width)
    return small - per_token * rows * width - per_pair * rows * width * width, per_token, per_pair
