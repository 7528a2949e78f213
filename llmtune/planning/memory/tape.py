"""Forward and backward pass on paper: which bytes are allocated, kept for the backward pass, and freed.

A ``Tape`` is told the operations of one piece of a model (a decoder layer, the head) and answers how many bytes the
piece keeps between its forward and its backward pass, and how high memory rises in each. It follows what torch's
autograd does: nodes run in the reverse order of their creation; a node's saved tensors and its incoming gradient are
freed when it has run; gradients that meet are added in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class Storage:
    """Memory of one tensor and its views; ``viewed`` when what is handed on is a view of it."""

    __slots__ = ("num_bytes", "references", "viewed")

    def __init__(self, num_bytes: float, *, viewed: bool = False) -> None:
        self.num_bytes, self.references, self.viewed = num_bytes, 0, viewed


class Value:
    """A tensor: number of values, bytes of each, whether a gradient flows to it, and the memory that it lies in."""

    __slots__ = ("gradient", "item", "num_bytes", "size", "storage")

    def __init__(self, size: float, item: int, *, gradient: bool, storage: Storage | None = None) -> None:
        self.size, self.item, self.gradient = size, item, gradient
        self.num_bytes = size * item
        self.storage = Storage(self.num_bytes) if storage is None else storage


@dataclass(slots=True)
class _Node:
    out: Value
    inputs: Sequence[Value]
    saved: Sequence[Value]
    holds: Sequence[Value]
    alias: bool
    in_place: bool
    folded: bool
    late: bool
    forward_work: float
    backward_work: float
    weight_gradient: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Bytes of one piece of a model.

    Attributes:
        saved: Kept between forward and backward pass.
        start: What the piece starts from.
        plain: Most bytes during a forward pass that keeps nothing, what it starts from included.
        forward: Most bytes during the forward pass, what it starts from and ``saved`` included.
        again: Most bytes when the forward pass is run once more in the middle of the backward pass, the gradients that
            are there by then included.
        backward: Most bytes during the backward pass, ``saved`` included.
        held: What autograd cannot drop when the piece is to be run again.
        saves_start: Whether what it starts from is one of the tensors saved.
        gradients: Of weights, left by the backward pass when there were none before.
    """

    saved: float
    start: float
    plain: float
    forward: float
    again: float
    backward: float
    held: float
    saves_start: bool
    gradients: float


class Tape:
    """The operations of one piece, in order.

    Args:
        accumulates: Gradients of weights are there already, and new ones are added to them.
    """

    def __init__(self, *, accumulates: bool) -> None:
        self._nodes: list[_Node] = []
        self._accumulates = accumulates

    def add(
        self,
        inputs: Sequence[Value],
        size: float,
        item: int,
        *,
        saved: Sequence[Value] = (),
        saves_output: bool = False,
        view: bool = False,
        holds: Sequence[Value] = (),
        alias: bool = False,
        in_place: bool = False,
        folded: bool = False,
        late: bool = False,
        trains: bool = False,
        forward_work: float = 0,
        backward_work: float = 0,
        weight_gradient: float = 0,
    ) -> Value:
        """Add an operation and return what it gives.

        Args:
            inputs: What its gradient flows to.
            size: Values of its output.
            item: Bytes of each.
            saved: What its backward pass needs.
            saves_output: Whether its backward pass needs the output too.
            view: The output lies in the memory of the first input.
            holds: What the caller's variables keep alive until it is done.
            folded: It works on rows of a matrix, so that the gradient of its input is a view.
            alias: Gradients of inputs of the output's type are the gradient of the output, not copies.
            late: What is saved is an attribute of the node, not one of autograd's saved tensors: it is freed after the
                gradients have been handed on, and kept when the piece is to be run again.
            in_place: It writes into its first input, whose gradient is that of the output.
            trains: It has a weight that is trained.
            forward_work: Bytes needed during its forward pass alone.
            backward_work: Bytes needed during its backward pass alone.
            weight_gradient: Bytes of the gradient of its weight.
        """
        out = Value(
            size,
            item,
            gradient=trains or any(value.gradient for value in inputs),
            storage=inputs[0].storage if view or in_place else None,
        )
        kept: Sequence[Value] = ()
        if out.gradient:
            kept = [*saved, out] if saves_output else saved
        self._nodes.append(
            _Node(out, inputs, kept, holds, alias, in_place, folded, late, forward_work, backward_work, weight_gradient)
        )
        return out

    def cost(self, start: Value, end: Value) -> Cost:
        """Run it: from ``start``, which exists, and back from the gradient of ``end``."""
        saved = {value.storage for node in self._nodes for value in node.saved}
        backward = _Backward(self._nodes, saved, accumulates=self._accumulates)
        backward.run(end)
        held = {value.storage for node in self._nodes if node.late for value in node.saved}
        stop = max((number for number, node in enumerate(self._nodes) if node.saved), default=0)
        forward, again = self._forward(start, end, saved, stop)
        plain, _ = self._forward(start, end, held, stop)
        return Cost(
            saved=sum(storage.num_bytes for storage in saved),
            start=start.num_bytes,
            plain=plain,
            forward=forward,
            again=again + backward.pending,
            backward=backward.peak,
            held=sum(storage.num_bytes for storage in held),
            saves_start=start.storage in saved,
            gradients=backward.gradients,
        )

    def _forward(self, start: Value, end: Value, saved: set[Storage], stop: int) -> tuple[float, float]:
        """Most bytes when ``saved`` is kept; and before operation ``stop``, where running it once more ends."""
        last: dict[Storage, int] = {}
        for number, node in enumerate(self._nodes):
            for value in (node.out, *node.inputs, *node.holds):
                last[value.storage] = number
        for storage in (*saved, start.storage, end.storage):
            last[storage] = len(self._nodes)
        live = peak = until = start.num_bytes
        known = {start.storage}
        for number, node in enumerate(self._nodes):
            if number == stop:
                until = peak
            for value in (node.out, *node.saved):
                storage = value.storage
                if storage not in known and (storage in saved or value is node.out):
                    known.add(storage)
                    live += storage.num_bytes
            peak = max(peak, live + node.forward_work)
            for value in (node.out, *node.inputs, *node.holds):
                if last[value.storage] == number:
                    last[value.storage] = -1  # freed once, though it may be used twice here
                    live -= value.storage.num_bytes
        return peak, until


