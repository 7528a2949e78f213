"""What a model is, without its weights: shape, exact parameter count and the linear modules an adapter can sit on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.errors import ModelError
from llmtune.models.activations import TracedActivations
from llmtune.presets import CatalogueEntry, ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmtune.models.locate import ModelLocation

# Architectures whose layers ``llmtune.planning.memory`` has written down, and the activation function they have then.
WRITTEN_DOWN = {
    "LlamaForCausalLM": "silu",
    "MistralForCausalLM": "silu",
    "Qwen2ForCausalLM": "silu",
    "Qwen3ForCausalLM": "silu",
    "PhiForCausalLM": "gelu_new",
    "Phi3ForCausalLM": "silu",
    "SmolLM3ForCausalLM": "silu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearModule:
    """All linear modules of one name inside the decoder layers: ``name``, in and out width, how many there are."""

    name: str
    in_features: int
    out_features: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A causal language model as the planner sees it.

    Attributes:
        parameters: Exact count where the configuration was read, the catalogue's count otherwise.
        context: Longest sequence in tokens that the position embedding covers.
        linears: Linear modules inside the decoder layers, the head excluded.
        known_from: ``config`` (read from the model) or ``catalogue`` (nothing was downloaded).
        residual_dropout: Whether the model drops a part of what its attention and MLP give.
        stored_item: Bytes of a weight on disk.
        window: Tokens that attention looks back over, itself included; None for all, or where it is not known.
        activations: What one of its layers keeps and needs, where that is not written down for its architecture.
    """

    id: str
    family: str
    model_type: str
    architecture: str
    shape: ModelShape
    parameters: int
    context: int
    linears: tuple[LinearModule, ...]
    known_from: str
    residual_dropout: bool = False
    stored_item: int = 2
    window: int | None = None
    activations: TracedActivations | None = None

    @property
    def block_parameters(self) -> int:
        """Weights of the linear modules inside the decoder layers (``N_b`` of the formulas)."""
        return sum(m.in_features * m.out_features * m.count for m in self.linears)

    @property
    def head_parameters(self) -> int:
        """``vocabulary × hidden`` (``N_h`` of the formulas), whether or not it is tied to the embedding."""
        return self.shape.vocabulary * self.shape.hidden

    def targeted(self, targets: tuple[str, ...]) -> tuple[LinearModule, ...]:
        """The linear modules that an adapter with these targets sits on; ``all-linear`` means all.

        A target may be a path's end, such as ``self_attn.q_proj``; its last part counts.
        """
        if "all-linear" in targets:
            return self.linears
        names = {target.rpartition(".")[2] for target in targets}
        return tuple(module for module in self.linears if module.name in names)

    def adapter_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Trainable parameters of a LoRA adapter: ``rank × (in + out)`` per targeted module."""
        return sum(rank * (m.in_features + m.out_features) * m.count for m in self.targeted(targets))


def read_spec(location: ModelLocation, family: str) -> ModelSpec:
    """Build the model on the meta device (no memory, no download) and read off shape and exact counts.

    Raises:
        ModelError: No model can be built from the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = location.config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=location.trust_remote_code)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError, ImportError) as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"model '{location.id}': no model can be built from its config.json: {text}") from error
    head = model.get_output_embeddings()
    counts: Counter[tuple[str, int, int]] = Counter()
    for path, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            counts[path.rsplit(".", 1)[-1], module.in_features, module.out_features] += 1
        elif isinstance(module, Conv1D):  # GPT-2's transposed linear
            counts[path.rsplit(".", 1)[-1], module.weight.shape[0], module.weight.shape[1]] += 1
    linears = tuple(LinearModule(name=n, in_features=i, out_features=o, count=c) for (n, i, o), c in counts.items())
    return ModelSpec(
        id=location.id,
        family=family,
        model_type=config.model_type,
        architecture=type(model).__name__,
        shape=_shape_of(config, linears, tied=bool(getattr(config, "tie_word_embeddings", False))),
        parameters=sum(p.numel() for p in model.parameters()),
        context=context_of(config),
        linears=linears,
        known_from="config",
        residual_dropout=(getattr(config.get_text_config(), "resid_pdrop", None) or 0.0) > 0,
        stored_item=4 if str(config.dtype).endswith("float32") else 2,
        window=getattr(config.get_text_config(), "sliding_window", None),
        activations=None if has_closed_form(config, type(model).__name__) else _traced(model),
    )


