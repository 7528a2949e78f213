"""Memory that runs out where a test says so, and a ledger of what was learned in spite of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

from llmtune.kernels.head import attached_rows


@contextmanager
def changed_models(*changes: Callable[[Any], None]) -> Iterator[None]:
    """A block in which every model that is loaded for training is handed to ``changes`` first."""
    from llmtune import models

    real = models.load_for_training

    def load(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        for change in changes:
            change(model)
        return model

    models.load_for_training = load
    try:
        yield
    finally:
        models.load_for_training = real


class RunsOut(TrainerCallback):
    """Memory runs out in the backward pass of the middle layer: the layers above it have their gradients already.

    Args:
        once_at_step: Once in this update, counted from 1, and in no other.
        after_passes: So many passes of that update are let through.
        above_rows: Whenever a pass has more rows; packed rows are told by their positions.
        above_tokens: Whenever a pass has more padded tokens.
        unless_recomputed: Not where activations are recomputed.
        unless_chunked: Not where the logits of so few rows, or fewer, are there at once.
        in_evaluation: In the forward pass of evaluations, and in no other.
        error: What is raised.
    """

    def __init__(
        self,
        *,
        once_at_step: int | None = None,
        after_passes: int = 0,
        above_rows: int | None = None,
        above_tokens: int | None = None,
        unless_recomputed: bool = False,
        unless_chunked: int = 0,
        in_evaluation: bool = False,
        error: Exception | None = None,
    ) -> None:
        self.once_at_step, self.after_passes = once_at_step, after_passes
        self.above_rows, self.above_tokens = above_rows, above_tokens
        self.unless_recomputed, self.in_evaluation = unless_recomputed, in_evaluation
        self.unless_chunked = unless_chunked
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.raised = self.passes = 0
        self._step = self._passes_of_step = self._rows = self._tokens = 0

    def __call__(self, model: Any) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.register_forward_pre_hook(self._look, with_kwargs=True)
        self._inner = inner
        self._layer = inner.model.layers[len(inner.model.layers) // 2]
        self._layer.register_forward_hook(self._forward)
        self._layer.register_full_backward_hook(self._backward)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step, self._passes_of_step = state.global_step + 1, 0

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        packed = "position_ids" in kwargs and "labels" in kwargs  # generation gives positions too
        self._tokens = ids.numel()
        self._rows = len(rows_of(kwargs)) if packed else len(ids)

    def _forward(self, module: Any, args: Any, output: Any) -> None:
        if self.in_evaluation and not module.training:
            self._judge()

    def _backward(self, module: Any, grad_input: Any, grad_output: Any) -> None:
        self.passes += 1
        self._passes_of_step += 1
        if not self.in_evaluation:
            self._judge()

    def _judge(self) -> None:
        if self.unless_recomputed and self._layer.gradient_checkpointing:
            return
        if (attached_rows(self._inner) or math.inf) <= self.unless_chunked:
            return
        here = self._step == self.once_at_step and self.raised == 0 and self._passes_of_step > self.after_passes
        many = self.above_rows is not None and self._rows > self.above_rows
        large = self.above_tokens is not None and self._tokens > self.above_tokens
        if here or many or large:
            self.raised += 1
            raise type(self.error)(*self.error.args)  # one that holds frames of no earlier pass


class Ledger(TrainerCallback):
    """Which rows each update has learned from, its gradient before the optimizer, and the weights it began with.

    Passes of an attempt that was given up are struck out: an attempt begins where no weight has a gradient.
    """

    def __init__(self) -> None:
        self.updates: list[list[tuple[int, ...]]] = []
        self.gradients: list[torch.Tensor | None] = []
        self.weights: list[torch.Tensor] = []
        self._trained: list[Any] = []

    def __call__(self, model: Any) -> None:
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.register_forward_pre_hook(self._look, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updates.append([])
        self.weights.append(torch.cat([weight.detach().flatten().clone() for weight in self._trained]))

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.training and self.updates:
            if all(weight.grad is None for weight in self._trained):
                self.updates[-1].clear()
            self.updates[-1] += rows_of(kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [weight.grad.flatten().clone() for weight in self._trained if weight.grad is not None]
        self.gradients.append(torch.cat(gradients) if gradients else None)


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The token ids of each row of a micro-batch; without padding, so that it does not matter beside which ones."""
    ids = batch["input_ids"]
    if "position_ids" not in batch:  # padded: the last token of a row is learned
        lasts = [int((labels != -100).nonzero().max()) for labels in batch["labels"]]
        return [tuple(row[: last + 1].tolist()) for row, last in zip(ids, lasts, strict=True)]
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    rows = [ids[0, start:end] for start, end in pairwise(starts)]
    learned = [batch["labels"][0, start:end] for start, end in pairwise(starts)]
    # What fills a sequence up is a block of its own in which nothing is learned.
    return [tuple(row.tolist()) for row, labels in zip(rows, learned, strict=True) if bool((labels != -100).any())]
