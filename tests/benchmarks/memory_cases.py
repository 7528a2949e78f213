"""A case of the memory benchmarks: a model of some shape with random weights, rows of one width, and settings."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "architecture": "llama",
    "hidden": 512,
    "layers": 8,
    "heads": 8,
    "kv_heads": None,  # as many as heads
    "head_dim": None,  # hidden / heads
    "mlp": None,  # 8/3 of hidden, up to a multiple of 64
    "vocabulary": 32000,
    "tied": False,
    "saved_dtype": "bf16",  # of the weights on disk
    "method": "lora",
    "quantization": None,  # nf4 under qlora
    "precision": "bf16",
    "rank": 16,
    "targets": None,  # the family's
    "dropout": 0.0,
    "checkpoint_every": 0,
    "offload": False,
    "optimizer": "adamw_torch_fused",
    "rows": 4,
    "width": 256,
    "passes": 1,  # forward passes per update
    "mixed": False,  # every second row is shorter, by any number of tokens
    "packed": False,
    "evaluate": False,
    "updates": 3,
    "threads": None,  # all
}
# A model's family is told by the name of its directory.
NAMES = {"llama": "TinyLlama", "phi": "phi-2", "phi3": "Phi-3-mini", "mistral": "Mistral-7B", "qwen2": "Qwen2.5"}
SHAPE = tuple("architecture hidden layers heads kv_heads head_dim mlp vocabulary tied saved_dtype".split())
CONTEXT = 8192


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """The case with defaults filled in."""
    if unknown := set(case) - set(DEFAULTS) - {"name"}:
        raise SystemExit(f"unknown keys: {', '.join(sorted(unknown))}; known: {', '.join(DEFAULTS)}")
    case = DEFAULTS | case
    case["kv_heads"] = case["kv_heads"] or case["heads"]
    case["mlp"] = case["mlp"] or -(-case["hidden"] * 8 // 3 // 64) * 64
    if case["method"] == "qlora":
        case["quantization"] = case["quantization"] or "nf4"
    return case


def model_directory(case: dict[str, Any], root: Path) -> Path:
    """Where the model of this shape lies or will lie."""
    case = complete(case)
    shape = "-".join(str(case[key]) for key in SHAPE)
    return root / "models" / f"{NAMES.get(case['architecture'], case['architecture'])}-{shape}"


def data_path(case: dict[str, Any], root: Path, what: str) -> Path:
    """The rows of a case: ``train`` or ``eval``."""
    case = complete(case)
    kind = "mixed" if case["mixed"] else "even"
    return root / "data" / f"{what}-{kind}-{case['rows'] * case['passes']}x{case['width']}x{case['updates']}.jsonl"


def settings_of(case: dict[str, Any], root: Path, output: Path) -> dict[str, Any]:
    """What the user of llmtune would set for this case; nothing that decides memory is left to the plan."""
    case = complete(case)
    settings: dict[str, Any] = {
        "model.id": str(model_directory(case, root)),
        "data.path": str(data_path(case, root, "train")),
        "data.format": "text",
        "data.supervise": "text",
        "data.eval_fraction": 0.0,
        "train.method": case["method"],
        "train.precision": case["precision"],
        "train.max_steps": case["updates"],
        "train.global_batch_size": case["rows"] * case["passes"],
        "train.micro_batch_size": case["rows"],
        "train.packing": case["packed"],
        "train.activation_checkpointing": case["checkpoint_every"] > 0,
        "train.optimizer": case["optimizer"],
        "train.learning_rate": 1e-4,
        "train.device": "cpu",
        "train.threads": case["threads"] or len(os.sched_getaffinity(0)),
        "evaluate.num_samples": 0,
        "evaluate.every_steps": case["updates"],
        "save.every_steps": case["updates"],
        "monitor.report": False,
        "recover.resume": "never",
        "output.dir": str(output),
        "output.root": str(output.parent),
    }
    if case["packed"]:
        settings["train.token_budget"] = case["rows"] * case["width"]
    if case["checkpoint_every"]:
        settings |= {"train.checkpoint_every": case["checkpoint_every"], "train.activation_offload": case["offload"]}
    if case["evaluate"]:
        settings["data.eval_path"] = str(data_path(case, root, "eval"))
    if case["method"] != "full":
        settings |= {"adapter.rank": case["rank"], "adapter.alpha": case["rank"], "adapter.dropout": case["dropout"]}
        if case["targets"]:
            settings["adapter.targets"] = case["targets"]
    if case["quantization"]:
        settings["adapter.quantization"] = case["quantization"]
    return settings


def build(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """Save a model with random weights and write the rows, unless both are there; returns nothing to tell."""
    case = complete(case)
    directory = model_directory(case, root)
    if not (directory / "config.json").exists():
        _build_model(case, directory)
    for what in ("train", "eval"):
        path = data_path(case, root, what)
        if not path.exists():
            rows = case["rows"] * case["passes"] * (case["updates"] if what == "train" else 1)
            rng, width = random.Random(what), case["width"]
            shorter = [rng.randint(16, width) if case["mixed"] and row % 2 else width for row in range(rows)]
            write_rows(path, shorter, rng)
    return {}


def _build_model(case: dict[str, Any], directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llmtune.builtin import tiny_path

    kind = case["architecture"]
    keys: dict[str, Any] = {
        "vocab_size": case["vocabulary"],
        "hidden_size": case["hidden"],
        "intermediate_size": case["mlp"],
        "num_hidden_layers": case["layers"],
        "num_attention_heads": case["heads"],
        "num_key_value_heads": case["kv_heads"],
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": case["tied"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if case["head_dim"]:
        keys["head_dim"] = case["head_dim"]
    if kind == "gpt2":
        keys |= {"n_inner": case["mlp"], "n_positions": CONTEXT}
        del keys["intermediate_size"], keys["num_key_value_heads"]
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case["saved_dtype"]]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys)).to(dtype)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(directory)


def write_rows(path: Path, lengths: Iterable[int], rng: random.Random) -> None:
    """Rows of random words: of exactly these numbers of tokens, the end token included."""
    from tokenizers import Tokenizer

    from llmtune.builtin import tiny_path

    tokenizer = Tokenizer.from_file(str(tiny_path() / "tokenizer.json"))
    decoded = (tokenizer.decode([number]) for number in range(tokenizer.get_vocab_size()))
    words = [word for word in decoded if word.startswith(" ") and word[1:].isalpha() and word.isascii()]
    words = [word for word in words if len(tokenizer.encode(word, add_special_tokens=False).ids) == 1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for length in lengths:
            text = "".join(rng.choices(words, k=length - 1))
            assert len(tokenizer.encode(text, add_special_tokens=False).ids) == length - 1
            file.write(json.dumps({"text": text}) + "\n")