class _Backward:
    """Gradients by the tensor that they belong to, and what is live."""

    def __init__(self, nodes: Sequence[_Node], saved: set[Storage], *, accumulates: bool) -> None:
        self._nodes, self._accumulates = nodes, accumulates
        self._live = self.peak = self._saved = sum(storage.num_bytes for storage in saved)
        self.pending = -1.0
        self.gradients = 0.0
        self._of: dict[Value, Storage] = {}
        self._uses = dict.fromkeys(saved, 0)
        for node in nodes:
            for storage in {value.storage for value in node.saved}:
                self._uses[storage] += 1

    def run(self, end: Value) -> None:
        """All nodes, last to first."""
        self._give(end, self._allocate(end.num_bytes))
        for node in reversed(self._nodes):
            if node.out in self._of:
                self._step(node)

    def _step(self, node: _Node) -> None:
        if self.pending < 0 and node.saved:
            self.pending = self._live - self._saved
        incoming = self._of.pop(node.out)
        given = [(value, self._gradient(node, value, incoming)) for value in node.inputs if value.gradient]
        self.peak = max(self.peak, self._live + node.backward_work + node.weight_gradient)
        self._release(incoming)
        if not node.late:
            self._release_saved(node)
        if node.weight_gradient and not self._accumulates:
            self.gradients += node.weight_gradient
            self._live += node.weight_gradient
        for value, storage in given:
            self._give(value, storage)
        if node.late:
            self._release_saved(node)

    def _gradient(self, node: _Node, value: Value, incoming: Storage) -> Storage:
        if (node.alias and value.item == node.out.item) or (node.in_place and value is node.inputs[0]):
            incoming.references += 1
            return incoming
        return self._allocate(value.num_bytes, viewed=node.folded)

    def _allocate(self, num_bytes: float, *, viewed: bool = False) -> Storage:
        storage = Storage(num_bytes, viewed=viewed)
        storage.references = 1
        self._live += num_bytes
        self.peak = max(self.peak, self._live)
        return storage

    def _give(self, value: Value, storage: Storage) -> None:
        """Add a gradient to what ``value`` has: in place, unless the old one is needed elsewhere, or a view."""
        old = self._of.get(value)
        if old is None:
            self._of[value] = storage
            return
        if old.references > 1 or old.viewed:
            self._of[value] = self._allocate(value.num_bytes)
            self._release(old)
        self._release(storage)

    def _release(self, storage: Storage) -> None:
        storage.references -= 1
        if storage.references == 0:
            self._live -= storage.num_bytes

    def _release_saved(self, node: _Node) -> None:
        for storage in {value.storage for value in node.saved}:
            self._uses[storage] -= 1
            if self._uses[storage] == 0:
                self._live -= storage.num_bytes
