"""soup-cli's trainer for ``soup train`` with task ``sft``, on rows that are tokenised already."""

from __future__ import annotations

import os

from common import Conversation, gate, in_order, read_job, read_rows

TALK, JOB = Conversation(), read_job()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from soup_cli.config.schema import SoupConfig  # noqa: E402
from soup_cli.trainer.sft import SFTTrainerWrapper  # noqa: E402

ROWS = min(4, JOB["most_rows"])
torch.set_num_threads(JOB["threads"])
os.chdir(JOB["work"])  # it takes paths below the working directory only
Dataset.from_list(read_rows(JOB)).save_to_disk("tokenized")
config = SoupConfig.model_validate(
    {
        "base": JOB["model"],
        "task": "sft",
        "output": "output",
        "data": {
            "train": "tokenized",
            "format": "pre_tokenized",
            "tokenized_path": "tokenized",
            "max_length": JOB["longest"],
        },
        "training": {
            "epochs": 1,
            "lr": JOB["learning_rate"],
            "batch_size": ROWS,
            "gradient_accumulation_steps": JOB["batch"] // ROWS,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "logging_steps": 1,
            "save_steps": 10**6,
            "optimizer": "adamw_torch_fused",
            "quantization": "none",
            "lora": {
                "r": JOB["rank"],
                "alpha": JOB["alpha"],
                "dropout": 0.0,
                "target_modules": "all-linear",
            },
        },
    }
)
wrapper = SFTTrainerWrapper(config, device="cpu")
wrapper.setup({"train": []})
trainer = wrapper.trainer
in_order(trainer, balanced=False)
trainer.add_callback(gate(JOB, TALK, "torch", "transformers", "peft", "accelerate", "trl", "soup-cli"))
wrapper.train()
