"""The moment of a forward and backward pass when most is alive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from llmtune.models import ModelSpec
from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.layers import LAYERS, layer_costs
from llmtune.planning.memory.paths import arithmetic_of, logit_tensors, mask_width, paths_of
from llmtune.planning.memory.traced import traced_costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Bytes that a pass holds at one time beside what stands the whole time.

    Attributes:
        activations: Kept for the backward pass, and the micro-batch itself.
        copies: Weights, or an adapter, in the type that is computed in.
        masks: The dense mask, and its copies kept for the backward pass.
        logits: Tensors as wide as the vocabulary: a chunk's logits; or log-probabilities, their gradient and that of
            the logits of all positions in fp32.
        workspace: What is freed again soon.
        gradients: Of weights.
    """

    activations: float
    copies: float
    masks: float
    logits: float
    workspace: float
    gradients: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.activations + self.copies + self.masks + self.logits + self.workspace + self.gradients


class PassSimulation:
    """A forward and backward pass of the largest micro-batch, layer by layer.

    Args:
        spec: The model.
        footprint: How it is trained.
        trained: Parameters that are trained.
        on_cpu: Whether it runs on a CPU.

    Attributes:
        logits: Bytes of each tensor as wide as the vocabulary that the loss holds at once.
        adapter_copies: Bytes of the adapter in the precision that it is computed in; they stay from the first pass on.
    """

    def __init__(self, spec: ModelSpec, footprint: Footprint, *, trained: int, on_cpu: bool) -> None:
        every, full = footprint.checkpoint_every, footprint.method == "full"
        shape, tokens = spec.shape, footprint.tokens
        arithmetic, self._paths = arithmetic_of(footprint), paths_of(spec, footprint, on_cpu=on_cpu)
        self._footprint, self._full, self._on_cpu, self._tied = footprint, full, on_cpu, shape.tied_head
        self._embedding = 4.0 * shape.vocabulary * shape.hidden
        self._all_gradients = 4.0 * trained
        self._gradients_before = self._all_gradients if footprint.accumulates else 0.0
        if spec.activations is None and spec.architecture in LAYERS:
            first, other, self._head = layer_costs(spec, footprint, on_cpu=on_cpu)
        else:
            other, self._head = traced_costs(spec, footprint, on_cpu=on_cpu)
            first = other
        self._layers = [
            (other if number else first, every > 0 and number % every == 0) for number in range(shape.layers)
        ]
        self.logits = logit_tensors(spec, footprint, on_cpu=on_cpu)
        narrow = self._paths.adapters and arithmetic.product < 4
        self.adapter_copies = float(arithmetic.product * trained) if narrow else 0.0
        in_layers = sum(m.in_features * m.out_features * m.count for m in spec.linears) if full else trained
        self._copy = arithmetic.product * in_layers / shape.layers if arithmetic.autocast else 0.0
        # Ids, mask and labels; cos and sin, shared by all rows and layers.
        width = mask_width(footprint)
        self._inputs = 24.0 * tokens + 2 * width * shape.head_dim * arithmetic.stream
        self._mask = float(tokens * width) if self._paths.masked else 0.0  # one byte each, shared by all layers
        self._mask_copy = self._mask * arithmetic.product

    @cached_property
    def moments(self) -> list[Moment]:
        """Every moment that may be the fullest, in order."""
        return [*self._forward(), *self._loss(), *self._backward()]

    def peak(self) -> Moment:
        """The fullest moment."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def passed(self) -> float:
        """Bytes that all layers together would hold, were none run again."""
        return sum(max(cost.again, cost.backward) for cost, _ in self._layers)

    @property
    def embedding_gradients(self) -> float:
        """Gradients of embedding and head."""
        return self._embedding * (1 if self._tied else 2) if self._full else 0.0

    def evaluation(self) -> float:
        """Bytes of a forward pass of as many tokens that keeps nothing."""
        copies = self._copy * len(self._layers) + (self._embedding / 2 if self._full and self._copy else 0)
        copies += self.adapter_copies
        return self._inputs + self._mask + copies + max(self._head.plain, *(cost.plain for cost, _ in self._layers))

    def _kept(self, number: int) -> float:
        """Bytes that a layer keeps between its forward and its backward pass."""
        cost, again = self._layers[number]
        if not again:
            return cost.saved
        return cost.held + (0.0 if self._footprint.offload and not self._on_cpu else cost.start)

    def _moment(
        self, kept: float, opened: int, inside: float, *, logits: float = 0, gradients: float, mask: bool = True
    ) -> Moment:
        """When ``opened`` layers hold their activations, part of ``kept``, and ``inside`` bytes are alive beside."""
        shared = self._mask if mask else 0.0
        copies, masks = opened * self._copy, opened * self._mask_copy
        return Moment(
            activations=self._inputs + kept - copies - masks,
            copies=copies + self.adapter_copies,
            masks=shared + masks,
            logits=logits,
            workspace=inside - logits,
            gradients=gradients,
        )

    def _forward(self) -> Iterator[Moment]:
        kept, opened, cached = 0.0, 0, 0.0
        first, first_again = self._layers[0]
        embedded = 0.0 if first.saves_start or first_again else first.start  # a variable holds it to the end
        for number, (cost, again) in enumerate(self._layers):
            if again:  # autocast holds its copies to the end of the forward pass, though nothing is kept
                inside = cost.plain - cost.held + cached
                kept += cost.held
                cached += self._copy
            else:
                inside = cost.forward - cost.saved + cached
                opened, kept = opened + 1, kept + cost.saved
            inside += embedded if number else 0.0
            yield self._moment(kept, opened, inside, gradients=self._gradients_before)
            if again:
                kept += self._kept(number) - cost.held

    def _loss(self) -> Iterator[Moment]:
        """The end of the forward pass, and the beginning of the backward pass."""
        kept = sum(self._kept(number) for number in range(len(self._layers)))
        opened = sum(not again for _, again in self._layers)
        cost, logits, before = self._head, sum(self.logits), self._gradients_before
        recomputes = opened < len(self._layers)
        if self._paths.loss:
            cached = self._copy * (len(self._layers) - opened)
            # What the last layer gave is gone once it is normed.
            gone = 0.0 if cost.saves_start else cost.start
            inside = cost.forward - cost.saved - gone + cached
            yield self._moment(kept + cost.saved, opened, inside, logits=logits, gradients=before)
            logits = 0.0
        of_head = max(0.0, cost.saved - self.logits[0]) if logits else cost.saved
        inside = cost.backward - of_head
        yield self._moment(kept + of_head, opened, inside, logits=logits, gradients=before, mask=recomputes)

    def _backward(self) -> Iterator[Moment]:
        numbers = range(len(self._layers))
        kept = sum(self._kept(number) for number in numbers)
        opened = sum(not again for _, again in self._layers)
        recomputes = opened < len(self._layers)
        # A trained head's is made with the loss; it waits for that of an embedding that is tied to it.
        of_head = self._embedding if self._full and (self._tied or not self._footprint.accumulates) else 0.0
        waiting = of_head if self._footprint.accumulates else 0.0
        gradients = self._gradients_before + of_head
        for number in reversed(numbers):
            cost, again = self._layers[number]
            if again:
                kept, opened = kept - self._kept(number) + cost.saved, opened + 1
                # What it starts from is alive too; in fp32 it is one of the tensors kept.
                beside = cost.held + (0.0 if cost.saves_start else cost.start)
                inside = max(cost.again + cost.held, cost.backward + beside) - cost.saved
            else:
                inside = cost.backward - cost.saved
            yield self._moment(kept, opened, inside, gradients=gradients, mask=recomputes)
            kept, opened = kept - cost.saved, opened - 1
            gradients += cost.gradients
        if self._full:
            # The embedding's gradient is made in one piece, and added to that of a tied head.
            again_there = self._footprint.accumulates or self._tied
            inside = self._layers[0][0].start + (self._embedding if again_there else 0.0) + waiting
            yield self._moment(0.0, 0, inside, gradients=self._all_gradients, mask=False)
