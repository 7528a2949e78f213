"""Costs of layers that are not written down: as traced when the configuration was read, or from widths alone."""

from __future__ import annotations

from llmtune.models import LinearModule, ModelSpec
from llmtune.models.activations import Stage
from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.layers import Pass, arithmetic_of
from llmtune.planning.memory.tape import Cost, Value


def traced_costs(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> tuple[Cost, Cost]:
    """One decoder layer with its adapters, and everything outside the layers."""
    kind = _kind(footprint)
    if spec.activations is None or kind not in spec.activations.layer:
        layer, outside = (_cost(spec, footprint, stage) for stage in _guessed(spec, footprint))
    else:
        layer = _cost(spec, footprint, spec.activations.layer[kind])
        outside = _cost(spec, footprint, spec.activations.outside[kind])
    extra, work = _adapters(spec, footprint, on_cpu=on_cpu)
    with_adapters = Cost(
        saved=layer.saved + extra,
        start=layer.start,
        plain=layer.plain + work,
        forward=layer.forward + extra + work,
        again=layer.again + extra + work,
        backward=layer.backward + extra + work,
        held=0,
        saves_start=layer.saves_start,
        gradients=_layer_gradients(spec, footprint),
    )
    return with_adapters, outside


def _kind(footprint: Footprint) -> str:
    arithmetic = arithmetic_of(footprint)
    if footprint.method == "full":
        return "autocast" if arithmetic.autocast else "trained"
    return "half" if arithmetic.stream == 2 else "single"


def _cost(spec: ModelSpec, footprint: Footprint, stage: Stage) -> Cost:
    tokens, pairs = footprint.tokens, footprint.tokens * footprint.width
    start = tokens * spec.shape.hidden * arithmetic_of(footprint).stream
    saved = max(0.0, stage.saved * tokens + stage.saved_pair * pairs + stage.saved_fixed)
    forward = max(saved, stage.forward * tokens + stage.forward_pair * pairs + stage.forward_fixed)
    # Gradients of weights that are there already are added to, one at a time; new ones stay.
    largest = 4.0 * max((module.in_features * module.out_features for module in spec.linears), default=0)
    weights = stage.backward_fixed if not footprint.accumulates else min(stage.backward_fixed, largest)
    backward = max(0.0, stage.backward * tokens + stage.backward_pair * pairs + weights)
    return Cost(
        saved=saved,
        start=start,
        plain=start + max(forward - saved, 0.0) + 2 * start,
        forward=start + forward,
        again=3 * start + forward,
        backward=saved + start + backward,
        held=0,
        saves_start=False,
        gradients=0,
    )


def _layer_gradients(spec: ModelSpec, footprint: Footprint) -> float:
    if footprint.accumulates:
        return 0.0
    full = footprint.method == "full"
    trained = spec.block_parameters if full else spec.adapter_parameters(footprint.rank, footprint.targets)
    return 4.0 * trained / max(spec.shape.layers, 1)


def _adapters(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> tuple[float, float]:
    """Bytes that the adapters of a layer keep, and the most that one of them needs while it runs."""
    if footprint.method == "full":
        return 0.0, 0.0
    item = arithmetic_of(footprint).stream
    inputs = {entry.module: entry for entry in spec.activations.inputs} if spec.activations else {}
    kept, work, counted = 0.0, 0.0, set[int]()
    for module in spec.targeted(footprint.targets):
        bare, adapted = (_linear(spec, footprint, module, on_cpu=on_cpu, adapted=on) for on in (False, True))
        per_layer = max(1, round(module.count / max(spec.shape.layers, 1)))
        extra, entry = adapted.saved - bare.saved, inputs.get(module.name)
        if item == 4 and not footprint.dropout and entry is not None:
            # The input is kept as it is, once for all modules that read it.
            if entry.saved or entry.tensor in counted:
                extra -= 4.0 * footprint.tokens * module.in_features
            counted.add(entry.tensor)
        kept += per_layer * extra
        work = max(
            work, adapted.backward - adapted.saved - (bare.backward - bare.saved), adapted.forward - adapted.saved
        )
    return kept, work


def _linear(spec: ModelSpec, footprint: Footprint, module: LinearModule, *, on_cpu: bool, adapted: bool) -> Cost:
    alone = Pass(spec, footprint, on_cpu=on_cpu)
    start = Value(footprint.tokens * module.in_features, arithmetic_of(footprint).stream, gradient=True)
    return alone.tape.cost(start, alone.apply(module, start, adapted=adapted))


def _guessed(spec: ModelSpec, footprint: Footprint) -> tuple[Stage, Stage]:
    """A layer that could not even be traced keeps inputs and outputs of its linear modules. An estimate."""
    arithmetic, shape = arithmetic_of(footprint), spec.shape
    widths = sum((m.in_features + m.out_features) * m.count for m in spec.linears) / max(shape.layers, 1)
    layer = _stage(
        saved=arithmetic.product * widths + 8.0 * shape.hidden + 4.0 * shape.heads,
        pair=float(arithmetic.attention),
        work=4.0 * max([shape.hidden, *(max(m.in_features, m.out_features) for m in spec.linears)]),
    )
    logits = 4.0 * shape.vocabulary
    return layer, _stage(saved=logits + 8.0 * shape.hidden, pair=0.0, work=2 * logits)


def _stage(*, saved: float, pair: float, work: float) -> Stage:
    return Stage(
        saved=saved,
        saved_pair=pair,
        saved_fixed=0,
        forward=saved + work,
        forward_pair=pair,
        forward_fixed=0,
        backward=2 * work,
        backward_pair=0,
        backward_fixed=0,
    )
