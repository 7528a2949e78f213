"""unsloth on its CPU backend: as its notebooks have it, or without checkpointing and with rows of like length together.

LoRA on bf16 weights in both: ``load_in_4bit`` would train another model than the other sides do.
"""

from __future__ import annotations

from common import Conversation, gate, in_order, read_job, read_rows, trainer_settings

TALK, JOB = Conversation(), read_job()

from unsloth import FastLanguageModel  # noqa: E402  isort: skip  it changes the others when it is imported
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
torch.set_num_threads(JOB["threads"])
best = JOB["mode"] == "best"
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=JOB["model"], max_seq_length=JOB["longest"], dtype=None, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(
    model,
    r=JOB["rank"],
    lora_alpha=JOB["alpha"],
    lora_dropout=0,
    bias="none",
    target_modules=TARGETS,
    use_gradient_checkpointing=False if best else "unsloth",
    random_state=JOB["seed"],
)
settings = trainer_settings(JOB, JOB["pass_rows"] if best else min(2, JOB["most_rows"]))
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(read_rows(JOB)),
    args=SFTConfig(**settings, optim="adamw_torch_fused", max_length=None),
    callbacks=[gate(JOB, TALK, "torch", "transformers", "peft", "accelerate", "trl", "unsloth", "unsloth_zoo")],
)
in_order(trainer, balanced=best)
trainer.train()
