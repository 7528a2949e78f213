"""LLaMA-Factory as its LoRA examples have it, on rows that are tokenised already (``tokenized_path``)."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

from common import Conversation, gate, read_job, read_rows, trainer_settings

TALK, JOB = Conversation(), read_job()

# Imported by it for sound, of which there is none here. The wheel on PyPI needs the torch with CUDA.
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

import torch  # noqa: E402
from datasets import Dataset, DatasetDict  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

torch.set_num_threads(JOB["threads"])
rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in read_rows(JOB)]
tokenized = Path(JOB["work"]) / "tokenized"
DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tokenized)
settings = trainer_settings(JOB, 1) | {
    "model_name_or_path": JOB["model"],
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": JOB["rank"],
    "lora_alpha": JOB["alpha"],
    "lora_dropout": 0.0,
    "lora_target": "all",
    "dataset": "tokenized",
    "tokenized_path": str(tokenized),
    "template": "empty",
    "cutoff_len": JOB["longest"],
    "bf16": True,
    "disable_shuffling": True,
    "overwrite_output_dir": True,
}
run_exp(settings, callbacks=[gate(JOB, TALK, "torch", "transformers", "peft", "accelerate", "llamafactory")])
