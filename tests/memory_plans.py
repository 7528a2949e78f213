"""Plans for tests of the memory prediction: footprints with changes, catalogued models of other shapes."""

from __future__ import annotations

from dataclasses import replace

from llmtune.models import ModelLocation, ModelSpec, spec_from_entry
from llmtune.planning.memory import Footprint, MemoryEstimate, predict_memory
from llmtune.presets import find_entry
from llmtune.units import GIB

GPU = {"device": "cuda:0", "total_bytes": 24 * GIB, "free_bytes": 24 * GIB}
CPU = GPU | {"device": "cpu"}
ARCHITECTURES = {
    "LlamaForCausalLM": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "MistralForCausalLM": "mistralai/Mistral-7B-v0.1",
    "Qwen2ForCausalLM": "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen3ForCausalLM": "Qwen/Qwen3-1.7B",
    "PhiForCausalLM": "microsoft/phi-2",
    "Phi3ForCausalLM": "microsoft/Phi-3.5-mini-instruct",
}


METHODS = (
    {"method": "lora"},
    {"method": "lora", "precision": "fp32", "dropout": 0.1},
    {"method": "lora", "precision": "fp16", "checkpoint_every": 2},
    {"method": "qlora", "dropout": 0.05},
    {"method": "qlora", "quantization": "int8", "checkpoint_every": 1},
    {"method": "full", "precision": "fp32", "accumulates": False},
    {"method": "full", "checkpoint_every": 1, "offload": True},
    {"method": "full", "precision": "fp16", "optimizer": "adafactor"},
)


def footprint(**changes) -> Footprint:
    """A footprint of everyday values, with changes."""
    base = {
        "method": "lora",
        "quantization": None,
        "precision": "bf16",
        "rank": 8,
        "targets": ("all-linear",),
        "dropout": 0.0,
        "tokens": 1024,
        "width": 256,
        "packed": False,
        "checkpoint_every": 0,
        "offload": False,
        "optimizer": "adamw_torch_fused",
        "sharding": None,
        "processes": 1,
        "accumulates": True,
    }
    if changes.get("method") == "qlora":
        base["quantization"] = "nf4"
    return Footprint(**(base | changes))


def catalogued(architecture: str, **shape) -> ModelSpec:
    """A catalogued model of this architecture with another shape."""
    entry = find_entry(ARCHITECTURES[architecture])
    changed = replace(entry.shape, **shape)
    return spec_from_entry(replace(entry, shape=changed, parameters=changed.matrix_parameters))


def predicted(spec: ModelSpec, where=GPU, correction: float = 1.0, **changes) -> MemoryEstimate:
    """The prediction for ``footprint(**changes)``."""
    return predict_memory(spec, footprint(**changes), **where, correction=correction)


def spelled(part) -> str:
    """The id of a parameter: a name, or what is set."""
    return part if isinstance(part, str) else "-".join(map(str, part.values())) or "lora"


SEVEN_B = spec_from_entry(find_entry("mistralai/Mistral-7B-v0.1"))


def location_of(config) -> ModelLocation:
    """A model of this configuration, for ``read_spec``."""
    return ModelLocation(
        id="tests/model",
        source="tests/model",
        revision=None,
        token=None,
        trust_remote_code=False,
        offline=True,
        config=config,
    )
