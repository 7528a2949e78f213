"""On a CPU nobody says that memory has run out: the kernel kills. So we ask before each pass, and say it ourselves.

What is left is the least of what control groups and the machine leave. What a pass takes is known from the largest one
so far, the probe's to begin with. A pass that is larger, or that comes near to what is left, is watched while it runs:
after each layer, forward and backward, and before the logits, whose size is known beforehand.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llmtune.hardware.cgroup import read_limits
from llmtune.kernels.head import attached_decoder, attached_rows
from llmtune.training.meter import peak_since_last_asked, resident_bytes, trim_heap
from llmtune.units import format_bytes

# Kept free, of what is there when the guard begins: allocators take whole arenas, page tables and threads take some.
RESERVE_SHARE = 0.02
# A pass is watched where so many times what it is known to take would not fit (an estimate: passes of the same number
# of tokens differ in width, and what a pass takes does not shrink quite in proportion to its tokens).
COMFORT = 1.5
# What is left is asked for anew when it is older.
FRESH_SECONDS = 0.5
# Per token and entry of the vocabulary: logits, their log-softmax and its gradient in fp32.
LOGIT_BYTES = 12


class OutOfMemoryError(MemoryError):
    """A pass was not begun, or was broken off, because the kernel would have killed this process in it."""


class MemoryGuard:
    """Raises before the kernel kills.

    Args:
        model: Whose passes they are.
        left: Bytes that this process may still take; None where nobody knows.
    """

    def __init__(self, model: torch.nn.Module, left: Callable[[], int | None] | None = None) -> None:
        self._model, self._left = model, left or bytes_left
        self._ceiling: int | None = None  # most that may be resident
        self._asked_at = -float("inf")
        self._reserve: int | None = None
        self._tokens, self._growth = 0, 0  # of the largest pass so far
        # Of a pass: what was resident when it began, or when the heap had given back what it did not use.
        self._start = 0
        # Of a watched block: the most that was resident, what was at the last look, the largest step between two looks.
        self._most, self._rise = 0, 0
        self._seen: int | None = None

    @contextmanager
    def passing(self, tokens: int) -> Iterator[None]:
        """A forward and backward pass of so many padded tokens.

        Raises:
            OutOfMemoryError: It would take more than there is.
        """
        self._ask()
        needed = self._needed(tokens)
        told = f"a pass of {tokens:,} tokens takes {format_bytes(needed)}"
        self._start = self._most = self._require_room(needed, told)
        unknown = tokens > self._tokens
        tight = self._ceiling is not None and self._start + COMFORT * needed > self._ceiling
        peak_since_last_asked()
        with self.watching() if unknown or tight else nullcontext():
            yield
        peak = peak_since_last_asked()
        growth = max(0, (self._most if peak is None else peak) - self._start)
        if unknown:
            self._tokens, self._growth = tokens, max(growth, self._growth)
        else:
            self._growth = max(growth, self._growth)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block in which every pass is looked at layer by layer; evaluations too.

        Raises:
            OutOfMemoryError: What is left would not hold what comes next.
        """
        self._ask()
        self._most = self._seen = resident_bytes()
        self._rise = 0
        with ExitStack() as stack:
            for layer in _layers(self._model):
                stack.callback(layer.register_forward_hook(self._after_layer).remove)
            head, decoder = _head(self._model), attached_decoder(self._model)
            if decoder is not None:
                stack.callback(decoder.register_forward_hook(self._before_loss).remove)
            elif head is not None:
                stack.callback(head.register_forward_pre_hook(self._before_logits).remove)
            yield

    # ------------------------------------------------------------------ what is known

    def _ask(self, *, now: bool = False) -> None:
        """How much there may be, unless that is known from a moment ago."""
        if not now and time.monotonic() - self._asked_at < FRESH_SECONDS:
            return
        left = self._left()
        self._asked_at = time.monotonic()
        if left is None:
            self._ceiling = None
            return
        resident = resident_bytes()
        if self._reserve is None:
            self._reserve = int(RESERVE_SHARE * (resident + left))
        self._ceiling = resident + left - self._reserve

    def _needed(self, tokens: int) -> int:
        """What a pass of so many tokens takes beside what is there, going by the largest so far."""
        return round(self._growth * tokens / self._tokens) if self._tokens else 0

    def _require_room(self, coming: int, what: str) -> int:
        """What is resident when there is room for ``coming`` bytes more; the heap gives its unused pages for it."""
        resident = resident_bytes()
        if self._ceiling is not None and resident + coming > self._ceiling:
            trim_heap()
            self._ask(now=True)
            resident = resident_bytes()
            self._start = min(self._start, resident)
            if self._ceiling is not None and resident + coming > self._ceiling:
                raise OutOfMemoryError(
                    f"memory guard: {what}, {format_bytes(resident)} are resident, and the kernel kills above "
                    f"{format_bytes(self._ceiling + (self._reserve or 0))}"
                )
        return resident

    # ------------------------------------------------------------------ while a pass runs

    def _after_layer(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._look()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(self._in_backward)  # type: ignore[no-untyped-call]

    def _in_backward(self, gradient: torch.Tensor) -> None:
        self._look()

    def _before_logits(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        hidden = args[0]
        assert isinstance(module.weight, torch.Tensor), "see _head"
        vocabulary = module.weight.shape[0]
        self._look(hidden[..., 0].numel() * vocabulary * LOGIT_BYTES)
        self._seen = None  # what the logits take is no step from layer to layer

    def _before_loss(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """After the decoder, where the loss is computed in chunks: the logits of one of them come next."""
        rows, head, hidden = attached_rows(self._model), _head(self._model), output[0]
        weight = None if head is None else head.weight
        assert rows is not None, "see watching"
        assert isinstance(weight, torch.Tensor), "see attach_loss"
        self._look(min(rows, hidden[..., 0].numel()) * weight.shape[0] * weight.element_size())
        self._seen = None

    def _look(self, coming: int = 0) -> None:
        """Compare what is resident, and what comes next, with what there may be.

        Without knowing better, the next step is taken to be as large as the largest so far.
        """
        resident = resident_bytes()
        if self._seen is not None:
            self._rise = max(self._rise, resident - self._seen)
        self._most = max(self._most, resident)
        coming = max(coming, self._rise)
        self._seen = self._require_room(coming, f"the next part of this pass may take {format_bytes(coming)}")


def guards(device: torch.device) -> bool:
    """Whether passes on this device can be guarded: Linux kills, others move memory to disk."""
    return device.type == "cpu" and sys.platform == "linux"


def bytes_left() -> int | None:
    """What control groups and the machine leave to this process; None where neither says."""
    limits = read_limits()
    left = [_machine_left()]
    if limits.memory_limit_bytes is not None and limits.memory_used_bytes is not None:
        left.append(limits.memory_limit_bytes - limits.memory_used_bytes)
    return min((one for one in left if one is not None), default=None)


def _machine_left() -> int | None:
    """``MemAvailable`` and free swap of /proc/meminfo, proc(5)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    return found["MemAvailable"] + found.get("SwapFree", 0) if "MemAvailable" in found else None


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if layer._compiled_call_impl is None]  # hooks would have them compiled again


def _head(model: torch.nn.Module) -> torch.nn.Module | None:
    """What makes the logits, if it is a plain weight times what the layers give."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return head if isinstance(head, torch.nn.Module) and hasattr(head, "weight") else None
