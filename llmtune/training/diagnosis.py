"""Where numbers stop being finite: each row of an update alone, forward and backward, with every layer watched.

Costs about one update, and only when an update was dropped. Weights, buffers and random states stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llmtune.data import EncodedDataset, collate
from llmtune.training.probe import untouched


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one row does to the model.

    Attributes:
        row: Its number in the training data.
        layer: The first module whose output, or past which the gradient, is not finite; None if it is the loss alone.
        where: ``forward`` or ``backward``.
    """

    row: int
    layer: str | None
    where: str


def diagnose(
    model: torch.nn.Module,
    data: EncodedDataset,
    rows: Sequence[int],
    *,
    pad_token_id: int,
    device: torch.device,
) -> list[Finding]:
    """Those of ``rows`` that alone give a loss or a gradient that is not finite.

    Args:
        model: As it trains, but not spread over ranks.
        data: The training data.
        rows: Numbers of rows in it.
        pad_token_id: See `collate`.
        device: Where the model is.
    """
    found = []
    with untouched(model), torch.compiler.set_stance("force_eager"):  # compiled layers do not call hooks put on later
        for row in rows:
            batch = {name: tensor.to(device) for name, tensor in collate([data[row]], pad_token_id).items()}
            finding = _look(model, batch, row)
            if finding is not None:
                found.append(finding)
            for parameter in model.parameters():
                parameter.grad = None
    return found


def gradient_layer(model: torch.nn.Module) -> str | None:
    """Of the trained modules with a gradient that is not finite, the last one: the backward pass meets it first."""
    broken = [
        name for name, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    return broken[-1].rpartition(".")[0] if broken else None


class _Watch:
    """Notes which outputs are not finite, in the order of the forward pass, and gradients in that of the backward."""

    def __init__(self) -> None:
        self.forward: str | None = None
        self.backward: list[tuple[str, bool]] = []

    @contextmanager
    def on(self, model: torch.nn.Module) -> Iterator[None]:
        """Watch every module inside this block."""
        handles = [
            module.register_forward_hook(partial(self._after, name)) for name, module in model.named_modules() if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if self.forward is None and not bool(torch.isfinite(tensor).all()):
                self.forward = name
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, name))  # type: ignore[no-untyped-call]

    def _gradient(self, name: str, gradient: torch.Tensor) -> None:
        self.backward.append((name, bool(torch.isfinite(gradient).all())))

    def layer_of_gradient(self) -> str | None:
        """The module the gradient was last finite behind: it is lost inside it; None where it never is."""
        before: str | None = None
        for name, finite in self.backward:
            if not finite:
                return before or name
            before = name
        return None


def _look(model: torch.nn.Module, batch: dict[str, torch.Tensor], row: int) -> Finding | None:
    watch = _Watch()
    with watch.on(model):
        loss = model(**batch, num_items_in_batch=1).loss
        if not bool(torch.isfinite(loss)):
            return Finding(row=row, layer=watch.forward, where="forward")
        loss.backward()
    if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters()):
        return None
    return Finding(row=row, layer=watch.layer_of_gradient() or gradient_layer(model), where="backward")


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)
