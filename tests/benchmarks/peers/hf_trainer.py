"""A plain ``transformers.Trainer`` on a peft model: with ``bf16=True``, or in fp32 as the reference of losses."""

from __future__ import annotations

from common import Conversation, gate, in_order, read_job, read_rows, trainer_settings

TALK, JOB = Conversation(), read_job()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

torch.set_num_threads(JOB["threads"])
fp32 = JOB["mode"] == "fp32"
recomputed = fp32 and JOB["longest"] > 2048  # the same numbers in less memory: one such row takes more than 24 GiB
lora = LoraConfig(
    r=JOB["rank"], lora_alpha=JOB["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
)
base = AutoModelForCausalLM.from_pretrained(JOB["model"], **({"dtype": torch.float32} if fp32 else {}))
model = get_peft_model(base, lora)
tokenizer = AutoTokenizer.from_pretrained(JOB["model"])
rows = 1 if fp32 else min(JOB["batch"], JOB["most_rows"])
trainer = Trainer(
    model=model,
    args=TrainingArguments(bf16=not fp32, gradient_checkpointing=recomputed, **trainer_settings(JOB, rows)),
    train_dataset=Dataset.from_list(read_rows(JOB)),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[gate(JOB, TALK, "torch", "transformers", "peft", "accelerate")],
)
in_order(trainer, balanced=False)
trainer.train()
