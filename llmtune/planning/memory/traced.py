"""Costs of layers that are not written down: as traced when the configuration was read, or from widths alone."""

from __future__ import annotations

from dataclasses import replace

from llmtune.models import LinearModule, ModelSpec
from llmtune.models.activations import Stage
from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.layers import Pass
from llmtune.planning.memory.paths import arithmetic_of, backward_blocks_bytes, mask_width, paths_of
from llmtune.planning.memory.tape import Cost, Value

# What a dense mask adds to a layer that was traced without one.
MASKED = ("saved_pair", "forward_pair")
# Bytes per value that ``kernels.layers`` keeps less than transformers: an fp32 copy of what is narrower, and what was
# normed where the weight is trained.
NORM_KEEPS_LESS = {"half": 2, "single": 0, "trained": 4, "autocast": 4}


def traced_costs(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> tuple[Cost, Cost]:
    """One decoder layer with its adapters, and everything outside the layers."""
    kind, paths = _kind(footprint), paths_of(spec, footprint, on_cpu=on_cpu)
    traced = spec.activations
    if traced is not None and kind in traced.layer:
        stage, around, has_loss = traced.layer[kind], traced.outside[kind], not traced.plain_loss
    else:
        stage, around, has_loss = *_guessed(spec, footprint), False
    if paths.masked and not stage.saved_pair:  # what is traced has none
        stage = replace(stage, **{name: float(arithmetic_of(footprint).product) for name in MASKED})
    blocks = (
        backward_blocks_bytes(spec, footprint, arithmetic_of(footprint).product) if paths.backward_in_blocks else 0.0
    )
    layer = _cost(spec, footprint, stage, blocks=blocks, norms=paths.norms)
    outside = _cost(spec, footprint, around, norms=paths.norms)
    if not has_loss:
        outside = _with_loss(spec, footprint, outside, on_cpu=on_cpu)
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


def _with_loss(spec: ModelSpec, footprint: Footprint, outside: Cost, *, on_cpu: bool) -> Cost:
    """Head and loss behind what was traced, which ends with the hidden states."""
    end = Pass(spec, footprint, on_cpu=on_cpu)
    states = end.start(gradient=True)
    loss = end.tape.cost(states, end.loss(states))
    return replace(
        outside,
        saved=outside.saved + loss.saved,
        plain=max(outside.plain, loss.plain),
        forward=max(outside.forward, outside.start + outside.saved + loss.forward),
        backward=max(outside.backward, outside.saved + loss.backward),
        gradients=loss.gradients,
    )


def _kind(footprint: Footprint) -> str:
    arithmetic = arithmetic_of(footprint)
    if footprint.method == "full":
        return "autocast" if arithmetic.autocast else "trained"
    return "half" if arithmetic.stream == 2 else "single"


def _cost(spec: ModelSpec, footprint: Footprint, stage: Stage, *, blocks: float = 0.0, norms: bool) -> Cost:
    tokens, pairs = footprint.tokens, footprint.tokens * mask_width(footprint)
    start = tokens * spec.shape.hidden * arithmetic_of(footprint).stream
    # Traced with transformers' norms, which keep more than ours.
    less = NORM_KEEPS_LESS[_kind(footprint)] * stage.normed * tokens if norms else 0.0
    saved = max(0.0, stage.saved * tokens + stage.saved_pair * pairs + stage.saved_fixed - less)
    forward = max(saved, stage.forward * tokens + stage.forward_pair * pairs + stage.forward_fixed - less)
    # Gradients of weights that are there already are added to, one at a time; new ones stay.
    largest = 4.0 * max((module.in_features * module.out_features for module in spec.linears), default=0)
    weights = stage.backward_fixed if not footprint.accumulates else min(stage.backward_fixed, largest)
    attention = stage.attention * tokens + stage.attention_pair * pairs + stage.attention_fixed
    backward = max(0.0, stage.backward * tokens + stage.backward_pair * pairs + weights, attention + blocks)
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
    # The input is kept as it is, once for all modules that read it: by our kernel always.
    shares = paths_of(spec, footprint, on_cpu=on_cpu).adapters or (item == 4 and not footprint.dropout)
    inputs = {entry.module: entry for entry in spec.activations.inputs} if spec.activations else {}
    kept, work, counted = 0.0, 0.0, set[int]()
    for module in spec.targeted(footprint.targets):
        bare, adapted = (_linear(spec, footprint, module, on_cpu=on_cpu, adapted=on) for on in (False, True))
        per_layer = max(1, round(module.count / max(spec.shape.layers, 1)))
        extra, entry = adapted.saved - bare.saved, inputs.get(module.name)
        if shares and entry is not None:
            if entry.saved or entry.tensor in counted:
                extra -= item * footprint.tokens * module.in_features
            counted.add(entry.tensor)
        kept += per_layer * extra
        work = max(
            work,
            adapted.backward - adapted.saved - (bare.backward - bare.saved),
            adapted.forward - adapted.saved - (bare.forward - bare.saved),
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
        work=4.0 * max([shape.hidden, *(max(m.in_features, m.out_features) for m in spec.linears)]),
    )
    return layer, _stage(saved=8.0 * shape.hidden, work=4.0 * shape.hidden)


def _stage(*, saved: float, work: float) -> Stage:
    return Stage(
        saved=saved,
        saved_pair=0,
        saved_fixed=0,
        forward=saved + work,
        forward_pair=0,
        forward_fixed=0,
        backward=2 * work,
        backward_pair=0,
        backward_fixed=0,
        attention=0,
        attention_pair=0,
        attention_fixed=0,
        normed=0,
    )