def has_closed_form(config: Any, architecture: str) -> bool:
    """Whether the planner knows by heart what a layer of this model does, operation by operation."""
    text = config.get_text_config()
    return (
        architecture in WRITTEN_DOWN
        and WRITTEN_DOWN[architecture] == getattr(text, "hidden_act", None)
        and not getattr(text, "attention_dropout", 0.0)
        and not getattr(text, "qk_layernorm", False)
    )


# Configuration -> what was traced: it takes seconds, and a spec is read several times in a run.
_TRACED: dict[str, TracedActivations | None] = {}


def _traced(model: PreTrainedModel) -> TracedActivations | None:
    from llmtune.models.trace import trace_activations

    key = f"{type(model).__name__} {model.config.to_json_string(use_diff=False)}"
    if key not in _TRACED:
        _TRACED[key] = trace_activations(model)
    return _TRACED[key]


def context_of(config: Any) -> int:
    """Longest sequence of a Hugging Face configuration, in tokens."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048  # no position limit is recorded (ALiBi and state-space models); a safe training length


def _shape_of(config: Any, linears: tuple[LinearModule, ...], *, tied: bool) -> ModelShape:
    text = config.get_text_config()
    hidden, heads = text.hidden_size, getattr(text, "num_attention_heads", None) or 1
    names = {module.name for module in linears}
    return ModelShape(
        hidden=hidden,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        mlp_width=getattr(text, "intermediate_size", None) or 4 * hidden,
        vocabulary=text.vocab_size,
        gated_mlp=bool(names & {"gate_proj", "gate_up_proj"}),
        tied_head=tied,
    )


def spec_from_entry(entry: CatalogueEntry) -> ModelSpec:
    """The spec of a catalogued model, without reading anything of it."""
    return ModelSpec(
        id=entry.id,
        family=entry.family,
        model_type=entry.model_type,
        architecture=entry.architecture,
        shape=entry.shape,
        parameters=entry.parameters,
        context=entry.context,
        linears=tuple(
            LinearModule(name=name, in_features=width, out_features=out, count=entry.shape.layers)
            for name, width, out in _linears_of(entry.architecture, entry.shape)
        ),
        known_from="catalogue",
        # Phi-2 has 0.1, Phi-1.5 none: the catalogue does not say, so the larger.
        residual_dropout=entry.architecture == "PhiForCausalLM",
    )


def _linears_of(architecture: str, s: ModelShape) -> list[tuple[str, int, int]]:
    """Name, in and out width of the linear modules of one decoder layer, as transformers names them."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    if architecture == "Phi3ForCausalLM":  # query, key and value in one matrix, gate and up in another
        return [
            ("qkv_proj", s.hidden, q + 2 * kv),
            ("o_proj", q, s.hidden),
            ("gate_up_proj", s.hidden, 2 * s.mlp_width),
            ("down_proj", s.mlp_width, s.hidden),
        ]
    attention = [("q_proj", s.hidden, q), ("k_proj", s.hidden, kv), ("v_proj", s.hidden, kv)]
    if architecture == "PhiForCausalLM":
        return [*attention, ("dense", q, s.hidden), ("fc1", s.hidden, s.mlp_width), ("fc2", s.mlp_width, s.hidden)]
    mlp = [("up_proj", s.hidden, s.mlp_width), ("down_proj", s.mlp_width, s.hidden)]
    if s.gated_mlp:
        mlp.append(("gate_proj", s.hidden, s.mlp_width))
    return [*attention, ("o_proj", q, s.hidden), *mlp]
