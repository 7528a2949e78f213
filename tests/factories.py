"""Tiny models of the supported architectures, built from their configurations and saved as ``save_pretrained`` does.

The tokenizer is the embedded model's (byte-level BPE). Architectures whose models come without a chat template get
none, so that the family's default applies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("llama", "phi", "phi3", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")
WITHOUT_SDPA = ("gemma2",)  # attention scores are bounded, which torch's kernels do not do
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# A family is also told by its name, so the directories are named as the models are.
DIRECTORY_NAMES = {
    "llama": "TinyLlama-test",
    "phi": "phi-2-test",
    "phi3": "Phi-3-mini-test",
    "mistral": "Mistral-7B-test",
    "qwen2": "Qwen2.5-test",
    "qwen3": "Qwen3-test",
    "smollm3": "SmolLM3-test",
    "gemma2": "gemma-2-test",
    "gemma3_text": "gemma-3-test",
}
PRESETS = {
    "llama": "tinyllama",
    "phi": "phi",
    "phi3": "phi",
    "mistral": "mistral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "smollm3": "llama",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
}
WITHOUT_TEMPLATE = ("phi", "mistral", "smollm3", "gemma2")
WIDE_HEADS = ("qwen3", "gemma2", "gemma3_text")  # wider than hidden / heads
TIED = ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")  # their small models share embedding and head


def family_config(family: str, **changes: Any) -> Any:
    """The Hugging Face configuration of the tiny model of ``family``, with ``changes`` to its keys."""
    from transformers import AutoConfig

    keys: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "vocab_size": 3072,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "phi" else 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": family in TIED,
    }
    if family in WIDE_HEADS:
        keys["head_dim"] = 16
    if family == "smollm3":
        keys["no_rope_layer_interval"] = 2  # SmolLM3 rotates three layers of four
    if family in ("gemma2", "gemma3_text"):
        kinds = ("sliding_attention", "full_attention")
        layers = changes.get("num_hidden_layers", keys["num_hidden_layers"])
        keys |= {"query_pre_attn_scalar": 16, "layer_types": [kinds[number % 2] for number in range(layers)]}
    return AutoConfig.for_model(family, **(keys | changes))


def tiny_tokenizer(chat_template: bool = True) -> Any:
    """The embedded model's tokenizer, with or without its chat template."""
    from transformers import AutoTokenizer

    from llmtune.builtin import tiny_path

    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    if not chat_template:
        tokenizer.chat_template = None
    return tokenizer


def save_family_model(family: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Build the tiny model of ``family`` with random fp32 weights and save it with its tokenizer in ``directory``."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(family_config(family, **changes))
    model.save_pretrained(directory)
    tiny_tokenizer(chat_template=family not in WITHOUT_TEMPLATE).save_pretrained(directory)
    return directory
