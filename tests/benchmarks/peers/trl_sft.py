"""TRL's ``SFTTrainer``: as it comes, or with the best of its documented flags on a CPU.

As it comes: the model by its name, adapters by ``peft_config``, every flag at its default. Only ``max_length`` is
switched off, which would cut rows at 1,024 tokens.

Best: weights in bf16, no activation checkpointing, rows of like length together within each update and passes of about
1,024 tokens. ``padding_free`` and ``packing`` are left out: their documentation supports them on FlashAttention only,
which has no CPU kernel.
"""

from __future__ import annotations

from common import Conversation, gate, in_order, read_job, read_rows, trainer_settings

TALK, JOB = Conversation(), read_job()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

torch.set_num_threads(JOB["threads"])
best = JOB["mode"] == "best"
settings = trainer_settings(JOB, JOB["pass_rows"] if best else min(JOB["batch"], JOB["most_rows"])) | {
    "max_length": None
}
if best:
    settings |= {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": "bfloat16"}}
trainer = SFTTrainer(
    model=JOB["model"],
    args=SFTConfig(**settings),
    train_dataset=Dataset.from_list(read_rows(JOB)),
    peft_config=LoraConfig(
        r=JOB["rank"], lora_alpha=JOB["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    callbacks=[gate(JOB, TALK, "torch", "transformers", "peft", "accelerate", "trl")],
)
in_order(trainer, balanced=best)
trainer.train()
